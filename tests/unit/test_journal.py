"""Journals of transfers: the story of all attempts, which never decides what is sent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blobflow import TransferRecord, upload, verify
from blobflow.errors import UsageError
from blobflow.transport.checkpoints import Checkpoint, LocalCheckpointStore, TransferJournal
from tests.clock import Clock
from tests.kit import SERIAL, artifact_of, local_store

ID = "0123456789abcdef"


def record(parts_done: int, state: str = "running", **changes: object) -> TransferRecord:
    """Of a transfer of ten parts of 100 bytes."""
    facts = {
        "transfer_id": ID,
        "kind": "upload",
        "key": "orders/1.tar",
        "artifact_digest": "sha256:" + "0" * 64,
        "part_size": 100,
        "parts_total": 10,
        "parts_done": parts_done,
        "bytes_done": parts_done * 100,
        "bytes_total": 1000,
        "state": state,
    }
    return TransferRecord.model_validate({**facts, **changes})


class Memory:
    """A home that counts what is written."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def read(self, transfer_id: str) -> str | None:
        own = [line for line in self.lines if Checkpoint.from_json(line).record.transfer_id == transfer_id]
        return own[-1] if own else None

    def append(self, checkpoint: Checkpoint) -> None:
        self.lines.append(checkpoint.to_json())


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000_000.0)


@pytest.fixture
def home(tmp_path: Path) -> LocalCheckpointStore:
    return LocalCheckpointStore(tmp_path / "journal")


def test_what_is_saved_is_found_by_another_process(home: LocalCheckpointStore):
    """By the transfer's id alone; of a transfer that nobody began, nothing is known."""
    assert TransferJournal(home).load(ID) is None
    TransferJournal(home, writer="run-1").save(record(3))
    found = TransferJournal(home, writer="run-2").load(ID)
    assert found is not None
    assert (found.record, found.writer, found.attempt, found.sequence) == (record(3), "run-1", 1, 1)


def test_a_running_transfer_is_written_every_ten_seconds(clock: Clock):
    """The first record and the last are always written, those between at most every ten seconds."""
    home = Memory()
    journal = TransferJournal(home, clock=clock)
    written: list[int] = []
    for seconds, parts in ((0, 0), (4, 1), (9.9, 2), (10, 3), (15, 4), (20, 5)):
        clock.now = 1_000_000.0 + seconds
        if journal.save(record(parts)):
            written.append(parts)
    assert written == [0, 3, 5]
    assert journal.save(record(6, "failed")) is not None
    assert journal.save(record(10, "done")) is not None
    assert len(home.lines) == 5


def test_a_clock_that_is_set_back_does_not_silence_the_journal(clock: Clock):
    """After the clock went back an hour, the next record is written."""
    journal = TransferJournal(Memory(), clock=clock)
    journal.save(record(0))
    clock.now -= 3600
    assert journal.save(record(1)) is not None


def test_attempts_are_a_chain(home: LocalCheckpointStore, clock: Clock):
    """Each attempt names the one before, counts itself, and measures its own speed."""
    TransferJournal(home, writer="run-1", clock=clock).save(record(0))
    clock.now += 60
    TransferJournal(home, writer="run-2", clock=clock).save(record(4, parts_resumed=4, bytes_resumed=400))
    third = TransferJournal(home, writer="run-3", clock=clock)
    third.save(record(6, parts_resumed=6, bytes_resumed=600))
    clock.now += 2
    last = third.save(record(10, "done", parts_resumed=6, bytes_resumed=600))
    assert last is not None
    assert (last.attempt, last.sequence, last.continues) == (3, 4, "run-2")
    assert (last.bytes_moved, last.bytes_per_s) == (400, 200.0)
    assert (last.began_at, last.saved_at) == (1_000_060.0, 1_000_062.0)


def test_what_was_done_begins_a_new_story(home: LocalCheckpointStore):
    """The same transfer again, to another place for example, is a first attempt."""
    first = TransferJournal(home, writer="run-1")
    first.save(record(0))
    first.save(record(10, "done"))
    again = TransferJournal(home, writer="run-2").save(record(0))
    assert again is not None
    assert (again.attempt, again.sequence, again.continues) == (1, 3, "")


def test_an_orphan_writes_nothing_into_its_successors_story(home: LocalCheckpointStore, clock: Clock):
    """Once the successor has written, neither progress nor failure of the one before is kept."""
    orphan = TransferJournal(home, writer="run-1", clock=clock)
    orphan.save(record(0))
    successor = TransferJournal(home, writer="run-2", clock=clock)
    successor.save(record(2))
    clock.now += 60
    assert orphan.save(record(3)) is None
    assert orphan.save(record(3, "failed")) is None
    assert successor.save(record(10, "done")) is not None
    found = successor.load(ID)
    assert found is not None
    assert (found.writer, found.record.state) == ("run-2", "done")


def test_a_transfer_that_the_store_shows_complete_is_settled(home: LocalCheckpointStore):
    """A process that died after its last request left it `running`; done and unknown ones are left alone."""
    assert TransferJournal(home).done(ID) is None
    TransferJournal(home, writer="run-1").save(record(4))
    settled = TransferJournal(home, writer="run-2").done(ID)
    assert settled is not None
    assert (settled.record.state, settled.record.parts_done, settled.record.bytes_done) == ("done", 10, 1000)
    assert TransferJournal(home).done(ID) is None


def test_older_checkpoints_are_read_and_newer_ones_refused(
    home: LocalCheckpointStore, caplog: pytest.LogCaptureFixture
):
    """A version more may mean anything, so it is not interpreted; the transfer itself does not depend on it."""
    written = TransferJournal(home, writer="run-1").save(record(3))
    assert written is not None
    document = json.loads(written.to_json())
    for missing in ("parts_resumed", "bytes_resumed"):
        del document["record"][missing]
    assert Checkpoint.from_json(json.dumps({**document, "colour": "red"})) == written

    document["version"] = 2
    document["record"] = "nobody knows"
    path = home._path(ID)
    path.write_text(json.dumps(document) + "\n")
    journal = TransferJournal(home, writer="run-2")
    with pytest.raises(UsageError, match="version 2, this blobflow reads up to 1") as refusal:
        journal.load(ID)
    assert "newer blobflow" in refusal.value.hint
    begun = journal.save(record(3))
    assert begun is not None
    assert begun.attempt == 1
    assert "journal.refused" in caplog.text


@pytest.mark.parametrize("text", ["{}", '{"version": 1}', "{not json}", '{"version": "one"}'])
def test_damage_is_refused_and_costs_nothing(text: str, home: LocalCheckpointStore):
    """A damaged journal is an error to whoever asks it, and none to the transfer."""
    TransferJournal(home).save(record(3))
    home._path(ID).write_text(text + "\n")
    with pytest.raises(UsageError, match="not a checkpoint"):
        TransferJournal(home).load(ID)
    assert TransferJournal(home).save(record(4)) is not None


def test_a_torn_line_is_passed_over(home: LocalCheckpointStore):
    """A crash in the middle of a line loses that line and neither the ones before nor the next one."""
    journal = TransferJournal(home, writer="run-1")
    journal.save(record(3))
    path = home._path(ID)
    for length in range(1, 40, 7):
        path.write_bytes(path.read_bytes() + b'{"version":1,"record":{"transfer_id":"0123'[:length])
        found = TransferJournal(home).load(ID)
        assert found is not None
        assert found.record.parts_done == 3
    after = TransferJournal(home, writer="run-2").save(record(5))
    assert TransferJournal(home).load(ID) == after


def test_a_checkpoint_is_synced_before_save_returns(home: LocalCheckpointStore, monkeypatch: pytest.MonkeyPatch):
    """The file and the directory that names it, so that it survives a power cut."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    TransferJournal(home).save(record(1))
    assert synced == [f"{ID}.jsonl", "journal"]


def test_a_checkpoint_survives_sigkill(tmp_path: Path):
    """A process that is killed right after `save` has written it."""
    code = (
        "import os, signal; from tests.unit.test_journal import record\n"
        "from blobflow.transport.checkpoints import LocalCheckpointStore, TransferJournal\n"
        f"TransferJournal(LocalCheckpointStore({str(tmp_path)!r})).save(record(7))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -signal.SIGKILL
    found = TransferJournal(LocalCheckpointStore(tmp_path)).load(ID)
    assert found is not None
    assert found.record.parts_done == 7


def test_a_checkpoint_stays_small():
    """Under 2 KB with the longest key that S3 takes and a long upload id."""
    journal = TransferJournal(Memory(), writer="f" * 36)
    kept = journal.save(record(3, key="k" * 1024, upload_id="u" * 256))
    assert kept is not None
    assert len(kept.to_json().encode()) < 2048


@pytest.mark.parametrize("name", ["", "../up", "a/b", "x" * 201, "a.b"])
def test_ids_do_not_leave_the_directory(name: str, home: LocalCheckpointStore):
    """An id is no path."""
    with pytest.raises(UsageError, match="invalid transfer id"):
        home.read(name)


@pytest.mark.parametrize("lie", ["done", "far", "lost"])
def test_the_store_wins(lie: str, tmp_path: Path):
    """A journal that says more than the store holds, or that was lost, costs no byte of correctness."""
    store, artifact = local_store(tmp_path), artifact_of(tmp_path)
    journal = TransferJournal(LocalCheckpointStore(tmp_path / "journal"), writer="run-1")
    first: list[TransferRecord] = []

    def stop_after_three(record: TransferRecord) -> None:
        first.append(record)
        journal.save(record)
        if record.parts_done == 3 and record.state == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload(store, "a.tar", artifact, profile=SERIAL, on_checkpoint=stop_after_three)
    told = first[-1]
    claimed = {"parts_done": told.parts_total, "bytes_done": told.bytes_total}
    if lie == "lost":
        LocalCheckpointStore(tmp_path / "journal")._path(told.transfer_id).unlink()
    else:
        state = "done" if lie == "done" else "running"
        liar = TransferJournal(LocalCheckpointStore(tmp_path / "journal"), writer="liar")
        liar.save(told.model_copy(update={**claimed, "state": state}))

    assert told.upload_id is not None
    parts = store.list_parts("a.tar", told.upload_id)
    held = sum(part.size for part in parts)
    second = TransferJournal(LocalCheckpointStore(tmp_path / "journal"), writer="run-2")
    result = upload(store, "a.tar", artifact, profile=SERIAL, on_checkpoint=second.save)
    assert (result.bytes_resumed, result.bytes_sent) == (held, artifact.payload_size - held)
    verify(store, "a.tar", mode="deep")
    last = second.written(told.transfer_id)
    assert last is not None
    assert (last.record.state, last.record.parts_resumed) == ("done", len(parts))
