"""Clients of a store: each is used by one call at a time, and every call has a time limit.

Many client libraries (paramiko, ftplib) are not thread-safe: two calls on one connection wait for each other forever,
or get each other's responses. So a call takes a client out of a pool, alone, and puts it back. A client that failed in
the middle of a call is closed and never used again, because its connection may still carry parts of that call.

The library's calls run in a separate thread for each client, so that a call that never returns can be given up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from operator import attrgetter
from queue import SimpleQueue
from typing import Any, TypeVar

from blobflow.forks import reset_after_fork_of

_T = TypeVar("_T")

SLOWEST_BYTES_PER_S = 16 * 1024
"""A library does not report progress. A call that moves less than this counts as silent."""


class Silence(Exception):
    """A client did not answer for the whole idle timeout."""


class Client:
    """One connection, made by `connect` in the thread that all calls then run in.

    Args:
        connect: Makes the library's object.
        idle_timeout_s: Longest silence of a call.
        threaded: False for libraries that never wait: calls then run in the caller's thread, without a time limit.

    Attributes:
        broken: Whether it must not be used again.
        raised: The library's errors since the client was taken out of its pool.
    """

    def __init__(self, connect: Callable[[], Any], idle_timeout_s: float, *, threaded: bool = True) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._threaded = threaded
        self._connection: Any = None
        self.broken = False
        self.raised: list[BaseException] = []
        if threaded:
            # The thread knows the queue alone, not the client, so that a forgotten client ends it.
            threading.Thread(target=_serve, args=(self._calls,), name="blobflow-client", daemon=True).start()
        try:
            self._connection = self.run(connect)
        except BaseException:
            self._calls.put(None)
            raise

    @property
    def connection(self) -> Any:
        """The library's own object; its methods are called through `run`."""
        return self._connection

    def run(self, call: Callable[..., _T], *arguments: Any, moves: int = 0, **options: Any) -> _T:
        """What `call` returns or raises.

        Args:
            moves: Bytes that the call moves at most; they take their time.

        Raises:
            Silence: it did not return in time, and was given up.
        """
        try:
            if not self._threaded:
                return call(*arguments, **options)
            return self._run_in_thread(lambda: call(*arguments, **options), moves)
        except BaseException as error:
            self.raised.append(error)
            raise

    def _run_in_thread(self, call: Callable[[], _T], moves: int) -> _T:
        done: Future[_T] = Future()
        self._calls.put((call, done))
        limit_s = self._idle_timeout_s + moves / SLOWEST_BYTES_PER_S
        try:
            return done.result(limit_s)
        except FutureTimeoutError:
            if done.done():  # the call's own
                raise
            self.broken = True
            self._hang_up()  # which ends the call, in most libraries
            raise Silence(f"no answer for {limit_s:.0f} s") from None
        except BaseException:
            self.broken = self.broken or not done.done()  # interrupted here, while it goes on there
            raise

    def close(self) -> None:
        """End the connection and the thread, without waiting for either."""
        self._calls.put((self._hang_up, Future()))
        self._calls.put(None)

    def _hang_up(self) -> None:
        for path in ("ftp", "client", "client.http"):
            with suppress(Exception):
                attrgetter(f"{path}.close")(self._connection)()

    def __del__(self) -> None:
        self._calls.put(None)


def _serve(calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
    while (entry := calls.get()) is not None:
        call, done = entry
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001  # raised in the caller's thread
            done.set_exception(error)
        del entry, call, done  # they hold the caller's buffers


class ClientPool:
    """Clients for one call each; as many as there are calls at a time, kept for the next ones.

    Args:
        connect: Makes the library's object.
        idle_timeout_s: Longest silence of a call.
        threaded: See `Client`.
    """

    def __init__(self, connect: Callable[[], Any], *, idle_timeout_s: float, threaded: bool = True) -> None:
        self._connect = connect
        self._idle_timeout_s = idle_timeout_s
        self._threaded = threaded
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`: a child makes new connections."""
        self._lock = threading.Lock()
        self._idle: list[Client] = []

    @contextmanager
    def client(self, *, fresh: bool = False, keep: tuple[type[BaseException], ...] = ()) -> Generator[Client]:
        """A client that nobody else uses inside of the block.

        Args:
            fresh: One that is connected to now, instead of those that are kept.
            keep: Errors that are good answers: the client is kept after them, and closed after all others.
        """
        if fresh:
            self.close()
        with self._lock:
            client = self._idle.pop() if self._idle else None
        if client is None:
            client = Client(self._connect, self._idle_timeout_s, threaded=self._threaded)
        try:
            yield client
        except BaseException as error:
            client.broken = client.broken or not isinstance(error, keep)
            raise
        finally:
            client.raised.clear()
            if client.broken:
                client.close()
            else:
                with self._lock:
                    self._idle.append(client)

    def close(self) -> None:
        """Close all clients that nobody uses now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()
