"""The S3 store against moto, and against a Ceph RADOS Gateway where there is one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import s3fs
from pydantic import SecretStr

from blobflow.checksum import combine_all, crc32c
from blobflow.errors import (
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    SizeMismatch,
    StoreConfigurationError,
    UploadIncomplete,
    UsageError,
)
from blobflow.stores.base import Body, PutMode
from blobflow.stores.s3 import store as s3_module
from blobflow.stores.s3.store import S3Options, S3Store
from tests.servers import S3Endpoint

MIB = 1024 * 1024
AWKWARD_KEYS = [
    "plain",
    "with space/a+b",
    "per%20cent %2F",
    "question?query=1&x=#fragment",
    "ünïcode/日本語/🎈",
    "quotes'\"<>",
    "~tilde/(a)!*;:@,$=[]^`{}|\\",
]


@pytest.fixture(params=["moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def endpoint(request: pytest.FixtureRequest) -> S3Endpoint:
    return request.getfixturevalue(f"{request.param}_s3")


@pytest.fixture
def open_s3(endpoint: S3Endpoint) -> Iterator[Callable[..., S3Store]]:
    """Makes stores on one fresh bucket."""
    bucket = endpoint.new_bucket()
    stores: list[S3Store] = []

    def make(**options: Any) -> S3Store:
        defaults = {
            "bucket": bucket,
            "prefix": "team/blobs",
            "endpoint_url": endpoint.endpoint_url,
            "access_key_id": endpoint.access_key_id,
            "secret_access_key": endpoint.secret_access_key,
            "idle_timeout": 60.0,
        }
        stores.append(S3Store(S3Options.model_validate(defaults | options)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(open_s3: Callable[..., S3Store]) -> S3Store:
    return open_s3()


@pytest.mark.parametrize("key", AWKWARD_KEYS)
def test_every_key_means_the_same_everywhere(store: S3Store, key: str) -> None:
    """A key of any characters is written, read, listed, copied, completed and deleted under its own name."""
    data = key.encode()
    put = store.put(key, data)
    assert store.get(key, max_bytes=1000).data == data
    assert store.get_range(key, 1, len(data) - 1, e_tag=put.e_tag) == data[1:]
    assert store.head(key).size == len(data)
    assert [found.key for found in store.list()] == [key]
    store.copy(key, f"copy of/{key}")
    assert store.get(f"copy of/{key}", max_bytes=1000).data == data
    upload_id = store.create_multipart(key, part_size=5 * MIB)
    assert [upload.key for upload in store.list_uploads()] == [key]
    part = store.put_part(key, upload_id, 1, Body.of(b"other"))
    assert store.complete_multipart(key, upload_id, [part]).e_tag == store.head(key).e_tag
    assert store.get(key, max_bytes=1000).data == b"other"
    store.delete(key)
    assert not store.exists(key)


def test_one_object_has_one_entity_tag(store: S3Store) -> None:
    """Put, head, get and list give the same entity tag, with its quotes."""
    tags = {
        store.put("a", b"1").e_tag,
        store.head("a").e_tag,
        store.get("a", max_bytes=1).meta.e_tag,
        next(store.list()).e_tag,
    }
    assert len(tags) == 1
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)


def test_an_empty_object_is_an_object(store: S3Store) -> None:
    """Zero bytes can be put, read whole and read as a range of nothing."""
    store.put("empty", b"")
    assert store.get("empty", max_bytes=0).data == b""
    assert store.get_range("empty", 0, 0) == b""
    assert store.head("empty").size == 0


def test_create_only_writes_once(store: S3Store) -> None:
    """Of sixteen writers that create the same key at once, one wins and the object is its own."""

    def write(number: int) -> int | None:
        try:
            store.put("k", str(number).encode(), mode=PutMode.CREATE)
        except PreconditionFailed:
            return None
        return number

    with ThreadPoolExecutor(4) as threads:
        winners = [won for won in threads.map(write, range(16)) if won is not None]
    assert [str(won).encode() for won in winners] == [store.get("k", max_bytes=10).data]


def test_compare_and_swap(store: S3Store) -> None:
    """An update succeeds against the tag it names; a stale tag and a missing object are refused, unchanged."""
    first = store.put("k", b"1")
    second = store.put("k", b"2", mode=PutMode.UPDATE, e_tag=first.e_tag)
    third = store.put("k", b"3", mode=PutMode.UPDATE, e_tag=second.e_tag)
    with pytest.raises(PreconditionFailed) as lost:
        store.put("k", b"4", mode=PutMode.UPDATE, e_tag=first.e_tag)
    assert lost.value.expected == first.e_tag
    assert store.get("k", max_bytes=10).data == b"3"
    assert store.head("k").e_tag == third.e_tag
    with pytest.raises(PreconditionFailed):
        store.put("absent", b"4", mode=PutMode.UPDATE, e_tag=first.e_tag)
    assert not store.exists("absent")


def test_a_lost_swap_names_the_tag_it_met(open_s3: Callable[..., S3Store]) -> None:
    """The first lost compare-and-swap of a store says what the object is now."""
    first = open_s3().put("k", b"1")
    second = open_s3().put("k", b"2")
    with pytest.raises(PreconditionFailed) as lost:
        open_s3().put("k", b"3", mode=PutMode.UPDATE, e_tag=first.e_tag)
    assert (lost.value.expected, lost.value.actual) == (first.e_tag, second.e_tag)


def test_a_tag_belongs_to_update_alone(store: S3Store) -> None:
    """An update without a tag, and a tag without an update, are refused before anything is sent."""
    with pytest.raises(UsageError):
        store.put("k", b"1", mode=PutMode.UPDATE)
    with pytest.raises(UsageError):
        store.put("k", b"1", e_tag='"x"')
    assert not store.exists("k")


def test_a_pinned_read_never_mixes_objects(store: S3Store) -> None:
    """A range pinned to a tag is refused once the object was replaced."""
    old = store.put("k", b"old!")
    store.put("k", b"new!")
    with pytest.raises(ObjectChanged) as changed:
        store.get_range("k", 0, 4, e_tag=old.e_tag)
    assert changed.value.expected == old.e_tag
    assert store.get_range("k", 0, 4) == b"new!"


@pytest.mark.parametrize(("offset", "length"), [(0, 5), (3, 2), (4, 1), (100, 1)])
def test_a_range_past_the_end_is_refused(store: S3Store, offset: int, length: int) -> None:
    """A range that the object cannot fill is a SizeMismatch, whether it starts inside or outside."""
    store.put("k", b"1234")
    with pytest.raises(SizeMismatch):
        store.get_range("k", offset, length)


def test_absent_objects_are_not_found(store: S3Store) -> None:
    """Every reader says ObjectNotFound with the key; deleting what is absent is no error."""
    for read in (
        lambda: store.get("no", max_bytes=1),
        lambda: store.get_range("no", 0, 1),
        lambda: store.head("no"),
        lambda: store.copy("no", "other"),
    ):
        with pytest.raises(ObjectNotFound) as missing:
            read()
        assert missing.value.key == "no"
    store.delete("no")


def test_get_is_bounded(store: S3Store) -> None:
    """An object one byte above the limit is refused; one of exactly the limit is given."""
    store.put("k", b"12345")
    assert store.get("k", max_bytes=5).data == b"12345"
    with pytest.raises(ObjectTooLarge) as refusal:
        store.get("k", max_bytes=4)
    assert refusal.value.limit == 4


def test_listing_is_paged_ordered_and_relative(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages give all keys in UTF-8 order, relative to the prefix, and only those that belong."""
    monkeypatch.setattr(s3_module, "PAGE", 3)
    keys = sorted(["a", "a/b", "a/c", "b", "ba", "b/é", "b/z", "日本", "🎈", "A"], key=str.encode)
    for key in keys:
        store.put(key, b"")
    assert [found.key for found in store.list()] == keys
    assert [found.key for found in store.list("b")] == [key for key in keys if key.startswith("b")]
    for number, key in enumerate(keys):
        assert [found.key for found in store.list(start_after=key)] == keys[number + 1 :]


def test_listing_passes_over_foreign_keys(endpoint: S3Endpoint, store: S3Store) -> None:
    """Folder markers, double slashes and objects outside the prefix do not show up and do no harm."""
    store.put("mine", b"")
    for foreign in ("team/blobs/", "team/blobs/folder/", "team/blobs/a//b", "team/blobsimilar", "outside"):
        endpoint.client.put_object(Bucket=store.options.bucket, Key=foreign, Body=b"")
    assert [found.key for found in store.list()] == ["mine"]


def test_copy_in_parts(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object above the limit of CopyObject is copied in parts, byte for byte, leaving no upload behind."""
    monkeypatch.setattr(s3_module, "COPY_LIMIT_BYTES", 5 * MIB)
    monkeypatch.setattr(s3_module, "COPY_PART_BYTES", 5 * MIB)
    data = os.urandom(5 * MIB) + b"tail"
    store.put("big", data)
    assert store.copy("big", "copy").size == len(data)
    assert store.get("copy", max_bytes=len(data)).data == data
    assert store.list_uploads() == []


def test_an_upload_survives_the_store_that_began_it(open_s3: Callable[..., S3Store]) -> None:
    """Another store object lists the parts, adds one, replaces one and completes; nothing shows before."""
    first, second = open_s3(), open_s3()
    one, two, tail = os.urandom(5 * MIB), os.urandom(5 * MIB), b"tail"
    upload_id = first.create_multipart("k", part_size=5 * MIB)
    first.put_part("k", upload_id, 3, Body.of(tail))
    first.put_part("k", upload_id, 1, Body.of(two))
    sent = first.put_part("k", upload_id, 1, Body.of(one))
    assert sent.crc32c == crc32c(one)
    second.put_part("k", upload_id, 2, Body.of(two))
    assert not second.exists("k")
    parts = second.list_parts("k", upload_id)
    assert [(part.part_number, part.size) for part in parts] == [(1, len(one)), (2, len(two)), (3, len(tail))]
    assert parts[0].e_tag == sent.e_tag
    done = second.complete_multipart("k", upload_id, parts)
    assert (done.size, done.e_tag) == (first.head("k").size, first.head("k").e_tag)
    whole = one + two + tail
    assert first.get_range("k", 0, len(whole), e_tag=done.e_tag) == whole
    with pytest.raises(NoSuchUpload) as gone:
        first.put_part("k", upload_id, 4, Body.of(b"late"))
    assert gone.value.upload_id == upload_id
    with pytest.raises(NoSuchUpload):
        first.list_parts("k", upload_id)


def test_a_body_may_come_in_pieces(store: S3Store) -> None:
    """A body without a known checksum, in pieces of odd sizes, arrives whole with the right checksum."""
    pieces = [os.urandom(size) for size in (1, 300_000, 0, 7, 1_000_003)]
    body = Body(sum(map(len, pieces)), lambda: iter(pieces))
    upload_id = store.create_multipart("k", part_size=5 * MIB)
    part = store.put_part("k", upload_id, 1, body)
    assert part.crc32c == combine_all((crc32c(piece), len(piece)) for piece in pieces)
    store.complete_multipart("k", upload_id, [part])
    assert store.get("k", max_bytes=body.size).data == b"".join(pieces)


@pytest.mark.parametrize("promised", [3, 5])
def test_a_body_of_another_length_is_refused(store: S3Store, promised: int) -> None:
    """A body that is shorter or longer than it says raises SizeMismatch and stores nothing."""
    with pytest.raises(SizeMismatch) as refusal:
        store.put("k", Body(promised, lambda: [b"12", b"34"]))
    assert (refusal.value.expected, refusal.value.actual) == (promised, 4)
    assert not store.exists("k")
    assert store.put("k", b"1").size == 1  # the broken connection went away with the broken request


@pytest.mark.seed("3.18", "W3.1")
def test_all_parts_are_listed(store: S3Store) -> None:
    """1,201 parts lie on two pages, and every one of them is listed once."""
    upload_id = store.create_multipart("k", part_size=5 * MIB)

    def send(number: int) -> None:
        store.put_part("k", upload_id, number, Body.of(b"x"))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, range(1, 1202)))
    assert [part.part_number for part in store.list_parts("k", upload_id)] == list(range(1, 1202))
    store.abort_multipart("k", upload_id)


def test_exactly_one_page_of_parts_ends(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that fills its last page to the brim ends there."""
    monkeypatch.setattr(s3_module, "PAGE", 2)
    upload_id = store.create_multipart("k", part_size=5 * MIB)
    for number in (1, 2, 5, 6):
        store.put_part("k", upload_id, number, Body.of(b"x"))
    assert [part.part_number for part in store.list_parts("k", upload_id)] == [1, 2, 5, 6]


def test_uploads_are_listed_below_their_prefix(store: S3Store) -> None:
    """Uploads show under keys that start with the prefix until they are aborted."""
    first = store.create_multipart("x/1", part_size=5 * MIB)
    second = store.create_multipart("x/1", part_size=5 * MIB)
    other = store.create_multipart("y/1", part_size=5 * MIB)
    assert {upload.upload_id for upload in store.list_uploads("x/")} == {first, second}
    store.abort_multipart("x/1", first)
    assert {upload.upload_id for upload in store.list_uploads()} == {second, other}


@pytest.mark.seed("3.12")
def test_gaps_are_refused_before_sending(store: S3Store) -> None:
    """Parts that are not dense from 1 are not sent to be completed; the upload lives on."""
    upload_id = store.create_multipart("k", part_size=5 * MIB)
    one, two, three = (store.put_part("k", upload_id, number, Body.of(b"x")) for number in (1, 2, 3))
    for wrong in ([], [two], [one, three], [two, one], [one, one]):
        with pytest.raises(UploadIncomplete):
            store.complete_multipart("k", upload_id, wrong)
    assert len(store.list_parts("k", upload_id)) == 3


def test_abort_may_be_repeated(store: S3Store) -> None:
    """An aborted upload has no parts; aborting it again is no error."""
    upload_id = store.create_multipart("k", part_size=5 * MIB)
    store.put_part("k", upload_id, 1, Body.of(b"x"))
    store.abort_multipart("k", upload_id)
    store.abort_multipart("k", upload_id)
    assert store.list_uploads() == []


def test_a_missing_bucket_is_a_configuration_error(open_s3: Callable[..., S3Store]) -> None:
    """Readers, writers and lists of a bucket that is not there say so, with a hint."""
    store = open_s3(bucket="no-such-bucket-here")
    for call in (
        lambda: store.put("k", b""),
        lambda: store.put("k", b"", mode=PutMode.UPDATE, e_tag='"x"'),
        lambda: store.get("k", max_bytes=1),
        lambda: list(store.list()),
        lambda: store.create_multipart("k", part_size=5 * MIB),
    ):
        with pytest.raises(StoreConfigurationError) as wrong:
            call()
        assert "bucket" in wrong.value.hint


@pytest.mark.rgw
def test_wrong_keys_are_a_configuration_error(rgw_s3: S3Endpoint) -> None:
    """A wrong secret and an unknown access key are told apart from a missing object."""
    bucket = rgw_s3.new_bucket()
    for keys in ((rgw_s3.access_key_id, "wrong"), ("unknown", rgw_s3.secret_access_key)):
        options = S3Options(
            bucket=bucket, endpoint_url=rgw_s3.endpoint_url, access_key_id=keys[0], secret_access_key=SecretStr(keys[1])
        )
        with closing(S3Store(options)) as store:
            with pytest.raises(StoreConfigurationError) as wrong_get:
                store.get("k", max_bytes=1)
            with pytest.raises(StoreConfigurationError) as wrong_list:
                list(store.list())
        for wrong in (wrong_get, wrong_list):
            assert wrong.value.status == 403
            assert "key" in wrong.value.hint


@pytest.mark.rgw
def test_connections_are_used_again(rgw_s3: S3Endpoint) -> None:
    """Fifty requests of one thread, refusals among them, need one connection."""
    store = S3Store(
        S3Options(
            bucket=rgw_s3.new_bucket(),
            endpoint_url=rgw_s3.endpoint_url,
            access_key_id=rgw_s3.access_key_id,
            secret_access_key=SecretStr(rgw_s3.secret_access_key),
        )
    )
    for number in range(25):
        store.put(f"k{number}", b"1" * number)
        with pytest.raises(ObjectNotFound):
            store.get("absent", max_bytes=1)
    assert "1 idle" in repr(store.connected().client)
    store.close()


def test_s3fs_and_blobflow_read_each_other(endpoint: S3Endpoint, store: S3Store) -> None:
    """What blobflow puts or completes s3fs reads, and the reverse."""
    files = s3fs.S3FileSystem(
        key=endpoint.access_key_id,
        secret=endpoint.secret_access_key,
        endpoint_url=endpoint.endpoint_url,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    root = f"{store.options.bucket}/team/blobs"
    data = os.urandom(5 * MIB) + b"tail"
    store.put("small + ü", data[:100])
    upload_id = store.create_multipart("large", part_size=5 * MIB)
    cuts = (data[: 5 * MIB], data[5 * MIB :])
    parts = [store.put_part("large", upload_id, number, Body.of(cut)) for number, cut in enumerate(cuts, start=1)]
    store.complete_multipart("large", upload_id, parts)
    assert files.cat_file(f"{root}/small + ü") == data[:100]
    assert files.cat_file(f"{root}/large") == data
    assert sorted(files.ls(root, detail=False)) == [f"{root}/large", f"{root}/small + ü"]

    with files.open(f"{root}/from s3fs", "wb", block_size=5 * MIB) as out:
        out.write(data)  # pyright: ignore[reportArgumentType]  # fsspec's stubs know text only
    assert store.get_range("from s3fs", 5 * MIB - 2, 6, e_tag=store.head("from s3fs").e_tag) == data[-6:]
    assert store.get("from s3fs", max_bytes=len(data)).data == data


def test_threads_share_a_store(store: S3Store) -> None:
    """Eight threads that start on an unconnected store at the same instant all get through."""
    start = threading.Barrier(8)

    def work(number: int) -> bytes:
        start.wait()
        store.put(f"k{number}", bytes([number]) * 100_000)
        return store.get_range(f"k{number}", 0, 100_000)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [bytes([number]) * 100_000 for number in range(8)]
