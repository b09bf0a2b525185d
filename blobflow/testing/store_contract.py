"""Every promise of a store, as tests."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from typing import Any, TypeVar

from blobflow.checksum import crc32c
from blobflow.errors import (
    InvalidKey,
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    SizeMismatch,
    Unsupported,
    UploadIncomplete,
    UsageError,
)
from blobflow.stores.base import MAX_KEY_BYTES, Body, PutMode, Store
from blobflow.testing.checks import raises

_T = TypeVar("_T")


_ODD_KEYS = (
    "plain",
    "with space",
    "plus+percent%41",
    "a&b=c;d?e#f",
    "quote'\"<tag>",
    "~tilde!$()*,:@[]^`{|}",
    "back\\slash",
    "grüße/日本語/🙂",
    "combining-e\u0301",
    "dots/.hidden/..two/three...",
    "deep/" + "/".join("abcdefgh"),
)

_ORDERED_KEYS = (
    "a!",
    "a-b",
    "a/b",
    "a/b-c",
    "a/c/d",
    "a/c/e",
    "a/c0",
    "a0",
    "b",
    "ba/a",
    "z",
    "é/x",
    "\ufffd",
    "\U0001f642",
)
"""In UTF-8 order, which is neither the order of directories nor that of UTF-16."""

_CHILD = """
import json, sys
from blobflow.stores import Body, PutMode, open_store
from blobflow.errors import PreconditionFailed

url, options, job, *args = json.loads(sys.argv[1])
store = open_store(url, **options)
print("ready", flush=True)
sys.stdin.readline()

if job == "create":
    key, text = args
    try:
        store.put(key, text.encode(), mode=PutMode.CREATE)
        print("won")
    except PreconditionFailed:
        print("lost")
elif job == "count":
    key, times, writer = args
    done = 0
    while done < times:
        found = store.get(key, max_bytes=100)
        raised = f"{int(found.data.split()[0]) + 1} by {writer}"
        try:
            store.put(key, raised.encode(), mode=PutMode.UPDATE, e_tag=found.meta.e_tag)
            done += 1
        except PreconditionFailed:
            pass
    print(done)
elif job == "parts":
    key, upload_id, size, numbers = args
    for number in numbers:
        store.put_part(key, upload_id, number, Body.of(bytes([number]) * size))
    print(len(numbers))
"""


def _noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class _SourceFailed(Exception):
    """An exception from a source; the store must raise it unchanged."""


def _failing_body(data: bytes, size: int) -> Body:
    """A body that yields `data` and then fails, before its size is reached."""

    def chunks() -> Iterator[bytes]:
        yield data
        raise _SourceFailed

    return Body(size, chunks)


class StoreContract:
    """Every promise of `blobflow.stores.base.Store` as tests. Inherit, and provide your store as a fixture.

    >>> class TestMyStore(StoreContract):
    ...     @pytest.fixture
    ...     def store(self):
    ...         return MyStore(...)  # empty

    Call `pytest.register_assert_rewrite("blobflow.testing")` before the import to see the values of failed assertions.
    Override `reopen` and `how_to_open` to have resumption and races between processes tested too.
    """

    many_objects = 1100
    """More than one page of the store's listings."""
    longest_key_bytes = MAX_KEY_BYTES
    """Override it for a server with a smaller limit."""

    def reopen(self, store: Store) -> Store:
        """Another store object for the same place, as another process would create it."""
        return store

    def how_to_open(self, store: Store) -> tuple[str, dict[str, Any]] | None:
        """URL and options with which another process opens `store`'s place; None if that is impossible."""
        del store
        return None

    # Objects

    def test_what_was_put_is_read_back(self, store: Store) -> None:
        """The bytes of a put come back, with the size and the e_tag that put and head report."""
        data = _noise(100_000)
        put = store.put("dir/object", data)
        found = store.get("dir/object", max_bytes=len(data))
        assert found.data == data
        assert (put.key, put.size) == ("dir/object", len(data))
        assert put.e_tag
        assert found.meta.e_tag == store.head("dir/object").e_tag == put.e_tag
        assert store.head("dir/object").size == len(data)
        assert store.exists("dir/object")

    def test_an_object_may_be_empty(self, store: Store) -> None:
        """Zero bytes make an object that exists."""
        assert store.put("empty", b"").size == 0
        assert store.get("empty", max_bytes=0).data == b""
        assert [(meta.key, meta.size) for meta in store.list()] == [("empty", 0)]

    def test_a_body_is_streamed(self, store: Store) -> None:
        """A body in chunks of any kind and size is stored in order."""
        data = _noise(300_000)
        pieces = [data[:1], bytearray(data[1:70_000]), b"", memoryview(data)[70_000:]]
        store.put("streamed", Body(len(data), lambda: pieces, crc32c(data)))
        assert store.get("streamed", max_bytes=len(data)).data == data

    def test_a_put_replaces(self, store: Store) -> None:
        """The second put of a key wins, and its e_tag is another."""
        first = store.put("key", b"first")
        second = store.put("key", b"other")
        assert store.get("key", max_bytes=10).data == b"other"
        assert first.e_tag != second.e_tag

    def test_absent_objects_are_named(self, store: Store) -> None:
        """A read of a missing object names its key."""
        for read in (
            lambda: store.get("absent", max_bytes=1),
            lambda: store.head("absent/deep"),
            lambda: store.get_range("absent", 0, 1),
            lambda: store.copy("absent", "elsewhere"),
        ):
            with raises(ObjectNotFound) as refusal:
                read()
            assert refusal.value.key.startswith("absent")
        assert not store.exists("absent")

    def test_a_directory_is_no_object(self, store: Store) -> None:
        """A prefix of keys is not a key."""
        store.put("a/b", b"x")
        with raises(ObjectNotFound):
            store.head("a")
        with raises(ObjectNotFound):
            store.get("a", max_bytes=1)
        with raises(ObjectNotFound):
            store.head("a/b/c")
        store.delete("a")
        assert store.exists("a/b")

    def test_small_objects_have_a_limit(self, store: Store) -> None:
        """An object of the maximum size is read; one more byte is refused with the limit."""
        store.put("small", b"12345")
        assert store.get("small", max_bytes=5).data == b"12345"
        with raises(ObjectTooLarge) as refusal:
            store.get("small", max_bytes=4)
        assert (refusal.value.key, refusal.value.limit) == ("small", 4)

    def test_a_failing_source_stores_nothing(self, store: Store) -> None:
        """The exception of a body is raised unchanged, and the key keeps its object."""
        with raises(_SourceFailed):
            store.put("new", _failing_body(b"abc", 6))
        store.put("old", b"earlier")
        with raises(_SourceFailed):
            store.put("old", _failing_body(b"abc", 6))
        assert store.get("old", max_bytes=10).data == b"earlier"
        assert [meta.key for meta in store.list()] == ["old"]

    def test_a_body_of_another_size_stores_nothing(self, store: Store) -> None:
        """A body that is too short or too long is refused."""
        for chunks in ((b"12345",), (b"1234", b"567")):
            with raises(SizeMismatch):
                store.put("wrong", Body(6, lambda chunks=chunks: chunks))
            assert not store.exists("wrong")

    def test_keys_may_contain_anything_printable(self, store: Store) -> None:
        """Every legal key is stored, found and listed under exactly its name."""
        for number, key in enumerate(_ODD_KEYS):
            store.put(key, str(number).encode())
        for number, key in enumerate(_ODD_KEYS):
            assert store.get(key, max_bytes=10).data == str(number).encode(), key
        assert [meta.key for meta in store.list()] == sorted(_ODD_KEYS, key=str.encode)

    def test_keys_may_be_long(self, store: Store) -> None:
        """A key of the greatest length, with segments of the greatest length, works like any other."""
        segments = "/".join(["s" * 255] * 4)
        key = segments[: self.longest_key_bytes].rstrip("/")
        store.put(key, b"1")
        assert store.get(key, max_bytes=1).data == b"1"
        assert [meta.key for meta in store.list("s" * 100)] == [key]
        with raises(InvalidKey):
            store.put("s/" * 450 + "s", b"1")

    def test_bad_keys_are_refused_everywhere(self, store: Store) -> None:
        """No method takes a key that leads out of the store or into its internals."""
        for key in (
            "",
            "/abs",
            "a//b",
            "a/",
            "../up",
            "a/../b",
            "a/./b",
            ".blobflow/locks/00",
            "a\0b",
            "a\nb",
            "\udcff",
        ):
            calls: list[Callable[[], object]] = [
                lambda key=key: store.put(key, b""),
                lambda key=key: store.get(key, max_bytes=1),
                lambda key=key: store.get_range(key, 0, 1),
                lambda key=key: store.head(key),
                lambda key=key: store.delete(key),
                lambda key=key: store.copy(key, "target"),
                lambda key=key: store.copy("source", key),
            ]
            if store.capabilities().multipart:
                calls.append(lambda key=key: store.create_multipart(key, part_size=store.capabilities().min_part_size))
            for call in calls:
                with raises(InvalidKey):
                    call()

    def test_delete_is_idempotent(self, store: Store) -> None:
        """Delete removes one object, and may be called for a missing one."""
        store.put("a/b/one", b"1")
        store.put("a/b/two", b"2")
        store.delete("a/b/one")
        store.delete("a/b/one")
        store.delete("never/was")
        assert [meta.key for meta in store.list()] == ["a/b/two"]

    def test_names_are_free_after_delete(self, store: Store) -> None:
        """When all objects below a prefix are gone, the prefix can be a key, and the reverse."""
        store.put("a/b/c", b"1")
        store.delete("a/b/c")
        store.put("a", b"2")
        assert [meta.key for meta in store.list()] == ["a"]
        store.delete("a")
        store.put("a/b", b"3")
        assert [meta.key for meta in store.list()] == ["a/b"]

    def test_copy_gives_an_equal_object(self, store: Store) -> None:
        """A copy has the bytes of its source and replaces its target."""
        data = _noise(200_000)
        store.put("source/of it", data)
        store.put("target", b"earlier")
        assert store.copy("source/of it", "target").size == len(data)
        store.copy("source/of it", "deep/target")
        for key in ("target", "deep/target", "source/of it"):
            assert store.get(key, max_bytes=len(data)).data == data

    # Conditional writes

    def test_create_never_replaces(self, store: Store) -> None:
        """A create-only put succeeds once; the object stays the first one."""
        self._need_conditional(store)
        meta = store.put("once", b"first", mode=PutMode.CREATE)
        with raises(PreconditionFailed) as refusal:
            store.put("once", b"second", mode=PutMode.CREATE)
        assert refusal.value.key == "once"
        found = store.get("once", max_bytes=10)
        assert (found.data, found.meta.e_tag) == (b"first", meta.e_tag)
        store.delete("once")
        store.put("once", b"third", mode=PutMode.CREATE)

    def test_update_needs_the_current_object(self, store: Store) -> None:
        """Compare-and-swap replaces the object it has seen, and no other."""
        self._need_conditional(store)
        first = store.put("ref", b"1")
        second = store.put("ref", b"2", mode=PutMode.UPDATE, e_tag=first.e_tag)
        with raises(PreconditionFailed):
            store.put("ref", b"3", mode=PutMode.UPDATE, e_tag=first.e_tag)
        assert store.get("ref", max_bytes=1).data == b"2"
        store.put("ref", b"4", mode=PutMode.UPDATE, e_tag=second.e_tag)
        assert store.get("ref", max_bytes=1).data == b"4"

    def test_update_of_nothing_is_refused(self, store: Store) -> None:
        """Compare-and-swap of an object that is gone is a lost race, not a new object."""
        self._need_conditional(store)
        gone = store.put("ref", b"1")
        store.delete("ref")
        with raises(PreconditionFailed):
            store.put("ref", b"2", mode=PutMode.UPDATE, e_tag=gone.e_tag)
        assert not store.exists("ref")

    def test_an_e_tag_belongs_to_update(self, store: Store) -> None:
        """A mode without its e_tag, or an e_tag without its mode, is a mistake of the caller."""
        for mode, e_tag in ((PutMode.UPDATE, None), (PutMode.CREATE, '"x"'), (PutMode.OVERWRITE, '"x"')):
            with raises(UsageError):
                store.put("key", b"", mode=mode, e_tag=e_tag)

    def test_only_one_thread_creates(self, store: Store) -> None:
        """Of many threads that create one key, one wins, and its bytes are the object."""
        self._need_conditional(store)

        def create(number: int) -> int | None:
            try:
                store.put("race/once", str(number).encode(), mode=PutMode.CREATE)
            except PreconditionFailed:
                return None
            return number

        winners = [number for number in _together(8, create) if number is not None]
        assert len(winners) == 1
        assert store.get("race/once", max_bytes=10).data == str(winners[0]).encode()

    def test_no_update_of_a_thread_is_lost(self, store: Store) -> None:
        """A counter that threads raise by compare-and-swap counts every success."""
        self._need_conditional(store)
        store.put("counter", b"0 by nobody")

        def raise_it(writer: int) -> None:
            done = 0
            while done < 5:
                found = store.get("counter", max_bytes=100)
                raised = f"{int(found.data.split()[0]) + 1} by {writer}"
                try:
                    store.put("counter", raised.encode(), mode=PutMode.UPDATE, e_tag=found.meta.e_tag)
                    done += 1
                except PreconditionFailed:
                    continue

        _together(4, raise_it)
        assert store.get("counter", max_bytes=100).data.split()[0] == b"20"

    def test_only_one_process_creates(self, store: Store) -> None:
        """Of several processes that create one key, one wins, and its bytes are the object."""
        self._need_conditional(store)
        answers = self._in_processes(store, [("create", "race/once", str(number)) for number in range(4)])
        assert sorted(answers) == ["lost", "lost", "lost", "won"]
        assert store.get("race/once", max_bytes=10).data == str(answers.index("won")).encode()

    def test_no_update_of_a_process_is_lost(self, store: Store) -> None:
        """A counter that processes raise by compare-and-swap counts every success."""
        self._need_conditional(store)
        store.put("counter", b"0 by nobody")
        assert self._in_processes(store, [("count", "counter", 10, writer) for writer in range(3)]) == ["10"] * 3
        assert store.get("counter", max_bytes=100).data.split()[0] == b"30"

    def test_conditional_writes_are_refused_where_they_are_not_safe(self, store: Store) -> None:
        """A store without conditional writes refuses them instead of pretending."""
        if store.capabilities().conditional:
            raise unittest.SkipTest("the store has conditional writes")
        for mode, e_tag in ((PutMode.CREATE, None), (PutMode.UPDATE, '"x"')):
            with raises(Unsupported) as refusal:
                store.put("key", b"", mode=mode, e_tag=e_tag)
            assert (refusal.value.store, refusal.value.capability) == (store.url, "conditional writes")
        assert not store.exists("key")

    # Ranges

    def test_any_range_is_read(self, store: Store) -> None:
        """First, middle, last byte and the whole: each range has exactly the bytes at that place."""
        data = _noise(70_000)
        e_tag = store.put("object", data).e_tag
        for offset, length in ((0, 1), (0, 70_000), (12_345, 40_000), (69_999, 1)):
            assert store.get_range("object", offset, length) == data[offset : offset + length]
            assert store.get_range("object", offset, length, e_tag=e_tag) == data[offset : offset + length]

    def test_a_range_fills_the_buffer_in_place(self, store: Store) -> None:
        """The bytes go into the caller's buffer, and nowhere else."""
        store.put("object", b"0123456789")
        buffer = bytearray(b"........")
        store.get_range_into("object", 3, memoryview(buffer)[2:6])
        assert buffer == b"..3456.."

    def test_a_range_beyond_the_end_is_refused(self, store: Store) -> None:
        """An object that ends before the buffer is full is not the one that the caller expects."""
        store.put("object", b"0123456789")
        store.put("empty", b"")
        for key, offset, length in (("object", 5, 6), ("object", 10, 1), ("object", 100, 1), ("empty", 0, 1)):
            with raises(SizeMismatch):
                store.get_range(key, offset, length)

    def test_a_pin_refuses_another_object(self, store: Store) -> None:
        """A pinned read never returns bytes of a successor, and its error is retryable."""
        first = store.put("object", b"first")
        second = store.put("object", b"other")
        with raises(ObjectChanged) as refusal:
            store.get_range("object", 0, 5, e_tag=first.e_tag)
        assert refusal.value.retryable
        assert (refusal.value.key, refusal.value.expected) == ("object", first.e_tag)
        assert store.get_range("object", 0, 5, e_tag=second.e_tag) == b"other"

    def test_ranges_may_be_read_at_once(self, store: Store) -> None:
        """Threads that read ranges of one object do not disturb each other."""
        data = _noise(400_000)
        store.put("object", data)

        def read(number: int) -> bool:
            return all(
                store.get_range("object", offset, 999) == data[offset : offset + 999]
                for offset in range(number * 1000, 400_000 - 999, 40_000)
            )

        assert all(_together(8, read))

    def test_readers_never_see_a_mixture(self, store: Store) -> None:
        """While an object is replaced again and again, ranges with one pin are of one version, or refused."""
        size = 50_000
        pin = store.put("object", bytes(size)).e_tag
        head = store.get_range("object", 0, size // 2, e_tag=pin)
        store.put("object", bytes([255]) * size)  # for certain between the two; below, whenever it happens
        with suppress(ObjectChanged):
            assert len(set(head + store.get_range("object", size // 2, size - size // 2, e_tag=pin))) == 1
        stop = threading.Event()

        def replace() -> None:
            for version in range(1, 50):
                store.put("object", bytes([version]) * size)
            stop.set()

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(replace)
            while not stop.is_set() and not writer.done():
                meta = store.head("object")
                assert meta.size == size
                try:
                    head = store.get_range("object", 0, size // 2, e_tag=meta.e_tag)
                    tail = store.get_range("object", size // 2, size - size // 2, e_tag=meta.e_tag)
                except ObjectChanged:
                    continue
                assert len(set(head + tail)) == 1
            writer.result()

    # Listings

    def test_listings_are_in_utf8_order(self, store: Store) -> None:
        """Keys come in the order of their UTF-8 bytes, each with the size and e_tag of its object."""
        for key in reversed(_ORDERED_KEYS):
            store.put(key, key.encode())
        listed = list(store.list())
        assert [meta.key for meta in listed] == list(_ORDERED_KEYS)
        for meta in listed:
            head = store.head(meta.key)
            assert (meta.size, meta.e_tag) == (len(meta.key.encode()), head.e_tag)

    def test_a_prefix_is_a_plain_string(self, store: Store) -> None:
        """A prefix may end anywhere in a key, and keys without it are left out."""
        for key in _ORDERED_KEYS:
            store.put(key, b"")
        for prefix in ("", "a", "a/", "a/c", "a/c/", "a/c/e", "b", "é", "a/b-c", "nothing", "a/nothing/", "z/"):
            expected = [key for key in _ORDERED_KEYS if key.startswith(prefix)]
            assert [meta.key for meta in store.list(prefix)] == expected, prefix

    def test_listings_continue_after_any_key(self, store: Store) -> None:
        """`start_after` gives the keys greater than it, whether it exists or not."""
        for key in _ORDERED_KEYS:
            store.put(key, b"")
        for prefix in ("", "a/", "a/c"):
            for after in (*_ORDERED_KEYS, "a", "a/", "a/b.", "a/c", "a/c/", "a/c/dd", "a/zzz", "c", "\U0010ffff"):
                expected = [key for key in _ORDERED_KEYS if key.startswith(prefix) and key.encode() > after.encode()]
                listed = [meta.key for meta in store.list(prefix, start_after=after)]
                assert listed == expected, (prefix, after)

    def test_listings_have_no_last_page(self, store: Store) -> None:
        """More objects than one page holds are all listed, once, and listings can continue in the middle."""
        keys = [f"many/{number:05}" for number in range(self.many_objects)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.put, keys, repeat(b"")))
        assert [meta.key for meta in store.list("many/")] == keys
        middle = keys[len(keys) // 2]
        assert [meta.key for meta in store.list(start_after=middle)] == keys[len(keys) // 2 + 1 :]
        first = next(iter(store.list()))
        assert first.key == keys[0]

    # Multipart uploads

    def test_parts_arrive_in_any_order(self, store: Store) -> None:
        """Parts sent out of order make the object, and nothing of it is visible before complete."""
        parts, data = self._parts(store, 3)
        upload_id = store.create_multipart("dir/large", part_size=len(parts[0]))
        acknowledged = [store.put_part("dir/large", upload_id, n, Body.of(parts[n - 1])) for n in (3, 1, 2)]
        assert [(part.part_number, part.size) for part in acknowledged] == [(n, len(parts[n - 1])) for n in (3, 1, 2)]
        assert all(part.crc32c in (None, crc32c(parts[part.part_number - 1])) for part in acknowledged)
        assert not store.exists("dir/large")
        assert list(store.list()) == []
        listed = store.list_parts("dir/large", upload_id)
        assert [(part.part_number, part.size) for part in listed] == [(n, len(parts[n - 1])) for n in (1, 2, 3)]
        meta = store.complete_multipart("dir/large", upload_id, sorted(acknowledged))
        assert (meta.key, meta.size) == ("dir/large", len(data))
        assert store.get("dir/large", max_bytes=len(data)).data == data
        assert store.head("dir/large").e_tag == meta.e_tag
        assert store.list_uploads() == []

    def test_one_small_part_is_enough(self, store: Store) -> None:
        """The last part may be smaller than the others, also when it is the only one."""
        self._need_multipart(store)
        upload_id = store.create_multipart("small", part_size=store.capabilities().min_part_size + 10)
        part = store.put_part("small", upload_id, 1, Body.of(b"tiny"))
        assert store.complete_multipart("small", upload_id, [part]).size == 4
        assert store.get("small", max_bytes=4).data == b"tiny"

    def test_a_part_sent_again_replaces_the_earlier_one(self, store: Store) -> None:
        """Of two parts with one number the last counts, also a shorter one at the end."""
        parts, _ = self._parts(store, 2)
        again = _noise(len(parts[0]), seed=99)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        for number, content in ((1, parts[0]), (2, parts[1]), (1, again), (2, b"end")):
            store.put_part("large", upload_id, number, Body.of(content))
        listed = store.list_parts("large", upload_id)
        assert [(part.part_number, part.size) for part in listed] == [(1, len(again)), (2, 3)]
        store.complete_multipart("large", upload_id, listed)
        assert store.get("large", max_bytes=len(again) + 3).data == again + b"end"

    def test_an_upload_is_taken_up_by_its_id(self, store: Store) -> None:
        """Another store object finds the upload, lists its parts as they were acknowledged, and completes it."""
        parts, data = self._parts(store, 3)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        first = store.put_part("large", upload_id, 1, Body.of(parts[0]))
        third = store.put_part("large", upload_id, 3, Body.of(parts[2]))
        other = self.reopen(store)
        assert [(upload.key, upload.upload_id) for upload in other.list_uploads("lar")] == [("large", upload_id)]
        listed = other.list_parts("large", upload_id)
        assert [part[:3] for part in listed] == [first[:3], third[:3]]
        second = other.put_part("large", upload_id, 2, Body.of(parts[1]))
        assert len(store.list_parts("large", upload_id)) == 3
        other.complete_multipart("large", upload_id, [listed[0], second, listed[1]])
        if other is not store:
            other.close()
        assert store.get("large", max_bytes=len(data)).data == data

    def test_a_gap_is_refused(self, store: Store) -> None:
        """Parts that are missing or not dense from 1 make no object; the upload stays and can be finished."""
        parts, data = self._parts(store, 3)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        first = store.put_part("large", upload_id, 1, Body.of(parts[0]))
        third = store.put_part("large", upload_id, 3, Body.of(parts[2]))
        for wrong in ([first, third], [third], [], [first, third._replace(part_number=2)]):
            with raises(UploadIncomplete):
                store.complete_multipart("large", upload_id, wrong)
        assert not store.exists("large")
        second = store.put_part("large", upload_id, 2, Body.of(parts[1]))
        store.complete_multipart("large", upload_id, [first, second, third])
        assert store.get("large", max_bytes=len(data)).data == data

    def test_a_completed_upload_is_gone(self, store: Store) -> None:
        """After complete the id is unknown, and the object cannot be touched through it."""
        parts, _ = self._parts(store, 1)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        part = store.put_part("large", upload_id, 1, Body.of(parts[0]))
        store.complete_multipart("large", upload_id, [part])
        self._assert_gone(store, upload_id)
        store.abort_multipart("large", upload_id)
        assert store.get("large", max_bytes=len(parts[0])).data == parts[0]

    def test_an_aborted_upload_is_gone(self, store: Store) -> None:
        """Abort removes the upload and its parts, leaves the key alone, and may be repeated."""
        parts, _ = self._parts(store, 1)
        store.put("large", b"earlier")
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        store.put_part("large", upload_id, 1, Body.of(parts[0]))
        store.abort_multipart("large", upload_id)
        store.abort_multipart("large", upload_id)
        self._assert_gone(store, upload_id)
        assert store.list_uploads() == []
        assert store.get("large", max_bytes=10).data == b"earlier"

    def test_complete_replaces(self, store: Store) -> None:
        """Complete replaces the key's object, in one step."""
        parts, data = self._parts(store, 2)
        earlier = store.put("large", b"earlier")
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        acknowledged = [store.put_part("large", upload_id, n, Body.of(part)) for n, part in enumerate(parts, 1)]
        assert store.get("large", max_bytes=10).data == b"earlier"
        store.complete_multipart("large", upload_id, acknowledged)
        assert store.get("large", max_bytes=len(data)).data == data
        with raises(ObjectChanged):
            store.get_range("large", 0, 1, e_tag=earlier.e_tag)

    def test_a_failing_part_changes_nothing(self, store: Store) -> None:
        """A part whose source fails is not acknowledged, and the one sent before stays whole."""
        parts, _ = self._parts(store, 1)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        with raises(_SourceFailed):
            store.put_part("large", upload_id, 1, _failing_body(b"abc", len(parts[0])))
        assert store.list_parts("large", upload_id) == []
        part = store.put_part("large", upload_id, 1, Body.of(parts[0]))
        with raises(_SourceFailed):
            store.put_part("large", upload_id, 1, _failing_body(b"abc", len(parts[0])))
        store.complete_multipart("large", upload_id, [part])
        assert store.get("large", max_bytes=len(parts[0])).data == parts[0]

    def test_uploads_are_told_apart(self, store: Store) -> None:
        """Uploads of one key do not mix, and are listed by prefix."""
        self._need_multipart(store)
        size = max(store.capabilities().min_part_size, 10)
        ids = {key: store.create_multipart(key, part_size=size) for key in ("b/one", "a/one", "b/two")}
        second = store.create_multipart("b/one", part_size=size)
        store.put_part("b/one", second, 1, Body.of(b"second"))
        assert store.list_parts("b/one", ids["b/one"]) == []
        assert sorted((upload.key, upload.upload_id) for upload in store.list_uploads("b/")) == sorted(
            [("b/one", ids["b/one"]), ("b/one", second), ("b/two", ids["b/two"])]
        )
        assert [upload.upload_id for upload in store.list_uploads("a/o")] == [ids["a/one"]]

    def test_an_upload_id_belongs_to_its_key(self, store: Store) -> None:
        """With another key the id is unknown."""
        self._need_multipart(store)
        upload_id = store.create_multipart("one", part_size=max(store.capabilities().min_part_size, 10))
        part = store.put_part("one", upload_id, 1, Body.of(b"1"))
        for call in (
            lambda: store.put_part("two", upload_id, 1, Body.of(b"2")),
            lambda: store.list_parts("two", upload_id),
        ):
            with raises(NoSuchUpload):
                call()
        store.abort_multipart("two", upload_id)
        assert [listed[:3] for listed in store.list_parts("one", upload_id)] == [part[:3]]

    def test_a_second_complete_changes_nothing(self, store: Store) -> None:
        """The second complete reports that the upload is gone, or (some S3 servers) the object that exists."""
        parts, _ = self._parts(store, 1)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        part = store.put_part("large", upload_id, 1, Body.of(parts[0]))
        meta = store.complete_multipart("large", upload_id, [part])
        with suppress(NoSuchUpload):
            assert store.complete_multipart("large", upload_id, [part]).e_tag == meta.e_tag
        assert store.head("large").e_tag == meta.e_tag
        assert store.get("large", max_bytes=len(parts[0])).data == parts[0]

    def test_parts_may_come_from_several_threads(self, store: Store) -> None:
        """Threads send parts of one upload at once."""
        parts, data = self._parts(store, 4)
        upload_id = store.create_multipart("large", part_size=len(parts[0]))
        acknowledged = _together(4, lambda n: store.put_part("large", upload_id, n + 1, Body.of(parts[n])))
        store.complete_multipart("large", upload_id, acknowledged)
        assert store.get("large", max_bytes=len(data)).data == data

    def test_parts_may_come_from_several_processes(self, store: Store) -> None:
        """Processes send parts of one upload at once, and any of them completes it."""
        self._need_multipart(store)
        size = max(store.capabilities().min_part_size, 10_000)
        upload_id = store.create_multipart("large", part_size=size)
        jobs = [("parts", "large", upload_id, size, numbers) for numbers in ([5, 1], [4, 2], [3])]
        assert self._in_processes(store, jobs) == ["2", "2", "1"]
        parts = store.list_parts("large", upload_id)
        assert [part.part_number for part in parts] == [1, 2, 3, 4, 5]
        store.complete_multipart("large", upload_id, parts)
        assert store.get("large", max_bytes=5 * size).data == b"".join(bytes([n]) * size for n in range(1, 6))

    def test_multipart_is_refused_where_there_is_none(self, store: Store) -> None:
        """A store without multipart uploads names itself and the missing capability."""
        if store.capabilities().multipart:
            raise unittest.SkipTest("the store has multipart uploads")
        for call in (
            lambda: store.create_multipart("key", part_size=1),
            lambda: store.put_part("key", "id", 1, Body.of(b"")),
            lambda: store.list_parts("key", "id"),
            store.list_uploads,
            lambda: store.complete_multipart("key", "id", []),
            lambda: store.abort_multipart("key", "id"),
        ):
            with raises(Unsupported) as refusal:
                call()
            assert (refusal.value.store, refusal.value.capability) == (store.url, "multipart uploads")

    # Helpers of the tests

    @staticmethod
    def _need_conditional(store: Store) -> None:
        if not store.capabilities().conditional:
            raise unittest.SkipTest("the store has no conditional writes")

    @staticmethod
    def _need_multipart(store: Store) -> None:
        if not store.capabilities().multipart:
            raise unittest.SkipTest("the store has no multipart uploads")

    def _parts(self, store: Store, count: int) -> tuple[list[bytes], bytes]:
        """Parts of the smallest size that the store allows, the last one smaller, and their bytes together."""
        self._need_multipart(store)
        size = max(store.capabilities().min_part_size, 10_000)
        data = _noise(size * count - size // 3)
        return [data[start : start + size] for start in range(0, len(data), size)], data

    @staticmethod
    def _assert_gone(store: Store, upload_id: str) -> None:
        for call in (
            lambda: store.list_parts("large", upload_id),
            lambda: store.put_part("large", upload_id, 1, Body.of(b"late")),
        ):
            with raises(NoSuchUpload) as refusal:
                call()
            assert (refusal.value.key, refusal.value.upload_id) == ("large", upload_id)

    def _in_processes(self, store: Store, jobs: Sequence[tuple[Any, ...]]) -> list[str]:
        """The output of one process per job; they start together."""
        opening = self.how_to_open(store)
        if opening is None:
            raise unittest.SkipTest("the store cannot be opened by another process")
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, json.dumps([*opening, *job])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for job in jobs
        ]
        try:
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n"
            for child in children:
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
            return [child.communicate(timeout=60)[0].strip() for child in children]
        finally:
            for child in children:
                child.kill()
                child.communicate()


def _together(count: int, call: Callable[[int], _T]) -> list[_T]:
    """The results of `call(0)` to `call(count - 1)`, started at the same moment."""
    barrier = threading.Barrier(count)

    def run(number: int) -> _T:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
