"""Errors of the operating system are told apart in one place, and mean the same wherever they come up."""

from __future__ import annotations

import ast
import errno
import os
import re
import resource
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pytest

import blobflow
from blobflow import Artifact, export_artifact, upload
from blobflow.checksum import crc32c
from blobflow.config import MIB
from blobflow.errors import (
    BlobflowError,
    DiskFull,
    InvalidKey,
    RefusedError,
    SourceChanged,
    StoreConfigurationError,
    StoreUnavailable,
    SystemLimit,
    TemporaryError,
    Unsupported,
    UnsupportedSource,
    UsageError,
    expanded,
    reading,
    storing,
    writing,
)
from blobflow.mirror import MirrorReceiver, SnapshotEnvelope, SnapshotId
from blobflow.scratch import scratch_directory
from blobflow.stores import open_store
from blobflow.stores.base import Body
from blobflow.stores.local.store import LocalStore
from blobflow.streams.ends import FileTarget
from blobflow.streams.transferring import transfer
from tests.kit import artifact_of

SIDES: Final[dict[str, Callable[[], AbstractContextManager[None]]]] = {
    "source": lambda: reading("some/file"),
    "destination": lambda: writing(Path("/some/file")),
    "store": lambda: storing("put 'some/file'", operation="put", key="some/file"),
}

MEANINGS: Final = [
    (errno.ENOSPC, DiskFull, DiskFull, DiskFull),
    (errno.EDQUOT, DiskFull, DiskFull, DiskFull),
    (errno.EFBIG, SystemLimit, SystemLimit, SystemLimit),
    (errno.EMFILE, SystemLimit, SystemLimit, SystemLimit),
    (errno.ENFILE, TemporaryError, TemporaryError, StoreUnavailable),
    (errno.ENOMEM, TemporaryError, TemporaryError, StoreUnavailable),
    (errno.EACCES, UnsupportedSource, RefusedError, StoreConfigurationError),
    (errno.EPERM, UnsupportedSource, RefusedError, StoreConfigurationError),
    (errno.EROFS, UnsupportedSource, RefusedError, StoreConfigurationError),
    (errno.ENAMETOOLONG, UnsupportedSource, RefusedError, InvalidKey),
    (errno.ENOENT, SourceChanged, RefusedError, StoreUnavailable),
    (errno.ESTALE, SourceChanged, RefusedError, StoreUnavailable),
    (errno.EXDEV, UnsupportedSource, Unsupported, StoreConfigurationError),
    (errno.EIO, UnsupportedSource, RefusedError, StoreUnavailable),
    (errno.ENODEV, UnsupportedSource, RefusedError, StoreUnavailable),
]


@pytest.mark.parametrize(("code", "source", "destination", "store"), MEANINGS, ids=str)
def test_an_error_number_has_one_meaning(
    code: int, source: type[BlobflowError], destination: type[BlobflowError], store: type[BlobflowError]
):
    """Whoever meets it: one type for each side, the thing and the reason in the message, and a remedy."""
    for side, kind in zip(SIDES, (source, destination, store), strict=True):
        with pytest.raises(BlobflowError) as refusal, SIDES[side]():
            raise OSError(code, os.strerror(code))
        error = refusal.value
        assert type(error) is kind, side
        assert os.strerror(code) in error.message
        assert "some/file" in error.message
        assert error.hint or error.retryable or kind is InvalidKey
        assert isinstance(error.__cause__, OSError)


def test_the_remedy_of_a_limit_is_the_limit():
    """What stops a process for good is named by the command that changes it."""
    for code, command in ((errno.EMFILE, "ulimit -n"), (errno.EFBIG, "ulimit -f")):
        for side in SIDES.values():
            with pytest.raises(SystemLimit) as refusal, side():
                raise OSError(code, os.strerror(code))
            assert command in refusal.value.hint
            assert not refusal.value.retryable


def test_error_numbers_are_told_apart_in_one_place():
    """No other module decides what a full disk, a limit or a missing permission means."""
    told_apart = {"ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "EACCES", "EIO"}
    root = Path(blobflow.__file__).parent
    found = {
        f"{path.relative_to(root)}:{node.lineno} {node.attr}"
        for path in root.rglob("*.py")
        if path.parent.name != "errors"
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Attribute)
        and (node.attr in told_apart or (node.attr == "expanduser" and "os" not in ast.unparse(node.value)))
    }
    # `append_lines` raises one, for a write that was cut short.
    assert {each for each in found if not re.fullmatch(r"durable\.py:\d+ ENOSPC", each)} == set()
    assert len(found) <= 1


@contextmanager
def limited(kind: int, value: int) -> Generator[None]:
    """The soft limit of this process is `value` for the block."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_limit_on_file_sizes_is_final_everywhere(tmp_path: Path):
    """`ulimit -f`: store, file target and receiver say what to do about it, and nobody tries again for ever."""
    data = bytes(2 * MIB)
    store = LocalStore(tmp_path / "store")
    upload_id = store.create_multipart("big", part_size=len(data))
    snapshot = SnapshotId("east", "orders", 42, f"sha256:{0xA:064x}")
    whole = SnapshotEnvelope(
        snapshot,
        offset=0,
        data=data,
        done=True,
        total_bytes=len(data),
        total_crc32c=crc32c(data),
        crc32c=crc32c(data),
    )
    with MirrorReceiver(tmp_path / "received") as receiver, limited(resource.RLIMIT_FSIZE, MIB):
        with pytest.raises(SystemLimit, match=r"write partial chunk: File too large"):
            receiver.handle(whole)
        with pytest.raises(SystemLimit, match=r"'key'.*File too large"):
            store.put("key", data)
        with pytest.raises(SystemLimit, match="'big'"):
            store.put_part("big", upload_id, 1, Body.of(data))
        with pytest.raises(SystemLimit, match=r"target.*File too large"):
            transfer(iter([data]), FileTarget(tmp_path / "target"))
    assert list(store.list()) == []
    store.put("key", data)


def test_a_limit_on_open_files_is_final(tmp_path: Path):
    """`ulimit -n`: it is named, instead of two minutes of trying again."""
    store = LocalStore(tmp_path / "store")
    store.put("key", b"x")
    artifact = artifact_of(tmp_path)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with limited(resource.RLIMIT_NOFILE, lowest_free):
        with pytest.raises(SystemLimit, match=r"'key'.*Too many open files"):
            store.get("key", max_bytes=10)
        with pytest.raises(SystemLimit, match="Too many open files"):
            Artifact.open(artifact.path)
    assert store.get("key", max_bytes=10).data == b"x"


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_source_without_permission_is_refused_the_same_for_files_and_directories(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is not damage (3), and the remedy is the permission: when it is exported, and when it is sent."""
    source = tmp_path / "source"
    (source / "secret").mkdir(parents=True)
    (source / "secret" / "file").write_text("x")
    denied = source / "secret" if what == "directory" else source / "secret" / "file"
    artifact = artifact_of(tmp_path)
    open_, scandir = os.open, os.scandir

    def deny(path: object) -> None:
        if Path(str(path)).is_relative_to(denied):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def guarded_open(path: str, *args: int, **options: int) -> int:
        deny(path)
        return open_(path, *args, **options)

    def guarded_scandir(path: str) -> object:
        deny(path)
        return scandir(path)

    monkeypatch.setattr(os, "open", guarded_open)
    monkeypatch.setattr(os, "scandir", guarded_scandir)
    with pytest.raises(UnsupportedSource, match=r"secret.*Permission denied") as refusal:
        export_artifact(source, tmp_path / "again")
    assert refusal.value.exit_code == RefusedError.exit_code
    assert "give permission" in refusal.value.hint
    with pytest.raises(UnsupportedSource, match=r"secret.*Permission denied") as refusal:
        upload(LocalStore(tmp_path / "store"), "k", artifact)
    assert "give permission" in refusal.value.hint


def test_no_home_directory_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A container whose user has no passwd entry, and no HOME: named, with the way out."""
    import pwd

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UsageError, match="no home directory") as refusal:
        expanded("~/store")
    assert "HOME" in refusal.value.hint
    with pytest.raises(UsageError, match="no home directory"):
        LocalStore("~/store")
    assert expanded(tmp_path) == tmp_path


@pytest.mark.parametrize("place", ["a file", "below a file", "where nothing can be made"])
def test_a_store_that_can_never_be_is_refused_at_once(tmp_path: Path, place: str):
    """Where the directory of a store is a file, or none can be made, the first write says so, finally."""
    (tmp_path / "file").touch()
    root = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "store"}.get(place, Path("/proc/store"))
    with pytest.raises(StoreConfigurationError, match="is no directory") as refusal:
        open_store(str(root)).put("key", b"x")
    assert not refusal.value.retryable
    assert str(tmp_path / "file" if place == "below a file" else root) in str(refusal.value)


def test_a_machine_without_temporary_files_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing temporary can be written, the error names TMPDIR."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in [...]")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(RefusedError, match="no place for temporary files") as refusal, scratch_directory(tmp_path):
        pass
    assert "TMPDIR" in refusal.value.hint


def test_a_receiver_that_cannot_write_says_where(tmp_path: Path):
    """A receiver whose directory cannot be made is misconfigured, by its path."""
    (tmp_path / "file").touch()
    with pytest.raises(BlobflowError, match="cannot be written") as failure:
        MirrorReceiver(tmp_path / "file" / "mirror")
    assert str(tmp_path / "file" / "mirror") in failure.value.message
