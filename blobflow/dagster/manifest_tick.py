"""One tick of a manifest sensor: compares the artifacts that the store lists with those that Dagster knows.

Dagster's event log is the journal: the last event of an artifact holds what is known about it. The cursor holds only
the position in the keys. So a killed tick is simply evaluated again: what it recorded is not recorded twice, and the
next tick requests the runs that it did not request.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError as NotInTime
from dataclasses import dataclass
from itertools import pairwise
from statistics import quantiles
from time import monotonic
from typing import Any, Final, NamedTuple

import dagster as dg

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.coordination.refs import read_ref
from blobflow.dagster import metadata as md
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    BlobflowError,
    InvalidKey,
    ObjectNotFound,
    RefusedError,
    ReplacementInProgress,
    StoreUnavailable,
    TemporaryError,
)
from blobflow.stores import ObjectMeta, Store, StoredObject
from blobflow.transport import MANIFEST_SUFFIX, read_manifest_bytes

BUDGET_S: Final = 20.0
"""Seconds for one tick: the sensor's work, and the time that Dagster needs to record its result. A tick stays below
30 s, even if recording takes half as long again as before."""
_RECORD_S: Final = 0.1
"""Assumed seconds to record an event, without recent measurements. A first tick so reports about 150 artifacts."""
_RUN_S: Final = 0.2
_PARTITION_SHARE: Final = 0.3
"""Cost of a partition in asset events. A partition is looked up, and added together with the others."""
_MEASURED: Final = 100
_FEWEST_MEASURED: Final = 8

PATIENCE_S: Final = 5.0
"""Seconds for which a request is repeated. If the store is down for longer, the next tick tries again."""
_BATCH: Final = 32
_READERS: Final = 8
_NAMED: Final = 5
"""Artifacts that a message names; the log names all."""
_QUOTED: Final = 200
"""Characters quoted from a manifest. It is untrusted, and may have a megabyte."""
_ANY: Final = "any"
"""Stands for any digest: the artifact need not be verified."""
DATA_VERSION: Final = "dagster/data_version"
_RUN_KEY: Final = "dagster/run_key"
_SENSOR_NAME: Final = "dagster/sensor_name"
_NOT_IN_PARTITION_KEYS: Final = "..."
"""Dagster's notation for ranges. (It takes no control characters either, nor do stores.)"""


def open_store(context: dg.SensorEvaluationContext, resource_key: str) -> Store:
    """The store, opened for a tick, which waits only a few seconds for it."""
    return getattr(context.resources, resource_key).get_store(patience_s=PATIENCE_S)


def described(error: BlobflowError) -> str:
    """An error's message and hint in one line."""
    return f"{error.message}. Hint: {error.hint}" if error.hint else error.message


@dataclass(frozen=True)
class PublishedArtifact:
    """An artifact in the store, as its manifest describes it."""

    key: str
    digest: str
    facts: dict[str, Any]

    @classmethod
    def read(cls, store: Store, key: str, data: bytes) -> "PublishedArtifact":
        """The artifact that the bytes of a manifest describe.

        Raises:
            ArtifactInvalid: the bytes are not a manifest.
        """
        found = ManifestFile.parse(data)
        manifest, digest = found.manifest, found.digest
        facts = {
            md.URI: f"{store.url}/{key}",
            md.KEY: key,
            md.SIZE: found.payload_size,
            md.MEMBERS: manifest.members,
            md.ARTIFACT_DIGEST: digest,
            md.CONTENT_DIGEST: manifest.content_digest,
            md.BACKEND: manifest.backend[:_QUOTED],
            md.CREATED_AT: dg.MetadataValue.timestamp(manifest.created_at),
        }
        return cls(key, digest, facts)

    def event(
        self, asset_key: dg.AssetKey, also: dict[str, Any], partition: str | None = None
    ) -> dg.AssetMaterialization:
        """The materialization that reports it to Dagster.

        Args:
            also: More metadata.
        """
        return dg.AssetMaterialization(
            asset_key, partition=partition, metadata={**self.facts, **also}, tags={DATA_VERSION: self.digest}
        )


@dataclass(frozen=True)
class ManifestWalk:
    """Settings of one manifest sensor, shared by its ticks."""

    sensor_name: str
    prefix: str
    asset_key: dg.AssetKey
    partitions_def: dg.DynamicPartitionsDefinition
    max_runs: int
    """Most runs that one tick requests; 0 for none."""
    page_size: int
    ref: str | None
    """Last segment of the refs that name verified artifacts; None reports every artifact."""

    @property
    def partitions_name(self) -> str:
        return str(self.partitions_def.name)


class _Cursor(NamedTuple):
    """Position of the sensor: at most 930 bytes, because a key has at most 900."""

    recorded: int
    """Storage id of the asset's last event when the last tick began; later events may need a run."""
    position: str
    """Key of the object that the walk reached; empty to start over."""

    @classmethod
    def parse(cls, text: str | None) -> "_Cursor":
        """An unreadable cursor restarts the walk: slower, nothing lost."""
        version, _, rest = (text or "").partition(" ")
        recorded, _, position = rest.partition(" ")
        return cls(int(recorded), position) if version == "1" and recorded.isdecimal() else cls(0, "")

    def __str__(self) -> str:
        return f"1 {self.recorded} {self.position}"


class _Known(NamedTuple):
    """Facts about an artifact in its last event."""

    digest: str | None
    e_tag: str | None


class _NotVerifiedError(RefusedError):
    """No ref has named the artifact so far. Field: key."""


class _Step(NamedTuple):
    """A step of the walk: a listed object, or a partition whose artifact is not listed."""

    at: str
    """Key of the object, or of the missing manifest."""
    key: str | None
    """Key of the artifact; None if the object is not a manifest."""
    e_tag: str | None
    """ETag of the object; None if it is not listed."""


class ManifestTick:
    """One evaluation of a manifest sensor, which compares the listed with the known artifacts."""

    def __init__(self, context: dg.SensorEvaluationContext, store: Store, walk: ManifestWalk) -> None:
        self._context = context
        self._store = store
        self._sensor = walk
        self._cursor = _Cursor.parse(context.cursor)
        self._position = self._cursor.position
        self._began = monotonic()
        self._record_s, self._run_s = _RECORD_S, _RUN_S
        self._partitions = {
            key for key in context.instance.get_dynamic_partitions(walk.partitions_name) if key.startswith(walk.prefix)
        }
        self._looked = 0
        self._events: list[dg.AssetMaterialization] = []
        self._added: list[str] = []
        self._gone: list[str] = []
        self._runs: list[dg.RunRequest] = []
        self._unreadable: list[str] = []
        self._unverified = 0
        self._named_in: dict[str, Future[dict[str, set[str]]]] = {}
        self._lock = threading.Lock()
        self._trouble: BlobflowError | None = None

    def run(self) -> dg.SensorResult:
        """The events, partitions and runs that Dagster must record, and the next cursor."""
        recorded = self._last_recorded()
        self._record_s = self._measured_record_s()
        if self._sensor.max_runs:
            self._run_s = self._measured_run_s()
            self._request_forgotten_runs()
        readers = ThreadPoolExecutor(_READERS, thread_name_prefix="blobflow-sensor")
        try:
            self._walk(readers)
        finally:
            # Without waiting: if the store hangs, a request may take longer than Dagster waits for the tick.
            readers.shutdown(wait=False, cancel_futures=True)
        if self._gone and not self._anything_listed():
            self._gone.clear()
        partitions = self._sensor.partitions_def
        summary = self._summary()
        self._context.log.info("sensor.tick %s", summary)
        return dg.SensorResult(
            asset_events=self._events,
            dynamic_partitions_requests=[
                *([partitions.build_add_request(self._added)] if self._added else []),
                *([partitions.build_delete_request(self._gone)] if self._gone else []),
            ],
            run_requests=self._runs,
            skip_reason=None if self._runs else summary,
            cursor=str(_Cursor(recorded, self._position)),
        )

    def _summary(self) -> str:
        parts = [
            f"{self._looked} artifacts below {self._sensor.prefix!r} checked",
            f"{len(self._events)} new or replaced",
            f"{len(self._gone)} gone",
        ]
        if self._unverified:
            parts.append(f"{self._unverified} not verified yet: no ref {self._sensor.ref!r} has named them")
        if self._unreadable:
            named = ", ".join(self._unreadable[:_NAMED])
            more = len(self._unreadable) - _NAMED
            parts.append(f"{len(self._unreadable)} unreadable: {named}" + (f" and {more} more" if more > 0 else ""))
        if self._trouble is not None:
            parts.append(f"stopped there: {described(self._trouble)}")
        return "; ".join(parts)

    # The time

    def _to_record_s(self) -> float:
        """Seconds that Dagster will need to record the result so far."""
        events = len(self._events) + len(self._gone) + _PARTITION_SHARE * len(self._added)
        return events * self._record_s + len(self._runs) * self._run_s

    def _left_s(self) -> float:
        """Seconds left of the budget."""
        return BUDGET_S - (monotonic() - self._began) - self._to_record_s()

    def _measured_record_s(self) -> float:
        """Seconds to record an event of the last tick."""
        of_last_tick = dg.AssetRecordsFilter(self._sensor.asset_key, after_storage_id=self._cursor.recorded or None)
        records = self._context.instance.fetch_materializations(of_last_tick, limit=_MEASURED).records
        return _pace([record.timestamp for record in records], _RECORD_S)

    def _measured_run_s(self) -> float:
        """Seconds to create a run of one of the last ticks."""
        ours = dg.RunsFilter(tags={_SENSOR_NAME: self._sensor.sensor_name})
        records = self._context.instance.get_run_records(ours, limit=_MEASURED)
        return _pace([record.create_timestamp.timestamp() for record in records], _RUN_S)

    # The walk

    def _walk(self, readers: ThreadPoolExecutor) -> None:
        """Continue from the cursor until the page is full, the budget is used, or the end is reached."""
        batch: list[_Step] = []
        listing = self._store.list(self._sensor.prefix, start_after=self._position or None)
        try:
            for step in _side_by_side(listing, self._missing_candidates()):
                if step.key is not None:
                    batch.append(step)
                    self._looked += 1
                over = self._looked == self._sensor.page_size or self._left_s() <= 0
                if over or len(batch) == _BATCH:
                    if not self._settle(batch, readers):
                        return
                    self._position = step.at
                    batch = []
                if over:
                    return
        except TemporaryError as error:
            self._settle(batch, readers)
            self._trouble = error
        else:
            if self._settle(batch, readers):
                self._position = ""

    def _missing_candidates(self) -> list[str]:
        """Keys of the known artifacts' manifests after the position, in the order of a listing."""
        start = self._position.encode()
        manifests = (key + MANIFEST_SUFFIX for key in self._partitions)
        return sorted((at for at in manifests if at.encode() > start), key=str.encode)

    def _settle(self, batch: Sequence[_Step], readers: ThreadPoolExecutor) -> bool:
        """Handle the news in a batch, in order; return False if the walk must stop after the position."""
        left_s, before_s = self._left_s(), self._to_record_s()
        known = self._known([step.key for step in batch if step.key is not None])
        read = {step.at: readers.submit(self._read, step) for step in batch if self._is_news(step, known)}
        # The last batch of a tick gets some time even if none is left, so that every tick makes progress.
        deadline = monotonic() + max(PATIENCE_S, left_s)
        for step in batch:
            if step.at in read:
                outcome = _outcome(read[step.at], step.at, deadline)
                if isinstance(outcome, TemporaryError) and not isinstance(outcome, ReplacementInProgress):
                    self._trouble = outcome
                    for pending in read.values():
                        pending.cancel()  # if the store is down, each would use up the patience
                    return False
                if not self._take_up(str(step.key), outcome, known.get(str(step.key))):
                    return False
            self._position = step.at
            if step.at in read and self._to_record_s() - before_s >= left_s:
                return False
        return True

    def _is_news(self, step: _Step, known: dict[str, _Known]) -> bool:
        seen = known.get(str(step.key))
        return step.e_tag is None or step.key not in self._partitions or seen is None or seen.e_tag != step.e_tag

    def _read(self, step: _Step) -> StoredObject | BlobflowError:
        try:
            # A missing artifact is reported without a ref.
            if step.e_tag is not None and not self._digests_named(str(step.key)):
                return _NotVerifiedError(f"no ref names {step.key!r}", key=step.key)
            return self._store.get(step.at, max_bytes=MAX_MANIFEST_BYTES)
        except ObjectNotFound:
            try:
                read_manifest_bytes(self._store, str(step.key))
            except BlobflowError as error:
                return error
            return ReplacementInProgress(f"{step.key!r} has just appeared", key=str(step.key))
        except BlobflowError as error:
            return error

    def _digests_named(self, key: str) -> set[str]:
        """Digests of the artifacts that were verified under a key; `_ANY` if published artifacts are announced.

        Raises:
            BlobflowError: a ref cannot be read.
        """
        if self._sensor.ref is None:
            return {_ANY}
        parts = key.split("/")
        directories = ["/".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
        return {digest for directory in directories for digest in self._named(directory).get(key, ())}

    def _named(self, directory: str) -> dict[str, set[str]]:
        """Digests by key that the ref in a directory names or has named; the ref is read once in a tick."""
        with self._lock:
            named = self._named_in.get(directory)
            is_mine = named is None
            if named is None:
                named = self._named_in[directory] = Future()
        if is_mine:
            try:
                state = read_ref(self._store, f"{directory}/{self._sensor.ref}")
                found: dict[str, set[str]] = {}
                for entry in state.entries() if state else ():
                    found.setdefault(entry.key, set()).add(entry.manifest_sha256)
                named.set_result(found)
            except BaseException as error:  # noqa: BLE001 - raised below, in all waiting threads
                named.set_exception(error)
        return named.result()

    def _take_up(self, key: str, outcome: StoredObject | BlobflowError, known: _Known | None) -> bool:
        """Handle one outcome; return False if it needs a run and this tick may request no more."""
        if isinstance(outcome, ReplacementInProgress):
            return True
        if isinstance(outcome, _NotVerifiedError):
            self._unverified += 1
            return True
        if isinstance(outcome, ArtifactNotFound | InvalidKey):
            if key in self._partitions:
                self._gone.append(key)
            return True
        try:
            if isinstance(outcome, BlobflowError):
                raise outcome
            found = PublishedArtifact.read(self._store, key, outcome.data)
            is_known = known is not None and known.digest == found.digest
            if not is_known and not self._digests_named(key) & {found.digest, _ANY}:
                self._unverified += 1
                return True
            if _NOT_IN_PARTITION_KEYS in key:
                raise ArtifactInvalid(
                    f"Dagster does not accept a partition key with {_NOT_IN_PARTITION_KEYS!r}", key=key, what="key"
                )
        except BlobflowError as error:
            reason = error.message[:_QUOTED]
            self._unreadable.append(f"{key!r} ({reason})")
            self._context.log.warning("manifest.unreadable key=%s error=%s", key, reason)
            return True
        if not is_known:
            if self._sensor.max_runs and not self._request_run(key, found.digest):
                return False
            announced = "verified" if self._sensor.ref else "published"
            also = {md.MANIFEST_E_TAG: outcome.meta.e_tag, md.ANNOUNCED: announced}
            self._events.append(found.event(self._sensor.asset_key, also, partition=key))
        self._add(key)
        return True

    def _add(self, key: str) -> None:
        if key not in self._partitions and key not in self._added:
            self._added.append(key)

    def _anything_listed(self) -> bool:
        """Whether the store lists anything at all; on a disk that is not mounted, everything seems to be gone."""
        try:
            if next(self._store.list(self._sensor.prefix), None) is not None:
                return True
            self._trouble = ArtifactNotFound(
                f"the store lists nothing at all, so the {len(self._gone)} missing artifacts are not reported as gone",
                hint="check that the store is the right one and mounted; partitions can be removed in Dagster's UI",
            )
        except TemporaryError as error:
            self._trouble = error
        return False

    # The journal

    def _last_recorded(self) -> int:
        records = self._context.instance.fetch_materializations(self._sensor.asset_key, limit=1).records
        return max((record.storage_id for record in records), default=0)

    def _known(self, keys: Sequence[str]) -> dict[str, _Known]:
        """Facts about these artifacts from their last events."""
        known: dict[str, _Known] = {}
        wanted = set(keys)
        page: str | None = None
        while wanted:
            found = self._context.instance.fetch_materializations(
                dg.AssetRecordsFilter(self._sensor.asset_key, asset_partitions=sorted(wanted)),
                limit=len(wanted),
                cursor=page,
            )
            for record in found.records:
                key, made = record.partition_key, record.asset_materialization
                if key is not None and made is not None and key not in known:
                    e_tag = made.metadata.get(md.MANIFEST_E_TAG)
                    known[key] = _Known((made.tags or {}).get(DATA_VERSION), str(e_tag.value) if e_tag else None)
            wanted -= known.keys()
            if not found.has_more:
                break
            page = found.cursor
        return known

    # Runs

    def _request_run(self, key: str, digest: str) -> bool:
        if len(self._runs) >= self._sensor.max_runs:
            return False
        tags = {md.KEY: key, md.ARTIFACT_DIGEST: digest}
        self._runs.append(dg.RunRequest(run_key=f"{key}@{digest}", partition_key=key, tags=tags))
        return True

    def _request_forgotten_runs(self) -> None:
        """Request the runs that a killed tick recorded events for but did not request.

        There are at most as many as this tick may request. Runs for the events of the last complete tick exist.
        """
        later = dg.AssetRecordsFilter(self._sensor.asset_key, after_storage_id=self._cursor.recorded or None)
        records = self._context.instance.fetch_materializations(later, limit=self._sensor.max_runs).records
        for record in reversed(records):
            key, made = record.partition_key, record.asset_materialization
            digest = (made.tags or {}).get(DATA_VERSION) if made else None
            if key is None or digest is None or not key.startswith(self._sensor.prefix):
                continue
            if not self._has_run(f"{key}@{digest}"):
                self._request_run(key, digest)
                self._add(key)

    def _has_run(self, run_key: str) -> bool:
        tags = {_RUN_KEY: run_key, _SENSOR_NAME: self._sensor.sensor_name}
        return bool(self._context.instance.get_run_records(dg.RunsFilter(tags=tags), limit=1))


def _outcome(read: "Future[StoredObject | BlobflowError]", at: str, deadline: float) -> StoredObject | BlobflowError:
    try:
        return read.result(timeout=max(0.0, deadline - monotonic()))
    except NotInTime:
        hint = "find out why the store is slow"
        return StoreUnavailable(f"{at!r} was not read in time", hint=hint, operation="get", key=at)


def _pace(timestamps: Iterable[float], assumed_s: float) -> float:
    """Seconds from one record to the next, as the upper quartile; `assumed_s` if there are too few records.

    Not the mean: the gap between two ticks, or while the daemon was down, says nothing.
    """
    gaps = [later - earlier for earlier, later in pairwise(sorted(timestamps))]
    return quantiles(gaps, n=4)[-1] if len(gaps) >= _FEWEST_MEASURED else assumed_s


def _side_by_side(listing: Iterable[ObjectMeta], known: Sequence[str]) -> Iterator[_Step]:
    """Listed objects and known but unlisted manifests, merged in the order of the listing."""
    missing = iter(known)
    next_known = next(missing, None)
    for meta in listing:
        while next_known is not None and next_known.encode() < meta.key.encode():
            yield _Step(next_known, next_known.removesuffix(MANIFEST_SUFFIX), None)
            next_known = next(missing, None)
        if next_known == meta.key:
            next_known = next(missing, None)
        key = meta.key.removesuffix(MANIFEST_SUFFIX)
        # A name that is only `.manifest.json` does not belong to an artifact.
        is_manifest = key != meta.key and bool(key) and not key.endswith("/")
        yield _Step(meta.key, key if is_manifest else None, meta.e_tag)
    while next_known is not None:
        yield _Step(next_known, next_known.removesuffix(MANIFEST_SUFFIX), None)
        next_known = next(missing, None)
