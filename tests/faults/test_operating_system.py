"""The operating system says no, at every single call: each failure has a type and a hint, and nothing is half done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from blobflow import Artifact, DirectoryExporter, DirectoryImporter, download, export_artifact, upload
from blobflow.errors import (
    BlobflowError,
    DiskFull,
    RefusedError,
    SourceBusy,
    SourceChanged,
    StoreUnavailable,
    Unsupported,
    UnsupportedSource,
)
from blobflow.stores.base import Body, ObjectMeta, PutMode
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Tree, read_tree, write_tree
from blobflow.trees import Cursor, remove_tree
from tests.kit import SERIAL, TREE, artifact_of

READING = ("fstat", "listdir", "open", "pread", "preadv", "scandir", "stat")
STORING = ("copy_file_range", "fdatasync", "ftruncate", "pwrite", "rmdir", "unlink", "write")
WRITING = ("chmod", "fsync", "link", "mkdir", "rename", "replace", "sendfile", "symlink", "utime")


class Refusing:
    """Counts the calls of functions of `os`, and fails the one that is next in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, *names: str) -> None:
        self.turn = 0
        self.seen = 0
        self.failed = ""
        for name in names:
            monkeypatch.setattr(os, name, self._guard(name, getattr(os, name)))
        self._code = code

    def _guard(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            if self.turn:
                self.seen += 1
                if self.seen == self.turn:
                    self.failed = name
                    raise OSError(self._code, os.strerror(self._code))
            return call(*args, **options)

        return guarded

    def error_of(self, number: int, call: Callable[[], object]) -> BlobflowError | None:
        """The error of a call during which the `number`-th call of the operating system fails."""
        self.turn, self.seen, self.failed = number, 0, ""
        try:
            call()
        except BlobflowError as error:
            return error
        finally:
            self.turn = 0
        return None


def put(store: LocalStore) -> object:
    return store.put("dir/key", b"new")


def put_update(store: LocalStore) -> object:
    return store.put("dir/key", b"new", mode=PutMode.UPDATE, e_tag=store.head("dir/key").e_tag)


def delete(store: LocalStore) -> object:
    return store.delete("dir/key")


def send_again(store: LocalStore) -> object:
    (upload,) = store.list_uploads()
    return store.put_part("big", upload.upload_id, 1, Body.of(b"othr"))


def complete(store: LocalStore) -> object:
    (upload,) = store.list_uploads()
    return store.complete_multipart("big", upload.upload_id, store.list_parts("big", upload.upload_id))


def abort(store: LocalStore) -> object:
    (upload,) = store.list_uploads()
    return store.abort_multipart("big", upload.upload_id)


OPERATIONS: list[Callable[[LocalStore], object]] = [
    put,
    put_update,
    lambda store: store.put("fresh/key", b"x", mode=PutMode.CREATE),
    lambda store: store.get("dir/key", max_bytes=100),
    lambda store: store.get_range("dir/key", 0, 3),
    lambda store: store.head("dir/key"),
    lambda store: list(store.list()),
    delete,
    lambda store: store.copy("dir/key", "copy"),
    lambda store: store.create_multipart("other", part_size=4),
    lambda store: store.list_uploads(),
    send_again,
    complete,
    abort,
]


def assert_all_is_well(store: LocalStore, before: ObjectMeta, *, deleted: bool) -> None:
    """Another process sees the old object or the new one, parts that are what they say, and can go on."""
    found = list(store.list("dir/"))
    assert found or deleted
    for meta in found:
        expected = b"old" if meta.e_tag == before.e_tag else b"new"
        assert store.get("dir/key", max_bytes=100).data == expected
    for begun in store.list_uploads("big"):
        held = {part.part_number for part in store.list_parts("big", begun.upload_id)}
        for part in {1, 2} - held:
            store.put_part("big", begun.upload_id, part, Body.of(b"part"))
        store.complete_multipart("big", begun.upload_id, store.list_parts("big", begun.upload_id))
        assert store.get("big", max_bytes=100).data in (b"partpart", b"othrpart")
    store.put("dir/key", b"next")
    assert store.get("dir/key", max_bytes=100).data == b"next"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: getattr(each, "__name__", ""))
def test_any_call_of_a_local_store_may_fail(
    operation: Callable[[LocalStore], object], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every error has a type, says what failed, and leaves what was there, whole, or what was asked for."""
    refusing = Refusing(monkeypatch, code, *READING, *STORING, *WRITING)
    number = 0
    while True:
        number += 1
        store = LocalStore(tmp_path / str(number))
        before = store.put("dir/key", b"old")
        upload_id = store.create_multipart("big", part_size=4)
        for part in (1, 2):
            store.put_part("big", upload_id, part, Body.of(b"part"))
        error = refusing.error_of(number, lambda store=store: operation(store))
        if error is not None:
            assert isinstance(error, StoreUnavailable if code == errno.EIO else DiskFull), refusing.failed
            assert error.retryable
            assert error.hint
            assert error.fields["key"] is not None
        if not refusing.failed:
            break
        assert_all_is_well(LocalStore(store.root), before, deleted=operation is delete)
    assert number > 1


@contextmanager
def refused(monkeypatch: pytest.MonkeyPatch, name: str, code: int, of: str) -> Iterator[None]:
    """Calls of this function of `os` fail when their first argument, or its name, contains `of`."""
    call = getattr(os, name)

    def refuse(first: Any, *args: Any, **options: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        if of in path:
            raise OSError(code, os.strerror(code))
        return call(first, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        yield


@pytest.mark.parametrize(
    ("name", "code", "kind", "hint"),
    [
        ("open", errno.ENOENT, SourceBusy, "run it again"),
        ("readv", errno.EIO, UnsupportedSource, "check the disk"),
        ("readv", errno.ESTALE, SourceBusy, "run it again"),
        ("scandir", errno.EIO, UnsupportedSource, "check the disk"),
        ("scandir", errno.EACCES, UnsupportedSource, "give permission"),
        ("scandir", errno.ENOENT, SourceBusy, "run it again"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    name: str, code: int, kind: type[BlobflowError], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The error says which file or directory, why, and what to do; no half of an artifact is left."""
    source = write_tree(tmp_path / "source", {"fine": "x", "nested": {"worse": "y"}})
    with refused(monkeypatch, name, code, "nested"), pytest.raises(kind, match="nested") as refusal:
        export_artifact(source, tmp_path / "artifact")
    assert hint in refusal.value.hint
    assert refusal.value.fields["path"].startswith("nested")
    assert not (tmp_path / "artifact").exists()


def test_a_file_that_goes_between_listing_and_looking_is_a_busy_source(tmp_path: Path):
    """The scan sees a name, and then nothing under it."""
    source = write_tree(tmp_path / "source", {"a": "x"})
    (source / "gone").symlink_to(tmp_path / "target")
    (tmp_path / "target").touch()

    class Vanishing(DirectoryExporter):
        def _check_link(self, cursor: Cursor, name: str, path: str, root: str) -> bool:
            (tmp_path / "target").unlink()
            return False

    with pytest.raises(SourceBusy, match="'gone' cannot be read: No such file"):
        Vanishing(path=source, symlinks="follow").export(tmp_path / "artifact")


@pytest.mark.parametrize("mode", ["reference", "link", "copy"])
@pytest.mark.parametrize("code", [errno.EDQUOT])
def test_an_export_without_room_is_temporary(
    mode: Literal["reference", "link", "copy"], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whichever call finds the disk full: `DiskFull`, and nothing is left behind."""
    exporter = DirectoryExporter(path=write_tree(tmp_path / "source", TREE), mode=mode)
    refusing = Refusing(monkeypatch, code, *WRITING)
    number = 0
    while True:
        number += 1
        error = refusing.error_of(number, lambda: exporter.export(tmp_path / "artifact"))
        if error is not None:
            assert isinstance(error, DiskFull), refusing.failed
            assert "free some space" in error.hint
        else:  # nothing failed, or making a directory that was there already
            assert read_tree(tmp_path / "artifact" / "data" / "nested") == TREE["nested"]
            remove_tree(tmp_path / "artifact")
        assert list(tmp_path.iterdir()) == [tmp_path / "source"]
        if not refusing.failed:
            break
    assert number > 3


@pytest.mark.parametrize("consume", [False, True])
def test_an_import_without_room_leaves_the_old_tree(consume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever call finds the disk full: `current` shows one whole tree, and importing again succeeds."""
    importer = DirectoryImporter(path=tmp_path / "mirror")
    old: Tree = {"a": "old"}
    importer.import_artifact(artifact_of(tmp_path / "old", old))
    refusing = Refusing(monkeypatch, errno.ENOSPC, *WRITING)
    number = 0
    while True:
        number += 1
        artifact = artifact_of(tmp_path / str(number), mode="copy")
        error = refusing.error_of(number, lambda artifact=artifact: importer.import_artifact(artifact, consume=consume))
        if error is not None:
            assert isinstance(error, DiskFull), refusing.failed
        assert read_tree(importer.path / "current") in ((old, TREE) if error else (TREE,))
        if not refusing.failed:
            break
        kept = importer.path / "versions" / artifact.digest.removeprefix("sha256:")[:16]
        importer.import_artifact(artifact if artifact.path.exists() else Artifact.open(kept))
        assert read_tree(importer.path / "current") == TREE
        importer.import_artifact(artifact_of(tmp_path / f"old-{number}", old))
    assert number > 3


def test_hard_links_that_cannot_be_made_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another file system, for example; the hint names the modes that work."""
    refusing = Refusing(monkeypatch, errno.EXDEV, "link")
    write_tree(tmp_path / "source", TREE)
    error = refusing.error_of(1, lambda: export_artifact(tmp_path / "source", tmp_path / "artifact", mode="link"))
    assert isinstance(error, Unsupported)
    assert 'mode="reference" or mode="copy"' in error.hint


def test_a_destination_that_is_forbidden_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not a traceback, and not a temporary error."""
    refusing = Refusing(monkeypatch, errno.EROFS, "mkdir")
    write_tree(tmp_path / "source", TREE)
    error = refusing.error_of(1, lambda: export_artifact(tmp_path / "source", tmp_path / "artifact"))
    assert isinstance(error, RefusedError)
    assert "cannot be written: Read-only file system" in error.message


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_any_read_of_an_upload_may_fail(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error names the file, nothing is published, and the next run continues."""
    artifact, store = artifact_of(tmp_path), LocalStore(tmp_path / "store")
    preadv, failing = os.preadv, 0

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal failing
        if "/source/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            failing -= 1
            if failing == 0:
                raise OSError(code, os.strerror(code))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    for number in range(1, 8):
        failing = number
        with pytest.raises(SourceChanged if code == errno.ESTALE else UnsupportedSource) as refusal:
            upload(store, f"{number}", artifact, profile=SERIAL)
        assert os.strerror(code) in refusal.value.message
        assert refusal.value.fields["path"] in artifact.index.paths
        assert not store.exists(f"{number}.manifest.json")
        upload(store, f"{number}", artifact, profile=SERIAL)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_any_call_of_a_download_may_fail(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error has a type, what is at the destination is whole, and the next run lands the tree and tidies up."""
    store = LocalStore(tmp_path / "store")
    upload(store, "k", artifact_of(tmp_path), profile=SERIAL)
    refusing = Refusing(monkeypatch, code, *WRITING, "ftruncate", "pwrite", "open")
    number = 0
    while True:
        number += 1
        dest = tmp_path / f"landing-{number}" / "dest"
        error = refusing.error_of(number, lambda dest=dest: download(store, "k", dest, profile=SERIAL))
        if error is not None:
            assert not dest.exists() or read_tree(dest / "data") == TREE, refusing.failed
            assert error.hint, refusing.failed
        if not refusing.failed:
            break
        download(store, "k", dest, profile=SERIAL)
        assert read_tree(dest / "data") == TREE
        assert os.listdir(dest.parent) == ["dest"]
    assert number > 10
