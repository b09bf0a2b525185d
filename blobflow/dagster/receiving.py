"""`received_mirror`: a mirror of what is pushed to a receiver, for targets that cannot reach the store.

| asset | materialized by | means |
|---|---|---|
| `["mirrors", name, "remote"]` | a sensor; external | a new snapshot arrived, whole |
| `["mirrors", name, "mirror"]` | the nodes download, import | the target shows it, and the receiver says `Following` |

The receiver (`blobflow mirror serve`) is a separate process, which works on while this deployment is down. What the
two share is the receiver's directory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import dagster as dg
from pydantic import Field, JsonValue

from blobflow.artifact.artifact import Artifact
from blobflow.backends import Importer, ImportResult, OnBytes
from blobflow.backoff import DEFAULT_PATIENCE_S
from blobflow.dagster import metadata as md
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.mirror import MIRRORS, ArtifactMirror, artifact_mirror
from blobflow.dagster.resource import TransferResource
from blobflow.dagster.spec import BlobflowTranslator
from blobflow.errors import UsageError, expanded
from blobflow.mirror import Bootstrapping, ReceivedStore, SnapshotId, read_snapshots
from blobflow.stores import Reader, Store

KEEP_SNAPSHOTS: Final = 2
"""The one that is shown, and the one before, to go back to."""


class ReceiverResource(TransferResource):
    """The artifacts in a receiver's directory, in the place of a `BlobflowResource`: to be read, and without keys."""

    directory: str = Field(description="Of `blobflow mirror serve`; an absolute path.")
    database: str | None = Field(default=None, description="Only the snapshots of this one.")
    shown_as: str | None = Field(default=None, description="What its keys begin with instead of its name.")

    def get_store(self, *, patience_s: float = DEFAULT_PATIENCE_S) -> Reader:
        """The store; `patience_s` is of no use to files."""
        del patience_s
        return ReceivedStore(self.directory, database=self.database, shown_as=self.shown_as)

    def get_leases(self, store: Store) -> None:
        """None: no rounds are published in a receiver's directory."""
        del store


def received_mirror(
    name: str,
    directory: str | Path,
    importer: Importer,
    *,
    key_prefix: Sequence[str] = MIRRORS,
    database: str | None = None,
    source: str | None = None,
    keep_snapshots: int = KEEP_SNAPSHOTS,
    translator: BlobflowTranslator | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    pool: str | None = None,
    minimum_interval_seconds: int = 30,
    running: bool = False,
) -> ArtifactMirror:
    """A mirror that shows the newest snapshot of a database that was pushed to a receiver.

    A sensor starts a run whenever the newest complete snapshot is another one. The run proves every member by its
    SHA-256, imports it and notes `Following` with the cursor in the receiver's journal, where `blobflow mirror status`
    shows it; a snapshot without a cursor is followed from its position. Of a snapshot that is still arriving, a second
    sensor reports how far it is, as observations of the mirror.

    Args:
        name: Of the two assets' prefix: letters, digits and `_`.
        directory: The receiver's. Sensors and steps run on its machine.
        importer: Of the target.
        key_prefix: Of the assets' keys, as that of `artifact_mirror`.
        database: What the senders call it; by default `name`.
        source: Only what comes from there. By default from anywhere, and positions of all sources are compared.
        keep_snapshots: Received artifacts of the same source that stay after an import, the imported one included.
        pool: Concurrency pool of which the reading takes a slot.
        minimum_interval_seconds: Between two looks into the directory.
        running: The sensors run from the start; otherwise they are switched on in the UI.

    Raises:
        UsageError: an argument makes no sense.
    """
    directory = expanded(directory)
    if not directory.is_absolute():
        raise UsageError(f"{str(directory)!r} is relative", hint="sensors and steps have no directory in common")
    if keep_snapshots < 1:
        raise UsageError(f"keep_snapshots={keep_snapshots}", hint="the snapshot that is shown stays")
    database = database or name
    SnapshotId(source or "any", database, 0, f"sha256:{'0' * 64}").checked()
    resource_key = f"{name}_receiver"
    view = {"database": database, "shown_as": name}
    mirror = artifact_mirror(
        name,
        _FollowingImporter(importer, directory, view, keep_snapshots),
        key_prefix=key_prefix,
        ref=f"{source}/latest" if source else "latest",
        translator=translator,
        retry_policy=retry_policy,
        pool=pool,
        minimum_interval_seconds=minimum_interval_seconds,
        running=running,
        resource_key=resource_key,
    )
    (key,) = mirror.mirror.keys
    arrivals = _arrivals_sensor(
        name, directory, key, (source, database), minimum_interval_seconds=minimum_interval_seconds, running=running
    )
    return replace(
        mirror,
        sensors=[*mirror.sensors, arrivals],
        resources={resource_key: ReceiverResource(directory=str(directory), database=database, shown_as=name)},
    )


@dataclass(frozen=True)
class _FollowingImporter:
    """An importer that reports to the receiver what it brought to life."""

    inner: Importer
    directory: Path
    view: dict[str, str]
    keep: int

    @property
    def backend(self) -> str:
        return self.inner.backend

    def staging(self, artifact_digest: str) -> Path:
        return self.inner.staging(artifact_digest)

    def current(self) -> Artifact | None:
        return self.inner.current()

    def cursor(self) -> JsonValue:
        return self.inner.cursor()

    def import_artifact(
        self,
        artifact: Artifact,
        *,
        consume: bool = False,
        on_progress: OnBytes | None = None,
        key: str | None = None,
    ) -> ImportResult:
        result = self.inner.import_artifact(artifact, consume=consume, on_progress=on_progress, key=key)
        store = ReceivedStore(self.directory, **self.view)
        if key is None:
            return result
        # A kill before this line is made good by the next attempt, which finds the import done.
        cursor = store.follow(key, result.cursor)
        store.prune(key, self.keep)
        return replace(result, cursor=cursor)


def _arrivals_sensor(
    name: str,
    directory: Path,
    mirror: dg.AssetKey,
    wanted: tuple[str | None, str],
    *,
    minimum_interval_seconds: int,
    running: bool,
) -> dg.SensorDefinition:
    source, database = wanted

    @dg.sensor(
        name=f"{name}_arrivals_sensor",
        description=f"Tells how much of the snapshots of {database!r} has arrived in {directory}.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
    )
    def arrivals(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        snapshots = {
            snapshot: status
            for snapshot, status in read_snapshots(directory).items()
            if snapshot.database == database and source in (None, snapshot.source)
        }
        # Only the newest: it is what the mirror will show.
        newest = max(snapshots, key=lambda snapshot: snapshot.position, default=None)
        status = snapshots[newest] if newest else None
        if newest is None or not isinstance(status, Bootstrapping):
            return dg.SensorResult(skip_reason="nothing is arriving", cursor="")
        seen = f"{newest.source} {newest.position} {newest.digest} {status.bytes_done}"
        if seen == context.cursor:
            return dg.SensorResult(skip_reason=f"{newest}: nothing new", cursor=seen)
        observation = dg.AssetObservation(
            mirror,
            description=f"{newest}: {status.bytes_done} of {status.bytes_total} bytes are there",
            metadata={
                md.MIRROR_STATUS: "Bootstrapping",
                md.BYTES_DONE: status.bytes_done,
                md.SIZE: status.bytes_total,
                md.PERCENT: round(100 * status.bytes_done / status.bytes_total, 1) if status.bytes_total else 100.0,
                md.ARTIFACT_DIGEST: newest.digest,
                md.SNAPSHOT: dg.MetadataValue.json(newest._asdict()),
            },
        )
        return dg.SensorResult(
            asset_events=[observation], skip_reason=f"{newest}: {status.bytes_done} bytes are there", cursor=seen
        )

    return arrivals
