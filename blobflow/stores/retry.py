"""A store that repeats calls after temporary errors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from typing_extensions import Unpack, override

from blobflow.activity import doing
from blobflow.backoff import DEFAULT_PATIENCE_S, Backoff
from blobflow.checksum import Buffer
from blobflow.errors import (
    BlobflowError,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    SlowDown,
    StoreUnavailable,
    TimedOut,
)
from blobflow.forks import reset_after_fork_of
from blobflow.stores.base import Body, ObjectMeta, PutOptions, Store
from blobflow.stores.optional import Coroutines, HasCoroutines, coroutines_of
from blobflow.stores.wrapping import WrappingStore

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_READ_BACK_BYTES = 2 * 1024 * 1024
"""Most bytes that are read back. Conditional writes are manifests, refs and leases, which are all smaller."""


class RetryingStore(WrappingStore, HasCoroutines):
    """Repeats calls of any `store` that failed with `StoreUnavailable`, `SlowDown` or `TimedOut`.

    `blobflow.backoff` decides the waits. A call fails when its patience ends, with the error of its last attempt.
    `ObjectChanged` and all other errors are raised at once.

    A conditional put may be refused because of its own success: the first attempt arrived, its response was lost, and
    the second attempt is refused. Then the object is read back, and equal bytes count as success. This cannot
    distinguish two writers of equal bytes, so each writer in a race must write something unique into the object. An
    object above 2 MiB is not read back; the put is refused.

    `complete_multipart` may raise `NoSuchUpload` for the same reason; the transport then checks the object.

    Args:
        store: The store that makes the attempts.
        patience_s: Seconds from the first failure of a call to its last attempt.
        sleep: Waits the given seconds.
        clock: Seconds, monotonic.

    Attributes:
        retries: Number of attempts repeated so far, over all calls.
        slow_downs: Number of repeated attempts that the store answered with SlowDown.
        patience_s: The argument of this name.
        clock: The argument of this name.
    """

    def __init__(
        self,
        store: Store,
        *,
        patience_s: float = DEFAULT_PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(store)
        self.retries = 0
        self.slow_downs = 0
        self.patience_s = patience_s
        self._sleep = sleep
        self.clock = clock
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._lock = threading.Lock()

    @override
    def put(self, key: str, body: Buffer | Body, **options: Unpack[PutOptions]) -> ObjectMeta:
        content = body if isinstance(body, Body) else Body.of(body)
        attempts = 0

        def attempt() -> ObjectMeta:
            nonlocal attempts
            attempts += 1
            return self.store.put(key, content, **options)

        try:
            return self._call("put", key, attempt)
        except PreconditionFailed:
            arrived = self._read_back(key, content) if attempts > 1 else None
            if arrived is None:
                raise
            return arrived

    def _read_back(self, key: str, body: Body) -> ObjectMeta | None:
        """The description of the object under `key` if its bytes equal `body`; otherwise None."""
        if body.size > _READ_BACK_BYTES:
            return None
        try:
            found = self.get(key, max_bytes=body.size)
        except (ObjectNotFound, ObjectTooLarge):
            return None
        if found.data != b"".join(body):
            return None
        _log.info("store.put_arrived key=%s", key)
        return found.meta

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        after = start_after
        rest: Iterator[ObjectMeta] | None = None

        def following() -> ObjectMeta | None:
            nonlocal rest
            if rest is None:
                rest = self.store.list(prefix, start_after=after)
            try:
                return next(rest, None)
            except BaseException:
                rest = None  # a generator ends when it raises, so the next attempt begins after the last key
                raise

        while (meta := self._call("list", prefix, following)) is not None:
            after = meta.key
            yield meta

    @override
    def _call(self, operation: str, key: str, attempt: Callable[[], _T]) -> _T:
        backoff = Backoff(self.patience_s, self.clock)
        with doing(f"{operation} of {key!r}", where=self.place) as activity:
            while True:
                try:
                    return attempt()
                except BlobflowError as error:
                    wait_s = self.wait_s(backoff, operation, key, error)
                    reason = error.message
                activity.blocked_by(f"{reason}; next attempt in {wait_s:.0f} s")
                self._sleep(wait_s)
                activity.blocked_by(f"{reason}; trying again")

    @override
    def coroutines(self) -> Coroutines | None:
        inner = coroutines_of(self.store)
        if inner is None:
            return None
        # Loads asyncio, which only batches need.
        from blobflow.stores.coroutines import RetryingCoroutines

        return RetryingCoroutines(inner, self)

    def place(self) -> str:
        """The store in messages: its URL, and its server's endpoint if there is one."""
        try:
            endpoint = self.server.endpoint
        except BlobflowError:  # the configuration is wrong, which the call itself reports
            endpoint = ""
        return f"{self.url} at {endpoint}" if endpoint else self.url

    def wait_s(self, backoff: Backoff, operation: str, key: str, error: BlobflowError) -> float:
        """Seconds until a call that failed with `error` is repeated; the retry is counted and logged.

        Raises:
            `error` itself, with the store's place added, if the call is not repeated.
        """
        error.locate(self.url, self.place())
        if not isinstance(error, StoreUnavailable | TimedOut):
            raise error
        wait_s = backoff.wait_s(error)
        with self._lock:
            self.retries += 1
            self.slow_downs += isinstance(error, SlowDown)
        _log.warning(
            "store.retry operation=%s key=%s attempt=%d wait_s=%.2f error=%s",
            operation,
            key,
            backoff.failures,
            wait_s,
            type(error).__name__,
        )
        return wait_s

    @override
    def __repr__(self) -> str:
        return f"<RetryingStore {self.store!r}, {self.retries} retries>"
