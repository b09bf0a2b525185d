"""The tools of `blobflow.testing` themselves: a contract that cannot fail shows nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobflow.checksum import Buffer
from blobflow.errors import SlowDown, StoreUnavailable
from blobflow.stores import Body, ObjectMeta, PartMeta, PutMode, StoredObject
from blobflow.stores.local.store import LocalStore
from blobflow.testing import (
    CorruptRead,
    Executable,
    FailAfter,
    FailBefore,
    FaultyStore,
    Fifo,
    Hook,
    Request,
    StoreContract,
    Symlink,
    Tree,
    Truncate,
    random_faults,
    read_tree,
    scripted_faults,
    write_tree,
)

# Trees


def test_a_tree_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Files, directories (also empty ones), links, programs and pipes come back equal to the literal."""
    tree: Tree = {
        "readme": "grüße",
        "data": {"0.bin": b"\x00\xff", "empty": {}, "latest": Symlink("0.bin")},
        "run": Executable("#!/bin/sh\n"),
        "pipe": Fifo(),
    }
    assert write_tree(tmp_path / "deep" / "tree", tree) == tmp_path / "deep" / "tree"
    assert read_tree(tmp_path / "deep" / "tree") == tree
    assert os.access(tmp_path / "deep" / "tree" / "run", os.X_OK)


@pytest.mark.parametrize(
    "other",
    [
        {"a": "2"},
        {"a": b"2"},
        {"b": "1"},
        {},
        {"a": "1", "b": {}},
        {"a": {}},
        {"a": Executable("1")},
        {"a": Symlink("1")},
        {"a": Fifo()},
    ],
)
def test_other_trees_are_not_equal(tmp_path: Path, other: Tree) -> None:
    """A tree differs from every other one: name, content, kind and the execute bit count."""
    write_tree(tmp_path, {"a": "1"})
    assert read_tree(tmp_path) == {"a": b"1"}
    assert read_tree(tmp_path) != other
    assert other != read_tree(tmp_path)


# Faults


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return FaultyStore(LocalStore(tmp_path))


def test_requests_are_logged(store: FaultyStore) -> None:
    """Every request leaves its operation, key and number, failed ones too."""
    store.faults = scripted_faults({("put", 2): FailBefore()})
    store.put("a", b"1")
    with pytest.raises(StoreUnavailable, match="put 'b'"):
        store.put("b", b"2")
    store.get_range("a", 0, 1)
    assert [meta.key for meta in store.list("a")] == ["a"]
    assert store.log == [("put", "a", 1), ("put", "b", 2), ("get_range", "a", 1), ("list", "a", 1)]
    assert store.count("put") == 2


def test_before_and_after_differ_by_what_happened(store: FaultyStore) -> None:
    """A request that was not sent did nothing; one whose answer was lost did everything."""
    store.faults = scripted_faults(
        {
            ("put", 1): FailBefore(SlowDown("wait", retry_after_s=7.0, operation="get")),
            ("put", 2): FailAfter(),
            ("delete", 1): FailAfter(),
        }
    )
    with pytest.raises(SlowDown):
        store.put("key", b"1")
    assert not store.store.exists("key")
    with pytest.raises(StoreUnavailable):
        store.put("key", b"2")
    assert store.store.get("key", max_bytes=1).data == b"2"
    with pytest.raises(StoreUnavailable):
        store.delete("key")
    assert not store.store.exists("key")


def test_reads_are_corrupted_and_cut(store: FaultyStore) -> None:
    """A corrupted read is silent and one bit wrong; a truncated one delivers so much and fails."""
    store.put("key", b"0000000000")
    store.faults = scripted_faults(
        {("get_range", 1): CorruptRead(at=3), ("get_range", 2): Truncate(keep=4), ("get", 1): CorruptRead(at=-1)}
    )
    assert store.get_range("key", 0, 5) == b"00010"
    buffer = bytearray(b"........")
    with pytest.raises(StoreUnavailable):
        store.get_range_into("key", 0, memoryview(buffer))
    assert buffer == b"0000...."
    assert store.get("key", max_bytes=10).data == b"0000000001"


def test_bodies_and_listings_are_cut(store: FaultyStore) -> None:
    """A truncated upload consumed so much of its body and stored nothing; a truncated listing gave so many entries."""
    taken: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for piece in (b"abc", b"def", b"ghi"):
            taken.append(piece)
            yield piece

    store.faults = scripted_faults({("put", 1): Truncate(keep=4), ("list", 1): Truncate(keep=2)})
    with pytest.raises(StoreUnavailable, match="after 4 bytes"):
        store.put("key", Body(9, chunks))
    assert taken == [b"abc", b"def"]
    assert not store.store.exists("key")
    for key in "abc":
        store.put(key, b"")
    got: list[str] = []
    with pytest.raises(StoreUnavailable, match="after 2 entries"):
        got.extend(meta.key for meta in store.list())
    listing = store.list()
    assert [next(listing).key, next(listing).key] == ["a", "b"]


def test_hooks_run_before_the_request(store: FaultyStore) -> None:
    """A hook sees the request and may change the store behind the caller's back."""
    seen: list[Request] = []

    def change(request: Request) -> None:
        seen.append(request)
        store.store.put(request.key, b"changed")

    store.store.put("key", b"before")
    store.faults = scripted_faults({("get", 1): Hook(change)})
    assert store.get("key", max_bytes=10).data == b"changed"
    assert seen == [("get", "key", 1)]


def test_random_faults_repeat_themselves() -> None:
    """A seed always gives the same faults, about as many as were asked for."""

    def draw(seed: int) -> list[Any]:
        faults = random_faults(seed, 0.25)
        return [faults(Request("put", "key", number)) for number in range(400)]

    assert draw(1) == draw(1) != draw(2)
    assert 60 < sum(fault is not None for fault in draw(1)) < 140


# The contract notices


class Torn(LocalStore):
    """Loses the last byte of every object."""

    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> ObjectMeta:
        data = b"".join(body) if isinstance(body, Body) else bytes(body)
        return super().put(key, data[:-1], mode=mode, e_tag=e_tag, content_type=content_type, private=private)


class Racy(LocalStore):
    """Looks first and writes then."""

    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> ObjectMeta:
        if mode is PutMode.OVERWRITE or (mode is PutMode.CREATE and self.exists(key)):
            return super().put(key, body, mode=mode, e_tag=e_tag, content_type=content_type, private=private)
        return super().put(key, body)


class Unpinned(LocalStore):
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        super().get_range_into(key, offset, buffer)


class Unsorted(LocalStore):
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        yield from sorted(super().list(prefix), key=lambda meta: meta.key.split("/"))


class Careless(LocalStore):
    """Completes what is there."""

    def complete_multipart(self, key: str, upload_id: str, parts: Any) -> ObjectMeta:
        held = {part.part_number: part for part in self.list_parts(key, upload_id)}
        dense = [part for number, part in sorted(held.items()) if number <= len(held)]
        return super().complete_multipart(key, upload_id, [p._replace(part_number=n) for n, p in enumerate(dense, 1)])


class Forgetful(LocalStore):
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return super().list_parts(key, upload_id)[:-1]


class Greedy(LocalStore):
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        return super().get(key, max_bytes=1 << 40)


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (Torn, "test_what_was_put_is_read_back"),
        (Racy, "test_no_update_of_a_thread_is_lost"),
        (Unpinned, "test_a_pin_refuses_another_object"),
        (Unpinned, "test_readers_never_see_a_mixture"),
        (Unsorted, "test_listings_are_in_utf8_order"),
        (Unsorted, "test_listings_continue_after_any_key"),
        (Careless, "test_a_gap_is_refused"),
        (Forgetful, "test_parts_arrive_in_any_order"),
        (Greedy, "test_small_objects_have_a_limit"),
    ],
)
def test_the_contract_notices_a_broken_promise(kind: type[LocalStore], promise: str, tmp_path: Path) -> None:
    """A store that breaks a promise fails the test of that promise."""
    with pytest.raises((AssertionError, StoreUnavailable)):
        getattr(StoreContract(), promise)(kind(tmp_path))


def test_pytest_is_not_needed() -> None:
    """Applications may import the tools without pytest."""
    code = "import sys; import blobflow.testing; print('pytest' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
