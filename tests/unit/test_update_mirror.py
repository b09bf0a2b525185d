"""`update_mirror`: a mirror comes to show an artifact, and nothing is done twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blobflow import Artifact, DirectoryImporter, ProgressEvent, upload
from blobflow.coordination.refs import move_ref
from blobflow.errors import DigestMismatch, LeaseLost, RefusedError, StoreUnavailable
from blobflow.mirror import mirror_history
from blobflow.mirror.update import MirrorUpdate, shown, stage_artifact, update_mirror
from blobflow.testing import FailBefore, Fault, FaultyStore, Request, Tree, read_tree, write_tree
from blobflow.transport.lanes import begin_download, fetch_lane
from tests.kit import SERIAL, SMALL, TREE, Killed, artifact_of, dies_at, flip_a_byte, local_store

MONDAY: Tree = TREE
TUESDAY: Tree = {**TREE, "empty": "no longer"}


@dataclass
class House:
    """A store with the artifacts of two days, and a mirror that shows none yet."""

    store: FaultyStore
    importer: DirectoryImporter
    monday: Artifact
    tuesday: Artifact

    @property
    def tree(self) -> Tree:
        """What the mirror shows."""
        return read_tree(self.importer.data)

    def requests(self) -> list[str]:
        """The operations since the last call."""
        operations = [request.operation for request in self.store.log]
        self.store.log.clear()
        return operations


@pytest.fixture
def house(tmp_path: Path) -> House:
    store = local_store(tmp_path)
    days = [artifact_of(write_tree(tmp_path / day, {}), tree) for day, tree in (("mon", MONDAY), ("tue", TUESDAY))]
    for key, artifact in zip(("monday.tar", "tuesday.tar"), days, strict=True):
        upload(store, key, artifact, profile=SMALL)
    return House(FaultyStore(store), DirectoryImporter(path=tmp_path / "mirror"), *days)


def update(house: House, day: str = "monday", **options: Any) -> MirrorUpdate:
    digest = house.monday.digest if day == "monday" else house.tuesday.digest
    return update_mirror(house.store, f"{day}.tar", digest, house.importer, **{"profile": SERIAL, **options})


def test_an_update_downloads_imports_and_records(house: House):
    """The mirror shows the artifact, its history names it, and both kinds of progress reach the end."""
    moved: list[ProgressEvent] = []
    imported: list[tuple[int, int]] = []
    result = update(house, on_progress=moved.append, on_import=lambda *progress: imported.append(progress))
    assert (result.download.status, result.imported.status) == ("downloaded", "imported")
    assert house.tree == MONDAY
    assert [(entry.key, entry.artifact_digest) for entry in mirror_history(house.importer.path)] == [
        ("monday.tar", house.monday.digest)
    ]
    assert moved[-1].bytes_done == moved[-1].bytes_total == result.download.bytes_total
    assert imported[-1] == (house.monday.manifest.bytes, house.monday.manifest.bytes)


def test_a_current_mirror_costs_no_request(house: House):
    """The second update is `unchanged` in both halves, asks the store nothing, and adds nothing to the history."""
    first = update(house)
    house.requests()
    again = update(house)
    assert (again.download.status, again.imported.status) == ("unchanged", "unchanged")
    assert (again.download.bytes_total, again.download.bytes_received) == (first.download.bytes_total, 0)
    assert house.requests() == []
    assert len(mirror_history(house.importer.path)) == 1
    assert shown(house.importer, house.monday.digest) is not None
    assert shown(house.importer, house.tuesday.digest) is None


def test_the_next_artifact_takes_its_place(house: House):
    """Another digest is another artifact: it is fetched and shown."""
    update(house)
    result = update(house, "tuesday")
    assert (result.download.status, result.imported.status) == ("downloaded", "imported")
    assert house.tree == TUESDAY


def test_what_an_earlier_step_staged_is_only_imported(house: House):
    """Download and import may be two steps: the second asks the store nothing."""
    staged = stage_artifact(house.store, "monday.tar", house.monday.digest, house.importer)
    assert staged.path == house.importer.staging(house.monday.digest)
    assert not house.importer.data.exists()
    house.requests()
    result = update(house)
    assert (result.download.status, result.imported.status) == ("unchanged", "imported")
    assert house.requests() == []
    assert house.tree == MONDAY
    assert not staged.path.exists()


def test_what_lanes_have_landed_is_not_fetched_again(house: House):
    """An update after the lanes of a download receives manifest and index only."""
    staging = house.importer.staging(house.monday.digest)
    ticket = begin_download(house.store, "monday.tar", staging, lanes=2, profile=SMALL)
    for lane in range(2):
        fetch_lane(house.store, ticket, staging, lane, profile=SMALL)
    result = update(house, profile=SMALL)
    assert result.download.bytes_resumed == result.download.bytes_total - result.download.bytes_received > 0
    assert result.download.bytes_received < 5_000
    assert house.tree == MONDAY


@pytest.mark.parametrize("request_number", [3, 6, 9])
def test_a_killed_update_is_continued(house: House, request_number: int):
    """Killed at some request of the download, the next update shows the artifact."""
    dying = House(FaultyStore(house.store, dies_at(request_number)), house.importer, house.monday, house.tuesday)
    with pytest.raises(Killed):
        update(dying)
    assert not house.importer.data.exists()
    assert update(house).imported.status == "imported"
    assert house.tree == MONDAY


def test_staged_data_that_rotted_is_not_shown(house: House):
    """The import holds every member to its digest, whoever downloaded it."""
    staged = stage_artifact(house.store, "monday.tar", house.monday.digest, house.importer)
    flip_a_byte(staged.path / "data" / "big.bin")
    with pytest.raises(DigestMismatch):
        update(house)
    assert not house.importer.data.exists()


def test_another_artifact_under_the_key_is_refused(house: House):
    """The digest decides, not the key."""
    with pytest.raises(DigestMismatch):
        update_mirror(house.store, "monday.tar", house.tuesday.digest, house.importer)
    assert not house.importer.data.exists()


def test_a_store_that_is_down_leaves_the_mirror_as_it_was(house: House):
    """The error comes out; the mirror shows what it showed."""
    update(house)

    def down(_: Request) -> Fault:
        return FailBefore()

    failing = House(FaultyStore(house.store, down), house.importer, house.monday, house.tuesday)
    with pytest.raises(StoreUnavailable):
        update(failing, "tuesday")
    assert house.tree == MONDAY


def test_a_mirror_of_another_backend_is_refused(house: House, tmp_path: Path):
    """The importer says so before anything is shown."""

    class Other(DirectoryImporter):
        @property
        def backend(self) -> str:
            return "other"

    with pytest.raises(RefusedError):
        update_mirror(house.store, "monday.tar", house.monday.digest, Other(path=tmp_path / "other"))


@pytest.mark.seed("W1.7")
def test_a_mirror_does_not_go_back_to_an_earlier_round(house: House):
    """It shows what the ref names, so the artifact of round 1 that wakes up late is refused; by hand it is not."""
    move_ref(house.store, "orders/latest", "tuesday.tar", house.tuesday.digest, round_number=2)
    update(house, "tuesday", ref="orders/latest", round_number=2)
    with pytest.raises(LeaseLost, match="belongs to round 2, and this is round 1"):
        update(house, ref="orders/latest", round_number=1)
    assert house.tree == TUESDAY
    update(house, ref="orders/latest")
    assert house.tree == MONDAY


@pytest.mark.seed("W1.7")
def test_a_mirror_that_is_behind_follows_round_by_round(house: House):
    """Round 1 is shown although the ref has moved on: it is newer than what the mirror shows."""
    move_ref(house.store, "orders/latest", "tuesday.tar", house.tuesday.digest, round_number=2)
    assert update(house, ref="orders/latest", round_number=1).imported.status == "imported"
    assert house.tree == MONDAY
