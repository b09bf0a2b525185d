"""Deaths and signals at exact requests of a server that writes down every byte: the figures are held against it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.conftest import Freight
from tests.crash.machines import INTERVAL, KIB, MIB, Machine, S3Place, committed
from tests.fault_rules import Rule
from tests.strict_s3 import Exchange, Hook, StrictS3

KEY = "orders/today"

Machines = Callable[..., Machine]
Make = Callable[[int, int], Freight]


@pytest.fixture
def strict() -> Iterator[StrictS3]:
    """An S3 that keeps AWS's rules and a log."""
    with StrictS3() as server:
        yield server


@pytest.fixture
def place(strict: StrictS3) -> S3Place:
    """A bucket in it."""
    return S3Place(strict.endpoint)


def end_at(
    strict: StrictS3,
    number: signal.Signals,
    machine: Machine,
    *command: object,
    operation: str = "*",
    nth: int,
    but_not_before: Callable[[], bool] = lambda: True,
) -> tuple[int, str]:
    """Run a command that gets a signal while the server holds the nth such request for KEY; exit code and stdout."""
    running: list[subprocess.Popen[str]] = []

    def send(_: Exchange) -> None:
        while not but_not_before() and running[0].poll() is None:
            time.sleep(0.01)
        running[0].send_signal(number)
        if number == signal.SIGKILL:
            running[0].wait()

    strict.script(Rule(Hook(send), operation=operation, key=KEY + "*", nth=nth))
    with machine.start(*command) as process:
        running.append(process)
        out, _ = process.communicate(timeout=60)
    strict.script()
    return process.returncode, out


@contextmanager
def heeded(number: signal.Signals) -> Iterator[None]:
    """Commands that are started in the block heed the signal, also where these tests run under nohup."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_second_push_sends_exactly_the_parts_that_are_not_there(strict: StrictS3, machine: Machines, freight: Make):
    """What the server received in the second run is what the command says it sent, and no part came twice."""
    cargo = freight(6 * MIB, 5)
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "1")
    code, _ = end_at(
        strict, signal.SIGKILL, machine(*options), "push", cargo.source, KEY, operation="UploadPart", nth=3
    )
    assert code == -signal.SIGKILL
    before = {each.part_number for each in strict.requests("UploadPart", KEY)}
    assert before == {1, 2, 3}
    strict.log.clear()

    document = machine(*options).run("push", cargo.source, KEY)

    sent = strict.requests("UploadPart", KEY)
    assert before.isdisjoint(each.part_number for each in sent)
    assert document["bytes_sent"] == sum(each.bytes_in for each in sent)
    assert document["bytes_resumed"] == 3 * cargo.chunk_size
    assert document["bytes_sent"] + document["bytes_resumed"] == document["bytes_total"]


def test_a_second_pull_fetches_exactly_what_the_journal_lacks(
    strict: StrictS3, place: S3Place, machine: Machines, freight: Make, tmp_path: Path
):
    """The server counts the bytes: what the journal vouches for is not asked for again."""
    cargo = freight(64 * KIB, 320)
    machine().run("push", cargo.source, KEY)
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "2")
    dest = tmp_path / "landing" / "here"
    code, _ = end_at(
        strict,
        signal.SIGKILL,
        machine(*options),
        *("pull", KEY, dest),
        operation="GetObject",
        nth=cargo.parts // 2,
        but_not_before=lambda: committed(dest.parent) >= INTERVAL,
    )
    assert code == -signal.SIGKILL
    assert not dest.exists()
    kept = committed(dest.parent)
    strict.log.clear()

    document = machine(*options).run("pull", KEY, dest)

    fetched = sum(each.bytes_out for each in strict.requests("GetObject", KEY))
    assert document["bytes_received"] == fetched == document["bytes_total"] - kept * cargo.chunk_size
    assert document["bytes_resumed"] == kept * cargo.chunk_size
    assert cargo.is_whole(dest / "data")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_a_last_checkpoint(
    number: signal.Signals,
    code: int,
    strict: StrictS3,
    place: S3Place,
    machine: Machines,
    freight: Make,
    tmp_path: Path,
):
    """Stopped long before its first regular checkpoint, a transfer has saved what it had, says so, and continues."""
    cargo = freight(64 * KIB, 40)
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "1")
    machine().run("push", cargo.source, KEY)
    dest = tmp_path / "landed"
    with heeded(number):
        exited, out = end_at(strict, number, machine(*options), "pull", KEY, dest, operation="GetObject", nth=20)
    assert exited == code
    error = json.loads(out)["error"]
    assert (error["type"], error["message"]) == ("Interrupted", f"stopped by {number.name}")
    assert "continues where it stopped" in error["hint"]
    assert not dest.exists()
    document = machine(*options).run("pull", KEY, dest)
    assert document["bytes_resumed"] >= 10 * cargo.chunk_size
    assert cargo.is_whole(dest / "data")


def test_a_terminated_push_saves_the_checksums_of_its_parts(
    strict: StrictS3, place: S3Place, machine: Machines, freight: Make
):
    """The intent in the bucket knows every acknowledged part, and no temporary file is left."""
    cargo = freight(6 * MIB, 5)
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "1")
    first = machine(*options)
    code, _ = end_at(strict, signal.SIGTERM, first, "push", cargo.source, KEY, operation="UploadPart", nth=3)
    assert code == 143
    assert json.loads(place.read(KEY + ".upload.json"))["parts"] in ("1-2", "1-3")
    assert first.scratch == []
    document = machine(*options).run("push", cargo.source, KEY)
    assert document["bytes_resumed"] >= 2 * cargo.chunk_size


@pytest.mark.slow
@pytest.mark.timeout(300)  # three commands for each request of a push
def test_a_push_may_die_at_any_request(strict: StrictS3, freight: Make, tmp_path: Path):
    """Whatever request was the last one that the server got, the next push ends with the whole artifact."""
    cargo = freight(6 * MIB, 2)
    options = ("--chunk-size", str(cargo.chunk_size), "--workers", "1")
    nth = 0
    while True:
        nth += 1
        place = S3Place(strict.endpoint)
        first, second = (Machine(tmp_path / f"{nth}-{name}", place, *options) for name in ("first", "second"))
        code, _ = end_at(strict, signal.SIGKILL, first, "push", cargo.source, KEY, nth=nth)
        if code == 0:
            break  # it sends fewer requests than that
        document = second.run("push", cargo.source, KEY)
        if document["status"] == "uploaded":
            assert document["bytes_sent"] + document["bytes_resumed"] == document["bytes_total"]
        second.run("pull", KEY, tmp_path / f"landed-{nth}")
        assert cargo.is_whole(tmp_path / f"landed-{nth}" / "data")
    assert nth > 10
