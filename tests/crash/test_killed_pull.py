"""`blobflow pull`, killed without warning, and run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import Freight
from tests.crash.machines import INTERVAL, KIB, Machine, committed, kill_when


@pytest.mark.seed("0.11", "1.16")
def test_a_killed_pull_fetches_only_what_is_missing(
    freight: Callable[[int, int], Freight], machine: Callable[..., Machine], tmp_path: Path
):
    """Nothing is at the destination until all of it is; the second run keeps every part the journal vouches for."""
    cargo = freight(64 * KIB, 320)
    machine().run("push", cargo.source, "k")
    dest = tmp_path / "landing" / "here"
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "2")
    pull = machine(*options).start("pull", "k", dest)
    assert kill_when(lambda: committed(dest.parent) >= 2 * INTERVAL, pull), "it was too quick to be killed"
    assert not dest.exists()
    kept = committed(dest.parent)

    document = machine(*options).run("pull", "k", dest)

    assert document["status"] == "downloaded"
    assert (kept - 1) * cargo.chunk_size < document["bytes_resumed"] <= kept * cargo.chunk_size  # the last is shorter
    assert document["bytes_received"] + document["bytes_resumed"] == document["bytes_total"]
    assert cargo.is_whole(dest / "data")
    assert [path.name for path in dest.parent.iterdir()] == ["here"]


@pytest.mark.parametrize("where", ["local"], indirect=True)
def test_a_killed_import_goes_on_and_the_old_tree_stays_until_then(
    freight: Callable[[int, int], Freight], machine: Callable[..., Machine], tmp_path: Path
):
    """While a pull into a mirror is unfinished, `current` shows the tree of before."""
    small, cargo = freight(64 * KIB, 4), freight(64 * KIB, 320)
    options = ("--chunk-size", str(cargo.chunk_size))
    first, mirror = machine(*options), tmp_path / "mirror"
    for key, each in (("old", small), ("new", cargo)):
        first.run("push", each.source, key)
    into = ("--import", "directory", mirror)
    first.run("pull", "old", *into)
    assert kill_when(lambda: committed(mirror / ".incoming") >= INTERVAL, first.start("pull", "new", *into))
    assert small.is_whole(mirror / "current")
    document = machine(*options).run("pull", "new", *into)
    assert document["bytes_resumed"] >= INTERVAL * cargo.chunk_size
    assert cargo.is_whole(mirror / "current")
    assert list((mirror / ".incoming").iterdir()) == []
