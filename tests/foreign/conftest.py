"""Fixtures of the tests with servers that nobody here wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.foreign.servers import KINDS, ForeignServer, Missing, Place, foreign_server


class _Servers:
    """Starts each server when it is first asked for; they end with the session of this worker."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: dict[str, ForeignServer] = {}

    def __call__(self, kind: str) -> ForeignServer:
        if kind not in self._running:
            try:
                self._running[kind] = self._stack.enter_context(foreign_server(kind))
            except Missing as reason:
                pytest.skip(str(reason))
        return self._running[kind]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def servers() -> Iterator[_Servers]:
    """Starts servers by name. One that is not to be had here skips the test (a failure in CI)."""
    servers = _Servers()
    yield servers
    servers.close()


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, servers: _Servers) -> ForeignServer:
    """One server after the other, unless the test names some."""
    return servers(request.param)


@pytest.fixture
def place(server: ForeignServer) -> Place:
    """A new, empty place there."""
    return server.new_place()
