"""The wrappers of stores for coroutines: retries and limits that wait without blocking a thread.

They are a separate module because the import of asyncio takes too long for small commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from blobflow.activity import doing
from blobflow.backoff import Backoff
from blobflow.errors import BlobflowError, SlowDown
from blobflow.limits import AdaptiveLimit, Bandwidth
from blobflow.stores.base import Body, ObjectMeta, StoredObject
from blobflow.stores.optional import Coroutines

if TYPE_CHECKING:
    from blobflow.stores.retry import RetryingStore

_T = TypeVar("_T")


class RetryingCoroutines(Coroutines):
    """`RetryingStore` for coroutines; it adds to the counters of the store."""

    def __init__(self, inner: Coroutines, store: RetryingStore) -> None:
        self._inner = inner
        self._store = store

    @override
    async def put(self, key: str, body: Body) -> ObjectMeta:
        return await self._call("put", key, lambda: self._inner.put(key, body))

    @override
    async def get(self, key: str, *, max_bytes: int) -> StoredObject:
        return await self._call("get", key, lambda: self._inner.get(key, max_bytes=max_bytes))

    @override
    async def delete(self, key: str) -> None:
        await self._call("delete", key, lambda: self._inner.delete(key))

    @override
    async def close(self) -> None:
        await self._inner.close()

    async def _call(self, operation: str, key: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        backoff = Backoff(self._store.patience_s, self._store.clock)
        with doing(f"{operation} of {key!r}", where=self._store.place, task=asyncio.current_task()) as activity:
            while True:
                try:
                    return await attempt()
                except BlobflowError as error:
                    wait_s = self._store.wait_s(backoff, operation, key, error)
                    reason = error.message
                activity.blocked_by(f"{reason}; next attempt in {wait_s:.0f} s")
                await asyncio.sleep(wait_s)
                activity.blocked_by(f"{reason}; trying again")


class LimitedCoroutines(Coroutines):
    """`LimitedStore` for coroutines."""

    def __init__(self, inner: Coroutines, requests: AdaptiveLimit, bandwidth: Bandwidth | None) -> None:
        self._inner = inner
        self._requests = requests
        self._bandwidth = bandwidth

    @override
    async def put(self, key: str, body: Body) -> ObjectMeta:
        await self._pay(body.size)
        return await self._in_a_place(lambda: self._inner.put(key, body))

    @override
    async def get(self, key: str, *, max_bytes: int) -> StoredObject:
        found = await self._in_a_place(lambda: self._inner.get(key, max_bytes=max_bytes))
        await self._pay(len(found.data))
        return found

    @override
    async def delete(self, key: str) -> None:
        await self._in_a_place(lambda: self._inner.delete(key))

    @override
    async def close(self) -> None:
        await self._inner.close()

    async def _pay(self, size: int) -> None:
        if self._bandwidth is not None and (wait_s := self._bandwidth.reserve(size)) > 0:
            await asyncio.sleep(wait_s)

    async def _in_a_place(self, request: Callable[[], Awaitable[_T]]) -> _T:
        epoch = self._requests.begin()
        if epoch is None:
            epoch = await self._wait()
        try:
            answer = await request()
        except SlowDown:
            self._requests.answered(epoch, True)
            raise
        else:
            self._requests.answered(epoch, False)
            return answer
        finally:
            self._requests.end()

    async def _wait(self) -> int:
        loop = asyncio.get_running_loop()
        while True:
            free: asyncio.Future[None] = loop.create_future()
            epoch = self._requests.begin(lambda free=free: self._told(loop, free))
            if epoch is not None:
                return epoch
            try:
                await free
            except asyncio.CancelledError:
                if not free.cancelled():  # it got a free place, but is cancelled: wake the next one
                    self._requests.wake()
                raise

    def _told(self, loop: asyncio.AbstractEventLoop, free: asyncio.Future[None]) -> None:
        """Report a free place to `free`; may be called by any thread."""

        def tell() -> None:
            if free.cancelled():
                self._requests.wake()
            else:
                free.set_result(None)

        try:
            loop.call_soon_threadsafe(tell)
        except RuntimeError:  # the loop is closed, so nothing waits there any more
            self._requests.wake()
