"""A store that repeats what failed for a passing reason."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential
from typing_extensions import override

from blobflow.activity import doing
from blobflow.checksum import Buffer
from blobflow.errors import ObjectNotFound, ObjectTooLarge, PreconditionFailed, StoreUnavailable, TimedOut
from blobflow.forks import forget_threads_in_children
from blobflow.stores.base import Arrived, Body, ObjectMeta, PutMode, Store
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
        self._patience_s = patience_s
        self._sleep = sleep
        self._clock = clock
        self.forget_threads()
        forget_threads_in_children(self)

    def forget_threads(self) -> None:
        """See `Forkable`."""
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
    ) -> ObjectMeta:
        content = body if isinstance(body, Body) else Body.of(body)
        attempts = 0

        def attempt() -> ObjectMeta:
            nonlocal attempts
            attempts += 1
            return self.store.put(key, content, mode=mode, e_tag=e_tag, content_type=content_type)

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
    def get_range_arriving(
        self, key: str, offset: int, buffer: memoryview, arrived: Arrived, *, e_tag: str | None = None
    ) -> None:
        self._call("get_range", key, lambda: self.store.get_range_arriving(key, offset, buffer, arrived, e_tag=e_tag))

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
        deadline: float | None = None
        left = self._patience_s

        def wait(state: RetryCallState) -> float:
            nonlocal deadline, left
            now = self._clock()
            deadline = now + self._patience_s if deadline is None else deadline
            left = deadline - now
            asked: float = getattr(_error_of(state), "retry_after_s", 0.0)
            return max(asked, min(_backoff(state), left))

        def is_over(state: RetryCallState) -> bool:
            return left <= 0 or state.upcoming_sleep > left

        def before_sleep(state: RetryCallState) -> None:
            with self._lock:
                self.retries += 1
            _log.warning(
                "store.retry operation=%s key=%s attempt=%d wait_s=%.2f error=%s",
                operation,
                key,
                state.attempt_number,
                state.upcoming_sleep,
                type(_error_of(state)).__name__,
            )

        attempts = Retrying(
            retry=retry_if_exception_type((StoreUnavailable, TimedOut)),
            wait=wait,
            stop=is_over,
            before_sleep=before_sleep,
            sleep=self._sleep,
            reraise=True,
        )
        with doing(f"{operation} of {key!r}"):
            return attempts(attempt)

    @override
    def __repr__(self) -> str:
        return f"<RetryingStore {self.store!r}, {self.retries} retries>"


_backoff = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
