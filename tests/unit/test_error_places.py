"""An error says where it happened: the server that was not reached, the bucket that is not there, the store and key."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, Final

import pytest

from blobflow.errors import BlobflowError, StoreConfigurationError, StoreUnavailable, SystemLimit
from blobflow.mirror.client import MirrorClient
from blobflow.stores import open_store
from blobflow.stores.optional import Coroutines
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Options, S3Store
from blobflow.streams.http_source import HttpSource
from tests.servers import Peer, free_port, scripted_server

KEYS: Final[dict[str, Any]] = {"access_key_id": "key", "secret_access_key": "secret"}


def by_store(url: str) -> object:
    with closing(open_store("s3://bucket/below", endpoint_url=url, patience_s=0.001, **KEYS)) as store:
        return store.get("k", max_bytes=1)


def by_batch(url: str) -> object:
    async def get() -> object:
        store = RetryingStore(
            S3Store(S3Options(bucket="bucket", prefix="below", endpoint_url=url, **KEYS)), patience_s=0
        )
        found = store.coroutines()
        assert isinstance(found, Coroutines)
        try:
            return await found.get("k", max_bytes=1)
        finally:
            await found.close()

    return asyncio.run(get())


def by_source(url: str) -> object:
    return HttpSource(url, patience_s=0, sleep=lambda _: None).pin()


def by_receiver(url: str) -> object:
    with MirrorClient(url, token="a token of sixteen") as client:
        return client.snapshots()


WIRES: Final = [by_store, by_batch, by_source, by_receiver]


@pytest.mark.parametrize("call", WIRES, ids=lambda call: call.__name__)
def test_a_refused_connection_names_host_and_port(call: Callable[[str], object]):
    """What was not reached, and why, in the words of the system; through every wire."""
    port = free_port()
    with pytest.raises(StoreUnavailable, match=f"no connection to 127.0.0.1:{port}: Connection refused") as refusal:
        call(f"http://127.0.0.1:{port}")
    if call in (by_store, by_batch):
        assert refusal.value.fields["store"] == f"s3://bucket/below at http://127.0.0.1:{port}"
        assert refusal.value.fields["key"] == "k"


@pytest.mark.parametrize("call", WIRES, ids=lambda call: call.__name__)
def test_a_name_that_is_unknown_is_named(call: Callable[[str], object]):
    """A typing error in the endpoint."""
    with pytest.raises(StoreUnavailable, match=r"no connection to no-such-host\.invalid:9000: "):
        call("http://no-such-host.invalid:9000")


@pytest.mark.parametrize("call", WIRES, ids=lambda call: call.__name__)
def test_too_many_open_files_is_no_fault_of_the_server(call: Callable[[str], object]):
    """`ulimit -n`: final, and named with its remedy, instead of two minutes of trying again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(BlobflowError):
        call(f"http://127.0.0.1:{free_port()}")  # what it imports and opens besides is there then
    needed = 3 if call is by_batch else 0  # by the event loop itself
    free = [os.dup(0) for _ in range(needed + 1)]  # the lowest ones; there may be open ones between them
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], before[1]))
    try:
        with pytest.raises(SystemLimit, match="Too many open files") as refusal:
            call("http://127.0.0.1:1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "ulimit -n" in refusal.value.hint


def refuses(code: str) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.request()
        peer.refuse(404, code)

    return script


@pytest.mark.parametrize("code", ["NoSuchBucket", ""])
def test_a_bucket_that_is_not_there_is_named(code: str):
    """Not the object that was asked for: there is no bucket, at this server; the remedy is said."""
    with scripted_server(refuses(code)) as url:
        store = RetryingStore(S3Store(S3Options(bucket="bukket", prefix="below", endpoint_url=url, **KEYS)))
        with pytest.raises(StoreConfigurationError) as refusal:
            list(store.list())
        store.close()
    assert refusal.value.message == f"there is no bucket 'bukket' (s3://bukket/below at {url})"
    assert refusal.value.fields["bucket"] == "bukket"
    assert "create the bucket" in refusal.value.hint


@pytest.mark.parametrize("code", ["NoSuchBucket", ""])
def test_the_first_push_to_a_bucket_that_is_not_there_names_it(code: str):
    """The probe is what meets it first; its object is of no interest. A write finds nothing else missing."""
    with scripted_server(refuses(code)) as url:
        store = open_store("s3://bukket", endpoint_url=url, **KEYS)
        with pytest.raises(StoreConfigurationError, match="there is no bucket 'bukket'") as refusal:
            store.put("blobflow-probe/x", b"x")
        store.close()
    assert "blobflow-probe" not in refusal.value.message
