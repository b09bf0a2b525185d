"""A mirror of what is pushed: it arrives at a receiver, is proven, imported and followed, until the next one comes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow import DirectoryImporter, open_store, upload
from blobflow.backends.sqlite import SqliteExporter, SqliteImporter
from blobflow.cli import run as blobflow
from blobflow.dagster import ArtifactMirror, metadata as md, received_mirror
from blobflow.errors import IntegrityError, NotFoundError, RefusedError, UsageError
from blobflow.mirror import (
    Bootstrapping,
    Following,
    MirrorReceiver,
    ReceivedStore,
    Snapshot,
    SnapshotId,
    mirror_history,
    mirror_status,
    read_snapshots,
)
from blobflow.mirror.client import MirrorClient
from blobflow.mirror.receiver import follow_received, read_received
from blobflow.stores import Store
from blobflow.testing import Tree, read_tree
from tests.dagster.kit import FOLLOWED, FOLLOWING, facts, failure
from tests.kit import TREE, artifact_of
from tests.receivers import TOKEN, serving


@dataclass
class Site:
    """Where snapshots are made, where they arrive, and the deployment that follows them."""

    home: Path
    instance: dg.DagsterInstance
    options: dict[str, Any] = field(default_factory=dict)
    cursors: dict[str, str | None] = field(default_factory=dict)

    @property
    def received(self) -> Path:
        return self.home / "received"

    @property
    def shown(self) -> Path:
        return self.home / "mirror" / "current"

    @property
    def mirror(self) -> ArtifactMirror:
        importer = DirectoryImporter(path=self.home / "mirror")
        return received_mirror("orders", self.received, **{"importer": importer, **self.options})

    def snapshot(self, position: int, tree: Tree, *, source: str = "east", database: str = "orders") -> Snapshot:
        """Of an artifact in a store that the mirror cannot reach."""
        there = self.home / f"{source}-{database}-{position}"
        store = open_store(there / "store")
        if not there.exists():
            upload(store, "it", artifact_of(there, tree))
        return Snapshot.of_artifact(store, "it", source=source, database=database, position=position)

    def push(self, snapshot: Snapshot, *, chunks: int | None = None) -> SnapshotId:
        """Let it arrive, or the next chunks only."""
        with MirrorReceiver(self.received, checkpoint_bytes=4096) as receiver:
            status = receiver.status(snapshot.id)
            offset = status.bytes_done if isinstance(status, Bootstrapping) else 0
            for number, envelope in enumerate(snapshot.envelopes(offset, chunk_bytes=4096)):
                if number == chunks:
                    break
                receiver.handle(envelope)
        return snapshot.id

    def tick(self, name: str = "orders_latest_sensor") -> Any:
        """One evaluation of a sensor; its events are recorded."""
        defs = self.mirror.definitions
        sensor = defs.resolve_sensor_def(name)
        with dg.build_sensor_context(
            instance=self.instance,
            instance_ref=self.instance.get_ref(),
            cursor=self.cursors.get(name),
            repository_def=defs.get_repository_def(),
            resources=self.mirror.resources,
        ) as context:
            result = sensor.evaluate_tick(context)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        self.cursors[name] = result.cursor
        return result

    def run(self, **tags: str) -> dg.ExecuteInProcessResult:
        job = self.mirror.definitions.resolve_job_def("orders_mirror_job")
        return job.execute_in_process(instance=self.instance, raise_on_error=False, tags=tags)

    def follow(self) -> list[dg.ExecuteInProcessResult]:
        """A tick, and the runs that it requests."""
        return [self.run(**request.tags) for request in self.tick().run_requests]

    def status(self) -> dict[int, Any]:
        """By position, as the receiver's journals have it."""
        return {snapshot.position: status for snapshot, status in read_snapshots(self.received).items()}


@pytest.fixture
def site(tmp_path: Path, instance: dg.DagsterInstance) -> Site:
    return Site(tmp_path, instance, {"retry_policy": None})


@pytest.mark.seed("2.11", "W2.9")
def test_what_was_pushed_is_imported_and_followed(site: Site, capsys):
    """The sensor tells of it and starts a run, which verifies, imports and says Following; the next one replaces it."""
    site.push(site.snapshot(7, TREE))
    assert site.status() == {7: Bootstrapping(site.snapshot(7, TREE).total_bytes, site.snapshot(7, TREE).total_bytes)}
    (result,) = site.follow()
    assert result.success
    assert read_tree(site.shown) == TREE
    told = facts(result, FOLLOWING)
    assert (told[md.MIRROR_STATUS], told[md.CURSOR]) == ("Following", 7)
    assert told[md.KEY].startswith("orders/00000000000000000007-")
    (remote,) = site.instance.fetch_materializations(FOLLOWED, limit=10).records
    assert remote.asset_materialization is not None
    assert remote.asset_materialization.metadata[md.GENERATION].value == 7
    assert site.status() == {7: Following(7)}
    assert site.follow() == []

    site.push(site.snapshot(8, {"newer": "file"}))
    assert mirror_status(site.home / "mirror", ReceivedStore(site.received), "orders/latest").behind
    (again,) = site.follow()
    assert again.success
    assert read_tree(site.shown) == {"newer": "file"}
    assert not mirror_status(site.home / "mirror", ReceivedStore(site.received), "orders/latest").behind
    assert [entry.key for entry in mirror_history(site.home / "mirror")] == [
        facts(each, FOLLOWING)[md.KEY] for each in (result, again)
    ]
    assert len(site.instance.fetch_materializations(FOLLOWING, limit=10).records) == 2

    capsys.readouterr()
    assert blobflow(["--json", "mirror", "status", str(site.received)]) == 0
    shown = json.loads(capsys.readouterr().out)["snapshots"]
    assert [(each["position"], each["status"], each["cursor"]) for each in shown] == [
        (7, "following", 7),
        (8, "following", 8),
    ]


def test_a_database_is_followed_from_its_own_cursor(site: Site):
    """Of an SQLite database with a cursor of its own, Following says that one, not the position."""
    import sqlite3

    site.home.mkdir(exist_ok=True)
    with sqlite3.connect(site.home / "orders.db") as database:
        database.execute("CREATE TABLE orders (id INTEGER)")
    database.close()
    there = site.home / "there"
    exported = SqliteExporter(path=site.home / "orders.db", cursor_query="SELECT 'lsn-42'").export(there / "artifact")
    store = open_store(there / "store")
    upload(store, "it", exported.artifact)
    site.push(Snapshot.of_artifact(store, "it", source="east", database="orders", position=7))
    site.options["importer"] = SqliteImporter(path=site.home / "mirror")
    (result,) = site.follow()
    assert facts(result, FOLLOWING)[md.CURSOR] == "lsn-42"
    assert site.status() == {7: Following("lsn-42")}


def test_what_is_arriving_is_told_and_starts_nothing(site: Site):
    """Bootstrapping with bytes done and in all, as observations of the mirror, once for each change."""
    snapshot = site.snapshot(7, TREE)
    assert site.tick("orders_arrivals_sensor").asset_events == []
    site.push(snapshot, chunks=2)
    assert site.follow() == []
    for repeated in (False, True):
        events = site.tick("orders_arrivals_sensor").asset_events
        assert len(events) == (not repeated)
    (record,) = site.instance.fetch_observations(FOLLOWING, limit=10).records
    told = record.asset_observation
    assert told is not None
    assert told.metadata[md.MIRROR_STATUS].value == "Bootstrapping"
    assert (told.metadata[md.BYTES_DONE].value, told.metadata[md.SIZE].value) == (8192, snapshot.total_bytes)
    site.push(snapshot)
    assert site.tick("orders_arrivals_sensor").asset_events[0].metadata[md.PERCENT].value == 100.0
    (result,) = site.follow()
    assert result.success
    assert site.tick("orders_arrivals_sensor").skip_message == "nothing is arriving"


def test_only_the_database_and_source_that_were_named_are_followed(site: Site):
    """Others have mirrors of their own; an older snapshot that comes late changes nothing."""
    site.options |= {"database": "orders-eu", "source": "east"}
    names = {"source": "east", "database": "orders-eu"}
    site.push(site.snapshot(5, {"right": "one"}, **names))
    site.push(site.snapshot(9, {"of": "the west"}, source="west", database="orders-eu"))
    site.push(site.snapshot(9, {"of": "another database"}, source="east", database="orders"))
    # A position after the artifact's, and no artifact: somebody's file.
    (site.home / "file").write_bytes(b"x" * 4096)
    site.push(Snapshot.of_file(site.home / "file", position=10, **names))
    site.tick("orders_arrivals_sensor")
    defs = site.mirror.definitions
    sensor = next(each.name for each in defs.sensors or () if "arrivals" not in each.name)
    assert [request.run_key.split("@")[0] for request in site.tick(sensor).run_requests] == ["orders/east/latest"]
    assert site.run().success
    assert read_tree(site.shown) == {"right": "one"}
    site.push(site.snapshot(4, {"late": "one"}, **names))
    assert site.tick(sensor).run_requests == []


def test_received_snapshots_do_not_fill_the_disk(site: Site):
    """After an import the two newest artifacts stay; what is newer than the imported one always does."""
    for position in (1, 2, 3, 4):
        site.push(site.snapshot(position, {"number": str(position)}))
    assert site.run().success
    assert [each.id.position for each in read_received(site.received)] == [3, 4]
    # The receiver, had it been running, knows: what is gone may be pushed again.
    with MirrorReceiver(site.received) as receiver:
        assert [snapshot.position for snapshot in receiver.snapshots()] == [3, 4]
    assert sorted(path.suffix for path in (site.received / "recv_snapshots/orders").iterdir()) == [
        *[".journal"] * 2,
        *[".snapshot"] * 2,
    ]


def damage_payload(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def test_damage_on_the_receivers_disk_is_not_imported(site: Site):
    """After a complete arrival a bit flips: the run fails, the mirror shows what it showed, nobody says Following."""
    site.push(site.snapshot(7, TREE))
    assert site.run().success
    site.push(site.snapshot(8, {**TREE, "newer": "file"}))
    damage_payload(read_received(site.received)[1].path)
    (result,) = site.follow()
    assert not result.success
    _, _, told = failure(result)
    assert told[md.ERROR] in ("ChecksumMismatch", "DigestMismatch")
    assert read_tree(site.shown) == TREE
    assert isinstance(site.status()[8], Bootstrapping)


def test_a_killed_run_is_made_good_by_the_next_one(site: Site, monkeypatch):
    """Killed between the import and the note: the next run imports nothing, and notes it."""
    site.push(site.snapshot(7, TREE))

    def dies(*_: object) -> None:
        raise RefusedError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(ReceivedStore, "follow", dies)
        assert not site.run().success
    assert read_tree(site.shown) == TREE
    assert isinstance(site.status()[7], Bootstrapping)
    again = site.run()
    assert facts(again, FOLLOWING)[md.STATUS] == "unchanged"
    assert site.status() == {7: Following(7)}


@pytest.mark.seed("2.11")
def test_a_receiver_at_work_learns_what_the_mirror_did(site: Site):
    """Pushed over HTTP while the receiver serves: its own answers say Following after the run, and absent after gc."""
    first, second, third = (site.snapshot(number, {"number": str(number)}) for number in (1, 2, 3))
    with (
        MirrorReceiver(site.received) as receiver,
        serving(receiver) as server,
        MirrorClient(server.url, token=TOKEN) as client,
    ):
        for snapshot in (first, second):
            client.push(snapshot)
            (result,) = site.follow()
            assert result.success
        assert [client.status(each.id)["status"] for each in (first, second)] == ["following"] * 2
        assert client.status(second.id)["cursor"] == 2
        client.push(third)
        assert site.follow()[0].success
        assert client.status(first.id)["status"] == "absent"
        assert client.push(second).status == "unchanged"
        assert client.push(first).status == "pushed"
    assert read_tree(site.shown) == {"number": "3"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"directory": "received"}, "is relative"),
        ({"keep_snapshots": 0}, "keep_snapshots=0"),
        ({"name": "or ders", "database": "orders"}, "invalid pipeline name"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, options, says):
    """When the code location is loaded."""
    given = {"name": "orders", "directory": tmp_path, "importer": DirectoryImporter(path=tmp_path / "mirror")}
    with pytest.raises(UsageError, match=says):
        received_mirror(**{**given, **options})


@pytest.mark.seed("W2.4")
@pytest.mark.parametrize("hostile", ["../x", "/etc", ".hidden", "a/b", " "])
def test_hostile_names_are_refused_here_too(tmp_path: Path, hostile: str):
    """A database is named in a configuration as carefully as on the wire."""
    with pytest.raises(RefusedError, match="is not the id of a database"):
        received_mirror("orders", tmp_path, DirectoryImporter(path=tmp_path / "mirror"), database=hostile)


# The directory as a store


def test_a_receivers_directory_is_a_store_that_is_read(site: Site):
    """Everything that reads artifacts reads it: the newest by a ref, others by key; and nothing is written."""
    site.push(site.snapshot(7, TREE))
    store = ReceivedStore(site.received)
    assert not isinstance(store, Store)
    (entry, _) = store.list()
    assert store.head(entry.key).size == entry.size
    shutil.rmtree(site.received)
    with pytest.raises(NotFoundError, match="no directory"):
        ReceivedStore(site.received)


def test_only_a_complete_snapshot_is_followed(site: Site):
    """What is on its way, or is not there, has no history yet."""
    snapshot = site.snapshot(7, TREE)
    site.push(snapshot, chunks=1)
    for named in (snapshot.id, snapshot.id._replace(position=8)):
        with pytest.raises(IntegrityError, match="is not complete"):
            follow_received(site.received, named, 1)


def test_a_premature_note_does_not_touch_what_is_arriving(site: Site):
    """Bytes that no checkpoint vouches for yet stay where they are, and the snapshot arrives whole."""
    snapshot = site.snapshot(7, TREE)
    with MirrorReceiver(site.received) as receiver:
        for number, envelope in enumerate(snapshot.envelopes(chunk_bytes=4096)):
            receiver.handle(envelope)
            if number == 1:
                with pytest.raises(IntegrityError, match="is not complete"):
                    follow_received(site.received, snapshot.id, 1)
                with pytest.raises(IntegrityError, match="8192 of"):
                    receiver.follow(snapshot.id, 1)
    assert site.run().success
    assert read_tree(site.shown) == TREE


def test_two_processes_may_note_at_the_same_time(site: Site):
    """Each line of the journal stays whole, and the last one counts."""
    snapshot = site.push(site.snapshot(7, TREE))
    with MirrorReceiver(site.received) as receiver:

        def note(follow: Callable[[int], None]) -> None:
            for number in range(50):
                follow(number)

        threads = [
            threading.Thread(target=note, args=(lambda n: receiver.follow(snapshot, n),)),
            threading.Thread(target=note, args=(lambda n: follow_received(site.received, snapshot, n),)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        receiver.follow(snapshot, "end")
        assert receiver.status(snapshot) == Following("end")
    (journal,) = (site.received / "recv_snapshots/orders").glob("*.journal")
    assert journal.read_bytes().count(b'"following"') == 101
    assert site.status() == {7: Following("end")}
