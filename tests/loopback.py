"""A threaded TCP server on a free loopback port: what the strict S3 and the fault proxy stand on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import TracebackType

from typing_extensions import Self


class LoopbackServer:
    """Serves each connection in a thread of its own, from construction on.

    Leaving the `with` block hangs up on everybody, joins all threads and raises what went wrong in one of them: a
    mistake of the server must not look like a fault of the network.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._others: set[socket.socket] = set()
        self._guard = threading.Lock()
        self._closing = threading.Event()
        self._failures: list[Exception] = []
        self._acceptor = threading.Thread(target=self._accept, name=f"{type(self).__name__}-{self.port}", daemon=True)
        self._acceptor.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, connection: socket.socket) -> None:
        """Serve one connection until it ends; it is closed afterwards. An `OSError` is the client hanging up."""
        raise NotImplementedError

    @contextmanager
    def connected_to(self, address: tuple[str, int]) -> Generator[socket.socket]:
        """A connection to another server, which ends at the latest when this one closes."""
        with socket.create_connection(address) as other:
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._guard:
                if self._closing.is_set():
                    raise ConnectionAbortedError("closing")
                self._others.add(other)
            try:
                yield other
            finally:
                with self._guard:
                    self._others.discard(other)

    def close(self) -> None:
        """Hang up and wait for all threads."""
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._guard:
            threads = list(self._connections.values())
            for connection in (*self._connections, *self._others):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(timeout=20)
            assert not thread.is_alive(), f"{self!r} still serves {thread.name}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._guard:
                if self._closing.is_set():
                    connection.close()
                    return
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self.serve(connection)
        except OSError:
            pass
        except Exception as error:  # noqa: BLE001  # raised again when the server closes
            self._failures.append(error)
        finally:
            with self._guard:
                del self._connections[connection]
                connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._failures and error is None:
            raise self._failures[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"


def hang_up(connection: socket.socket) -> None:
    """End a connection so that what was sent last arrives, although the other side may still be sending.

    To close it at once would reset it, and throw away what the other side has not read yet.
    """
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65536):
        pass
