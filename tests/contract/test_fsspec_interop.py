"""fsspec: what it writes, we read, and the reverse; and how its file systems are kept honest."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import SecretStr

from blobflow.errors import (
    InvalidKey,
    InvalidStoreUrl,
    SizeMismatch,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
    UsageError,
)
from blobflow.stores import Body, PutMode
from blobflow.stores.fsspec.store import FsspecStore
from blobflow.stores.s3.store import S3Options, S3Store
from tests.servers import S3Endpoint


class Broken(Exception):
    """What a body raises."""


def breaking(size: int) -> Body:
    def chunks() -> Iterator[bytes]:
        yield b"x" * (size // 2)
        raise Broken

    return Body(size, chunks)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[FsspecStore]:
    yield FsspecStore(f"memory://{request.node.name}")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


# S3 through s3fs


@pytest.mark.seed("1.11")
def test_s3fs_and_the_s3_store_read_each_other(moto_s3: S3Endpoint) -> None:
    """Objects, also those made of parts, are the same through s3fs and through our own S3 store."""
    bucket = moto_s3.new_bucket()
    ours = S3Store(
        S3Options(
            bucket=bucket,
            prefix="shared",
            endpoint_url=moto_s3.endpoint_url,
            region=moto_s3.region,
            access_key_id=moto_s3.access_key_id,
            secret_access_key=SecretStr(moto_s3.secret_access_key),
        )
    )
    theirs = FsspecStore(
        f"s3://{bucket}/shared",
        key=moto_s3.access_key_id,
        secret=moto_s3.secret_access_key,
        endpoint_url=moto_s3.endpoint_url,
        client_kwargs={"region_name": moto_s3.region},
        default_block_size=5 * 1024**2,
    )
    data = os.urandom(11 * 1024**2)
    upload_id = ours.create_multipart("a/large", part_size=6 * 1024**2)
    parts = [
        ours.put_part("a/large", upload_id, 1, Body.of(data[: 6 * 1024**2])),
        ours.put_part("a/large", upload_id, 2, Body.of(data[6 * 1024**2 :])),
    ]
    ours.complete_multipart("a/large", upload_id, parts)
    assert theirs.get("a/large", max_bytes=len(data)).data == data
    head = theirs.head("a/large")
    assert head.e_tag == ours.head("a/large").e_tag
    assert theirs.get_range("a/large", 6 * 1024**2 - 5, 10, e_tag=head.e_tag) == data[6 * 1024**2 - 5 :][:10]

    theirs.put(
        "b/large", Body(len(data), lambda: (data[start : start + 100_000] for start in range(0, len(data), 100_000)))
    )
    theirs.put("b/empty", b"")
    assert ours.get("b/large", max_bytes=len(data)).data == data
    assert ours.get("b/empty", max_bytes=1).data == b""
    assert [meta[:3] for meta in theirs.list()] == [meta[:3] for meta in ours.list()]
    assert [meta.key for meta in theirs.list(start_after="a/zzz")] == ["b/empty", "b/large"]

    with pytest.raises(Broken):
        theirs.put("b/broken", breaking(12 * 1024**2))
    with pytest.raises(SizeMismatch):
        theirs.put("b/broken", Body(12, lambda: [b"short"]))
    assert not ours.exists("b/broken")
    assert ours.list_uploads() == []

    theirs.copy("b/large", "c/copy")
    assert ours.get("c/copy", max_bytes=len(data)).data == data
    for key in ("a/large", "b/large", "b/empty", "c/copy"):
        theirs.delete(key)
        theirs.delete(key)
    assert list(ours.list()) == []
    with pytest.raises(Unsupported):
        theirs.put("key", b"", mode=PutMode.CREATE)
    ours.close()


# File systems that publish by renaming


def test_a_reader_never_sees_a_half_written_file(tmp_path: Path) -> None:
    """Until the last byte is there the key is absent; a body that breaks leaves no file behind."""
    store = FsspecStore(f"file://{tmp_path}")

    def chunks() -> Iterator[bytes]:
        yield b"first"
        assert not store.exists("dir/key")
        assert list(store.list()) == []
        yield b"second"

    store.put("dir/key", Body(11, chunks))
    assert (tmp_path / "dir" / "key").read_bytes() == b"firstsecond"
    with pytest.raises(Broken):
        store.put("dir/key", breaking(10))
    assert (tmp_path / "dir" / "key").read_bytes() == b"firstsecond"
    assert list((tmp_path / ".blobflow" / "tmp").iterdir()) == []


def test_a_key_is_not_put_into_a_directory_of_its_name(tmp_path: Path) -> None:
    """By itself fsspec moves a file into the directory that has the target's name; the store refuses instead."""
    store = FsspecStore(f"file://{tmp_path}")
    store.put("a/b", b"1")
    with pytest.raises(InvalidKey):
        store.put("a", b"2")
    with pytest.raises(InvalidKey):
        store.put("a/b/c", b"3")
    assert [meta.key for meta in store.list()] == ["a/b"]
    assert list((tmp_path / ".blobflow" / "tmp").iterdir()) == []


# Memory


def test_memory_is_shared_within_the_process(memory: FsspecStore) -> None:
    """What is put is there for plain fsspec, and what fsspec puts is there for the store."""
    memory.put("a", b"ours")
    plain: Any = fsspec.filesystem("memory")
    path = memory.url.removeprefix("memory:/")
    assert plain.cat_file(f"{path}/a") == b"ours"
    plain.pipe_file(f"{path}/b", b"theirs")
    assert memory.get("b", max_bytes=10).data == b"theirs"
    assert [meta.key for meta in memory.list()] == ["a", "b"]


def test_memory_refuses_contradicting_keys(memory: FsspecStore) -> None:
    """A key below an object is refused here as in a directory."""
    memory.put("a", b"1")
    with pytest.raises(InvalidKey):
        memory.put("a/b", b"2")


def test_memory_bears_threads(memory: FsspecStore) -> None:
    """Objects that come and go while others look and list are there or not there, and nothing else."""
    barrier = threading.Barrier(4)

    def churn(number: int) -> None:
        barrier.wait()
        for _ in range(300):
            memory.put(f"key-{number}", b"x")
            memory.delete(f"key-{number}")

    def look(_: int) -> None:
        barrier.wait()
        for _ in range(300):
            assert {meta.size for meta in memory.list()} <= {1}
            memory.exists("key-0")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(churn, 0), pool.submit(churn, 1), pool.submit(look, 0), pool.submit(look, 1)]
            for future in done:
                future.result(60)
    finally:
        sys.setswitchinterval(before)


# Errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("denied: key=SECRET"), StoreConfigurationError),
        (TimeoutError(), TimedOut),
        (ConnectionResetError(), StoreUnavailable),
        (RuntimeError("client: token=SECRET"), StoreUnavailable),
        (NotImplementedError(), Unsupported),
    ],
)
def test_foreign_errors_are_translated(
    memory: FsspecStore, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    """No error of a client library escapes, and its text, which may hold anything, is not repeated."""

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    for call in (lambda: memory.head("key"), lambda: memory.put("key", b""), lambda: list(memory.list())):
        with pytest.raises(kind) as refusal:
            call()
        assert refusal.value.__cause__ is error
        assert "SECRET" not in str(refusal.value)


def test_schemes_are_checked_when_the_store_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown scheme, and one whose package is missing, are told apart."""
    with pytest.raises(InvalidStoreUrl, match="unknown scheme 'nosuch'"):
        FsspecStore("nosuch://place")

    def missing(scheme: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UsageError, match="gs:// needs a package") as refusal:
        FsspecStore("gs://bucket")
    assert refusal.value.hint == "pip install 'gcsfs'"
