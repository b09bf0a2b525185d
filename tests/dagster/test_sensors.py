"""Sensors: what appears in a store is told once, whatever dies in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow import upload
from blobflow.artifact.manifest import BodyInfo, IndexInfo, Manifest, artifact_digest
from blobflow.coordination.refs import move_ref
from blobflow.dagster import BlobflowResource, artifact_partitions, manifest_sensor, metadata as md, ref_sensor
from blobflow.errors import StoreConfigurationError, StoreUnavailable, UsageError
from blobflow.stores import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailAfter, FailBefore, Fault, Hook, Request, Truncate
from tests.dagster.kit import FaultyResource
from tests.kit import FULL_SIZE, Killed, artifact_of, sized, watched
from tests.processes import wait_for
from tests.servers import S3Endpoint

REMOTE = dg.AssetKey(["orders", "remote"])
LONG = (pytest.mark.slow, pytest.mark.timeout(900))
PARTITIONS = artifact_partitions("orders")
published_sensor = partial(manifest_sensor, announce="published")
"""How it tells is the same whichever it tells of; what it waits for has tests of its own."""


@dg.asset(key=["orders", "mirror"], deps=[REMOTE], partitions_def=PARTITIONS)
def mirror() -> None:
    """Stands for a mirror."""


@dg.asset(key=["orders", "latest_mirror"])
def latest_mirror() -> None:
    """Stands for a mirror that follows a ref."""


def manifest(number: int) -> bytes:
    """The manifest of an artifact of its own."""
    return Manifest(
        backend="directory",
        created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        producer="blobflow 0",
        members=number,
        bytes=number,
        content_digest=f"sha256:{number:064x}",
        index=IndexInfo(size=1, sha256="0" * 64, crc32c=0),
        body=BodyInfo(size=1024, crc32c=0),
    ).encode()


def key_of(number: int) -> str:
    return f"orders/{number:06}.tar"


def publish(store: Store, numbers: Sequence[int], *, content: int = 0) -> list[str]:
    """Manifests as uploads leave them; the payloads are nobody's business here."""
    keys = [key_of(number) for number in numbers]
    for number, key in zip(numbers, keys, strict=True):
        store.put(key + ".manifest.json", manifest(number + content))
    return keys


class DaemonKilled(Exception):
    """The daemon is no more; what it wrote before is written."""


@dataclass
class Daemon:
    """What Dagster's sensor daemon does with the result of a tick, in its order, and until it is killed."""

    instance: dg.DagsterInstance
    home: Path
    sensor: dg.SensorDefinition = field(default_factory=lambda: published_sensor("orders"))
    cursor: str | None = None
    reserved: tuple[list[dg.RunRequest], str | None] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the resource; by default the local store is it."""
    takes: Callable[[str], None] = lambda _: None
    """What the time does while an `event`, a `partition` or a `run` is recorded."""
    _writes_left: int | None = None

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.home / "store")

    def evaluate(self) -> Any:
        blobflow = FaultyResource(**(self.settings or {"store": str(self.home / "store")}))
        defs = dg.Definitions(
            assets=[mirror, latest_mirror], sensors=[self.sensor], resources={"blobflow": blobflow}
        ).get_repository_def()
        with dg.build_sensor_context(
            instance=self.instance,
            instance_ref=self.instance.get_ref() if self.instance.is_persistent else None,
            cursor=self.cursor,
            repository_def=defs,
            resources={"blobflow": blobflow},
        ) as context:
            result = self.sensor.evaluate_tick(context)
        assert len((result.cursor or "").encode()) < 1024
        return result

    def tick(self, *, dies_after: int | None = None) -> Any:
        """Evaluate and record; with `dies_after`, the daemon is killed after so many writes."""
        self._writes_left = dies_after
        if self.reserved is not None:
            return self._submit()
        result = self.evaluate()
        for event in result.asset_events:
            self._write()
            self.takes("event")
            self.instance.report_runless_asset_event(event)
        for request in result.dynamic_partitions_requests:
            for key in request.partition_keys:
                self._write()
                self.takes("partition")
                if isinstance(request, dg.AddDynamicPartitionsRequest):
                    self.instance.add_dynamic_partitions(request.partitions_def_name, [key])
                else:
                    self.instance.delete_dynamic_partition(request.partitions_def_name, key)
        self._write()
        self.reserved = (list(result.run_requests), result.cursor)
        self._submit()
        return result

    def _submit(self) -> None:
        assert self.reserved is not None
        requests, cursor = self.reserved
        for request in requests:
            self._write()
            self.takes("run")
            if not self.instance.get_run_records(dg.RunsFilter(tags={"dagster/run_key": str(request.run_key)})):
                own = {"dagster/run_key": str(request.run_key), "dagster/sensor_name": self.sensor.name}
                tags = {**request.tags, **own}
                self.instance.add_run(dg.DagsterRun(job_name="mirror", run_id=str(uuid.uuid4()), tags=tags))
        self._write()
        self.cursor, self.reserved = cursor, None

    def _write(self) -> None:
        if self._writes_left is not None:
            self._writes_left -= 1
            if self._writes_left < 0:
                raise DaemonKilled

    # What there is

    def partitions(self) -> list[str]:
        return sorted(self.instance.get_dynamic_partitions("orders_artifacts"))

    def events(self) -> list[dg.AssetMaterialization]:
        """All of them, oldest first."""
        found = self.instance.fetch_materializations(REMOTE, limit=10_000, ascending=True)
        return [record.asset_materialization for record in found.records if record.asset_materialization]

    def run_keys(self) -> list[str]:
        return sorted(record.dagster_run.tags["dagster/run_key"] for record in self.instance.get_run_records())


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    FaultyResource.script(lambda _: None)
    with dg.DagsterInstance.ephemeral() as in_memory:
        yield Daemon(in_memory, tmp_path)


@pytest.fixture
def running_daemon(instance: dg.DagsterInstance, tmp_path: Path) -> Daemon:
    """With an instance on disk, which Dagster wants where partitions are run."""
    FaultyResource.script(lambda _: None)
    return Daemon(instance, tmp_path)


# What a tick tells


def test_an_artifact_becomes_an_event_and_a_partition(daemon: Daemon, tmp_path: Path):
    """A new artifact is a materialization of the external asset with its facts, and a partition named as its key."""
    artifact = artifact_of(tmp_path)
    upload(daemon.store, "orders/a.tar", artifact)
    daemon.tick()

    (event,) = daemon.events()
    facts = {label: value.value for label, value in event.metadata.items()}
    assert (event.asset_key, event.partition) == (REMOTE, "orders/a.tar")
    assert event.tags == {"dagster/data_version": artifact.digest}
    assert facts[md.URI] == f"{daemon.store.url}/orders/a.tar"
    assert facts[md.SIZE] == artifact.payload_size == daemon.store.head("orders/a.tar").size
    assert facts[md.MEMBERS] == artifact.manifest.members
    assert facts[md.ARTIFACT_DIGEST] == artifact.digest
    assert daemon.partitions() == ["orders/a.tar"]


def test_an_artifact_is_announced_when_a_ref_has_named_it(daemon: Daemon):
    """Not before its pipeline has verified it; and once that has, also where the ref has moved on meanwhile."""
    daemon.sensor = manifest_sensor("orders")
    keys = publish(daemon.store, range(4))
    result = daemon.tick()
    assert (daemon.partitions(), daemon.events()) == ([], [])
    assert "4 not verified yet: no ref 'latest' has named them" in result.skip_message

    for number in (0, 2):
        move_ref(daemon.store, "orders/latest", keys[number], artifact_digest(manifest(number)))
    assert "2 not verified yet" in daemon.tick().skip_message
    assert daemon.partitions() == [keys[0], keys[2]]
    assert [event.metadata[md.ANNOUNCED].value for event in daemon.events()] == ["verified", "verified"]
    daemon.tick()
    assert len(daemon.events()) == 2


def test_a_replacement_is_announced_when_a_ref_has_named_it(daemon: Daemon):
    """The ref names another artifact under the same key: what lies there now is not verified yet."""
    daemon.sensor = manifest_sensor("orders")
    (key,) = publish(daemon.store, [1])
    move_ref(daemon.store, "orders/latest", key, artifact_digest(manifest(1)))
    daemon.tick()
    publish(daemon.store, [1], content=100)
    assert "1 not verified yet" in daemon.tick().skip_message
    assert (daemon.partitions(), len(daemon.events())) == ([key], 1)
    move_ref(daemon.store, "orders/latest", key, artifact_digest(manifest(101)))
    daemon.tick()
    assert [(event.tags or {})["dagster/data_version"] for event in daemon.events()] == [
        artifact_digest(manifest(1)),
        artifact_digest(manifest(101)),
    ]


def test_what_was_announced_and_is_gone_needs_no_ref_to_go(daemon: Daemon):
    """Its partition is removed, whatever the refs name by then."""
    daemon.sensor = manifest_sensor("orders")
    keys = publish(daemon.store, range(2))
    for number in (0, 1):
        move_ref(daemon.store, "orders/latest", keys[number], artifact_digest(manifest(number)))
    daemon.tick()
    daemon.store.delete(keys[0] + ".manifest.json")
    daemon.tick()
    assert daemon.partitions() == [keys[1]]


@pytest.mark.parametrize(
    ("ref", "named"), [("orders/eu/latest", True), ("orders/latest", True), ("orders/us/latest", False)]
)
def test_the_ref_of_a_partition_or_of_the_whole_counts(daemon: Daemon, ref: str, named: bool):
    """It lies in the directory of the key or above, and is read once in a tick, however many artifacts are there."""
    daemon.sensor = manifest_sensor("orders")
    keys = [f"orders/eu/{number}.tar" for number in range(40)]
    for number, key in enumerate(keys):
        daemon.store.put(key + ".manifest.json", manifest(number))
    move_ref(daemon.store, ref, keys[3], artifact_digest(manifest(3)))
    FaultyResource.script(lambda _: None)
    daemon.tick()
    assert daemon.partitions() == ([keys[3]] if named else [])
    assert FaultyResource.count("get") == 2 + named


def test_a_ref_that_cannot_be_read_stops_the_tick_or_is_named(daemon: Daemon):
    """A store that is down is asked again from the same place; a damaged ref is named, and announces nothing."""
    daemon.sensor = manifest_sensor("orders")
    keys = publish(daemon.store, range(2))
    move_ref(daemon.store, "orders/latest", keys[1], artifact_digest(manifest(1)))
    down = StoreUnavailable("the store is down", key="orders/latest.ref.json", operation="get")
    FaultyResource.script(lambda request: FailBefore(down) if ".ref.json" in str(request) else None)
    result = daemon.tick()
    assert "the store is down" in result.skip_message
    assert daemon.partitions() == []
    FaultyResource.script(lambda _: None)
    daemon.tick()
    assert daemon.partitions() == [keys[1]]

    daemon.store.put("orders/latest.ref.json", b"not a ref")
    message = daemon.tick().skip_message
    assert "1 unreadable: 'orders/000000.tar' (object 'orders/latest.ref.json' is not a RefState" in message
    assert daemon.partitions() == [keys[1]]


def test_a_sensor_that_announces_what_is_published_says_so(daemon: Daemon):
    """In its description, and in every event."""
    daemon.sensor = published_sensor("orders")
    assert "published artifacts, verified or not," in str(daemon.sensor.description)
    publish(daemon.store, [1])
    daemon.tick()
    (event,) = daemon.events()
    assert event.metadata[md.ANNOUNCED].value == "published"


def test_what_is_known_is_neither_told_nor_fetched_again(daemon: Daemon):
    """A round over known artifacts costs a listing: no manifest is fetched, nothing is recorded."""
    publish(daemon.store, range(5))
    daemon.tick()
    FaultyResource.script(lambda _: None)
    result = daemon.tick()
    assert (result.asset_events, result.dynamic_partitions_requests, result.run_requests) == ([], [], [])
    assert result.skip_message == "5 artifacts below 'orders/' checked; 0 new or replaced; 0 gone"
    assert FaultyResource.count("get") == 0


def test_only_whole_artifacts_below_the_prefix_count(daemon: Daemon):
    """Payloads without manifest, refs, other tools' objects and other prefixes are passed over."""
    daemon.store.put("orders/unfinished.tar", b"payload")
    daemon.store.put("orders/x/.manifest.json", b"somebody else's")
    move_ref(daemon.store, "orders/latest", "orders/a.tar", artifact_digest(manifest(1)))
    daemon.store.put("others/a.tar.manifest.json", manifest(1))
    keys = publish(daemon.store, [1])
    daemon.tick()
    assert daemon.partitions() == keys


def test_what_appears_before_the_cursor_is_found_in_the_next_round(daemon: Daemon):
    """Keys that sort before the place that the walk has reached are not missed."""
    daemon.sensor = published_sensor("orders", page_size=2)
    publish(daemon.store, [3, 4, 5, 6])
    daemon.tick()
    publish(daemon.store, [0])
    for _ in range(4):
        daemon.tick()
    assert daemon.partitions() == [key_of(number) for number in (0, 3, 4, 5, 6)]
    assert len(daemon.events()) == 5


def test_an_artifact_that_was_replaced_is_told_again(daemon: Daemon):
    """Another artifact under the same key is another materialization, with its own data version."""
    publish(daemon.store, [1, 2])
    daemon.tick()
    publish(daemon.store, [1], content=100)
    result = daemon.tick()
    (event,) = result.asset_events
    assert (event.partition, event.tags["dagster/data_version"]) == (key_of(1), artifact_digest(manifest(101)))
    assert result.dynamic_partitions_requests == []
    assert daemon.tick().asset_events == []


def test_a_manifest_that_was_written_anew_is_no_news(daemon: Daemon):
    """The same bytes under another entity tag are the same artifact."""
    publish(daemon.store, [1])
    daemon.tick()
    publish(daemon.store, [1])
    assert daemon.tick().asset_events == []


def test_an_artifact_that_is_gone_loses_its_partition(daemon: Daemon):
    """Its events stay; when it comes back as it was, only the partition does."""
    publish(daemon.store, range(4))
    daemon.tick()
    for number in (1, 3):
        daemon.store.delete(key_of(number) + ".manifest.json")
    result = daemon.tick()
    assert "2 gone" in result.skip_message
    assert daemon.partitions() == [key_of(0), key_of(2)]

    publish(daemon.store, [1])
    daemon.tick()
    assert daemon.partitions() == [key_of(0), key_of(1), key_of(2)]
    assert len(daemon.events()) == 4


def test_a_bucket_is_followed_as_a_directory_is(daemon: Daemon, moto_s3: S3Endpoint):
    """New, replaced and removed artifacts in S3, page by page."""
    daemon.settings = {
        "store": f"s3://{moto_s3.new_bucket()}/backups",
        "endpoint_url": moto_s3.endpoint_url,
        "region": moto_s3.region,
        "access_key_id": moto_s3.access_key_id,
        "secret_access_key": moto_s3.secret_access_key,
    }
    daemon.sensor = published_sensor("orders", page_size=2)
    with closing(BlobflowResource(**daemon.settings).get_store()) as store:
        keys = publish(store, range(5))
        for _ in range(3):
            daemon.tick()
        assert (daemon.partitions(), len(daemon.events())) == (keys, 5)
        publish(store, [0], content=100)
        store.delete(keys[4] + ".manifest.json")
        for _ in range(3):
            daemon.tick()
        assert (daemon.partitions(), len(daemon.events())) == (keys[:4], 6)


def test_gone_artifacts_do_not_fill_a_page_forever(daemon: Daemon):
    """What is gone counts towards the page as well, and the walk continues behind it."""
    publish(daemon.store, range(20))
    daemon.tick()
    for number in range(18):
        daemon.store.delete(key_of(number) + ".manifest.json")
    daemon.sensor = published_sensor("orders", page_size=5)
    for left in (15, 10, 5, 2):
        daemon.tick()
        assert len(daemon.partitions()) == left


def test_a_store_that_shows_nothing_takes_nothing_away(daemon: Daemon):
    """A directory that is not mounted looks empty; nothing is taken for gone then, and the tick says so."""
    publish(daemon.store, range(3))
    daemon.tick()
    (daemon.home / "store").rename(daemon.home / "unmounted")
    result = daemon.tick()
    assert "the store lists nothing at all" in result.skip_message
    assert len(daemon.partitions()) == 3


def test_an_artifact_that_is_being_replaced_keeps_its_partition(daemon: Daemon, tmp_path: Path):
    """Between the old manifest and the new one there is none; that is not an end."""
    upload(daemon.store, "orders/a.tar", artifact_of(tmp_path))
    publish(daemon.store, [1])
    daemon.tick()

    def dies_before_publishing(request: Request) -> Fault | None:
        if request.operation == "put" and request.key.endswith(".manifest.json"):
            raise Killed
        return None

    store = watched(daemon.store)
    store.faults = dies_before_publishing
    with pytest.raises(Killed):
        upload(store, "orders/a.tar", artifact_of(tmp_path / "new", {"other": "content"}), overwrite=True)
    assert not daemon.store.exists("orders/a.tar.manifest.json")
    daemon.tick()
    assert daemon.partitions() == [key_of(1), "orders/a.tar"]


@pytest.mark.parametrize(
    ("key", "content", "told"),
    [
        ("orders/000001a.tar", b'{"format": "somebody.else/1"}', "format 'somebody.else/1'"),
        ("orders/000001a.tar", b"{", "not JSON"),
        ("orders/000001a.tar", b" " * (1 << 20) + b"{}", "more than"),
        ("orders/000001a.tar", b'{"format": "%s"}' % (b"x" * 1_000_000), "format 'xxx"),
        ("orders/000001...tar", manifest(7), "partition key"),
    ],
)
def test_an_unreadable_manifest_keeps_nobody_waiting(daemon: Daemon, key, content, told):
    """It is named in the tick, the others are told of, and once it is mended it is found."""
    daemon.store.put(f"{key}.manifest.json", content)
    keys = publish(daemon.store, [0, 1, 2])
    result = daemon.tick()
    assert daemon.partitions() == keys
    assert "1 unreadable" in result.skip_message
    assert key in result.skip_message
    assert told in result.skip_message
    assert len(result.skip_message) < 1000

    daemon.store.delete(f"{key}.manifest.json")
    daemon.store.put("orders/000001a.tar.manifest.json", manifest(7))
    daemon.tick()
    assert daemon.partitions() == sorted([*keys, "orders/000001a.tar"])


def test_a_manifest_may_say_anything(daemon: Daemon):
    """Sizes beyond any disk, a time long past, a backend with a name of a megabyte: an event is made of it."""
    strange = json.loads(manifest(1)) | {
        "created_at": "0002-01-02T00:00:00+00:00",
        "backend": "x" * 1_000_000,
        "members": 2**63 - 1,
        "body": {"size": 2**63 - 1, "crc32c": 0},
    }
    daemon.store.put("orders/0.manifest.json", json.dumps(strange).encode())
    keys = publish(daemon.store, [1])
    daemon.tick()
    assert daemon.partitions() == ["orders/0", *keys]
    (first, _) = daemon.events()
    assert len(str(first.metadata[md.BACKEND].value)) == 200


def test_many_unreadable_manifests_are_counted(daemon: Daemon):
    """A message names some of them, and the number of the others."""
    for number in range(9):
        daemon.store.put(f"orders/{number}.manifest.json", b"{")
    assert daemon.tick().skip_message.endswith(" and 4 more")


# Stores that fail


def test_a_store_that_is_down_costs_a_tick(daemon: Daemon):
    """The tick is skipped with the error and its hint, and the next one goes on from the same place."""
    daemon.sensor = published_sensor("orders", page_size=2)
    publish(daemon.store, range(4))
    daemon.tick()
    before = str(daemon.cursor).split()[2]
    FaultyResource.script(
        lambda _: FailBefore(StoreUnavailable("the store is down", hint="look at its power cord", operation="get"))
    )
    result = daemon.tick()
    assert "the store is down. Hint: look at its power cord" in result.skip_message
    assert str(daemon.cursor).split()[2] == before
    FaultyResource.script(lambda _: None)
    daemon.tick()
    assert len(daemon.partitions()) == 4


def test_a_listing_that_breaks_counts_as_far_as_it_came(daemon: Daemon):
    """What was listed is told of, and the next tick goes on behind it."""
    publish(daemon.store, range(8))
    FaultyResource.script(lambda request: Truncate(keep=5) if request.operation == "list" else None)
    result = daemon.tick()
    assert len(result.asset_events) == 5
    assert "stopped there" in result.skip_message
    FaultyResource.script(lambda _: None)
    assert [event.partition for event in daemon.tick().asset_events] == [key_of(n) for n in (5, 6, 7)]


def test_a_manifest_that_cannot_be_fetched_now_is_fetched_by_the_next_tick(daemon: Daemon):
    """The walk stops before it, keeps what comes before, and nothing is skipped."""
    publish(daemon.store, range(8))

    def faults(request: Request) -> Fault | None:
        return FailAfter() if request.operation == "get" and request.key.startswith(key_of(5)) else None

    FaultyResource.script(faults)
    assert [event.partition for event in daemon.tick().asset_events] == [key_of(n) for n in range(5)]
    FaultyResource.script(lambda _: None)
    assert [event.partition for event in daemon.tick().asset_events] == [key_of(n) for n in (5, 6, 7)]


def test_a_wrong_configuration_fails_the_tick(daemon: Daemon):
    """What waiting does not mend is a failure with the hint; Dagster keeps the cursor of a failed tick."""
    FaultyResource.script(lambda _: FailBefore(StoreConfigurationError("no such bucket", hint="make it")))
    for daemon.sensor in (published_sensor("orders"), ref_sensor("orders")):
        with pytest.raises(dg.Failure, match="no such bucket"):
            daemon.evaluate()


def test_a_slow_store_makes_the_page_shorter(daemon: Daemon, monkeypatch):
    """After 20 s a tick ends with what it has, and every tick gets on."""
    now = [0.0]

    def takes_two_seconds(request: Request) -> Fault | None:
        def wait(_: Request) -> None:
            now[0] += 2

        return Hook(wait) if request.operation == "get" else None

    monkeypatch.setattr("blobflow.dagster.manifest_tick.monotonic", lambda: now[0])
    FaultyResource.script(takes_two_seconds)
    publish(daemon.store, range(100))
    told: list[int] = []
    while sum(told) < 100 and len(told) < 20:
        told.append(len(daemon.tick().asset_events))
    assert sum(told) == 100
    assert max(told) <= 33, told  # which of a batch came in time, the threads decide


def test_other_objects_are_no_obstacle(daemon: Daemon, monkeypatch):
    """A prefix full of something else is gone through tick by tick, too."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr("blobflow.dagster.manifest_tick.monotonic", clock)
    for number in range(50):
        daemon.store.put(f"orders/0-{number:02}", b"")
    keys = publish(daemon.store, [1])
    for _ in range(3):
        daemon.tick()
    assert daemon.partitions() == keys


class SlowDagster:
    """A clock that stands still except while Dagster records, which takes `seconds`, and `times` as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.now = time.time()
        self.seconds = seconds
        self.times = 1.0
        monkeypatch.setattr("time.time", lambda: self.now)  # of the events that are recorded
        monkeypatch.setattr("blobflow.dagster.manifest_tick.monotonic", lambda: self.now)

    def __call__(self, what: str) -> None:
        self.now += self.seconds[what] * self.times


@pytest.mark.parametrize(
    ("number", "event_s", "all_told_after"),
    [(1500, 0.01, 3), (1500, 0.03, 4), (1500, 0.1, 10), pytest.param(10_000, 0.01, 12, marks=LONG)],
)
@pytest.mark.parametrize("worse", [1.0, 1.4])
def test_a_tick_leaves_time_for_dagster_to_record_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, number: int, event_s: float, all_told_after: int, worse: float
):
    """Evaluated and recorded, a tick stays below 30 s, also where Dagster becomes slower from tick to tick."""
    slow = daemon.takes = SlowDagster(monkeypatch, event=event_s, partition=0.2 * event_s)
    publish(daemon.store, range(number))
    told: list[int] = []
    while sum(told) < number:
        began = slow.now
        told.append(len(daemon.tick().asset_events))
        assert slow.now - began < 30.0, told
        if len(told) % 2:
            slow.times = min(slow.times * worse, 3.0)
    assert told[0] <= 154
    assert min(told[:-1]) > 0
    assert worse > 1 or len(told) == all_told_after, told


def test_what_is_gone_takes_its_time_as_well(daemon: Daemon, monkeypatch: pytest.MonkeyPatch):
    """Partitions are removed one by one: a store from which much was removed is as many ticks as one that filled."""
    keys = publish(daemon.store, range(400))
    daemon.tick()
    daemon.tick()
    daemon.tick()
    assert len(daemon.partitions()) == 400
    slow = daemon.takes = SlowDagster(monkeypatch, event=0.1, partition=0.1)
    for key in keys[1:]:
        daemon.store.delete(key + ".manifest.json")
    while daemon.partitions() != keys[:1]:
        began = slow.now
        daemon.tick()
        assert slow.now - began < 30.0


def test_runs_take_their_time_as_well(running_daemon: Daemon, monkeypatch: pytest.MonkeyPatch):
    """Where Dagster needs a second to create a run, a tick requests fewer of them than it may."""
    daemon = running_daemon
    daemon.sensor = published_sensor("orders", target=mirror)
    slow = daemon.takes = SlowDagster(monkeypatch, event=0.01, partition=0.01, run=0.5)
    found = daemon.instance.get_run_records
    created: dict[str, datetime] = {}

    def records(*arguments: Any, **options: Any) -> Sequence[dg.RunRecord]:
        """With the time at which they were created."""
        now = datetime.fromtimestamp(slow.now, timezone.utc)
        return [
            record._replace(create_timestamp=created.setdefault(record.dagster_run.run_id, now))
            for record in found(*arguments, **options)
        ]

    add_run = daemon.instance.add_run

    def add(run: dg.DagsterRun) -> dg.DagsterRun:
        created[run.run_id] = datetime.fromtimestamp(slow.now, timezone.utc)
        return add_run(run)

    monkeypatch.setattr(daemon.instance, "get_run_records", records)
    monkeypatch.setattr(daemon.instance, "add_run", add)
    publish(daemon.store, range(120))
    requested: list[int] = []
    while sum(requested) < 120:
        began = slow.now
        requested.append(len(daemon.tick().run_requests))
        assert slow.now - began < 30.0, requested
    assert requested[0] == 50
    assert 30 < requested[1] < 45


def test_a_store_that_hangs_ends_the_tick(daemon: Daemon, monkeypatch: pytest.MonkeyPatch):
    """A manifest that does not come is not waited for beyond the budget; what came before it is told."""
    release = threading.Event()

    def faults(request: Request) -> Fault | None:
        hangs = request.operation == "get" and request.key.startswith(key_of(5))
        return Hook(hang) if hangs else None

    def hang(_: Request) -> None:
        release.wait(60)

    monkeypatch.setattr("blobflow.dagster.manifest_tick.BUDGET_S", 2.0)
    monkeypatch.setattr("blobflow.dagster.manifest_tick.PATIENCE_S", 0.5)
    publish(daemon.store, range(10))
    FaultyResource.script(faults)
    result = daemon.tick()
    release.set()
    assert [event.partition for event in result.asset_events] == [key_of(n) for n in range(5)]
    assert "was not read in time" in result.skip_message
    FaultyResource.script(lambda _: None)
    while len(daemon.partitions()) < 10:
        daemon.tick()


# The cursor


def test_the_cursor_is_small_for_the_longest_key(daemon: Daemon):
    """A key of 900 bytes, whatever its characters, fits into a cursor below 1 KB, and the walk goes on behind it."""
    daemon.sensor = published_sensor("orders", page_size=1)
    long = "orders/" + "/".join('é"' * 80 for _ in range(3)) + "/" + "\\" * 100
    daemon.store.put(long + ".manifest.json", manifest(1))
    publish(daemon.store, [1])
    for _ in range(2):
        daemon.tick()  # which looks at the cursor's size
    assert daemon.partitions() == sorted([key_of(1), long])


@pytest.mark.parametrize("cursor", ["", "nonsense", "1 x orders/0", "2 0 orders/9", "{}"])
def test_a_cursor_that_nobody_understands_begins_anew(daemon: Daemon, cursor):
    """Whatever somebody wrote into it: that costs a round, and loses nothing."""
    keys = publish(daemon.store, range(3))
    daemon.cursor = cursor
    daemon.tick()
    assert daemon.partitions() == keys


# Runs


def run_keys_of(numbers: Sequence[int]) -> list[str]:
    return [f"{key_of(number)}@{artifact_digest(manifest(number))}" for number in numbers]


def test_with_a_target_every_artifact_gets_one_run(running_daemon: Daemon):
    """At most 50 per tick, keyed by artifact and digest; the others wait, and nothing is run twice."""
    running_daemon.sensor = published_sensor("orders", target=mirror)
    publish(running_daemon.store, range(70))
    first = running_daemon.tick()
    assert [(r.run_key, r.partition_key) for r in first.run_requests][:2] == [
        (run_key, key_of(number)) for number, run_key in enumerate(run_keys_of([0, 1]))
    ]
    assert len(first.run_requests) == len(first.asset_events) == 50
    assert len(running_daemon.tick().run_requests) == 20
    assert running_daemon.tick().run_requests == []
    assert running_daemon.run_keys() == run_keys_of(range(70))


def test_a_replaced_artifact_is_run_again(running_daemon: Daemon):
    """Another digest under the same key has another run key."""
    running_daemon.sensor = published_sensor("orders", target=mirror, max_runs=2)
    publish(running_daemon.store, [1])
    running_daemon.tick()
    publish(running_daemon.store, [1], content=100)
    (request,) = running_daemon.tick().run_requests
    assert request.run_key == f"{key_of(1)}@{artifact_digest(manifest(101))}"


@pytest.mark.parametrize("target", [None, mirror], ids=["events", "runs"])
@pytest.mark.parametrize("seed", range(3))
def test_a_daemon_killed_anywhere_misses_nothing_and_repeats_nothing(running_daemon: Daemon, target, seed):
    """Killed after any write and started again, over and over: one event, one partition and one run each."""
    chance = random.Random(seed)
    running_daemon.sensor = published_sensor("orders", target=target, max_runs=7, page_size=20)
    keys = publish(running_daemon.store, range(40))
    for _ in range(200):
        try:
            result = running_daemon.tick(dies_after=chance.randrange(40))
        except DaemonKilled:
            continue
        if (
            result is not None
            and not result.asset_events
            and not result.run_requests
            and len(running_daemon.partitions()) == 40
        ):
            break
    for _ in range(3):
        running_daemon.tick()
    assert sorted(str(event.partition) for event in running_daemon.events()) == keys
    assert running_daemon.partitions() == keys
    assert running_daemon.run_keys() == (run_keys_of(range(40)) if target else [])


@pytest.mark.parametrize("options", [{"page_size": 0}, {"page_size": 1001}, {"max_runs": 51}])
def test_limits_that_dagster_cannot_bear_are_refused(options):
    """A mistake shows when the code location is loaded."""
    with pytest.raises(UsageError, match="is not between"):
        published_sensor("orders", **options)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_manifests_are_found_page_by_page(daemon: Daemon, monkeypatch):
    """Each is found once, a thousand in a tick (100,000 in a hundred ticks), with a cursor that stays small."""
    content, number = manifest(1), sized(100_000, 20_000)
    directory = daemon.home / "store" / "orders"
    directory.mkdir(parents=True)
    for n in range(number):
        (directory / f"{n:06}.tar.manifest.json").write_bytes(content)
    daemon.sensor = published_sensor("orders", page_size=1000)
    monkeypatch.setattr("blobflow.dagster.manifest_tick.BUDGET_S", 3600.0)  # pages are counted here, not seconds
    for tick in range(number // 1000 + 1):
        result = daemon.evaluate()
        for request in result.dynamic_partitions_requests:
            daemon.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        assert len(result.asset_events) == (1000 if tick < number // 1000 else 0)
        daemon.cursor = result.cursor
    assert daemon.partitions() == [key_of(n) for n in range(number)]


# Refs


def point_at(daemon: Daemon, number: int) -> str:
    """Publish an artifact and move the ref to it."""
    (key,) = publish(daemon.store, [number])
    move_ref(daemon.store, "orders/latest", key, artifact_digest(manifest(number)))
    return key


def test_a_ref_that_was_moved_is_told_once(daemon: Daemon):
    """Every move is a materialization with the artifact's facts; between moves nothing happens."""
    daemon.sensor = ref_sensor("orders")
    assert "there is no ref 'orders/latest'" in daemon.tick().skip_message
    key = point_at(daemon, 1)
    daemon.tick()
    assert daemon.tick().skip_message == f"'orders/latest' still names {key!r}"
    point_at(daemon, 2)
    daemon.tick()

    told = [{label: value.value for label, value in event.metadata.items()} for event in daemon.events()]
    assert [facts[md.GENERATION] for facts in told] == [1, 2]
    assert [facts[md.ARTIFACT_DIGEST] for facts in told] == [artifact_digest(manifest(n)) for n in (1, 2)]
    assert [facts[md.REF] for facts in told] == ["orders/latest"] * 2
    assert daemon.run_keys() == []


def test_a_ref_that_was_moved_starts_a_run(daemon: Daemon):
    """With a target: one run per move, keyed by generation and digest; moved back counts as a move."""
    daemon.sensor = ref_sensor("orders", target=latest_mirror)
    for number in (1, 2, 1):
        point_at(daemon, number)
        daemon.tick()
        daemon.tick()
    one, two = (artifact_digest(manifest(n)) for n in (1, 2))
    assert daemon.run_keys() == [f"orders/latest@1@{one}", f"orders/latest@2@{two}", f"orders/latest@3@{one}"]


def test_a_move_whose_tick_was_killed_is_run_and_not_repeated(daemon: Daemon):
    """Killed before the cursor was kept: the event is there once, and the run comes."""
    daemon.sensor = ref_sensor("orders", target=latest_mirror)
    point_at(daemon, 1)
    for writes in (1, 0):
        with pytest.raises(DaemonKilled):
            daemon.tick(dies_after=writes)
    daemon.tick()
    assert len(daemon.events()) == 1
    assert daemon.run_keys() == [f"orders/latest@1@{artifact_digest(manifest(1))}"]


def test_a_ref_is_followed_when_its_artifact_is_there(daemon: Daemon):
    """While the artifact is being replaced, or the store is down, the tick is skipped and the next one sees to it."""
    daemon.sensor = ref_sensor("orders", target=latest_mirror)
    point_at(daemon, 1)
    publish(daemon.store, [1], content=100)
    assert "was replaced" in daemon.tick().skip_message
    FaultyResource.script(lambda _: FailBefore(StoreUnavailable("the store is down", hint="wait", operation="get")))
    assert daemon.tick().skip_message == "the store is down. Hint: wait"
    FaultyResource.script(lambda _: None)
    publish(daemon.store, [1])
    assert len(daemon.tick().run_requests) == 1


def test_a_ref_may_be_called_anything():
    """Refs have slashes and dashes, names of sensors have none."""
    assert ref_sensor("orders", ref="eu/last-good").name == "orders_eu_last_good_sensor"


def test_a_ref_to_nothing_fails_the_tick(daemon: Daemon):
    """Somebody removed what the ref names: that is worth a failure with a hint."""
    daemon.sensor = ref_sensor("orders")
    move_ref(daemon.store, "orders/latest", "orders/a.tar", artifact_digest(manifest(1)))
    with pytest.raises(dg.Failure, match=r"no artifact 'orders/a.tar'.*Hint: list what there is"):
        daemon.evaluate()


# With the real daemon


class RealDaemon:
    """Dagster's daemon in processes of its own, over an instance on disk."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.environment = environment
        (home / "dagster").mkdir()
        # Runs are created and stay in the queue: what is started is not the question here.
        (home / "dagster" / "dagster.yaml").write_text(
            "telemetry: {enabled: false}\nconcurrency: {runs: {max_concurrent_runs: 0}}\n"
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block, which kills it and its code server at once."""
        environment = {
            **os.environ,
            **self.environment,
            "DAGSTER_HOME": str(self.home / "dagster"),
            "SENSOR_STORE": str(self.home / "store"),
        }
        with open(self.home / "daemon.log", "ab") as log:
            process = subprocess.Popen(
                [Path(sys.executable).parent / "dagster-daemon", "run", "-m", "tests.dagster.sensor_location"],
                env=environment,
                cwd=Path(__file__).resolve().parents[2],
                start_new_session=True,
                stdout=log,
                stderr=log,
            )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with dg.DagsterInstance.from_config(str(self.home / "dagster")) as instance:
            yield instance

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, 900, self.home / "daemon.log")


def ticks_of(instance: dg.DagsterInstance) -> list[Any]:
    """The ticks of the only sensor, oldest first."""
    (state,) = instance.all_instigator_state()
    return list(reversed(instance.get_ticks(state.instigator_origin_id, state.selector_id)))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("number", "runs"), [(sized(10_000, 3000), False), (160, True)], ids=["many", "with runs"])
def test_the_real_daemon_killed_three_times_misses_nothing(tmp_path: Path, record_property, number, runs):
    """All are found (50 a tick, with runs), each once, although the daemon dies in three ticks.

    10,000 on a machine of their own are found within 12 ticks, each below 30 s.
    """
    daemon = RealDaemon(tmp_path, **({"SENSOR_RUNS": "1"} if runs else {}))
    directory = tmp_path / "store" / "orders"
    directory.mkdir(parents=True)
    for n in range(number):
        (directory / f"{n:06}.tar.manifest.json").write_bytes(manifest(n))

    with daemon.instance() as instance:

        def told() -> int:
            return len(instance.get_dynamic_partitions("orders_artifacts"))

        def recorded() -> int:
            newest = instance.fetch_materializations(REMOTE, limit=1).records
            return newest[0].storage_id if newest else 0

        for share in (0.15, 0.45, 0.75):
            with daemon.running():
                daemon.wait_for(lambda share=share: recorded() > share * number)
        with daemon.running():
            daemon.wait_for(lambda: told() == number and (not runs or instance.get_runs_count() == number))
            seen = len(ticks_of(instance))
            daemon.wait_for(lambda: len(ticks_of(instance)) > seen + 1)

        found: list[str] = []
        cursor: str | None = None
        while True:
            page = instance.fetch_materializations(REMOTE, limit=5000, cursor=cursor, ascending=True)
            found += [str(record.partition_key) for record in page.records]
            cursor = page.cursor
            if not page.has_more:
                break
        assert found == [key_of(n) for n in range(number)]
        ticks = ticks_of(instance)
        seconds = [round(tick.end_timestamp - tick.timestamp, 1) for tick in ticks if tick.end_timestamp]
        record_property("ticks", seconds)
        print("seconds of the ticks:", seconds)
        if runs:
            keys = [str(run.tags["dagster/run_key"]) for run in instance.get_runs()]
            assert sorted(keys) == run_keys_of(range(number))
        elif FULL_SIZE:
            events = [tick for tick in ticks if tick.tick_data.dynamic_partitions_request_results]
            assert len(events) <= 12
            assert max(seconds) < 30.0
