"""Sensors that follow a store: what appears there becomes asset events, partitions and, where asked for, runs.

| sensor | follows | reports |
|---|---|---|
| `manifest_sensor` | every verified artifact below a prefix | an event and a dynamic partition for each |
| `ref_sensor` | one ref, e.g. `orders/latest` | an event whenever it is moved |

A tick of the first is in `blobflow.dagster.manifest_tick`.
"""

import re
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import dagster as dg

from blobflow.coordination.refs import read_ref
from blobflow.dagster import metadata as md
from blobflow.dagster.failures import as_dagster_error
from blobflow.dagster.manifest_tick import (
    DATA_VERSION,
    ManifestTick,
    ManifestWalk,
    PublishedArtifact,
    described,
    open_store,
)
from blobflow.errors import BlobflowError, TemporaryError, UsageError
from blobflow.fields import check_choice
from blobflow.transport import read_manifest_bytes

Announce: TypeAlias = Literal["verified", "published"]
"""Which artifacts a sensor reports: those that a ref names or has named, or all that are complete."""

Target: TypeAlias = Any
"""What `dg.sensor` takes as its `target`: a job, assets, or a selection of assets."""

PAGE_SIZE: Final = 950
"""Artifacts that one tick looks at. Dagster needs 10 ms to record one, so 10,000 new artifacts are 12 ticks."""
LARGEST_PAGE: Final = 1000
MAX_RUNS: Final = 50
"""Dagster starts about six a second."""


def artifact_partitions(name: str) -> dg.DynamicPartitionsDefinition:
    """The partitions of a pipeline's artifacts, one for each key in the store. They are `manifest_sensor`'s to keep."""
    return dg.DynamicPartitionsDefinition(name=f"{name}_artifacts")


def manifest_sensor(
    name: str,
    *,
    prefix: str | None = None,
    asset_key: dg.AssetKey | Sequence[str] | str | None = None,
    partitions_def: dg.DynamicPartitionsDefinition | None = None,
    target: Target = None,
    max_runs: int = MAX_RUNS,
    page_size: int = PAGE_SIZE,
    announce: Announce = "verified",
    ref: str = "latest",
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
    resource_key: str = "blobflow",
) -> dg.SensorDefinition:
    """A sensor that reports the verified artifacts below a prefix, whichever process uploaded them.

    A pipeline moves its ref to an artifact when it has verified it. So what the ref names, or is known to have named
    before (it remembers 20 places), is verified; it is looked for in the directory of the artifact's key and in those
    above. With `announce="published"` the sensor reports every complete artifact: also one whose verification is
    still under way, or has failed, and those that no ref ever names.

    Each tick looks at one page of the keys; after the last page the walk starts over. So the sensor finds what is new,
    wherever its key sorts, what was replaced and what is gone. N artifacts take N / `page_size` ticks.

    | in the store | in Dagster |
    |---|---|
    | a new artifact | a materialization of the external asset, and a partition: its key |
    | one that no ref has named yet | nothing, unless `announce="published"`; the next round looks again |
    | another artifact under the same key | a materialization |
    | an artifact that is gone | the partition is removed; its events stay |
    | a manifest that cannot be read | nothing; the tick's message and log name it, and the next round tries again |

    With `target`, new and replaced artifacts also get a run, with the run key `<key>@<digest>`. Many are better left to
    the mirror's automation condition, see `mirror_condition`, which makes one backfill of them.

    Args:
        name: The pipeline's; the sensor is called `<name>_manifest_sensor`.
        prefix: Of the keys, a plain string; by default `<name>/`.
        asset_key: The external asset; by default `[name, "remote"]`.
        partitions_def: By default `artifact_partitions(name)`. Nothing else should change them.
        target: A job or assets with the same partitions, to be run for each artifact. None: no runs.
        max_runs: Runs requested per tick, at most 50. The artifacts after them wait for the next tick.
        page_size: Artifacts looked at per tick, at most 1,000; fewer if to look at them and to record what is new
            would take longer than 20 s, as quickly as Dagster recorded the last ones.
        announce: `verified`: what the ref names or has named. `published`: all.
        ref: Last segment of the refs that are moved after a verification, as the `ref` of `artifact_pipeline`.
        minimum_interval_seconds: Between ticks.
        resource_key: Under which the `BlobflowResource` is found.

    Raises:
        UsageError: a limit, or `announce`, makes no sense.
    """
    check_choice("announce", announce, Announce)
    for what, limit, highest in (("page_size", page_size, LARGEST_PAGE), ("max_runs", max_runs, MAX_RUNS)):
        if not 1 <= limit <= highest:
            raise UsageError(f"{what}={limit} is not between 1 and {highest}")
    walk = ManifestWalk(
        sensor_name=f"{name}_manifest_sensor",
        prefix=f"{name}/" if prefix is None else prefix,
        asset_key=_asset_key(name, asset_key),
        partitions_def=partitions_def or artifact_partitions(name),
        max_runs=0 if target is None else max_runs,
        page_size=page_size,
        ref=ref if announce == "verified" else None,
    )
    which = "verified artifacts" if walk.ref else "published artifacts, verified or not,"

    @dg.sensor(
        name=walk.sensor_name,
        description=f"Tells of the {which} below {walk.prefix!r}.",
        target=target,
        required_resource_keys={resource_key},
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
    )
    def manifests(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        store = open_store(context, resource_key)
        try:
            return ManifestTick(context, store, walk).run()
        except BlobflowError as error:
            raise as_dagster_error(error, retry_number=0, retry_policy=None) from error
        finally:
            store.close()

    return manifests


def ref_sensor(
    name: str,
    *,
    ref: str = "latest",
    asset_key: dg.AssetKey | Sequence[str] | str | None = None,
    target: Target = None,
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
    resource_key: str = "blobflow",
) -> dg.SensorDefinition:
    """A sensor that reports when the ref `<name>/<ref>` was moved; it makes one small request per tick.

    That is how a mirror follows an exporter that lives in another Dagster deployment: every move is a materialization
    of the external asset, and with `target` a run, with the run key `<name>/<ref>@<generation>@<digest>`. Of several
    moves between two ticks only the last one counts.

    Args:
        name: The pipeline's; the sensor is called `<name>_<ref>_sensor`; every other character than a letter or
            digit becomes `_`.
        asset_key: The external asset; by default `[name, "remote"]`.
        target: A job or assets without partitions. None: no runs; the mirror's automation condition makes them.
        minimum_interval_seconds: Between ticks.
        resource_key: Under which the `BlobflowResource` is found.
    """
    sensor_name = re.sub(r"\W", "_", f"{name}_{ref}_sensor", flags=re.ASCII)
    followed = f"{name}/{ref}"
    remote = _asset_key(name, asset_key)

    @dg.sensor(
        name=sensor_name,
        description=f"Tells when {followed!r} was moved.",
        target=target,
        required_resource_keys={resource_key},
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
    )
    def moves(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        try:
            store = open_store(context, resource_key)
            try:
                state = read_ref(store, followed)
                if state is None:
                    return _nothing(context, f"there is no ref {followed!r} in {store.url}")
                version = f"{state.generation}@{state.manifest_sha256}"
                if version == context.cursor:
                    return _nothing(context, f"{followed!r} still names {state.key!r}")
                data = read_manifest_bytes(store, state.key)
                found = PublishedArtifact.read(store, state.key, data)
            finally:
                store.close()
            if found.digest != state.manifest_sha256:
                return _nothing(context, f"{state.key!r} was replaced; its uploader moves {followed!r} in a moment")
        except TemporaryError as error:
            return _nothing(context, described(error))
        except BlobflowError as error:
            raise as_dagster_error(error, retry_number=0, retry_policy=None) from error
        known = _latest_version(context.instance, remote) == (state.generation, state.manifest_sha256)
        event = found.event(remote, {md.REF: followed, md.GENERATION: state.generation})
        run = dg.RunRequest(run_key=f"{followed}@{version}", tags={md.ARTIFACT_DIGEST: found.digest})
        return dg.SensorResult(
            asset_events=[] if known else [event],
            run_requests=None if target is None else [run],
            skip_reason=f"{followed!r} was moved to {state.key!r}" if target is None else None,
            cursor=version,
        )

    return moves


def _asset_key(name: str, given: dg.AssetKey | Sequence[str] | str | None) -> dg.AssetKey:
    if given is None:
        return dg.AssetKey([name, "remote"])
    return given if isinstance(given, dg.AssetKey) else dg.AssetKey(given)


def _nothing(context: dg.SensorEvaluationContext, reason: str) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=reason, cursor=context.cursor)


def _latest_version(instance: dg.DagsterInstance, asset_key: dg.AssetKey) -> tuple[Any, Any] | None:
    """Generation and digest of the asset's last event."""
    for record in instance.fetch_materializations(asset_key, limit=1).records:
        made = record.asset_materialization
        if made is not None and md.GENERATION in made.metadata:
            return made.metadata[md.GENERATION].value, (made.tags or {}).get(DATA_VERSION)
    return None
