"""Throughput of a push to a mirror over loopback.

    python -m benchmarks.mirror [--mib 1024] [--chunk-mib 4] [--runs 3]

Sender and receiver are processes of their own. Each tells its processor time for the push alone, imports and start not
included. The receiver's directory is on tmpfs where there is one: the disk of the machine is not what is measured.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from blobflow.mirror import MirrorReceiver, Snapshot
from blobflow.mirror.client import MirrorClient

MIB = 1024 * 1024
TOKEN = "a token for the benchmark"


def cpu_s() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def receive(directory: str) -> None:
    """A receiver, until standard input ends; prints its URL, then its processor time and peak memory."""
    from blobflow.mirror.server import MirrorServer

    with MirrorReceiver(directory) as receiver:
        server = MirrorServer(receiver, token=TOKEN)
        print(server.url, flush=True)
        before = cpu_s()
        threading.Thread(target=lambda: (sys.stdin.read(), server.stop()), daemon=True).start()
        server.run()
    print(cpu_s() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)


def push(directory: Path, size: int, chunk_bytes: int) -> None:
    """One push to a fresh receiver; prints a row."""
    source = directory / "source"
    block = os.urandom(MIB)
    with open(source, "wb") as file:
        file.writelines(block for _ in range(size // MIB))
    snapshot = Snapshot.of_file(source, source="bench", database="bench")
    command = [sys.executable, "-m", "benchmarks.mirror", "--receive", directory / "mirror"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as receiver,
        MirrorClient(receiver.stdout.readline().strip() if receiver.stdout else "", token=TOKEN) as client,
    ):
        started, before = time.monotonic(), cpu_s()
        client.push(snapshot, chunk_bytes=chunk_bytes)
        wall, sender = time.monotonic() - started, cpu_s() - before
        out, _ = receiver.communicate("")
    took, memory = map(float, out.split())
    rates = " ".join(f"{size / 1e6 / seconds:9.0f}" for seconds in (wall, sender, took, sender + took))
    print(f"{wall:6.2f} {sender:8.2f} {took:8.2f} {memory:8.0f}   {rates}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mirror")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--receive", metavar="DIR", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.receive:
        receive(given.receive)
        return
    print("wall s sender s receiver s RSS MiB   MB/s: wall   sender  receiver both per core")
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
            push(Path(directory), given.mib * MIB, given.chunk_mib * MIB)


if __name__ == "__main__":
    main()
