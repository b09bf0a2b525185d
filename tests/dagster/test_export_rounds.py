"""The round of a pipeline's export: held as long as it goes on, lost by who is silent, and never published late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow import DirectoryExporter, ExportResult, Lease, read_ref
from blobflow.backends.base import OnBytes
from blobflow.coordination.lease_store import ObjectLeaseStore
from blobflow.coordination.sql_lease_store import SqlLeaseStore
from blobflow.dagster import metadata as md
from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Request, read_tree, write_tree
from blobflow.transport import list_artifacts
from tests.dagster.kit import FaultyResource, Place, failure
from tests.dagster.s3_pipeline import ROOT
from tests.processes import wait_for

TTL_S = 0.6


class Slow:
    """Exports a directory after something else has happened; it tells no progress before."""

    backend = "directory"

    def __init__(self, source: Path, first: Callable[[], object]) -> None:
        self._source = source
        self._first = first

    def export(self, dest: Path, *, on_progress: OnBytes | None = None) -> ExportResult:
        self._first()
        return DirectoryExporter(path=self._source).export(dest, on_progress=on_progress)


@pytest.mark.seed("W1.7")
def test_a_round_that_is_longer_than_its_time_to_live_is_kept(place: Place):
    """The heartbeat renews it while the exporter says nothing, and nobody else gets it meanwhile."""
    seen: list[float] = []

    def outlive() -> None:
        record = ObjectLeaseStore(place.store)

        def renewed() -> bool:
            found = record.read("orders/round")
            assert found is not None
            seen.append(found.state.expires_at)
            assert not Lease(place.store, "orders/round").try_acquire()
            return seen[-1] - seen[0] > 2 * TTL_S

        wait_for(renewed)

    result = place.run(place.pipeline(exporter=Slow(place.source, outlive), ttl_s=TTL_S))
    assert result.success
    assert len(set(seen)) > 4
    assert read_tree(place.current) == read_tree(place.source)


@pytest.mark.seed("W1.7")
def test_an_export_that_hangs_does_not_hold_its_round_for_ever(place: Place):
    """After so long a silence another one takes over, and what the first one exports then is not handed on."""
    successor = Lease(place.store, "orders/round", ttl_s=60)
    exporter = Slow(place.source, lambda: wait_for(successor.try_acquire))
    FaultyResource.script(lambda _: None)
    result = place.run(place.pipeline(exporter=exporter, ttl_s=TTL_S, max_silence_s=0.0))
    step, message, told = failure(result)
    assert (step, told[md.ERROR]) == ("orders__snapshot.export", "LeaseLost")
    assert "is not held" in message or "was taken over" in message
    assert FaultyResource.count("create_multipart") == 0
    assert [path for path in place.scratch.rglob("*") if path.is_file()] == []
    assert successor.generation == 2


def test_a_round_whose_completion_fails_is_free_again(place: Place):
    """The store fails at the very end of the export: the step fails, its scratch is gone, the next run exports."""
    down: list[int] = []

    def faults(request: Request) -> Fault | None:
        if request.operation == "put" and request.key == "orders/round.lease.json":
            down.append(request.number)
            if len(down) == 2:  # the first one took the round
                return FailBefore(StoreUnavailable("the store is down", operation="put", key=request.key))
        return None

    FaultyResource.script(faults)
    result = place.run()
    assert failure(result)[2][md.ERROR] == "StoreUnavailable"
    assert [path for path in place.scratch.rglob("*") if path.is_file()] == []
    assert Lease(place.store, "orders/round").try_acquire()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.seed("1.20", "W1.7")
def test_a_frozen_run_publishes_nothing(place: Place, tmp_path: Path):
    """Stopped in its export for longer than the time to live; what it exports later reaches neither store nor ref."""
    home = tmp_path / "frozen"
    write_tree(home / "source", {"old": "and late"})
    ttl_s = 1.0
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from tests.dagster import frozen_run as run; run.main(run.Path(run.sys.argv[1]), 1.0)",
            home,
        ],
        cwd=ROOT,
    ) as frozen:
        try:
            wait_for(lambda: (home / "exporting").exists() or frozen.poll() is not None)
            os.kill(frozen.pid, signal.SIGSTOP)
            pipeline = place.pipeline(ttl_s=ttl_s)
            wait_for(lambda: place.run(pipeline).success)
            ref = read_ref(place.store, "orders/latest")
            (home / "go-on").touch()
            os.kill(frozen.pid, signal.SIGCONT)
            frozen.wait(120)
        finally:
            frozen.kill()
    assert (home / "outcome").read_text().startswith("orders__snapshot.export lease 'orders/round'")
    assert read_ref(place.store, "orders/latest") == ref
    assert ref is not None
    assert [entry.key for entry in list_artifacts(place.store)] == [ref.key]
    assert read_tree(place.current) == read_tree(place.source)


def test_a_database_keeps_the_lease(place: Place):
    """With `leases`, a store without conditional writes has rounds as well, one at a time and numbered."""
    leases = f"sqlite:///{place.home}/leases.db"
    resource = place.resource(store=place.unconditional, leases=leases)
    store = resource.get_store()
    lease = Lease(SqlLeaseStore(leases), "orders/round")
    assert lease.try_acquire()
    step, _, metadata = failure(place.run(resource=resource))
    assert (step, metadata[md.ERROR]) == ("orders__snapshot.export", "TransferBusy")
    assert list(store.list("")) == []
    lease.abandon()

    for number in (2, 3):
        write_tree(place.source, {"number": str(number)})
        assert place.run(resource=resource).success
        latest = read_ref(store, "orders/latest")
        assert latest is not None
        assert latest.round_number == number
    assert not [entry.key for entry in store.list("") if entry.key.endswith(".lease.json")]

    record = SqlLeaseStore(leases).read("orders/round")
    assert record is not None
    assert record.state.owner == ""  # given back
