"""`blobflow copy`, killed without warning, and run again on another machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import Freight
from tests.crash.machines import KIB, LocalPlace, Machine, Place, kill_when

KEY, COPY = "orders/today", "archive/today"

Machines = Callable[..., Machine]


@pytest.fixture
def origin(tmp_path: Path) -> LocalPlace:
    """Another store, which has the artifact."""
    return LocalPlace(tmp_path / "origin")


@pytest.mark.parametrize(
    "where",
    ["local", pytest.param("moto", marks=pytest.mark.slow), pytest.param("rgw", marks=pytest.mark.rgw)],
    indirect=True,
)
def test_a_killed_copy_is_finished_by_another_machine(
    origin: LocalPlace, place: Place, cargo: Freight, machine: Machines, tmp_path: Path
):
    """The second machine sends only what the target lacks, and what arrives is what was there.

    It fetches no more than that either, where the store tells the checksums of parts, as these two S3 servers do not.
    """
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "2")
    machine("--store", origin.url).run("push", cargo.source, KEY)
    moment = cargo.parts // 3
    command = ("copy", origin.url, KEY, place.url, COPY)
    first = machine(*options).start(*command)
    assert kill_when(lambda: len(place.parts(COPY)) >= moment, first), "it was too quick to be killed"
    assert place.size(COPY) is None
    held = sum(size for size in place.parts(COPY).values() if size == cargo.chunk_size)

    document = machine(*options).run(*command)

    assert (document["status"], document["server_side"]) == ("copied", False)
    assert document["bytes_resumed"] + document["bytes_sent"] == document["bytes_total"]
    # A part that was in flight when its sender died may still have been acknowledged after we looked.
    assert 0 < held <= document["bytes_resumed"] <= held + 2 * cargo.chunk_size
    assert document["bytes_received"] <= document["bytes_sent" if isinstance(place, LocalPlace) else "bytes_total"]
    assert place.read(COPY) == origin.read(KEY)
    assert place.read(COPY + ".manifest.json") == origin.read(KEY + ".manifest.json")
    assert place.leftovers() == []
    machine().run("pull", COPY, tmp_path / "landed")
    assert cargo.is_whole(tmp_path / "landed" / "data")


@pytest.mark.parametrize("where", ["local"], indirect=True)
@pytest.mark.parametrize(
    "moment", ["payload", *(pytest.param(each, marks=pytest.mark.slow) for each in ("intent", "manifest"))]
)
def test_a_server_side_copy_may_die_between_any_two_steps(
    moment: str, place: LocalPlace, machine: Machines, freight: Callable[[int, int], Freight], tmp_path: Path
):
    """Within one store: whatever it had come to, the next copy ends with the whole artifact and leaves nothing."""
    cargo = freight(64 * KIB, 320)
    machine().run("push", cargo.source, KEY)
    reached: dict[str, Callable[[], bool]] = {
        "intent": lambda: place.size(COPY + ".upload.json") is not None,
        "payload": lambda: place.size(COPY) is not None,
        "manifest": lambda: place.size(COPY + ".manifest.json") is not None,
    }
    command = ("copy", place.url, KEY, place.url, COPY)
    kill_when(reached[moment], machine().start(*command))
    assert machine().run(*command)["status"] in ("copied", "unchanged")
    assert place.leftovers() == []
    machine().run("pull", COPY, tmp_path / "landed")
    assert cargo.is_whole(tmp_path / "landed" / "data")
