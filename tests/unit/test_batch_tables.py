"""Batches from files, and the command: what is read, what is written, and what a second run does."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blobflow.batch import BatchExecutor
from blobflow.batch.tables import BatchReport, default_results, run_batch_file
from blobflow.cli import run as run_command
from blobflow.durable import names_file, try_lock
from blobflow.errors import (
    AtCapacity,
    RefusedError,
    ResultsConflict,
    StoreConfigurationError,
    StoreUnavailable,
    TransferBusy,
    UsageError,
)
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailBefore, Fault, FaultyStore, Request
from tests.kit import Killed, give_away, keys


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return FaultyStore(LocalStore(tmp_path / "store"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "operations.jsonl"


def write(path: Path, *entries: Any) -> Path:
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def inserts(count: int) -> list[dict[str, Any]]:
    return [{"op": "insert", "key": f"k{number:04}", "payload": f"payload {number}"} for number in range(count)]


def execute(store: FaultyStore, path: Path, **options: Any) -> BatchReport:
    return run_batch_file(BatchExecutor(store, window=4, ordered=True), path, **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def fails(*failing: str, error: Exception | None = None) -> Any:
    def faults(request: Request) -> Fault | None:
        denied = error or StoreConfigurationError("denied", hint="ask")
        return FailBefore(denied) if request.operation == "put" and request.key in failing else None  # type: ignore[arg-type]

    return faults


def test_every_operation_has_a_row(store: FaultyStore, path: Path) -> None:
    """Text and binary payloads are stored, gets read, deletes delete; the table tells of each, in the file's order."""
    binary = bytes(range(256))
    write(
        path,
        {"op": "insert", "key": "a", "payload": "grüße"},
        {"op": "insert", "key": "b", "payload_base64": base64.b64encode(binary).decode()},
        {"op": "get", "key": "a"},
        {"op": "get", "key": "absent"},
        {"op": "delete", "key": "a"},
        {"op": "insert", "payload": ""},
    )
    report = execute(store, path, payloads=True)
    assert (report.operations, report.executed, report.done, report.absent, report.failed) == (6, 6, 5, 1, 0)
    assert report.kinds == {"insert": 3, "get": 2, "delete": 1}
    found = rows(report.results)
    assert report.results == default_results(path)
    assert [row["index"] for row in found] == list(range(6))
    assert [row["status"] for row in found] == ["done", "done", "done", "absent", "done", "done"]
    assert found[2]["payload"] == "grüße".encode()
    assert found[1]["size"] == 256
    assert store.get("b", max_bytes=300).data == binary
    assert found[5]["key"] in keys(store)


@pytest.mark.seed("4.8")
def test_entries_that_are_no_operations_fail_alone(store: FaultyStore, path: Path) -> None:
    """A broken line is a failed row that says why; all others are executed."""
    wrong = [
        "no json",
        "[1]",
        {"op": "fly", "key": "k"},
        {"op": "get"},
        {"op": "get", "key": "k", "payload": "x"},
        {"op": "insert", "key": "k"},
        {"op": "insert", "key": "k", "payload": "a", "payload_base64": "YQ=="},
        {"op": "insert", "key": "k", "payload_base64": "!"},
        {"op": "insert", "key": "k", "payload": 5},
        {"op": "insert", "key": "k", "payload": "x", "metadata": [1]},
        {"op": "insert", "key": "k", "payload": "x", "colour": "red"},
        {"op": "insert", "key": 7, "payload": "x"},
    ]
    write(path, *wrong, *inserts(1))
    report = execute(store, path)
    assert (report.done, report.failed, report.retryable) == (1, len(wrong), False)
    assert {row["error"] for row in rows(report.results)[:-1]} == {"InvalidOperation"}
    assert "entry 0: it is not JSON" in report.failures[0].message
    assert keys(store) == ["k0000"]


def test_operations_come_from_a_table_too(store: FaultyStore, tmp_path: Path) -> None:
    """A Parquet table with op, key, payload and metadata is executed like lines."""
    path = tmp_path / "operations.parquet"
    columns = {
        "op": ["insert", "get", "delete", "insert"],
        "key": ["a", "a", "b", "c"],
        "payload": pa.array([b"\xff\x00", None, None, b"x"], pa.binary()),
        "metadata": pa.array([None, None, None, [("colour", "red")]], pa.map_(pa.string(), pa.string())),
        "ignored": [1, 2, 3, 4],
    }
    pq.write_table(pa.table(columns), path)
    report = execute(store, path, payloads=True)
    found = rows(report.results)
    assert [row["status"] for row in found] == ["done", "done", "done", "failed"]
    assert found[1]["payload"] == b"\xff\x00"
    assert found[3]["error"] == "Unsupported"  # a local store keeps no metadata


def test_a_second_run_executes_what_failed(store: FaultyStore, path: Path) -> None:
    """What is done is not done again; keys that were made stay the same; a third run has nothing to do."""
    write(path, *inserts(10), {"op": "insert", "payload": "keyless"})
    store.faults = fails("k0003", "k0007")
    first = execute(store, path)
    assert [failure.key for failure in first.failures] == ["k0003", "k0007"]
    store.faults = fails()
    second = execute(store, path)
    assert (second.executed, second.resumed, second.failed, second.done) == (2, 9, 0, 11)
    assert store.count("put") == 13
    assert execute(store, path).executed == 0
    assert execute(store, path, fresh=True).executed == 11
    assert len(keys(store)) == 11


def test_payloads_that_are_asked_for_later_are_read_then(store: FaultyStore, path: Path) -> None:
    """A run that keeps payloads reads again what an earlier one did not keep, and nothing else."""
    write(path, *inserts(1), {"op": "get", "key": "k0000"})
    execute(store, path)
    report = execute(store, path, payloads=True)
    assert (report.executed, rows(report.results)[1]["payload"]) == (1, b"payload 0")
    assert execute(store, path, payloads=True).executed == 0


def test_results_of_other_operations_are_refused(store: FaultyStore, path: Path, tmp_path: Path) -> None:
    """A file that was changed does not continue its old results; neither is a foreign file taken for results."""
    write(path, *inserts(2))
    execute(store, path)
    write(path, *inserts(3))
    with pytest.raises(ResultsConflict) as refusal:
        execute(store, path)
    assert refusal.value.path == str(default_results(path))
    with pytest.raises(ResultsConflict):  # and is refused again
        execute(store, path)
    assert execute(store, path, fresh=True).executed == 3
    with pytest.raises(ResultsConflict, match="not a table"):
        execute(store, path, results=path)
    with pytest.raises(UsageError, match="cannot be read"):
        execute(store, tmp_path / "absent.jsonl")


def test_two_runs_at_once_are_one_too_many(store: FaultyStore, path: Path) -> None:
    """While one process works on the results, another one is told to wait."""
    write(path, *inserts(2))

    def second(request: Request) -> Fault | None:
        with pytest.raises(TransferBusy):
            run_batch_file(BatchExecutor(store.store), path)
        return None

    store.faults = second
    assert execute(store, path).failed == 0


def test_a_run_that_has_just_begun_keeps_its_journal(store: FaultyStore, path: Path) -> None:
    """The journal of another process is left alone, although nothing is written in it yet."""
    write(path, *inserts(2))
    journal = default_results(path).with_name(default_results(path).name + ".journal")
    with journal.open("w") as other:
        assert try_lock(other.fileno())
        with pytest.raises(TransferBusy):
            execute(store, path)
        assert names_file(journal, other.fileno())
    assert execute(store, path).done == 2


def test_a_run_that_cannot_begin_leaves_the_table(store: FaultyStore, path: Path) -> None:
    """Without a free permit nothing is executed, and the results of before stay."""
    write(path, *inserts(2))
    store.faults = fails("k0001")
    execute(store, path)
    with pytest.raises(AtCapacity):
        run_batch_file(BatchExecutor(store, permits=0), path)
    store.faults = fails()
    assert execute(store, path).executed == 1


def test_a_killed_run_is_continued(store: FaultyStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, with half a line in its journal: the next run executes what is not written down."""
    write(path, *inserts(100))
    monkeypatch.setattr("blobflow.batch.tables._FLUSH_ROWS", 1)

    def progress(done: int, total: int) -> None:
        if done == 60:
            raise Killed

    with pytest.raises(Killed):
        execute(store, path, on_progress=progress)
    journal = default_results(path).with_name(default_results(path).name + ".journal")
    with journal.open("ab") as file:
        file.write(b'{"index": 99, "st')
    report = execute(store, path)
    assert (report.resumed, report.executed, report.done) == (60, 40, 100)
    assert not journal.exists()
    assert [row["index"] for row in rows(report.results)] == list(range(100))


SLOW_COMMAND = """
import sys, time
from blobflow.cli import run
from blobflow.stores.local.store import LocalStore
put = LocalStore.put
def slow(self, key, *args, **options):
    if key == "k0020":
        print("here", flush=True)
        time.sleep(60)
    return put(self, key, *args, **options)
LocalStore.put = slow
sys.exit(run(sys.argv[1:]))
"""


def test_the_command_survives_a_kill(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`blobflow batch`, killed by SIGKILL in the middle and run again, does the rest and reports all of it."""
    write(path, *inserts(50))
    line = ["--store", str(tmp_path / "store"), "--json", "batch", str(path), "--window", "2"]
    with subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, *line], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert run_command(line) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["status"], report["operations"], report["done"], report["failed"]) == ("executed", 50, 50, 0)
    assert report["executed"] + report["resumed"] == 50
    assert len(keys(LocalStore(tmp_path / "store"))) == 50
    assert run_command(line) == 0
    assert json.loads(capfd.readouterr().out)["status"] == "unchanged"


def test_the_command_s_exit_codes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """0 done; 1 something failed; 75 all that failed may pass; 2 and 5 as everywhere."""
    line = ["--store", str(tmp_path / "store"), "batch", str(path)]
    assert run_command(line) == 2
    write(path, *inserts(2), {"op": "get", "key": "absent"})
    assert run_command([*line, "--allow", "read"]) == 1
    assert "PermissionMissing" in capfd.readouterr().err
    put = LocalStore.put

    def down(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("down", operation="get")

    monkeypatch.setattr(LocalStore, "put", down)
    assert run_command([*line, "--deadline", "1s"]) == 75
    monkeypatch.setattr(LocalStore, "put", put)
    assert run_command(line) == 0
    assert "3 operations: 2 done, 1 absent, 0 failed" in capfd.readouterr().out
    write(path, *inserts(4))
    assert run_command(line) == 5


@pytest.mark.parametrize(
    "beside", ["operations.jsonl.results.parquet.journal", ".operations.jsonl.results.parquet.PID"]
)
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "foreign"])
def test_what_others_put_beside_the_results_is_not_written(
    store: FaultyStore, path: Path, beside: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory where others may write, no link leads the journal or the table elsewhere, and no pipe holds it."""
    write(path, *inserts(2))
    victim = path.with_name("victim")
    victim.write_text("precious")
    planted = path.with_name(beside.replace("PID", str(os.getpid())))
    if kind == "link":
        planted.symlink_to(victim)
    elif kind == "hard link":
        planted.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.write_text("")
        give_away(planted, monkeypatch)
    if beside.endswith(".journal"):
        with pytest.raises(RefusedError, match="is not used"):
            execute(store, path)
        assert keys(store) == []
    else:  # of nobody's, and what is there under its name goes
        assert execute(store, path).done == 2
        assert not planted.exists()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["pipe", "foreign"])
def test_results_that_are_no_file_of_ones_own_are_refused(
    store: FaultyStore, path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of others are not believed, and a pipe in their place is not waited for."""
    write(path, *inserts(2))
    if kind == "pipe":
        os.mkfifo(default_results(path))
    else:
        execute(store, path)
        give_away(default_results(path), monkeypatch)
    with pytest.raises(RefusedError, match="is not used"):
        execute(store, path)
