"""Export rounds: at most one at a time, and nothing stays behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from blobflow import DirectoryExporter, ExportResult, Lease, ProgressEvent, read_ref, run_export_round, verify
from blobflow.errors import LeaseLost, StoreUnavailable
from blobflow.rounds import content_key
from blobflow.stores.local import LocalStore
from blobflow.testing import Executable, FailBefore, Fault, FaultyStore, Request, Tree, write_tree
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
    assert (second.upload.status, second.ref, second.generation) == ("unchanged", first.ref, 2)


def test_a_round_that_is_running_elsewhere_does_nothing(store: LocalStore, scratch: Path, tmp_path: Path):
    """None, no export, no request but the look at the lease."""
    assert Lease(store, "orders/round").try_acquire()
    faulty = FaultyStore(store)
    assert run_export_round(faulty, "orders", DirectoryExporter(path=tmp_path / "absent"), scratch_dir=scratch) is None
    assert [request.operation for request in faulty.log] == ["get"]


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


def test_an_interrupt_gives_the_lease_up(store: LocalStore, scratch: Path, tmp_path: Path):
    """Also what is no Exception."""

    def stop(_: ProgressEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_export_round(store, "orders", exporter_of(tmp_path), scratch_dir=scratch, on_progress=stop)
    assert lease_of(store)["owner"] == ""
    assert list(scratch.iterdir()) == []


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
    assert [meta.key for meta in store.list()] == ["orders/round.lease.json"]
    assert list(scratch.iterdir()) == []


def test_a_completion_that_fails_is_only_a_warning(
    store: LocalStore, scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The artifact is published, so the round has its result."""

    def faults(request: Request) -> Fault | None:
        ref_is_there = store.exists("orders/latest.ref.json")
        return FailBefore() if request.key.endswith(".lease.json") and ref_is_there else None

    with caplog.at_level(logging.WARNING):
        result = run_export_round(FaultyStore(store, faults), "orders", exporter_of(tmp_path), scratch_dir=scratch)
    assert result is not None
    assert "round.completion_failed name=orders" in caplog.text


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
