"""`received_mirror`: a mirror of snapshots that are pushed to a receiver, for targets that cannot reach the store.

| asset | materialized by | means |
|---|---|---|
| `["mirrors", name, "remote"]` | a sensor; external | a new snapshot arrived completely |
| `["mirrors", name, "mirror"]` | the nodes download, import | the target shows it, and the receiver says `Following` |

The receiver (`blobflow mirror serve`) is a separate process, which continues while this deployment is down. The two
share the receiver's directory.
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
"""The imported snapshot, and the previous one, to go back to."""


class ReceiverResource(TransferResource):
    """Read access to the artifacts in a receiver's directory, in place of a `BlobflowResource`; it needs no keys."""

    directory: str = Field(description="Directory of `blobflow mirror serve`; an absolute path.")
    database: str | None = Field(default=None, description="Read only the snapshots of this database.")
    shown_as: str | None = Field(default=None, description="Prefix of the database's keys, instead of its name.")

    def get_store(self, *, patience_s: float = DEFAULT_PATIENCE_S) -> Reader:
        """The store; `patience_s` has no effect on files."""
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

    A sensor starts a run whenever another snapshot becomes the newest complete one. The run proves every member by its
    SHA-256, imports the snapshot, and records `Following` with the cursor in the receiver's journal, for
    `blobflow mirror status`. A snapshot without a cursor is followed from its position. A second sensor reports the
    progress of a snapshot that is still arriving, as observations of the mirror.

    Args:
        name: Name in the two assets' keys: letters, digits and `_`.
        directory: Directory of the receiver. Sensors and steps run on its machine.
        importer: Importer of the target.
        key_prefix: Prefix of the assets' keys, as in `artifact_mirror`.
        database: Name of the database as its senders give it; by default `name`.
        source: Accept only snapshots from this source. By default all sources count, and their positions are compared.
        keep_snapshots: Number of received artifacts of the same source to keep after an import, including the imported
            one.
        pool: Concurrency pool; each read of a snapshot takes a slot.
        minimum_interval_seconds: Seconds between two checks of the directory.
        running: Whether the sensors run from the start; otherwise turn them on in the UI.

    Raises:
        UsageError: an argument is invalid.
    """
    directory = expanded(directory)
    if not directory.is_absolute():
        raise UsageError(
            f"{str(directory)!r} is relative", hint="give an absolute path: sensors and steps do not share a directory"
        )
    if keep_snapshots < 1:
        raise UsageError(
            f"keep_snapshots={keep_snapshots}", hint="give 1 or more: the imported snapshot is always kept"
        )
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
    """An importer that reports its imports to the receiver."""

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
        # After a kill before this line, the next attempt finds the import done and gets here.
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
        description=f"Reports how much of the newest snapshot of {database!r} has arrived in {directory}.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
    )
    def arrivals(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        snapshots = {
            snapshot: status
            for snapshot, status in read_snapshots(directory).items()
            if snapshot.database == database and source in (None, snapshot.source)
        }
        # Only the newest: the mirror will show it.
        newest = max(snapshots, key=lambda snapshot: snapshot.position, default=None)
        status = snapshots[newest] if newest else None
        if newest is None or not isinstance(status, Bootstrapping):
            return dg.SensorResult(skip_reason="nothing is arriving", cursor="")
        seen = f"{newest.source} {newest.position} {newest.digest} {status.bytes_done}"
        if seen == context.cursor:
            return dg.SensorResult(skip_reason=f"{newest}: nothing new", cursor=seen)
        observation = dg.AssetObservation(
            mirror,
            description=f"{newest}: {status.bytes_done} of {status.bytes_total} bytes have arrived",
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
            asset_events=[observation], skip_reason=f"{newest}: {status.bytes_done} bytes have arrived", cursor=seen
        )

    return arrivals
