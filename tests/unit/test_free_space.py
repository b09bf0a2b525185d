"""Free space is compared before the first byte, at either end, and nothing is refused that would fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow import Artifact, DirectoryImporter, download, durable, export_artifact, import_artifact, upload
from blobflow.durable import free_bytes
from blobflow.errors import DiskTooSmall
from blobflow.lanes import begin_download
from blobflow.layers import LayerSync
from blobflow.stores.local.store import LocalStore
from blobflow.streams import FileTarget, ObjectSource, transfer
from blobflow.testing import FaultyStore, write_tree
from tests.kit import SERIAL, SMALL, Killed, artifact_of, declare, dies_before, keys, local_store, noise

KEY = "a.tar"
CONTENT = 300_000


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path / "made", {"big": noise(CONTENT)})


@pytest.fixture
def store(tmp_path: Path, artifact: Artifact) -> LocalStore:
    store = local_store(tmp_path)
    upload(store, KEY, artifact, profile=SMALL)
    return store


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are free, on every file system."""

    def leave(free: int) -> None:
        monkeypatch.setattr("blobflow.durable._file_system", lambda _: ("ext4", "rw"))
        size = os.statvfs("/tmp").f_frsize
        found = os.statvfs_result((size, 1, 1 << 40, free, free, 1, 1, 1, 0, 255))
        monkeypatch.setattr(durable.os, "statvfs", lambda _: found)

    return leave


@pytest.mark.parametrize("how", ["download", "lanes"])
def test_a_download_is_refused_before_the_first_byte(
    how: str, store: LocalStore, room: Callable[[int], None], tmp_path: Path
):
    """With what is needed and what is free; a disk that is too small is not temporary, and nothing is left."""
    room(CONTENT - 1)
    dest, watched = tmp_path / "below" / "dest", FaultyStore(store)
    land: dict[str, Callable[[], object]] = {
        "download": lambda: download(watched, KEY, dest, profile=SERIAL),
        "lanes": lambda: begin_download(watched, KEY, dest, lanes=2, profile=SERIAL),
    }
    with pytest.raises(
        DiskTooSmall, match=r"dest has too little room: 300,000 bytes are needed, 299,999 are free"
    ) as no:
        land[how]()
    assert (no.value.needed, no.value.free, no.value.retryable, no.value.exit_code) == (CONTENT, CONTENT - 1, False, 5)
    assert sum(request.operation == "get_range" for request in watched.log) <= 2  # manifest and index
    assert os.listdir(dest.parent) == []
    room(CONTENT)
    land[how]()


def test_what_has_landed_is_not_needed_again(store: LocalStore, room: Callable[[int], None], tmp_path: Path):
    """A download that goes on needs room for the rest; if there is none, what has landed is kept."""
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_before("get_range", 40)), KEY, tmp_path / "dest", profile=SERIAL)
    room(CONTENT // 10)
    with pytest.raises(DiskTooSmall) as no:
        download(store, KEY, tmp_path / "dest", profile=SERIAL)
    assert no.value.needed < CONTENT - 30 * 4096
    room(no.value.needed)
    assert download(store, KEY, tmp_path / "dest", profile=SERIAL).bytes_resumed > 30 * 4096


def sparse(path: Path, size: int) -> Path:
    """A directory with a file that has one block of content and `size` bytes."""
    write_tree(path, {"disk.img": noise(4096), "small": "x"})
    os.truncate(path / "disk.img", size)
    return path


def test_holes_need_no_room(room: Callable[[int], None], tmp_path: Path):
    """A sparse file lands sparse: the manifest says how much of it is holes, and only the rest is asked for."""
    store = local_store(tmp_path)
    artifact = export_artifact(sparse(tmp_path / "source", 20 << 20), tmp_path / "artifact").artifact
    assert (artifact.manifest.holes or 0) >= (20 << 20) - 16 * 1024
    upload(store, KEY, artifact)
    LayerSync(store, home=tmp_path / "home").sync("web", tmp_path / "source")
    room(64 * 1024)
    download(store, KEY, tmp_path / "dest")
    assert (tmp_path / "dest" / "data" / "disk.img").stat().st_blocks * 512 < 1 << 20
    LayerSync(store, home=tmp_path / "home").restore("web", tmp_path / "restored")
    assert (tmp_path / "restored" / "disk.img").stat().st_size == 20 << 20


def test_an_artifact_without_holes_says_nothing_of_them(artifact: Artifact):
    """So that manifests are what earlier versions write."""
    assert artifact.manifest.holes is None
    assert b"holes" not in artifact.manifest_bytes


@pytest.mark.parametrize("multipart", [True, False])
def test_an_upload_to_a_local_store_is_refused_before_the_first_byte(
    multipart: bool, artifact: Artifact, room: Callable[[int], None], tmp_path: Path
):
    """A directory as a store has as much room as its file system; parts that it holds already need none."""
    store = local_store(tmp_path)
    if not multipart:
        declare(store, multipart=False)
    room(CONTENT)
    with pytest.raises(DiskTooSmall, match=r"are needed, 300,000 are free"):
        upload(store, KEY, artifact, profile=SERIAL)
    assert [key for key in keys(store) if not key.endswith(".upload.json")] == []
    room(1 << 30)
    if multipart:
        with pytest.raises(Killed):
            upload(FaultyStore(store, dies_before("put_part", 60)), KEY, artifact, profile=SERIAL)
        room(CONTENT - 50 * 4096)
    assert upload(store, KEY, artifact, profile=SERIAL).status == "uploaded"


def test_copies_are_refused_before_the_first_byte(artifact: Artifact, room: Callable[[int], None], tmp_path: Path):
    """An export in mode copy, and an import that copies; where the file system shares blocks, nobody can say."""
    room(CONTENT - 1)
    source = tmp_path / "made" / "source"
    with pytest.raises(DiskTooSmall):
        export_artifact(source, tmp_path / "copy", mode="copy")
    assert not (tmp_path / "copy").exists()
    export_artifact(source, tmp_path / "linked", mode="link")
    with pytest.raises(DiskTooSmall):
        import_artifact(artifact, DirectoryImporter(path=tmp_path / "mirror"))
    room(CONTENT + (1 << 20))
    import_artifact(artifact, DirectoryImporter(path=tmp_path / "mirror"))


def test_a_transfer_to_a_file_is_refused_before_the_first_byte(
    store: LocalStore, artifact: Artifact, room: Callable[[int], None], tmp_path: Path
):
    """If the source says how large it is; nothing is left beside the file."""
    (place := tmp_path / "place").mkdir()
    room(artifact.payload_size - 1)
    watched = FaultyStore(store)
    with pytest.raises(DiskTooSmall):
        transfer(ObjectSource(watched, KEY), FileTarget(place / "target"), SMALL)
    assert [request.operation for request in watched.log] == ["head"]
    assert os.listdir(place) == []
    room(artifact.payload_size)
    transfer(ObjectSource(store, KEY), FileTarget(place / "target"), SMALL)


@pytest.mark.parametrize(
    ("kind", "options", "known"),
    [("ext4", "rw", True), ("btrfs", "rw,compress=zstd:3", False), ("zfs", "rw", False), ("fuse.x", "rw", False)],
)
def test_where_data_may_take_less_room_nothing_is_refused(
    kind: str, options: str, known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A file system that compresses may hold more than it has free bytes."""
    monkeypatch.setattr("blobflow.durable._file_system", lambda _: (kind, options))
    assert (free_bytes(tmp_path / "absent" / "below") is not None) == known


def test_the_file_system_of_a_path_is_known():
    """From the kernel's own list of mounts."""
    assert durable._file_system(Path("/proc"))[0] == "proc"
    assert free_bytes(Path("/proc")) is None
