"""A store with faults, for tests of failing requests."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

from typing_extensions import Unpack, override

from blobflow.checksum import Buffer
from blobflow.errors import BlobflowError, StoreUnavailable
from blobflow.forks import reset_after_fork_of
from blobflow.stores.base import Body, ObjectMeta, PartMeta, PutOptions, Store, StoredObject
from blobflow.stores.wrapping import WrappingStore

_T = TypeVar("_T")


class Request(NamedTuple):
    """One request that reached a `FaultyStore`."""

    operation: str
    """The name of the method; `get_range` for both ways to read a range."""
    key: str
    """The key, or the prefix for listings."""
    number: int
    """Number of the request among those of this operation, from 1."""


@dataclass(frozen=True)
class FailBefore:
    """The request never arrives: nothing happens."""

    error: BlobflowError | None = None


@dataclass(frozen=True)
class FailAfter:
    """The response is lost: the store has done it, and the caller does not know."""

    error: BlobflowError | None = None


@dataclass(frozen=True)
class CorruptRead:
    """One byte of a read is wrong, without an error."""

    at: int = 0


@dataclass(frozen=True)
class Truncate:
    """The connection breaks in the middle: after `keep` bytes of a body or a read, or entries of a listing."""

    keep: int = 0
    error: BlobflowError | None = None


@dataclass(frozen=True)
class Hook:
    """`call` runs before the request, e.g. to block it, to count, or to change the store meanwhile."""

    call: Callable[[Request], None]


Fault: TypeAlias = FailBefore | FailAfter | CorruptRead | Truncate | Hook


def scripted_faults(script: Mapping[tuple[str, int], Fault]) -> Callable[[Request], Fault | None]:
    """Faults by operation and number.

    >>> FaultyStore(store, scripted_faults({("put_part", 3): FailAfter(), ("list", 1): Truncate(keep=10)}))
    """
    return lambda request: script.get((request.operation, request.number))


def random_faults(
    seed: int, rate: float, kinds: Sequence[Fault] = (FailBefore(), FailAfter(), Truncate(keep=1))
) -> Callable[[Request], Fault | None]:
    """Faults of random kinds for a share of the requests; the same seed and order of calls give the same faults."""
    generator = random.Random(seed)

    def faults(_: Request) -> Fault | None:
        return generator.choice(kinds) if generator.random() < rate else None

    return faults


class FaultyStore(WrappingStore):
    """Passes requests on to `store`, except for the faults that `faults` returns.

    `faults` is called for one request at a time, so it may keep state without a lock.

    Attributes:
        log: All requests, in order.
    """

    def __init__(self, store: Store, faults: Callable[[Request], Fault | None] = lambda _: None) -> None:
        super().__init__(store)
        self.faults = faults
        self.log: list[Request] = []
        self._counts: Counter[str] = Counter()
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`."""
        self._lock = threading.Lock()

    def count(self, operation: str) -> int:
        """The number of requests of an operation."""
        return self._counts[operation]

    def _next(self, operation: str, key: str) -> tuple[Request, Fault | None]:
        with self._lock:
            self._counts[operation] += 1
            request = Request(operation, key, self._counts[operation])
            self.log.append(request)
            fault = self.faults(request)
        if isinstance(fault, Hook):
            fault.call(request)
        if isinstance(fault, FailBefore):
            raise fault.error or _injected(request, "was not sent")
        return request, fault

    @override
    def _call(self, operation: str, key: str, attempt: Callable[[], _T]) -> _T:
        request, fault = self._next(operation, key)
        if isinstance(fault, Truncate):
            raise fault.error or _injected(request, "was not sent whole")
        answer = attempt()
        if isinstance(fault, FailAfter):
            raise fault.error or _injected(request, "got no answer")
        return answer

    def _send_body(self, operation: str, key: str, body: Body, call: Callable[[Body], _T]) -> _T:
        request, fault = self._next(operation, key)
        if isinstance(fault, Truncate):
            error = fault.error or _injected(request, f"broke after {fault.keep} bytes")
            body = Body(
                body.size, lambda whole=body: _first(whole, fault.keep, error), body.crc32c, metadata=body.metadata
            )
        answer = call(body)
        if isinstance(fault, FailAfter):
            raise fault.error or _injected(request, "got no answer")
        return answer

    @override
    def put(self, key: str, body: Buffer | Body, **options: Unpack[PutOptions]) -> ObjectMeta:
        content = body if isinstance(body, Body) else Body.of(body)
        return self._send_body("put", key, content, lambda sent: self.store.put(key, sent, **options))

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        request, fault = self._next("get", key)
        found = self.store.get(key, max_bytes=max_bytes)
        match fault:
            case FailAfter() | Truncate():
                raise fault.error or _injected(request, "got no answer")
            case CorruptRead():
                data = bytearray(found.data)
                _flip(memoryview(data), fault.at)
                return StoredObject(bytes(data), found.meta)
            case _:
                return found

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        request, fault = self._next("get_range", key)
        match fault:
            case Truncate():
                self.store.get_range_into(key, offset, buffer[: fault.keep], e_tag=e_tag)
                raise fault.error or _injected(request, f"broke after {fault.keep} bytes")
            case FailAfter():
                self.store.get_range_into(key, offset, buffer, e_tag=e_tag)
                raise fault.error or _injected(request, "got no answer")
            case CorruptRead():
                self.store.get_range_into(key, offset, buffer, e_tag=e_tag)
                _flip(buffer, fault.at)
            case _:
                self.store.get_range_into(key, offset, buffer, e_tag=e_tag)

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        request, fault = self._next("list", prefix)
        for position, meta in enumerate(self.store.list(prefix, start_after=start_after)):
            if isinstance(fault, Truncate | FailAfter) and position >= getattr(fault, "keep", 0):
                raise fault.error or _injected(request, f"broke after {position} entries")
            yield meta

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        return self._send_body(
            "put_part", key, body, lambda body: self.store.put_part(key, upload_id, part_number, body)
        )


def _injected(request: Request, what: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"injected fault: {request.operation} {request.key!r} (number {request.number}) {what}",
        operation=request.operation,
        key=request.key,
    )


def _flip(buffer: memoryview, at: int) -> None:
    if buffer:
        buffer[at % len(buffer)] ^= 0x01


def _first(body: Body, keep: int, error: BlobflowError) -> Iterator[Buffer]:
    for buffer in body:
        if keep > 0:
            yield memoryview(buffer)[:keep]
        keep -= len(buffer)
        if keep <= 0:
            break
    raise error
