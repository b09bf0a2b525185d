"""A store whose payload requests obey limits that the stores of a process share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from typing_extensions import Unpack, override

from blobflow.activity import doing
from blobflow.checksum import Buffer
from blobflow.errors import SlowDown
from blobflow.limits import AdaptiveLimit, Bandwidth
from blobflow.stores.base import Body, ObjectMeta, PartMeta, PutOptions, Store, StoredObject
from blobflow.stores.optional import Coroutines, HasCoroutines, coroutines_of
from blobflow.stores.wrapping import WrappingStore


class LimitedStore(WrappingStore, HasCoroutines):
    """Makes payload requests wait for a free place among the requests in flight, and for bandwidth.

    It belongs below `RetryingStore`: every attempt counts, and an attempt that waits for its retry holds no place. An
    endpoint that answers `SlowDown` gets half as many requests at a time, until it stops.

    Args:
        store: The store that makes the attempts.
        requests: Limit of payload requests in flight; shared by the stores of one endpoint.
        bandwidth: Limit of payload bytes in both directions; None for no limit.
    """

    def __init__(self, store: Store, *, requests: AdaptiveLimit, bandwidth: Bandwidth | None = None) -> None:
        super().__init__(store)
        self.requests = requests
        self.bandwidth = bandwidth

    @override
    def put(self, key: str, body: Buffer | Body, **options: Unpack[PutOptions]) -> ObjectMeta:
        content = body if isinstance(body, Body) else Body.of(body)
        with self._place(content.size):
            return self.store.put(key, content, **options)

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        with self._place(body.size):
            return self.store.put_part(key, upload_id, part_number, body)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        with self._place(0):
            found = self.store.get(key, max_bytes=max_bytes)
        if self.bandwidth is not None:
            self.bandwidth.take(len(found.data))  # the size is known only now, so later requests wait for it
        return found

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        with self._place(len(buffer)):
            self.store.get_range_into(key, offset, buffer, e_tag=e_tag)

    @override
    def coroutines(self) -> Coroutines | None:
        inner = coroutines_of(self.store)
        if inner is None:
            return None
        # Loads asyncio, which only batches need.
        from blobflow.stores.coroutines import LimitedCoroutines

        return LimitedCoroutines(inner, self.requests, self.bandwidth)

    @contextmanager
    def _place(self, size: int) -> Generator[None]:
        with doing(f"waiting for a place among {self.requests!r}"), self.requests.slot() as answered:
            if self.bandwidth is not None:
                with doing("waiting for bandwidth", quiet=True):
                    self.bandwidth.take(size)
            with doing(f"moving {size} bytes"):
                try:
                    yield
                except SlowDown:
                    answered(True)
                    raise
            answered(False)
