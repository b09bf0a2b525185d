"""`artifact_mirror`: the mirror side alone, for a deployment that brings to life what another one publishes.

| asset | materialized by | means |
|---|---|---|
| `["mirrors", name, "remote"]` | a sensor; external | the store has a new artifact |
| `["mirrors", name, "mirror"]` | the nodes download, import | the target shows it |

The two deployments share nothing but the store. If they are code locations of one deployment after all, the assets of
the pipeline are `[name, ...]`, and so are others than these; each further mirror of the same pipeline needs a
different `key_prefix`.
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
"""What the keys of mirrors begin with, so that they are not those of the pipeline that they follow."""

_DESCRIPTION: Final = "An artifact that another deployment published in the store."


@dataclass(frozen=True)
class ArtifactMirror:
    """The Dagster definitions of one mirror, to be taken together (`definitions`) or one by one."""

    name: str
    remote: dg.AssetSpec
    """External: a sensor reports it."""
    mirror: dg.AssetsDefinition
    job: Any
    sensors: list[dg.SensorDefinition]
    resources: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More that it brings along: its own `BlobflowResource`, if it has one."""

    @cached_property
    def definitions(self) -> dg.Definitions:
        """All of it but a `BlobflowResource` that is the code location's to configure."""
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
    """A mirror of what the pipeline `name` of another deployment publishes in the store.

    With a ref, the mirror shows what the ref `<name>/<ref>` names, and a `ref_sensor` starts a run whenever it moves.
    Without one (None), every artifact below `<name>/` is a partition with its own mirror: a `manifest_sensor`
    reports them, and an automation condition makes the runs, one backfill for all that is new.

    Args:
        name: Of the publishing pipeline: what its keys begin with.
        importer: Of the target; without a ref it may be a function of the partition key, which is the artifact's key.
        key_prefix: Of the assets' keys, before the name, which the pipeline's own assets begin with. A key that a
            translator gives stays as it is.
        announce: Without a ref: which artifacts the sensor reports; see `manifest_sensor`.
        digest: Refuse every artifact but this one (`sha256:...`), whoever writes to the store. A single run is held to
            one by the config `digest` of its first step.
        lanes: Among how many steps each download is divided; see `artifact_pipeline`.
        freshness_policy: Of the mirror. With a ref it is materialized when the ref moves, so the window is the longest
            time for which the source may stay the same.
        pool: Concurrency pool of which downloads take a slot.
        minimum_interval_seconds: Between two looks into the store.
        running: The sensors run from the start; otherwise they are switched on in the UI.
        resource_key: Under which the `BlobflowResource` is found.
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
    """A mirror that follows: run for every artifact that it has not brought to life, and whenever one is replaced.

    It differs from `AutomationCondition.eager()` in two ways. Artifacts that were there before the condition was first
    evaluated count as well, so a mirror that is set up late catches up, in one backfill. And no partition is too old:
    an artifact that was exported late for an early day is followed, too.

    A run that failed is not requested again before its artifact changes: that is the retries' business.
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
    """Gives the assets their prefix and the mirror the condition under which it follows, unless they have others."""

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
