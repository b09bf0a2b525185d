"""Sensors that follow a store: new artifacts become asset events, partitions and, if wanted, runs.

| sensor | follows | reports |
|---|---|---|
| `manifest_sensor` | every verified artifact below a prefix | an event and a dynamic partition for each |
| `ref_sensor` | one ref, e.g. `orders/latest` | an event whenever it is moved |

The code of a `manifest_sensor`'s tick is in `blobflow.dagster.manifest_tick`.
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
"""Artifacts that a sensor reports: those that a ref names or has named, or all complete ones."""

Target: TypeAlias = Any
"""A `target` of `dg.sensor`: a job, assets, or a selection of assets."""

PAGE_SIZE: Final = 950
"""Artifacts that one tick checks. Dagster needs 10 ms to record one, so 10,000 new artifacts take 12 ticks."""
LARGEST_PAGE: Final = 1000
MAX_RUNS: Final = 50
"""Most runs that one tick requests. Dagster starts about six a second."""


def artifact_partitions(name: str) -> dg.DynamicPartitionsDefinition:
    """The partitions of a pipeline's artifacts, one for each key in the store. `manifest_sensor` maintains them."""
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

    A pipeline moves its ref to an artifact after verifying it. So an artifact is verified if the ref names it, or has
    named it before (a ref remembers 20 places). The sensor reads the refs in the directory of the artifact's key and in
    those above. With `announce="published"` it reports every complete artifact, even if its verification is still under
    way or has failed, or if no ref ever names it.

    Each tick checks one page of the keys; after the last page, the walk starts over. So the sensor finds new, replaced
    and removed artifacts, wherever their keys sort. N artifacts take N / `page_size` ticks.

    | in the store | in Dagster |
    |---|---|
    | a new artifact | a materialization of the external asset, and a partition: its key |
    | one that no ref has named yet | nothing, unless `announce="published"`; the next walk checks again |
    | another artifact under the same key | a materialization |
    | an artifact that is gone | the partition is removed; its events stay |
    | a manifest that cannot be read | nothing; the tick's message and log name it, and the next walk tries again |

    With `target`, new and replaced artifacts also get a run, with the run key `<key>@<digest>`. If there are many,
    prefer the mirror's automation condition (`mirror_condition`), which makes one backfill of them.

    Args:
        name: Name of the pipeline; the sensor's name is `<name>_manifest_sensor`.
        prefix: Prefix of the keys, a plain string; by default `<name>/`.
        asset_key: Key of the external asset; by default `[name, "remote"]`.
        partitions_def: Partitions that the sensor maintains; by default `artifact_partitions(name)`. Nothing else
            should change them.
        target: A job or assets with the same partitions, run for each artifact; None for no runs.
        max_runs: Most runs that a tick requests, at most 50. Further artifacts wait for the next tick.
        page_size: Most artifacts that a tick checks, at most 1,000. A tick checks fewer if the checks and the records
            would take longer than 20 s, judged by the speed of Dagster's last records.
        announce: `verified` reports artifacts that the ref names or has named; `published` reports all.
        ref: Last segment of the refs that move after a verification, the same as `ref` of `artifact_pipeline`.
        minimum_interval_seconds: Seconds between two ticks.
        resource_key: Key of the `BlobflowResource` among the resources.

    Raises:
        UsageError: a limit, or `announce`, is invalid.
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
        description=f"Reports the {which} below {walk.prefix!r}.",
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
    """A sensor that reports moves of the ref `<name>/<ref>`; it makes one small request per tick.

    A mirror follows an exporter in another Dagster deployment in this way. Every move becomes a materialization of the
    external asset, and with `target` a run with the run key `<name>/<ref>@<generation>@<digest>`. If the ref moves
    several times between two ticks, only the last move counts.

    Args:
        name: Name of the pipeline. The sensor's name is `<name>_<ref>_sensor`; every character that is not a letter or
            digit becomes `_`.
        asset_key: Key of the external asset; by default `[name, "remote"]`.
        target: A job or assets without partitions. None for no runs, if the mirror's automation condition makes them.
        minimum_interval_seconds: Seconds between two ticks.
        resource_key: Key of the `BlobflowResource` among the resources.
    """
    sensor_name = re.sub(r"\W", "_", f"{name}_{ref}_sensor", flags=re.ASCII)
    followed = f"{name}/{ref}"
    remote = _asset_key(name, asset_key)

    @dg.sensor(
        name=sensor_name,
        description=f"Reports moves of the ref {followed!r}.",
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
    """Generation and digest in the asset's last event; None if it has no such event."""
    for record in instance.fetch_materializations(asset_key, limit=1).records:
        made = record.asset_materialization
        if made is not None and md.GENERATION in made.metadata:
            return made.metadata[md.GENERATION].value, (made.tags or {}).get(DATA_VERSION)
    return None
