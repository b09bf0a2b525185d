"""A store that repeats what failed for a passing reason."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from typing_extensions import override

from blobflow.activity import doing
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
from blobflow.stores.base import Body, Coroutines, ObjectMeta, PutMode, Store
from blobflow.stores.wrapping import WrappingStore

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

DEFAULT_PATIENCE_S = 120.0
"""Longer than a store's restart or a failover; shorter than an operator's."""

_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 20.0
"""Beyond that, waiting longer helps the store no more and costs the transfer its restart."""
_READ_BACK_BYTES = 2 * 1024 * 1024
"""Conditional writes are manifests, refs and leases; all of them are below this size."""


class RetryingStore(WrappingStore):
    """Repeats the calls of `store` that failed with `StoreUnavailable`, `SlowDown` or `TimedOut`; any store fits in.

    The waits are exponential with full jitter, and at least as long as the store asks for. A call fails when its
    patience is used up, with the error of its last attempt; `ObjectChanged` and all other errors pass through at once.

    A conditional put may meet its own success: the first attempt arrived, its answer was lost, and the second one is
    refused. Then the object is read back, and equal bytes count as success. Two writers who put equal bytes cannot be
    told apart that way, so whoever takes part in a race writes something of its own into the object. An object above
    2 MiB is not read back; the refusal stands.

    `complete_multipart` may answer `NoSuchUpload` for the same reason; the transport settles that by looking at the
    object.

    Args:
        store: The store that makes the attempts.
        patience_s: Seconds from the first failure of a call to its last attempt. They do not begin with the call,
            because one attempt alone may be silent for that long before it times out.
        sleep: Waits that many seconds.
        clock: Monotonic seconds.

    Attributes:
        retries: Attempts repeated so far, over all calls.
        slow_downs: Those among them that the store answered with SlowDown.
        clock: Monotonic seconds.
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
        self._patience_s = patience_s
        self._sleep = sleep
        self.clock = clock
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._lock = threading.Lock()

    @override
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
        content = body if isinstance(body, Body) else Body.of(body)
        attempts = 0

        def attempt() -> ObjectMeta:
            nonlocal attempts
            attempts += 1
            return self.store.put(key, content, mode=mode, e_tag=e_tag, content_type=content_type, private=private)

        try:
            return self._call("put", key, attempt)
        except PreconditionFailed:
            arrived = self._read_back(key, content) if attempts > 1 else None
            if arrived is None:
                raise
            return arrived

    def _read_back(self, key: str, body: Body) -> ObjectMeta | None:
        """The object under `key`, if its bytes are those of `body`."""
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
                rest = None  # a generator that raised is at its end: the next attempt begins after the last key
                raise

        while (meta := self._call("list", prefix, following)) is not None:
            after = meta.key
            yield meta

    @override
    def _call(self, operation: str, key: str, attempt: Callable[[], _T]) -> _T:
        patience: Patience | None = None
        with doing(f"{operation} of {key!r}", where=self.place) as activity:
            while True:
                try:
                    return attempt()
                except BlobflowError as error:
                    self.locate(error)
                    if not isinstance(error, StoreUnavailable | TimedOut):
                        raise
                    patience = patience or self.patience(operation, key)
                    wait_s = patience.wait_s(error)
                    if wait_s is None:
                        raise
                    reason = error.message
                activity.blocked_by(f"{reason}; next attempt in {wait_s:.0f} s")
                self._sleep(wait_s)
                activity.blocked_by(f"{reason}; trying again")

    @override
    def coroutines(self) -> Coroutines | None:
        inner = self.store.coroutines()
        if inner is None:
            return None
        from blobflow.stores.coroutines import RetryingCoroutines

        return RetryingCoroutines(inner, self)

    def place(self) -> str:
        """The store as people are told of it: its URL, and the server where that does not say it."""
        try:
            endpoint = self.store.server.endpoint
        except BlobflowError:  # it is configured wrongly, as the call itself says
            endpoint = ""
        return f"{self.url} at {endpoint}" if endpoint else self.url

    def locate(self, error: BlobflowError) -> None:
        """Have an error of the store say where it happened."""
        error.locate(self.url, self.place())

    def patience(self, operation: str, key: str) -> Patience:
        """What a call has whose first attempt has just failed."""
        return Patience(self, operation, key, self.clock() + self._patience_s)

    def note_retry(self, operation: str, key: str, attempt: int, wait_s: float, error: BlobflowError) -> None:
        """Count and log that an attempt failed and will be repeated."""
        with self._lock:
            self.retries += 1
            self.slow_downs += isinstance(error, SlowDown)
        _log.warning(
            "store.retry operation=%s key=%s attempt=%d wait_s=%.2f error=%s",
            operation,
            key,
            attempt,
            wait_s,
            type(error).__name__,
        )

    @override
    def __repr__(self) -> str:
        return f"<RetryingStore {self.store!r}, {self.retries} retries>"


class Patience:
    """How often a call is repeated, and when; it does no waiting itself, so threads and coroutines share it."""

    def __init__(self, store: RetryingStore, operation: str, key: str, ends_at: float) -> None:
        self._store = store
        self._operation = operation
        self._key = key
        self._ends_at = ends_at
        self._attempts = 0
        self._backoff = _backoff()

    def wait_s(self, error: BlobflowError) -> float | None:
        """Seconds until the next attempt; None where `error` was the last word."""
        left = self._ends_at - self._store.clock()
        asked: float = error.fields.get("retry_after_s", 0.0)
        wait_s = max(asked, min(self._backoff(self._attempts + 1), left))
        if left <= 0 or wait_s > left:
            return None
        self._attempts += 1
        self._store.note_retry(self._operation, self._key, self._attempts, wait_s, error)
        return wait_s


def _backoff() -> Callable[[int], float]:
    """Gives the wait after an attempt, counted from 1: exponential with full jitter."""
    # Not at the top: it imports asyncio, and most calls never fail.
    from tenacity import RetryCallState, Retrying, wait_random_exponential

    wait = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)
    state = RetryCallState(Retrying(), None, (), {})

    def after(attempt: int) -> float:
        state.attempt_number = attempt
        return wait(state)

    return after
