"""`blobflow push`, killed without warning at a random moment, and run again on another machine."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.crash.conftest import Freight
from tests.crash.machines import LocalPlace, Machine, Place, kill_when

KEY = "orders/today"

Machines = Callable[..., Machine]


class Watcher:
    """Looks at the place again and again: a manifest may be there only while its payload is, whole."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.looks = 0
        self.payload_sizes: set[int | None] = set()
        """Of the payload, at all the moments when the manifest was there."""

    def look(self) -> None:
        self.looks += 1
        if self._place.size(KEY + ".manifest.json") is not None:
            self.payload_sizes.add(self._place.size(KEY))


def assert_arrived(place: Place, cargo: Freight, document: dict[str, Any], unpacked: Path) -> None:
    """The payload is the source, and the manifest beside it is the one inside."""
    payload = place.read(KEY)
    assert len(payload) == document["bytes_total"]
    with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
        embedded = tar.extractfile("MANIFEST.json")
        assert embedded is not None
        assert embedded.read() == place.read(KEY + ".manifest.json")
    unpacked.mkdir()
    subprocess.run(["tar", "xf", "-", "-C", unpacked], input=payload, check=True)
    assert cargo.is_whole(unpacked / "data")


@pytest.mark.seed("1.2", "0.11", "W1.4")
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_push_is_finished_by_another_machine(
    seed: int, place: Place, cargo: Freight, machine: Machines, tmp_path: Path
):
    """The second machine sends only what is missing, says so truthfully, and no manifest comes before its payload."""
    moment = random.Random(seed).randint(1, cargo.parts // 2)
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "2")
    first, second = machine(*options), machine(*options)
    watcher = Watcher(place)
    push = first.start("push", cargo.source, KEY)
    assert kill_when(lambda: len(place.parts(KEY)) >= moment, push, watcher.look), "it was too quick to be killed"
    assert place.size(KEY) is None
    held = sum(size for size in place.parts(KEY).values() if size == cargo.chunk_size)

    document = second.run("push", cargo.source, KEY, watch=watcher.look)

    assert document["status"] == "uploaded"
    assert document["bytes_resumed"] + document["bytes_sent"] == document["bytes_total"]
    # A part that was in flight when its sender died may still have been acknowledged after we looked.
    assert 0 < held <= document["bytes_resumed"] <= held + 2 * cargo.chunk_size
    assert_arrived(place, cargo, document, tmp_path / "unpacked")
    assert place.leftovers() == []
    watcher.look()
    assert watcher.payload_sizes == {document["bytes_total"]}
    assert watcher.looks > 2
    assert first.scratch != [] == second.scratch


@pytest.mark.parametrize("where", ["local"], indirect=True)
@pytest.mark.parametrize("moment", ["scratch", "intent", "all parts", "payload", "manifest"])
def test_a_push_may_die_between_any_two_steps(
    moment: str, place: LocalPlace, cargo: Freight, machine: Machines, tmp_path: Path
):
    """Wherever the first push dies, the second one ends with the whole artifact and correct figures."""
    options = ("--chunk-size", str(cargo.chunk_size))
    first = machine(*options)
    reached: dict[str, Callable[[], bool]] = {
        "scratch": lambda: first.scratch != [],
        "intent": lambda: place.size(KEY + ".upload.json") is not None,
        "all parts": lambda: len(place.parts(KEY)) >= cargo.parts,
        "payload": lambda: place.size(KEY) is not None,
        "manifest": lambda: place.size(KEY + ".manifest.json") is not None,
    }
    watcher = Watcher(place)
    kill_when(reached[moment], first.start("push", cargo.source, KEY), watcher.look)

    document = machine(*options).run("push", cargo.source, KEY, watch=watcher.look)

    watcher.look()
    assert watcher.payload_sizes == {document["bytes_total"]}
    assert_arrived(place, cargo, document, tmp_path / "unpacked")
    if document["status"] == "unchanged":
        assert (document["bytes_sent"], document["bytes_resumed"]) == (0, 0)
        # A push that dies between its manifest and its end leaves its note; an unchanged push does not look for one.
        assert place.leftovers() in ([], ["today.upload.json"])
    else:
        assert document["bytes_resumed"] + document["bytes_sent"] == document["bytes_total"]
        assert place.leftovers() == []


@pytest.mark.parametrize("where", ["local"], indirect=True)
def test_scratch_of_a_killed_push_is_swept_by_the_next_one(place: LocalPlace, cargo: Freight, machine: Machines):
    """On the same machine the next push removes what the killed one left; the source is not touched."""
    same = machine("--chunk-size", str(cargo.chunk_size))
    assert kill_when(lambda: bool(place.parts(KEY)), same.start("push", cargo.source, KEY))
    assert len(same.scratch) == 1
    before = {path: path.stat().st_mtime_ns for path in cargo.source.rglob("*")}
    same.run("push", cargo.source, KEY)
    assert same.scratch == []
    assert {path: path.stat().st_mtime_ns for path in cargo.source.rglob("*")} == before


@pytest.mark.parametrize("where", ["local"], indirect=True)
def test_a_source_that_changed_after_the_kill_is_sent_as_it_is_now(
    place: LocalPlace, machine: Machines, freight: Callable[[int, int], Freight], tmp_path: Path
):
    """Parts of the old content are never mixed with those of the new."""
    old = freight(64 * 1024, 320)
    options = ("--chunk-size", str(old.chunk_size))
    source = tmp_path / "source"
    shutil.copytree(old.source, source)
    assert kill_when(lambda: len(place.parts(KEY)) > 20, machine(*options).start("push", source, KEY))
    with open(source / "nested" / "big.bin", "r+b") as file:
        file.write(b"changed")
    document = machine(*options).run("push", source, KEY)
    assert (document["bytes_sent"], document["bytes_resumed"]) == (document["bytes_total"], 0)
    assert_arrived(place, Freight(source, old.chunk_size, old.parts), document, tmp_path / "unpacked")
    assert place.leftovers() == []
