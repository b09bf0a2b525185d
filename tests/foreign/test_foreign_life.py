"""Servers that nobody here wrote: push, pull, a kill in the middle of either, and refs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blobflow import ChunkProfile, download, export_artifact, open_store, upload
from blobflow.coordination.refs import name_artifact, read_ref
from blobflow.stores import Store
from blobflow.testing import Tree, read_tree, write_tree
from blobflow.transport import list_artifacts
from tests.crash.machines import MIB, Machine, committed, kill_when
from tests.foreign.servers import RESUMES_UPLOADS, ForeignServer, Place
from tests.kit import noise

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

PART = 5 * MIB
"""The smallest that S3 takes."""

PROFILE = ChunkProfile.custom(PART, 1, workers=4)

TREE: Tree = {
    "big.bin": noise(3 * PART, 1),
    "dir": {"rest.bin": noise(PART + 12_345, 2), "empty": {}},
    "ünï #?%;.txt": "text\n",
}

Machines = Callable[..., Machine]


@pytest.fixture
def machine(tmp_path: Path, place: Place) -> Machines:
    """Makes machines that use the place, each with a home and temporary files of its own."""
    count = 0

    def make() -> Machine:
        nonlocal count
        count += 1
        return Machine(tmp_path / f"machine-{count}", place, "--chunk-size", str(PART), "--workers", "4")

    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that is sent."""
    path = tmp_path_factory.mktemp("source") / "tree"
    write_tree(path, TREE)
    return path


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    """The place, from within this process."""
    with closing(open_store(place.url, **place.options)) as store:
        yield store


def assert_pulled(store: Store, key: str, target: Path) -> None:
    """What is under the key is the whole tree."""
    download(store, key, target, profile=PROFILE)
    assert read_tree(target / "data") == TREE


def test_what_was_pushed_is_pulled_and_a_ref_moves_twice(source: Path, store: Store, tmp_path: Path):
    """The pulled tree is the pushed one, a second push sends nothing, and a ref points to where it was moved last."""
    artifact = export_artifact(source, tmp_path / "artifact").artifact
    assert upload(store, "orders/first", artifact, profile=PROFILE).status == "uploaded"
    assert upload(store, "orders/first", artifact, profile=PROFILE).status == "unchanged"
    write_tree(tmp_path / "small", {"other.txt": b"another"})
    other = export_artifact(tmp_path / "small", tmp_path / "other").artifact
    upload(store, "orders/second", other, profile=PROFILE)
    assert [entry.key for entry in list_artifacts(store)] == ["orders/first", "orders/second"]

    for key, digest in (("orders/first", artifact.digest), ("orders/second", other.digest)) * 2:
        name_artifact(store, "orders/latest", key, digest)
        found = read_ref(store, "orders/latest")
        assert found is not None
        assert (found.key, found.manifest_sha256) == (key, digest)
    assert_pulled(store, "orders/first", tmp_path / "landed")


def test_a_killed_push_is_finished_by_another_machine(
    source: Path, server: ForeignServer, store: Store, machine: Machines, tmp_path: Path
):
    """Nothing is visible before; the next push ends whole, and continues where the server tells what it has."""
    before = _bytes_below(server)

    def in_the_middle() -> bool:
        if server.relay is not None:
            return server.relay.holds
        return _bytes_below(server) - before > 2 * PART

    if server.relay is not None:
        # The first parts have arrived; what comes next is held back until the sender is dead.
        server.relay.hold_after(3 * PART + PART // 2)
    try:
        first = machine()
        assert kill_when(in_the_middle, first.start("push", source, "orders/today")), "it was too quick to be killed"
    finally:
        if server.relay is not None:
            server.relay.hold_after(None)
    assert list(list_artifacts(store)) == []

    document = machine().run("push", source, "orders/today")

    assert document["status"] == "uploaded"
    assert document["bytes_resumed"] + document["bytes_sent"] == document["bytes_total"]
    if server.kind in RESUMES_UPLOADS:
        assert document["bytes_resumed"] >= PART
    assert_pulled(store, "orders/today", tmp_path / "landed")


def test_a_killed_pull_continues(source: Path, store: Store, machine: Machines, tmp_path: Path):
    """What the killed pull landed is not fetched again, and nothing stands at the destination before it is whole."""
    here = machine()
    upload(store, "orders/today", export_artifact(source, tmp_path / "artifact").artifact, profile=PROFILE)
    target = tmp_path / "pulled" / "landed"
    target.parent.mkdir()
    pull = here.start("--bwlimit", "10MiB", "pull", "orders/today", target)
    assert kill_when(lambda: committed(target.parent) >= 1, pull), "it was too quick to be killed"
    assert not target.exists()

    document = here.run("pull", "orders/today", target)

    assert document["bytes_resumed"] >= PART
    assert document["bytes_resumed"] + document["bytes_received"] == document["bytes_total"]
    assert read_tree(target / "data") == TREE


def _bytes_below(server: ForeignServer) -> int:
    total = 0
    for path in server.data.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
