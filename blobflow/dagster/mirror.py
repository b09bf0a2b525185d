"""`artifact_mirror`: only the mirror, for a deployment that imports the artifacts of another deployment.

| asset | materialized by | means |
|---|---|---|
| `["mirrors", name, "remote"]` | a sensor; external | the store has a new artifact |
| `["mirrors", name, "mirror"]` | the nodes download, import | the target shows it |

The two deployments share only the store. If they are code locations of one deployment after all, the keys do not
collide, because the pipeline's assets are `[name, ...]`. Each further mirror of the same pipeline needs a different
`key_prefix`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import dagster as dg

from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.pipeline import mirror_asset
from blobflow.dagster.sensors import Announce, artifact_partitions, manifest_sensor, ref_sensor
from blobflow.dagster.spec import BlobflowAssetProps, BlobflowTranslator, ImporterOf, PipelineSpec
from blobflow.fields import check_choice

MIRRORS: Final = ("mirrors",)
"""Prefix of the keys of mirrors, so that they differ from the keys of the pipeline that they follow."""

_DESCRIPTION: Final = "An artifact that another deployment published in the store."


@dataclass(frozen=True)
class ArtifactMirror:
    """The Dagster definitions of one mirror, to use together (`definitions`) or one by one."""

    name: str
    remote: dg.AssetSpec
    """The external asset; a sensor reports it."""
    mirror: dg.AssetsDefinition
    job: Any
    sensors: list[dg.SensorDefinition]
    resources: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further resources of the mirror, such as that of a received mirror."""

    @cached_property
    def definitions(self) -> dg.Definitions:
        """All definitions except a `BlobflowResource` that the code location must configure."""
        return dg.Definitions(
            assets=[self.remote, self.mirror],
            jobs=[self.job],
            sensors=self.sensors,
            resources=dict(self.resources),
        )


def artifact_mirror(
    name: str,
    importer: ImporterOf,
    *,
    key_prefix: Sequence[str] = MIRRORS,
    ref: str | None = "latest",
    announce: Announce = "verified",
    digest: str | None = None,
    lanes: int = 1,
    freshness_policy: dg.FreshnessPolicy | None = None,
    translator: BlobflowTranslator | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    pool: str | None = None,
    minimum_interval_seconds: int = 30,
    running: bool = False,
    resource_key: str = "blobflow",
) -> ArtifactMirror:
    """A mirror of the artifacts that the pipeline `name` of another deployment publishes in the store.

    With a ref, the mirror shows the artifact that `<name>/<ref>` names, and a `ref_sensor` starts a run whenever the
    ref moves. Without a ref (None), every artifact below `<name>/` is a partition with its own mirror. A
    `manifest_sensor` reports them, and an automation condition requests the runs, as one backfill for all news.

    Args:
        name: Name of the publishing pipeline; its keys begin with it.
        importer: Importer of the target. Without a ref it may be a function of the partition key, which is the
            artifact's key.
        key_prefix: Prefix of the assets' keys, before the name. The pipeline's own assets begin with the name. A key
            from a translator stays as it is.
        announce: Without a ref, the artifacts that the sensor reports; see `manifest_sensor`.
        digest: Accept only this artifact (`sha256:...`), whoever writes to the store. To accept only one artifact in a
            single run, set the config `digest` of its first step.
        lanes: Number of steps that share each download; see `artifact_pipeline`.
        freshness_policy: Freshness policy of the mirror. With a ref the mirror is materialized when the ref moves, so
            the window is the longest time for which the source may stay the same.
        pool: Concurrency pool; each download takes a slot.
        minimum_interval_seconds: Seconds between two checks of the store.
        running: Whether the sensors run from the start; otherwise turn them on in the UI.
        resource_key: Key of the `BlobflowResource` among the resources.
    """
    check_choice("announce", announce, Announce)
    partitions = artifact_partitions(name) if ref is None else None
    spec = PipelineSpec(
        name=name,
        exporter=None,
        importer=importer,
        partitions_def=partitions,
        lanes=lanes,
        ref=ref,
        digest=digest,
        freshness_policy=freshness_policy,
        translator=_MirrorTranslator(translator or BlobflowTranslator(), tuple(key_prefix), automatic=ref is None),
        retry_policy=retry_policy,
        pool=pool,
        resource_key=resource_key,
    )
    remote = spec.remote.replace_attributes(description=_DESCRIPTION, partitions_def=partitions)
    mirror = mirror_asset(spec)
    job = dg.define_asset_job(
        f"{name}_mirror_job",
        selection=dg.AssetSelection.assets(mirror),
        description=f"Brings the mirror of {name} up to date.",
    )
    status = dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
    follow: dict[str, Any] = {
        "asset_key": remote.key,
        "minimum_interval_seconds": minimum_interval_seconds,
        "default_status": status,
        "resource_key": resource_key,
    }
    if ref is not None:
        sensors = [ref_sensor(name, ref=ref, target=job, **follow)]
    else:
        automation = dg.AutomationConditionSensorDefinition(
            f"{name}_mirror_automation",
            target=dg.AssetSelection.assets(mirror),
            default_status=status,
            minimum_interval_seconds=minimum_interval_seconds,
        )
        sensors = [manifest_sensor(name, partitions_def=partitions, announce=announce, **follow), automation]
    return ArtifactMirror(name, remote, mirror, job, sensors)


def mirror_condition() -> dg.AutomationCondition[Any]:
    """An automation condition that requests a run for every artifact that is not imported yet or was replaced.

    It differs from `AutomationCondition.eager()` in two ways. First, artifacts older than the condition's first
    evaluation count as well, so a mirror that is set up late catches up in one backfill. Second, no partition is too
    old: an artifact that was exported late for an early day is imported, too.

    A failed run is not requested again before its artifact changes; retries are for that.
    """
    condition = dg.AutomationCondition
    is_due = condition.missing().newly_true() | condition.any_deps_updated()
    is_handled = condition.newly_requested() | condition.newly_updated()
    return (
        is_due.since(is_handled)
        & ~condition.any_deps_missing()
        & ~condition.any_deps_in_progress()
        & ~condition.in_progress()
    ).with_label("mirror_condition")


@dataclass(frozen=True)
class _MirrorTranslator(BlobflowTranslator):
    """Adds the key prefix to the assets and `mirror_condition` to the mirror, unless `inner` set others."""

    inner: BlobflowTranslator
    key_prefix: tuple[str, ...]
    automatic: bool

    def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
        spec = self.inner.get_asset_spec(props)
        if spec.key.path == [props.pipeline, props.stage]:
            spec = spec.replace_attributes(key=[*self.key_prefix, *spec.key.path])
        if self.automatic and props.stage == "mirror" and spec.automation_condition is None:
            return spec.replace_attributes(automation_condition=mirror_condition())
        return spec
