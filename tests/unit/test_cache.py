"""The cache of artifacts: fetched once, shared, found out when changed, bounded, and never pulled from under a user."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blobflow.artifact.artifact import Artifact
from blobflow.errors import ArtifactNotFound, DigestMismatch, DiskFull, StoreUnavailable
from blobflow.stores import Store
from blobflow.testing import FailBefore, Fault, FaultyStore, Request, Tree, read_tree, write_tree
from blobflow.transport import UploadResult, upload
from blobflow.transport.cache import ArtifactCache
from tests.clock import Clock
from tests.kit import SERIAL, TREE, Killed, artifact_of, dies_at, local_store, noise

ROOT = Path(__file__).resolve().parents[2]


class Shelf:
    """A store with artifacts, and caches of them below one directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "cache"
        self.clock = Clock()
        self.caches: list[ArtifactCache] = []

    def put(self, name: str, tree: Tree = TREE) -> UploadResult:
        return upload(local_store(self.path), name, artifact_of(self.path / name, tree), profile=SERIAL)

    def cache(self, **options: Any) -> ArtifactCache:
        """As a process of its own has it: locks belong to open files, not to processes."""
        self.caches.append(ArtifactCache(self.root, clock=self.clock, **options))
        return self.caches[-1]

    def get(self, cache: ArtifactCache, stored: UploadResult, store: Store | None = None) -> tuple[Artifact, int]:
        """The artifact, and the bytes that were fetched for it."""
        self.clock.now += 1
        artifact, download = cache.get(
            store or local_store(self.path), stored.key, stored.artifact_digest, profile=SERIAL
        )
        return artifact, download.bytes_received if download else 0

    @property
    def entries(self) -> list[Path]:
        return [path for path in self.root.iterdir() if not path.name.startswith(".")]

    @property
    def leftovers(self) -> list[str]:
        return [path.name for path in self.root.iterdir() if path.name.startswith(".")]


@pytest.fixture
def shelf(tmp_path: Path):
    shelf = Shelf(tmp_path)
    yield shelf
    for cache in shelf.caches:
        cache.close()


def test_an_artifact_is_fetched_once(shelf: Shelf):
    """The first process fetches it, others and later ones get the same directory without a request."""
    stored = shelf.put("a")
    first, received = shelf.get(shelf.cache(), stored)
    assert received == stored.bytes_total
    assert read_tree(first.data) == TREE
    silent = FaultyStore(local_store(shelf.path), lambda request: pytest.fail(f"unexpected {request}"))
    second, received = shelf.get(shelf.cache(), stored, silent)
    assert (second.path, received) == (first.path, 0)
    assert shelf.leftovers == []


def test_what_is_not_there_is_said(shelf: Shelf):
    """A missing artifact, or another one under its key, is the download's error, and leaves nothing."""
    stored = shelf.put("a")
    with pytest.raises(ArtifactNotFound):
        shelf.cache().get(local_store(shelf.path), "b", stored.artifact_digest)
    with pytest.raises(DigestMismatch):
        shelf.cache().get(local_store(shelf.path), stored.key, "sha256:" + "0" * 64)
    assert list(shelf.root.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda data: (data / "nested" / "deep" / "file.txt").write_text("HELLO\n"),
        lambda data: (data / "new").write_text(""),
        lambda data: (data / "empty").unlink(),
        lambda data: (data / "big.bin").chmod(0o755),
        lambda data: os.replace(data / "empty", data / "ünïcode" / "日本語.txt"),
    ],
    ids=["written", "added", "removed", "made executable", "renamed"],
)
def test_a_changed_entry_is_not_used_again(shelf: Shelf, change: Callable[[Path], object]):
    """Whatever a careless user does to an entry, the next user gets a whole one, and the user keeps what it has."""
    stored = shelf.put("a")
    careless = shelf.cache()
    artifact, _ = shelf.get(careless, stored)
    change(artifact.data)
    changed = read_tree(artifact.data)
    other, received = shelf.get(shelf.cache(), stored)
    assert received == stored.bytes_total
    assert read_tree(other.data) == TREE
    assert read_tree(artifact.data) == changed
    careless.close()
    third, received = shelf.get(shelf.cache(), stored)
    assert (third.path, received) == (other.path, 0)
    assert shelf.entries == [other.path]


def test_one_process_may_use_what_it_changed_beside_a_fresh_entry(shelf: Shelf):
    """With the in-process executor a changed entry and its successor are held by one cache: no waiting for itself."""
    stored = shelf.put("a")
    cache = shelf.cache()
    artifact, _ = shelf.get(cache, stored)
    (artifact.data / "new").write_text("")
    again, _ = shelf.get(cache, stored)
    assert again.path != artifact.path
    assert read_tree(again.data) == TREE
    assert (artifact.data / "new").exists()


def test_only_sha256_sees_what_hides_from_stat(shelf: Shelf):
    """Bytes that changed under the same size, time and inode pass the stamp; the other check reads them."""
    stored = shelf.put("a")
    artifact, _ = shelf.get(shelf.cache(), stored)
    file = artifact.data / "big.bin"
    status = file.stat()
    with open(file, "r+b") as damaged:
        damaged.write(b"?")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shelf.get(shelf.cache(), stored)[0].path == artifact.path
    other, received = shelf.get(shelf.cache(check="sha256"), stored)
    assert received == stored.bytes_total
    assert read_tree(other.data) == TREE


def test_a_killed_fetch_is_continued(shelf: Shelf):
    """The next process asks only for the parts that the one before had not noted."""
    stored = shelf.put("a")
    dying = FaultyStore(local_store(shelf.path), dies_at(8))
    with pytest.raises(Killed):
        shelf.get(shelf.cache(), stored, dying)
    assert shelf.entries == []
    artifact, received = shelf.get(shelf.cache(), stored)
    assert 0 < received < stored.bytes_total
    assert read_tree(artifact.data) == TREE
    assert shelf.leftovers == []


def test_what_landed_before_a_kill_is_verified_and_used(shelf: Shelf):
    """An entry without a stamp is read once, and never fetched again; a damaged one is fetched."""
    stored = shelf.put("a")
    cache = shelf.cache()
    artifact, _ = shelf.get(cache, stored)
    cache.close()
    (artifact.path / "STAMP").unlink()
    assert shelf.get(cache, stored)[1] == 0
    cache.close()
    (artifact.path / "STAMP").unlink()
    (artifact.data / "big.bin").write_bytes(noise(20_000, 9))
    again, received = shelf.get(cache, stored)
    assert received == stored.bytes_total
    assert read_tree(again.data) == TREE


def test_the_longest_unused_goes_first_and_only_for_room(shelf: Shelf):
    """Before a download, as many entries go as its bytes need; those in use stay, whatever the bound."""
    trees: dict[str, Tree] = {name: {"f": noise(10_000, n)} for n, name in enumerate("abcde")}
    stored = {name: shelf.put(name, tree) for name, tree in trees.items()}
    cache, user = shelf.cache(max_bytes=30_000), shelf.cache()
    paths = {name: shelf.get(cache, stored[name])[0].path for name in "abc"}
    shelf.get(user, stored["a"])
    shelf.get(cache, stored["b"])
    cache.close()

    shelf.get(cache, stored["d"])
    assert [name for name, path in paths.items() if path.exists()] == ["a", "b"]
    shelf.get(cache, stored["e"])
    assert [name for name, path in paths.items() if path.exists()] == ["a"]
    assert len(shelf.entries) == 3
    shelf.get(cache, stored["b"])
    assert len(shelf.entries) == 4  # all of the others are in use


def test_a_full_disk_costs_the_unused(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    """Where there is no room, every entry that nobody uses goes, and the download is continued; once."""
    old, new = shelf.put("old", {"f": noise(5_000)}), shelf.put("new")
    cache = shelf.cache()
    path = shelf.get(cache, old)[0].path

    def faults(request: Request) -> Fault | None:
        if request.operation == "get_range" and path.exists():
            return FailBefore(DiskFull("no room left"))
        return None

    with pytest.raises(DiskFull):
        shelf.get(shelf.cache(), new, FaultyStore(local_store(shelf.path), faults))
    cache.close()
    artifact, _ = shelf.get(shelf.cache(), new, FaultyStore(local_store(shelf.path), faults))
    assert not path.exists()
    assert read_tree(artifact.data) == TREE


def test_two_at_once_fetch_it_once(shelf: Shelf):
    """The second one waits, says so, and finds what the first one fetched."""
    stored = shelf.put("a")
    waiting, holding = threading.Event(), threading.Event()
    found: list[tuple[Artifact, object]] = []

    def second() -> None:
        assert holding.wait(30)
        store = local_store(shelf.path)
        found.append(shelf.cache().get(store, stored.key, stored.artifact_digest, on_wait=waiting.set))

    def faults(_: Request) -> None:
        holding.set()
        assert waiting.wait(30)

    thread = threading.Thread(target=second)
    thread.start()
    artifact, received = shelf.get(shelf.cache(), stored, FaultyStore(local_store(shelf.path), faults))
    thread.join()
    assert received == stored.bytes_total
    assert [(other.path, download) for other, download in found] == [(artifact.path, None)]
    assert shelf.leftovers == []


def test_a_failed_fetch_lets_the_next_one_try(shelf: Shelf):
    """Whoever fails gives the lock back."""
    stored = shelf.put("a")
    broken = FaultyStore(local_store(shelf.path), lambda _: FailBefore(StoreUnavailable("down", operation="get")))
    with pytest.raises(StoreUnavailable):
        shelf.get(shelf.cache(), stored, broken)
    assert shelf.get(shelf.cache(), stored)[1] == stored.bytes_total


def test_a_killed_process_holds_nothing(shelf: Shelf):
    """The locks of a process end with it: what it used may go, and whoever waited for it goes on."""
    stored = shelf.put("a")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from blobflow.transport.cache import ArtifactCache; from blobflow.stores import open_store\n"
        "root, store, key, digest = sys.argv[1:]\n"
        "ArtifactCache(Path(root)).get(open_store(store), key, digest)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = (str(shelf.root), str(shelf.path / "store"), stored.key, stored.artifact_digest)
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=False)
    (entry,) = shelf.entries
    other = shelf.put("b", {"f": "1"})
    shelf.get(shelf.cache(max_bytes=0), other)
    assert not entry.exists()


def test_halves_of_removed_entries_are_swept(shelf: Shelf):
    """What a process that was killed while it removed an entry left goes with the next download."""
    stored = shelf.put("a")
    half = shelf.root / ".removed-0123"
    write_tree(half, {"data": {"f": "1"}})
    shelf.get(shelf.cache(), stored)
    assert not half.exists()


def test_an_entry_that_is_being_removed_is_not_given_out(shelf: Shelf):
    """Between the decision to remove it and its end nobody gets the path; another one is fetched."""
    stored = shelf.put("a")
    cache = shelf.cache()
    artifact, _ = shelf.get(cache, stored)
    cache.close()
    remover = os.open(artifact.path, os.O_RDONLY)
    try:
        fcntl.flock(remover, fcntl.LOCK_EX)
        other, received = shelf.get(cache, stored)
    finally:
        os.close(remover)
    assert other.path != artifact.path
    assert received == stored.bytes_total
