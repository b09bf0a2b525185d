"""Downloads in lanes: processes that share a stage, and the one that makes the artifact of what they landed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from blobflow import Artifact, download, upload
from blobflow.artifact.landing import STAGE_PREFIX
from blobflow.errors import (
    DestinationNotEmpty,
    DigestMismatch,
    NotFoundError,
    TransferBusy,
    UsageError,
)
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, Hook, Request, read_tree
from blobflow.transport import ProgressEvent
from blobflow.transport.lanes import DownloadTicket, begin_download, fetch_lane
from tests.kit import SERIAL, SMALL, Killed, artifact_of, local_store, noise, watched

KEY = "a.tar"
LANES = 3
PART = 4096


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    tree = {
        "big.bin": noise(30_000, 1),
        "empty": "",
        "empty dir": {},
        "small": {f"{n:02}": noise(700, n) for n in range(40)},
        "sparse": noise(500, 3) + bytes(200_000) + noise(500, 4),
    }
    return artifact_of(tmp_path / "made", tree)


@pytest.fixture
def store(tmp_path: Path, artifact: Artifact) -> LocalStore:
    store = local_store(tmp_path)
    upload(store, KEY, artifact, profile=SMALL)
    return store


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "landed" / "a"


def stage_of(dest: Path) -> Path:
    (stage,) = dest.parent.glob(f"{STAGE_PREFIX}*")
    return stage


def check_whole(artifact: Artifact, dest: Path) -> None:
    """The artifact is there, and nothing else."""
    assert read_tree(dest / "data") == read_tree(artifact.data)
    assert Artifact.open(dest).digest == artifact.digest
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]


def ranges(store: FaultyStore) -> int:
    """Parts that were fetched: what an opened artifact reads first are its head and its index."""
    opened = sum(1 for request in store.log if request.operation == "get" and request.key.endswith(".manifest.json"))
    return store.count("get_range") - 2 * opened


def killed_at(store: Store, number: int) -> FaultyStore:
    """A store whose client dies at that range, counted from 1; the first two are the head and the index."""

    def die(_: Request) -> None:
        raise Killed

    return FaultyStore(store, lambda r: Hook(die) if (r.operation, r.number) == ("get_range", number) else None)


@contextmanager
def stopped(store: Store, ticket: DownloadTicket, dest: Path, lane: int) -> Iterator[None]:
    """A lane that waits for its first part, in another thread, as long as the block lasts."""
    arrived, go_on = threading.Event(), threading.Event()

    def wait(_: Request) -> None:
        arrived.set()
        assert go_on.wait(60)

    held = FaultyStore(store, lambda r: Hook(wait) if (r.operation, r.number) == ("get_range", 3) else None)
    with ThreadPoolExecutor(1) as pool:
        lane_result = pool.submit(fetch_lane, held, ticket, dest, lane, profile=SERIAL)
        assert arrived.wait(60)
        try:
            yield
        finally:
            go_on.set()
        lane_result.result()


def test_lanes_fetch_every_part_once_and_download_makes_the_whole(store: LocalStore, artifact: Artifact, dest: Path):
    """Lanes side by side land all parts; the download afterwards fetches none, proves them and publishes."""
    watch = watched(store)
    ticket = begin_download(watch, KEY, dest, lanes=LANES, profile=SMALL)
    assert ranges(watch) == 0
    with ThreadPoolExecutor(LANES) as pool:
        results = list(pool.map(lambda n: fetch_lane(watch, ticket, dest, n, profile=SMALL), range(LANES)))
    assert not dest.exists()
    assert ranges(watch) == ticket.parts == sum(result.parts for result in results)
    assert {result.status for result in results} == {"moved"}

    result = download(watch, KEY, dest, profile=SMALL)

    assert ranges(watch) == ticket.parts
    assert result.bytes_resumed == sum(each.bytes_moved for each in results)
    assert result.bytes_resumed + result.bytes_received == result.bytes_total
    check_whole(artifact, dest)


def test_a_lane_that_never_ran_costs_time_only(store: LocalStore, artifact: Artifact, dest: Path):
    """What no lane has landed the download fetches itself."""
    ticket = begin_download(store, KEY, dest, lanes=LANES, profile=SMALL)
    landed = [fetch_lane(store, ticket, dest, lane, profile=SMALL) for lane in (0, 2)]
    watch = watched(store)
    result = download(watch, KEY, dest, profile=SMALL)
    assert ranges(watch) == ticket.parts - sum(lane.parts for lane in landed)
    assert result.bytes_resumed == sum(lane.bytes_moved for lane in landed)
    check_whole(artifact, dest)


def test_a_killed_lane_continues(store: LocalStore, artifact: Artifact, dest: Path):
    """A lane that died fetches again only what it had not noted."""
    ticket = begin_download(store, KEY, dest, lanes=LANES, profile=SERIAL)
    with pytest.raises(Killed):
        fetch_lane(killed_at(store, 6), ticket, dest, 1, profile=SERIAL)
    watch = watched(store)
    again = fetch_lane(watch, ticket, dest, 1, profile=SERIAL)
    assert again.bytes_resumed == 3 * PART
    assert ranges(watch) == again.parts - 3
    for lane in (0, 2):
        fetch_lane(store, ticket, dest, lane, profile=SERIAL)
    download(store, KEY, dest, profile=SERIAL)
    check_whole(artifact, dest)


def test_lanes_continue_a_killed_download_and_the_reverse(store: LocalStore, artifact: Artifact, dest: Path):
    """A download in one piece, lanes, other lanes, and a download again: each takes up what was there."""
    with pytest.raises(Killed):
        download(killed_at(store, 6), KEY, dest, profile=SERIAL)
    ticket = begin_download(store, KEY, dest, lanes=2, profile=SERIAL)
    with pytest.raises(Killed):
        fetch_lane(killed_at(store, 8), ticket, dest, 0, profile=SERIAL)
    ticket = begin_download(store, KEY, dest, lanes=5, profile=SERIAL)
    lanes = [fetch_lane(store, ticket, dest, lane, profile=SERIAL) for lane in range(3)]
    assert sum(lane.bytes_resumed for lane in lanes) > 0
    watch = watched(store)
    download(watch, KEY, dest, profile=SERIAL)
    assert ranges(watch) < ticket.parts - 8
    check_whole(artifact, dest)


def test_another_profile_keeps_the_cut(store: LocalStore, artifact: Artifact, dest: Path):
    """The parts are those of the stage, whatever chunks a later process would have made."""
    with pytest.raises(Killed):
        download(killed_at(store, 6), KEY, dest, profile=SERIAL)
    coarse = SMALL.model_copy(update={"chunk_size": 10 * PART})
    ticket = begin_download(store, KEY, dest, lanes=2, profile=coarse)
    assert ticket.part_size == PART
    assert sum(fetch_lane(store, ticket, dest, lane, profile=coarse).bytes_resumed for lane in (0, 1)) == 3 * PART
    download(store, KEY, dest, profile=coarse)
    check_whole(artifact, dest)


def test_nobody_lands_a_part_beside_its_lane(store: LocalStore, artifact: Artifact, dest: Path):
    """While a lane is at work, other lanes are welcome; the same lane, a download and another division are not."""
    ticket = begin_download(store, KEY, dest, lanes=LANES, profile=SERIAL)
    with stopped(store, ticket, dest, 1):
        fetch_lane(store, ticket, dest, 0, profile=SERIAL)
        with pytest.raises(TransferBusy, match="another process is lane 1"):
            fetch_lane(store, ticket, dest, 1, profile=SERIAL)
        with pytest.raises(TransferBusy, match="another process is landing"):
            download(store, KEY, dest, profile=SERIAL)
        with pytest.raises(TransferBusy, match="another process is landing"):
            begin_download(store, KEY, dest, lanes=2, profile=SERIAL)
    download(store, KEY, dest, profile=SERIAL)
    check_whole(artifact, dest)


def test_a_lane_of_an_earlier_division_is_refused(store: LocalStore, dest: Path):
    """Lanes of two divisions would land the same parts; without a stage there is nothing to be a lane of."""
    old = begin_download(store, KEY, dest, lanes=2, profile=SMALL)
    begin_download(store, KEY, dest, lanes=3, profile=SMALL)
    with pytest.raises(NotFoundError, match="in 2 lanes") as answer:
        fetch_lane(store, old, dest, 0, profile=SMALL)
    assert "begin it again" in answer.value.hint
    with pytest.raises(NotFoundError, match="no download to"):
        fetch_lane(store, old, dest.with_name("elsewhere"), 0, profile=SMALL)


def test_damage_in_the_stage_is_found_at_the_end(store: LocalStore, artifact: Artifact, dest: Path):
    """Members in parts of several lanes are read back: if the file system lost a write, they are fetched again."""
    ticket = begin_download(store, KEY, dest, lanes=LANES, profile=SMALL)
    for lane in range(LANES):
        fetch_lane(store, ticket, dest, lane, profile=SMALL)
    with open(stage_of(dest) / "artifact" / "data" / "big.bin", "r+b") as file:
        file.seek(9_000)
        file.write(bytes(100))
    with pytest.raises(DigestMismatch, match=r"big\.bin"):
        download(store, KEY, dest, profile=SMALL)
    assert not dest.exists()
    watch = watched(store)
    download(watch, KEY, dest, profile=SMALL)
    assert 0 < ranges(watch) < ticket.parts
    check_whole(artifact, dest)


def test_reading_back_can_be_stopped(
    store: LocalStore, artifact: Artifact, dest: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may take as long as a transfer: progress is told meanwhile, and raising from it stops, and loses nothing."""
    ticket = begin_download(store, KEY, dest, lanes=2, profile=SMALL)
    for lane in (0, 1):
        fetch_lane(store, ticket, dest, lane, profile=SMALL)
    monkeypatch.setattr("blobflow.uploads.progress._PROGRESS_S", 0.0)

    def stop(_: ProgressEvent) -> None:
        raise Killed

    with pytest.raises(Killed):
        download(store, KEY, dest, profile=SMALL, on_progress=stop)
    assert not dest.exists()
    watch = watched(store)
    download(watch, KEY, dest, profile=SMALL)
    assert ranges(watch) == 0
    check_whole(artifact, dest)


def test_another_machine_believes_only_what_is_synced(
    store: LocalStore, artifact: Artifact, dest: Path, monkeypatch: pytest.MonkeyPatch
):
    """A lane that ended has synced its parts for everybody; of a killed one, the last may be with its machine only."""
    rare = SERIAL.model_copy(update={"checkpoint_interval": 1000})
    ticket = begin_download(store, KEY, dest, lanes=2, profile=rare)
    ended = fetch_lane(store, ticket, dest, 0, profile=rare)
    dead = killed_at(store, 5)
    monkeypatch.setattr("blobflow.uploads.progress.TransferProgress.failed", lambda _: None)  # SIGKILL saves nothing
    with pytest.raises(Killed):
        fetch_lane(dead, ticket, dest, 1, profile=rare)
    monkeypatch.undo()
    monkeypatch.setattr("blobflow.artifact.landing.boot_id", lambda: "another machine")
    watch = watched(store)
    result = download(watch, KEY, dest, profile=rare)
    assert result.bytes_resumed == ended.bytes_moved
    assert ranges(watch) == ticket.parts - ended.parts
    check_whole(artifact, dest)


def test_what_has_landed_is_left_alone(store: LocalStore, artifact: Artifact, dest: Path):
    """At a destination that holds the artifact, lanes have nothing to do, early or late; other things stay."""
    ticket = begin_download(store, KEY, dest, lanes=2, profile=SMALL)
    download(store, KEY, dest, profile=SMALL)
    assert fetch_lane(store, ticket, dest, 0).status == "unchanged"
    nothing = begin_download(store, KEY, dest, lanes=2)
    assert nothing.parts == 0
    assert fetch_lane(store, nothing, dest, 1).status == "unchanged"
    check_whole(artifact, dest)

    (dest / "MANIFEST.json").write_text("{}")
    with pytest.raises(DestinationNotEmpty):
        begin_download(store, KEY, dest, lanes=2)
    with pytest.raises(DestinationNotEmpty):
        fetch_lane(store, ticket, dest, 0)


def test_more_lanes_than_parts_are_idle(store: LocalStore, artifact: Artifact, dest: Path):
    """A lane without parts ends at once."""
    coarse = SMALL.model_copy(update={"chunk_size": 200_000})
    ticket = begin_download(store, KEY, dest, lanes=5, profile=coarse)
    assert [fetch_lane(store, ticket, dest, lane, profile=coarse).parts for lane in range(5)] == [1, 1, 0, 0, 0]
    download(store, KEY, dest, profile=coarse)
    check_whole(artifact, dest)


def test_a_lane_tells_of_itself(store: LocalStore, dest: Path):
    """Progress and records count the lane's own bytes, under an id of its own, and end with `done`."""
    ticket = begin_download(store, KEY, dest, lanes=2, profile=SERIAL)
    records, events = [], []
    result = fetch_lane(store, ticket, dest, 1, profile=SERIAL, on_checkpoint=records.append, on_progress=events.append)
    assert len({record.transfer_id for record in records}) == 1
    assert [record.state for record in records][-2:] == ["running", "done"]
    assert records[-1].bytes_done == records[-1].bytes_total == result.bytes_moved
    assert records[-1].parts_done == records[-1].parts_total == result.parts
    assert events[-1].bytes_done == events[-1].bytes_total


def test_tickets_travel_as_json(store: LocalStore, dest: Path):
    """A ticket goes through JSON; a lane that it does not have, or a document that is none, is refused."""
    ticket = begin_download(store, KEY, dest, lanes=2)
    assert DownloadTicket.from_json_dict(json.loads(json.dumps(ticket.to_json_dict()))) == ticket
    with pytest.raises(UsageError, match="no lane 2 of 2"):
        fetch_lane(store, ticket, dest, 2)
    with pytest.raises(UsageError, match="not the ticket"):
        DownloadTicket.from_json_dict({"key": KEY})
    with pytest.raises(UsageError, match="lanes must be 1 or more, not 0"):
        begin_download(store, KEY, dest, lanes=0)
