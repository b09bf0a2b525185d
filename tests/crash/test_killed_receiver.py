"""A receiver behind HTTP, killed without warning near the end of a transfer, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blobflow.mirror import Bootstrapping, Snapshot, read_snapshots
from blobflow.mirror.client import MirrorClient
from tests.kit import noise
from tests.servers import free_port

KIB = 1024
MIB = 1024 * KIB
TOKEN = "a token for the test alone"

RECEIVER = """
import sys
from blobflow.mirror import MirrorReceiver
from blobflow.mirror.server import MirrorServer

directory, port, checkpoint_bytes, token = sys.argv[1:]
with MirrorReceiver(directory, checkpoint_bytes=int(checkpoint_bytes)) as receiver:
    server = MirrorServer(receiver, port=int(port), token=token)
    print(server.url, flush=True)
    server.run()
"""


@contextmanager
def running(directory: Path, port: int, checkpoint_bytes: int) -> Generator[subprocess.Popen[str]]:
    """A receiver in a process of its own, from the moment it listens on."""
    arguments = [sys.executable, "-c", RECEIVER, directory, port, checkpoint_bytes, TOKEN]
    with subprocess.Popen(list(map(str, arguments)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
        try:
            yield process
        finally:
            process.kill()


def write_noise(path: Path, size: int) -> None:
    """A file of `size` bytes, no two mebibytes of it alike."""
    block = bytearray(noise(min(size, MIB)))
    with open(path, "wb") as file:
        for number in range(-(-size // MIB)):
            block[:8] = number.to_bytes(8, "big")
            file.write(block[: size - number * MIB])


@pytest.mark.seed("W2.1")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("size", "chunk", "checkpoint"),
    [(4 * MIB, 32 * KIB, 256 * KIB), pytest.param(1024 * MIB, 4 * MIB, 64 * MIB, marks=pytest.mark.slow)],
    ids=["4MiB", "1GiB"],
)
def test_a_killed_receiver_is_sent_at_most_one_checkpoint_again(tmp_path: Path, size: int, chunk: int, checkpoint: int):
    """The same push goes on while its receiver is killed at 95 % and replaced: at most one checkpoint is sent twice."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    write_noise(source, size)
    snapshot = Snapshot.of_file(source, source="east", database="orders")
    port = free_port()
    killed, replaced = threading.Event(), threading.Event()
    reached = 0

    with running(mirror, port, checkpoint) as first:

        def watch(done: int, _: int) -> None:
            nonlocal reached
            if done >= size * 95 // 100 and not killed.is_set():
                reached = done
                first.send_signal(signal.SIGKILL)
                first.wait()
                killed.set()

        def sleep(_: float) -> None:
            assert replaced.wait(60)

        def replace() -> None:
            assert killed.wait(300)
            with running(mirror, port, checkpoint):
                replaced.set()
                finished.wait(300)

        finished = threading.Event()
        replacing = threading.Thread(target=replace)
        replacing.start()
        try:
            with MirrorClient(f"http://127.0.0.1:{port}", token=TOKEN, sleep=sleep) as client:
                pushed = client.push(snapshot, chunk_bytes=chunk, request_bytes=chunk, on_progress=watch)
                document = client.status(snapshot.id)
        finally:
            finished.set()
            replacing.join()

    assert killed.is_set()
    assert (pushed.status, document["complete"]) == ("pushed", True)
    # The request that met the dead receiver counts as sent, though nobody was there to take it.
    assert pushed.bytes_sent - size <= checkpoint + chunk
    assert read_snapshots(mirror) == {snapshot.id: Bootstrapping(size, size)}
    (arrived,) = mirror.rglob("*.snapshot")
    assert os.stat(arrived).st_size == size
    with open(arrived, "rb") as left, open(source, "rb") as right:
        while block := right.read(MIB):
            assert left.read(MIB) == block


@pytest.mark.seed("W2.1")
def test_a_killed_sender_goes_on_where_the_receiver_stands(tmp_path: Path):
    """Another push of the same snapshot, by another process, sends only what is missing."""
    size, chunk = 2 * MIB, 64 * KIB
    source = tmp_path / "source"
    write_noise(source, size)
    snapshot = Snapshot.of_file(source, source="east", database="orders")

    class Gone(BaseException):
        """The sender is dead."""

    def dies(done: int, _: int) -> None:
        if done > MIB:
            raise Gone

    with running(tmp_path / "mirror", port := free_port(), MIB):
        url = f"http://127.0.0.1:{port}"
        with MirrorClient(url, token=TOKEN) as client, pytest.raises(Gone):
            client.push(snapshot, chunk_bytes=chunk, request_bytes=chunk, on_progress=dies)
        with MirrorClient(url, token=TOKEN) as client:
            pushed = client.push(snapshot, chunk_bytes=chunk)
    assert pushed.bytes_resumed == MIB + chunk
    assert pushed.bytes_sent == size - pushed.bytes_resumed
