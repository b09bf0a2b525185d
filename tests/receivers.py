"""Receivers of snapshots that listen on loopback."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from blobflow.mirror import MirrorReceiver
from blobflow.mirror.server import MirrorServer

TOKEN = "a token of the tests"


@contextmanager
def serving(receiver: MirrorReceiver, **options: Any) -> Generator[MirrorServer]:
    """The receiver's server, in a thread, until the block ends."""
    server = MirrorServer(receiver, token=TOKEN, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
