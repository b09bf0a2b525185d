"""Export rounds: at most one at a time, and nothing stays behind."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from blobflow import (
    DirectoryExporter,
    ExportResult,
    Lease,
    ProgressEvent,
    RoundResult,
    read_ref,
    run_export_round,
    upload,
    verify,
)
from blobflow.backends import AppendLog, AppendLogExporter
from blobflow.coordination.lease_store import ObjectLeaseStore
from blobflow.coordination.refs import fence_ref, move_ref
from blobflow.coordination.rounds import ExportRound, RoundToken, content_key, take_token
from blobflow.errors import LeaseLost, StoreUnavailable, TimedOut, TransferBusy
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Executable, FailBefore, Fault, FaultyStore, Hook, Request, Tree, write_tree
from blobflow.transport import list_artifacts
from tests.kit import SMALL, TREE, artifact_of, local_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return local_store(tmp_path)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def exporter_of(path: Path, tree: Tree = TREE) -> DirectoryExporter:
    return DirectoryExporter(path=write_tree(path / "source", tree))


def lease_of(store: LocalStore) -> dict[str, object]:
    return json.loads(store.get("orders/round.lease.json", max_bytes=10_000).data)


@pytest.mark.seed("1.22", "1.23")
def test_a_round_publishes_and_cleans_up(store: LocalStore, scratch: Path, tmp_path: Path):
    """Artifact under its content key, ref moved to it, lease released, scratch empty."""
    result = run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=scratch, profile=SMALL)
    assert result is not None
    assert result.ref == read_ref(store, "orders/latest")
    assert result.ref is not None
    assert result.ref.key == result.upload.key
    verify(store, result.upload.key, mode="deep", expected_digest=result.ref.manifest_sha256)
    assert (lease_of(store)["owner"], lease_of(store)["generation"], result.generation) == ("", 1, 1)
    assert list(scratch.iterdir()) == []


def test_the_same_content_is_sent_once(store: LocalStore, scratch: Path, tmp_path: Path):
    """The second round uploads nothing and leaves the ref alone."""
    exporter = exporter_of(tmp_path)
    first = run_export_round(store, "orders", exporter, scratch_dir=scratch)
    second = run_export_round(store, "orders", exporter, scratch_dir=scratch)
    assert first is not None
    assert second is not None
    assert (second.upload.status, second.generation) == ("unchanged", 2)
    assert first.ref is not None
    assert second.ref is not None
    assert (second.ref.key, second.ref.generation) == (first.ref.key, first.ref.generation)


@pytest.mark.seed("1.20")
def test_a_round_that_is_running_elsewhere_does_nothing(store: LocalStore, scratch: Path, tmp_path: Path):
    """None, no export, no request but the look at the lease."""
    assert Lease(store, "orders/round").try_acquire()
    faulty = FaultyStore(store)
    assert run_export_round(faulty, "orders", DirectoryExporter(path=tmp_path / "absent"), scratch_dir=scratch) is None
    assert [request.operation for request in faulty.log] == ["get"]


@pytest.mark.seed("1.22", "1.23", "W1.7")
@pytest.mark.parametrize("operation", ["create_multipart", "put_part", "complete_multipart", "head"])
def test_a_round_that_fails_gives_the_lease_up(operation: str, store: LocalStore, scratch: Path, tmp_path: Path):
    """Whichever step fails: the error comes out, the lease is free at once, the scratch directory is empty."""

    def faults(request: Request) -> Fault | None:
        return FailBefore() if request.operation == operation else None

    with pytest.raises(StoreUnavailable):
        run_export_round(FaultyStore(store, faults), "orders", exporter_of(tmp_path), scratch_dir=scratch)
    assert lease_of(store)["owner"] == ""
    assert read_ref(store, "orders/latest") is None
    assert list(scratch.iterdir()) == []
    assert run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=scratch) is not None


@pytest.mark.seed("1.23")
def test_an_interrupt_gives_the_lease_up(store: LocalStore, scratch: Path, tmp_path: Path):
    """Also what is no Exception."""

    def stop(_: ProgressEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=scratch, on_progress=stop)
    assert lease_of(store)["owner"] == ""
    assert list(scratch.iterdir()) == []


@pytest.mark.seed("W1.7")
def test_who_lost_the_lease_publishes_nothing(store: LocalStore, scratch: Path, tmp_path: Path):
    """It slept during its export; another one took over; the ref stays where the other one put it."""

    class Slow:
        backend = "directory"

        def export(self, dest: Path, **options: object) -> ExportResult:
            result = exporter_of(tmp_path).export(dest)
            assert Lease(store, "orders/round", clock=lambda: 1e12).try_acquire()
            return result

    with pytest.raises(LeaseLost):
        run_export_round(store, "orders", Slow(), scratch_dir=scratch)
    assert read_ref(store, "orders/latest") is None
    assert [meta.key for meta in store.list()] == ["orders/latest.ref.json", "orders/round.lease.json"]
    assert list(scratch.iterdir()) == []


@pytest.mark.seed("1.22", "1.23")
def test_a_completion_that_fails_is_only_a_warning(
    store: LocalStore, scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The artifact is published, so the round has its result."""

    def faults(request: Request) -> Fault | None:
        published = read_ref(store, "orders/latest") is not None
        return FailBefore() if request.key.endswith(".lease.json") and published else None

    with caplog.at_level(logging.WARNING):
        result = run_export_round(FaultyStore(store, faults), "orders", exporter_of(tmp_path), scratch_dir=scratch)
    assert result is not None
    assert result.ref == read_ref(store, "orders/latest")
    assert "round.completion_failed name=orders" in caplog.text
    assert list(scratch.iterdir()) == []


@pytest.mark.seed("W1.5")
def test_a_content_key_tells_contents_apart(tmp_path: Path):
    """Equal trees, equal keys, also on another day; other bytes or another execute bit, another key."""
    trees: dict[str, Tree] = {
        "1": {"run": "x"},
        "2": {"run": "x"},
        "3": {"run": "y"},
        "4": {"run": Executable("x")},
    }
    keys = {name: content_key("orders", artifact_of(tmp_path / name, tree)) for name, tree in trees.items()}
    assert keys["1"] == keys["2"]
    assert len(set(keys.values())) == 3
    assert all(key.startswith("orders/") and key.endswith(".tar") for key in keys.values())


def test_a_changed_execute_bit_is_a_new_round(store: LocalStore, scratch: Path, tmp_path: Path):
    """Chmod +x is published like any other change."""
    exporter = exporter_of(tmp_path, {"run": "x"})
    run_export_round(store, "orders", exporter, scratch_dir=scratch)
    (tmp_path / "source" / "run").chmod(0o755)
    second = run_export_round(store, "orders", exporter, scratch_dir=scratch)
    assert second is not None
    assert second.upload.status == "uploaded"


# A round in several processes


def begin(store: LocalStore, **options: Any) -> ExportRound | None:
    return ExportRound.begin(store, "orders", ref="orders/latest", leases=ObjectLeaseStore(store), **options)


def exported(store: LocalStore, *, fenced: bool = False) -> tuple[ExportRound, RoundToken]:
    """A round whose export has ended, and its token as another process reads it."""
    held = begin(store)
    assert held is not None
    with held.kept_alive():
        token = held.fence() if fenced else held.take_number()
    held.hand_over()
    return held, RoundToken(**json.loads(json.dumps(token.to_json_dict())))


@pytest.mark.seed("1.22", "W1.7")
def test_another_process_publishes_and_completes_a_round(store: LocalStore, tmp_path: Path):
    """All that it needs is the token, which passes through JSON; both may be done again after a crash."""
    artifact = artifact_of(tmp_path)
    upload(store, "orders/1.tar", artifact)
    held, token = exported(store)
    assert token == held.token == RoundToken("orders", "orders/latest", number=1, generation=1)
    assert lease_of(store)["owner"] == ""
    for _ in range(2):
        moved = token.publish(store, "orders/1.tar", artifact.digest)
        assert moved == read_ref(store, "orders/latest")
        assert moved is not None
        assert (moved.key, moved.round_number) == ("orders/1.tar", 1)
        assert token.complete(ObjectLeaseStore(store), "tuesday")
        assert (lease_of(store)["owner"], lease_of(store)["cursor"]) == ("", "tuesday")


@pytest.mark.seed("W1.7")
def test_a_later_round_closes_an_earlier_one_that_was_handed_over(store: LocalStore, tmp_path: Path):
    """Once the later round has published, the earlier one neither moves the ref nor completes."""
    artifact = artifact_of(tmp_path)
    for key in ("orders/1.tar", "orders/2.tar"):
        upload(store, key, artifact)
    (_, first), (_, second) = exported(store), exported(store)
    assert (first.number, second.number) == (1, 2)
    second.publish(store, "orders/2.tar", artifact.digest)
    with pytest.raises(LeaseLost, match="belongs to round 2, and this is round 1"):
        first.publish(store, "orders/1.tar", artifact.digest)
    assert not first.complete(ObjectLeaseStore(store), "late")
    assert second.complete(ObjectLeaseStore(store), "in time")
    assert lease_of(store)["cursor"] == "in time"


@pytest.mark.seed("W1.7")
@pytest.mark.parametrize("fenced", [True, False])
def test_a_fence_closes_earlier_rounds_before_the_later_one_publishes(store: LocalStore, tmp_path: Path, fenced: bool):
    """With a number alone, the earlier round may still publish until the later one does."""
    artifact = artifact_of(tmp_path)
    upload(store, "orders/1.tar", artifact)
    _, first = exported(store)
    exported(store, fenced=fenced)
    with pytest.raises(LeaseLost) if fenced else nullcontext():
        first.publish(store, "orders/1.tar", artifact.digest)
    assert (read_ref(store, "orders/latest") is None) is fenced


def test_a_round_is_numbered_above_its_ref_when_its_lease_begins_again(store: LocalStore):
    """Somebody removed the record of the lease: the number continues where the ref is."""
    move_ref(store, "orders/latest", "orders/7.tar", "sha256:" + "7" * 64, round_number=7)
    assert exported(store)[1].number == 8
    assert exported(store, fenced=True)[1].number == 8


def test_a_failing_block_gives_the_round_up(store: LocalStore):
    """Whatever is raised while a round is kept alive: the next round begins at once."""
    held = begin(store)
    assert held is not None
    assert begin(store) is None
    with pytest.raises(Unlucky), held.kept_alive():
        raise Unlucky
    assert lease_of(store)["owner"] == ""
    assert begin(store) is not None


@pytest.mark.seed("W1.7")
def test_a_lost_round_is_not_handed_over(store: LocalStore):
    """Its progress, its renewal and its end say so, and what it exported stays where it is."""
    held = begin(store)
    assert held is not None
    with held.kept_alive() as progress:
        progress(1, 2)
        assert Lease(store, "orders/round", clock=lambda: 1e12).try_acquire()
        with pytest.raises(LeaseLost):
            held.renew()
        with pytest.raises(LeaseLost):
            progress(2, 2)
    with pytest.raises(LeaseLost):
        held.hand_over()
    with pytest.raises(LeaseLost):
        held.complete(None)


def test_a_round_without_leases_keeps_nobody_away(store: LocalStore, tmp_path: Path):
    """Where nothing keeps leases, every process has its round; the ref moves as if by hand."""
    upload(store, "orders/1.tar", artifact := artifact_of(tmp_path))
    rounds = [ExportRound.begin(store, "orders", ref="orders/latest", leases=None) for _ in range(2)]
    for held in rounds:
        assert held is not None
        with held.kept_alive() as progress:
            progress(1, 2)
            token = held.fence()
            assert token == held.take_number() == RoundToken("orders", "orders/latest")
        held.renew()
        held.hand_over()
        assert token.publish(store, "orders/1.tar", artifact.digest) is not None
        assert token.complete(None, "tuesday")
        held.complete("tuesday")
        held.abandon()
    assert not [meta.key for meta in store.list() if meta.key.endswith(".lease.json")]


@pytest.mark.seed("W1.7")
def test_a_token_without_an_export_numbers_what_is_published(store: LocalStore):
    """Each token is above the one before, and the lease is free again; a round in progress is waited for."""

    def take(ttl_s: float = 10.0) -> int | None:
        return take_token(store, "orders", ref="orders/latest", leases=ObjectLeaseStore(store), ttl_s=ttl_s).number

    assert [take(), take()] == [1, 2]
    held = begin(store)
    with pytest.raises(TransferBusy, match="a round of 'orders' is under way"):
        take(ttl_s=0.01)
    assert held is not None
    held.abandon()
    assert take() == 4
    assert take_token(store, "orders", ref="orders/latest", leases=None).number is None


class Scripted:
    """An exporter that does something of the test's own when it is called."""

    backend = "directory"

    def __init__(self, path: Path, then: Callable[[Path], object]) -> None:
        self.calls = 0
        self._path = path
        self._then = then

    def export(self, dest: Path, **options: object) -> ExportResult:
        self.calls += 1
        result = exporter_of(self._path).export(dest)
        self._then(dest)
        return result


WORKER = """
import sys
from pathlib import Path

from blobflow import DirectoryExporter, open_store, run_export_round

store, source, books, me = sys.argv[1:]
books = Path(books)


class Waits(DirectoryExporter):
    def export(self, dest, **options):
        (books / f"exports-{me}").touch()
        while len(list(books.glob("none-*"))) < 7:  # every other one asks while this one exports
            pass
        return super().export(dest, **options)


done = run_export_round(open_store(store), "orders", Waits(path=source), scratch_dir=books / "scratch")
(books / f"{'none' if done is None else 'done'}-{me}").touch()
"""


@pytest.mark.seed("1.20")
def test_of_eight_processes_one_exports(store: LocalStore, scratch: Path, tmp_path: Path):
    """Eight processes, one round: one export, and seven are told None and have written nothing."""
    source = write_tree(tmp_path / "source", TREE)
    (tmp_path / "books" / "scratch").mkdir(parents=True)
    command = [sys.executable, "-c", WORKER, store.url, source, tmp_path / "books"]
    workers = [subprocess.Popen([*command, str(number)]) for number in range(8)]
    try:
        assert [worker.wait(100) for worker in workers] == [0] * 8
    finally:
        for worker in workers:
            worker.kill()
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "books").iterdir() if path.is_file()]
    assert Counter(kinds) == {"none": 7, "exports": 1, "done": 1}
    assert lease_of(store)["generation"] == 1
    ref = read_ref(store, "orders/latest")
    assert ref is not None
    assert ref.generation == 1
    assert list((tmp_path / "books" / "scratch").iterdir()) == []


@pytest.mark.seed("1.22")
def test_a_round_is_completed_by_its_upload_alone(store: LocalStore, scratch: Path, tmp_path: Path):
    """The cursor of the completion record is that of the last round that was uploaded; a failed one leaves it."""
    log = AppendLogExporter(path=tmp_path / "log")

    def append(key: str) -> None:
        with AppendLog(log.path) as opened:
            opened.append(key, 1)

    append("a")
    seen: list[object] = []

    def watch(request: Request) -> Fault | None:
        if request.operation == "complete_multipart":
            seen.append(lease_of(store)["cursor"])
            return FailBefore() if len(seen) == 2 else None
        return None

    faulty = FaultyStore(store, watch)
    assert run_export_round(faulty, "orders", log, scratch_dir=scratch) is not None
    assert lease_of(store)["cursor"] == 1
    append("b")
    with pytest.raises(StoreUnavailable):
        run_export_round(faulty, "orders", log, scratch_dir=scratch)
    assert (lease_of(store)["cursor"], lease_of(store)["owner"]) == (1, "")
    assert run_export_round(faulty, "orders", log, scratch_dir=scratch) is not None
    assert lease_of(store)["cursor"] == 2
    assert seen == [None, 1, 1]


def test_of_eight_that_want_one_round_one_exports(store: LocalStore, scratch: Path, tmp_path: Path):
    """Seven get None and have done nothing."""
    all_asked = threading.Barrier(8)
    exporter = Scripted(tmp_path, lambda _: all_asked.wait(60))
    results: list[RoundResult | None] = []

    def work() -> None:
        results.append(run_export_round(store, "orders", exporter, scratch_dir=scratch))
        if results[-1] is None:
            all_asked.wait(60)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results.count(None), len(results), exporter.calls) == (7, 8, 1)


class Unlucky(Exception):
    """Not one of ours."""


def _fails(_: Path) -> None:
    raise Unlucky


def _loses_its_reply(_: Path) -> None:
    raise TimedOut("the database gave no reply", operation="export", key="orders", timeout_s=1.0)


def _channel_is_gone(_: Path) -> None:
    raise ConnectionResetError("the channel is gone")


def _disk_is_full(dest: Path) -> None:
    raise OSError(errno.ENOSPC, "no space left", str(dest))


@pytest.mark.seed("1.21", "1.23", "W1.10")
@pytest.mark.parametrize("fault", [_fails, _loses_its_reply, _channel_is_gone, _disk_is_full])
def test_an_export_that_fails_gives_the_lease_up(
    fault: Callable[[Path], object], store: LocalStore, scratch: Path, tmp_path: Path
):
    """Whatever the exporter raises comes out as it is; the next one has the lease at once and the scratch is empty."""
    with pytest.raises((Unlucky, TimedOut, OSError)) as failure:
        run_export_round(store, "orders", Scripted(tmp_path, fault), scratch_dir=scratch)
    assert isinstance(failure.value, TimedOut) is (fault is _loses_its_reply)
    assert lease_of(store)["owner"] == ""
    assert list(scratch.iterdir()) == []
    assert read_ref(store, "orders/latest") is None
    assert run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=scratch) is not None


@pytest.mark.seed("1.21")
def test_a_scratch_directory_that_is_absent_gives_the_lease_up(store: LocalStore, tmp_path: Path):
    """The first thing that can fail after the lease was won."""
    with pytest.raises(FileNotFoundError):
        run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=tmp_path / "absent")
    assert lease_of(store)["owner"] == ""


@pytest.mark.seed("W1.7")
def test_a_sleeper_finds_its_round_closed(store: LocalStore, scratch: Path, tmp_path: Path):
    """Frozen right before the ref is moved, it wakes when its successor has begun, and the ref is not its own any more.

    The successor has published nothing yet: its fence alone keeps the sleeper away.
    """
    begun: list[int] = []

    def freeze(request: Request) -> Fault | None:
        def meanwhile(_: Request) -> None:
            successor = Lease(store, "orders/round", clock=lambda: 1e12)
            assert successor.try_acquire()
            begun.append(fence_ref(store, "orders/latest", successor.generation))

        moves = request.operation == "put" and request.key == "orders/latest.ref.json"
        uploaded = any(meta.key.endswith(".manifest.json") for meta in store.list("orders/"))
        return Hook(meanwhile) if moves and uploaded and not begun else None

    with pytest.raises(LeaseLost, match="belongs to round 2, and this is round 1"):
        run_export_round(FaultyStore(store, freeze), "orders", exporter_of(tmp_path), scratch_dir=scratch)
    assert begun == [2]
    assert read_ref(store, "orders/latest") is None
    assert list(scratch.iterdir()) == []


@pytest.mark.seed("W1.7")
def test_a_silent_export_is_kept_alive(store: LocalStore, scratch: Path, tmp_path: Path):
    """An exporter that tells no progress for longer than the time to live keeps its round."""

    def sleeps(_: Path) -> None:
        before = lease_of(store)["write_id"]
        seen = {before}
        while len(seen) < 4:  # renewals, a third of the time to live apart
            seen.add(lease_of(store)["write_id"])

    done = run_export_round(store, "orders", Scripted(tmp_path, sleeps), scratch_dir=scratch, ttl_s=0.3)
    assert done is not None
    assert done.generation == 1


@pytest.mark.seed("W1.7")
def test_an_export_that_hangs_is_succeeded(
    store: LocalStore, scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """After `max_silence_s` without progress the lease runs out, and another one does the round."""

    def hangs(_: Path) -> None:
        other = Lease(store, "orders/round")
        while not other.try_acquire():
            pass

    with caplog.at_level(logging.WARNING), pytest.raises(LeaseLost):
        run_export_round(store, "orders", Scripted(tmp_path, hangs), scratch_dir=scratch, ttl_s=0.3, max_silence_s=0.0)
    assert "reason=no_progress" in caplog.text
    assert list(scratch.iterdir()) == []


def test_a_round_may_have_no_ref(store: LocalStore, scratch: Path, tmp_path: Path):
    """Then the lease alone keeps the rounds apart."""
    done = run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=scratch, ref=None)
    assert done is not None
    assert done.ref is None
    assert not [meta.key for meta in store.list() if meta.key.endswith(".ref.json")]


def test_a_round_does_not_name_what_is_pruned_meanwhile(tmp_path: Path):
    """Its artifact is removed just before the ref moves: the ref stays where it was, and the next round publishes."""
    write_tree(tmp_path / "source", TREE)
    store = local_store(tmp_path)
    exporter = DirectoryExporter(path=tmp_path / "source")
    first = run_export_round(store, "orders", exporter)
    assert first is not None
    before = read_ref(store, "orders/latest")
    write_tree(tmp_path / "source", {"new": "x"})

    def prunes(request: Request) -> None:
        if request.operation == "put" and request.key == "orders/latest.ref.json" and _new(store, first.upload.key):
            (key,) = _new(store, first.upload.key)
            store.delete(key + ".manifest.json")

    with pytest.raises(TransferBusy, match="being removed"):
        run_export_round(FaultyStore(store, prunes), "orders", exporter)
    after = read_ref(store, "orders/latest")
    assert before is not None
    assert after is not None
    assert after.key == before.key
    again = run_export_round(store, "orders", exporter)
    assert again is not None
    assert again.ref is not None
    assert again.ref.key == again.upload.key != first.upload.key


def _new(store: LocalStore, old: str) -> list[str]:
    """The keys of artifacts that were published after `old`."""
    return [entry.key for entry in list_artifacts(store) if entry.key != old]
