"""Finds the input of a step on the disk or in the store, not in Dagster's storage.

The assets of a pipeline depend on each other without data. So each can be materialized alone, with a new DAGSTER_HOME
or on a new machine, if the store has the artifacts.

| wanted | looked for, in this order |
|---|---|
| a snapshot | the scratch directory of this run, and of the runs that it continues |
| | the store, for artifacts that those runs materialized: a verification may have removed their scratch directory |
| | the newest scratch directory of another run, unless a later round has moved the ref |
| | the store, for the artifact that the ref names |
| an artifact in the store | the artifact that the ref names |
| | without a ref: the artifact that this run materialized, otherwise the one that was published last |

If a run's export ended, the run falls back to the ref's artifact only if a later round has moved the ref. Otherwise, if
its steps do not share the scratch directory, the fallback would look like "nothing new" in every run.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import dagster as dg

from blobflow.coordination.refs import RefState, read_ref
from blobflow.coordination.rounds import content_key
from blobflow.dagster import metadata as md
from blobflow.dagster.handles import RemoteHandle, SnapshotHandle
from blobflow.dagster.scratch import newest_first, read_exported
from blobflow.errors import ArtifactNotFound, DigestMismatch, NotFoundError, ReplacementInProgress
from blobflow.stores import Store
from blobflow.transport import list_artifacts, read_manifest_file

_MAX_RUNS: Final = 100
"""Latest materializations that are searched for those of this run; others are of concurrent runs of the partition."""
_CONTENT_KEY: Final = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}\.tar")


@dataclass(frozen=True)
class Upstream:
    """Finds the artifacts of one pipeline, or of one of its partitions.

    Args:
        prefix: Prefix of the keys and the ref.
        ref: Ref that names the newest artifact; None if there is none.
        key: Key of the only artifact, if it is fixed; None to look for the newest.
    """

    context: dg.OpExecutionContext
    store: Store
    prefix: str
    ref: str | None
    key: str | None = None

    def snapshot(self, asset: dg.AssetKey, rounds: Path) -> SnapshotHandle:
        """The newest snapshot, on the disk or in the store.

        Args:
            asset: Key of the snapshot asset.
            rounds: Directory of the scratch directories.

        Raises:
            ArtifactNotFound: there is no snapshot on the disk or in the store.
            DigestMismatch: the stored artifact is not the one that the ref names.
        """
        runs = lineage(self.context)
        for run_id in runs:
            if found := self._exported(rounds / run_id):
                return found
        named = self._named()
        if made := self._materialized(asset, runs):
            if named and (made.round_number or 0) < named.round_number:  # a later round has replaced it
                return self._named_snapshot(asset, named)
            return self._stored_snapshot(asset, rounds / made.run_id, made)
        for scratch in newest_first(rounds):
            found = None if scratch.name in runs else self._exported(scratch)
            if found and not (named and (found.round_number or 0) < named.round_number):
                return found
        return self._named_snapshot(asset, named)

    def remote(self, asset: dg.AssetKey) -> RemoteHandle:
        """The artifact that a mirror must show.

        Args:
            asset: Key of the asset of artifacts in the store.

        Raises:
            NotFoundError: the ref or the artifact does not exist.
        """
        if self.key is not None:
            return RemoteHandle(self.key, read_manifest_file(self.store, self.key).digest)
        if self.ref is not None:
            named = self._named()
            if named is None:
                raise NotFoundError(
                    f"there is no ref {self.ref!r} in {self.store.url}",
                    hint=f"materialize {asset.to_user_string()}, or check the deployment that publishes it, and the URL"
                    " of the store",
                    key=self.ref,
                )
            return RemoteHandle(named.key, named.manifest_sha256, named.round_number or None)
        made = self._materialized(asset, lineage(self.context))
        key = made.key if made else self._published_last(asset)
        return RemoteHandle(key, read_manifest_file(self.store, key).digest)

    def _exported(self, scratch: Path) -> SnapshotHandle | None:
        """The snapshot in a scratch directory, if its export has ended."""
        found = read_exported(scratch)
        if found is None:
            return None
        artifact = found.artifact
        return SnapshotHandle(
            content_key(self.prefix, artifact),
            str(scratch),
            artifact.manifest_bytes,
            found.round_number,
            found.generation,
        )

    def _stored_snapshot(self, asset: dg.AssetKey, scratch: Path, made: "_Made") -> SnapshotHandle:
        try:
            stored = read_manifest_file(self.store, made.key)
            if stored.manifest.content_digest == made.content_digest:
                return SnapshotHandle(made.key, None, stored.data, made.round_number)
        except (ArtifactNotFound, ReplacementInProgress):
            pass
        raise snapshot_is_gone(self.store, asset, made.key, str(scratch))

    def _named_snapshot(self, asset: dg.AssetKey, named: RefState | None) -> SnapshotHandle:
        hint = f"materialize {asset.to_user_string()} again"
        if self.ref is not None and named is None:
            raise ArtifactNotFound(
                f"nothing was exported, and there is no ref {self.ref!r} in {self.store.url}", hint=hint, key=self.ref
            )
        key = named.key if named else self._published_last(asset)
        try:
            stored = read_manifest_file(self.store, key)
        except ArtifactNotFound as error:
            raise ArtifactNotFound(
                f"no exported artifact is on the disk, and {key!r} is not in {self.store.url}", hint=hint, key=key
            ) from error
        if named and stored.digest != named.manifest_sha256:
            raise DigestMismatch(
                f"{key!r} is the artifact {stored.digest}, but ref {self.ref!r} names {named.manifest_sha256}",
                hint=f"find out who wrote to the store; then {hint}",
                what=key,
                expected=named.manifest_sha256,
                actual=stored.digest,
            )
        return SnapshotHandle(key, None, stored.data, named.round_number if named else None)

    def _named(self) -> RefState | None:
        return read_ref(self.store, self.ref) if self.ref is not None else None

    def _published_last(self, asset: dg.AssetKey) -> str:
        """The key of the artifact that was published last under the prefix."""
        found = [
            (entry.last_modified.timestamp() if entry.last_modified else 0.0, entry.key)
            for entry in list_artifacts(self.store, f"{self.prefix}/")
            if _CONTENT_KEY.fullmatch(entry.key.removeprefix(f"{self.prefix}/"))
        ]
        if not found:
            raise ArtifactNotFound(
                f"there is no artifact under {self.prefix!r} in {self.store.url}",
                hint=f"materialize {asset.to_user_string()}",
                key=self.prefix,
            )
        return max(found)[1]

    def _materialized(self, asset: dg.AssetKey, runs: list[str]) -> "_Made | None":
        """The materialization of an asset by this run, or by the latest run that it continues."""
        partitions = [self.context.partition_key] if self.context.has_partition_key else None
        wanted = dg.AssetRecordsFilter(asset_key=asset, asset_partitions=partitions)
        found: dict[str, dict[str, Any]] = {}
        for record in self.context.instance.fetch_materializations(wanted, limit=_MAX_RUNS).records:
            made = record.asset_materialization
            if made is not None:
                found.setdefault(record.run_id, {label: value.value for label, value in made.metadata.items()})
        for run_id in runs:
            facts = found.get(run_id)
            if facts and md.KEY in facts:
                return _Made(run_id, facts[md.KEY], facts.get(md.CONTENT_DIGEST), facts.get(md.ROUND))
        return None


@dataclass(frozen=True)
class _Made:
    """Facts about a materialization from the log of its run."""

    run_id: str
    key: str
    content_digest: str | None
    round_number: int | None


def snapshot_is_gone(store: Store, asset: dg.AssetKey, key: str, scratch: str | None) -> ArtifactNotFound:
    """The error for a snapshot whose content is neither on the disk nor in the store."""
    where = f"in {scratch}" if scratch else "on the disk"
    return ArtifactNotFound(
        f"the exported artifact is not {where} any more, and {key!r} is not in {store.url}",
        hint=f"materialize {asset.to_user_string()} again; if the steps of this run are on several machines, give"
        " the resource a scratch_dir that they all share",
        path=scratch,
        key=key,
    )


def lineage(context: dg.OpExecutionContext) -> list[str]:
    """The ids of this run and of those that it continues, the latest first."""
    found = [context.run_id]
    run = context.instance.get_run_by_id(context.run_id)
    while run is not None and run.parent_run_id and run.parent_run_id not in found:
        found.append(run.parent_run_id)
        run = context.instance.get_run_by_id(run.parent_run_id)
    return found
