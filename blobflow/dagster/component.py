"""Pipelines and mirrors as YAML: the Dagster components `ArtifactPipelineComponent` and `ArtifactMirrorComponent`.

```yaml
type: blobflow.dagster.ArtifactPipelineComponent
attributes:
  name: orders
  exporter: {kind: directory, path: /var/lib/orders}
  importer: {kind: directory, path: /srv/mirror/orders}
  store: s3://backups/orders
  schedule: "0 * * * *"
```

The attributes are the arguments of `artifact_pipeline` and `artifact_mirror`. `{{ partition_key }}` in the settings of
an exporter or importer is filled in when a step runs. A secret is written as `{{ env.NAME }}` and becomes a
`dg.EnvVar`: only the process that needs it reads it, and it is never rendered.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import dagster as dg
from dagster.components.resolved.core_models import (
    DailyPartitionsDefinitionModel,
    HourlyPartitionsDefinitionModel,
    StaticPartitionsDefinitionModel,
    TimeWindowPartitionsDefinitionModel,
    WeeklyPartitionsDefinitionModel,
)
from dagster.components.utils.translation import TranslationFn, TranslationFnResolver
from pydantic import BaseModel, ConfigDict, Field, field_validator

from blobflow.coordination.rounds import DEFAULT_SILENCE_S, DEFAULT_TTL_S
from blobflow.dagster.component_fields import (
    EXPORTERS,
    IMPORTERS,
    DynamicPartitions,
    ExportSchedule,
    MirrorFreshness,
    StoreSettings,
    Template,
    backend_resolver,
    resolve_freshness,
    resolve_partitions,
    resolve_schedule,
    resolve_store,
    without_unknown_fields,
)
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.mirror import MIRRORS, artifact_mirror
from blobflow.dagster.pipeline import build_pipeline, export_schedule
from blobflow.dagster.sensors import Announce
from blobflow.dagster.spec import BlobflowAssetProps, BlobflowTranslator, PipelineSpec
from blobflow.errors import UsageError
from blobflow.transport import VerifyMode


def _described(description: str) -> dg.Resolver:
    # Dagster drops the description of a pydantic Field that has a default.
    return dg.Resolver.default(description=description)


_TRANSLATION: Final = TranslationFnResolver[BlobflowAssetProps](lambda props: {"props": props, "stage": props.stage})
_TRANSLATION.description = (
    "Changes the assets' keys, groups, owners, tags and so on. It can use `stage` (snapshot, remote or mirror), `props`"
    " and `spec`."
)


class _StoreComponent(dg.Component, dg.Model, dg.Resolvable):
    """Base of the two components: the attributes that pipelines and mirrors share."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    # `Any` stands for a BlobflowResource, and in the subclasses for exporters and importers. Dagster would look for
    # fields in the resource, and pydantic would check the exporters and importers, which are protocols.
    store: Annotated[
        Any,
        dg.Resolver(
            resolve_store,
            model_field_type=StoreSettings | str | None,
            inject_before_resolve=False,
            description="URL or settings of the store, from which the component makes its own resource. By default it"
            " uses the resource `resource_key` of the code location.",
        ),
    ] = None
    resource_key: Annotated[
        str,
        _described("Key of the BlobflowResource in the code location; cannot be combined with `store`."),
    ] = "blobflow"
    max_retries: Annotated[
        int,
        _described("Retries of a step after a temporary error, such as a store that is down."),
    ] = DEFAULT_RETRY_POLICY.max_retries
    pool: Annotated[str | None, _described("Concurrency pool; each upload and download takes a slot.")] = None
    lanes: Annotated[
        int,
        _described(
            "Number of steps that share each upload and download, for executors that spread steps over machines."
        ),
    ] = 1
    freshness: Annotated[
        dg.FreshnessPolicy | None,
        dg.Resolver(
            resolve_freshness,
            model_field_type=MirrorFreshness | Template | None,
            description="Age of the mirror after which the UI and alerts report it as stale.",
        ),
    ] = None
    translation: Annotated[TranslationFn[BlobflowAssetProps] | None, _TRANSLATION] = None

    @classmethod
    def model(cls) -> type[BaseModel]:
        return without_unknown_fields(super().model())

    # Not a constraint of the field: Dagster would hold templates to it as well.
    @field_validator("max_retries")
    @classmethod
    def _not_negative(cls, max_retries: int) -> int:
        if max_retries < 0:
            raise ValueError("max_retries must be 0 or more")
        return max_retries

    def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
        """The spec of one asset; override it if `translation` is not enough."""
        spec = BlobflowTranslator().get_asset_spec(props)
        return self.translation(spec, props) if self.translation else spec

    def _options(self, name: str, **ends: Any) -> dict[str, Any]:
        """Arguments of `artifact_pipeline` and `artifact_mirror`; `ends` are the exporter and importer by stage."""
        usual = DEFAULT_RETRY_POLICY
        retries = dg.RetryPolicy(
            max_retries=self.max_retries, delay=usual.delay, backoff=usual.backoff, jitter=usual.jitter
        )
        return {
            "name": name,
            "translator": _ComponentTranslator(self, ends),
            "retry_policy": retries if self.max_retries else None,
            "pool": self.pool,
            "lanes": self.lanes,
            "freshness_policy": self.freshness,
            "resource_key": self.resource_key if self.store is None else f"{name}_blobflow",
        }

    def _resources(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if self.store is None:
            return {}
        if "resource_key" in self.model_fields_set:
            raise UsageError(f"{options['name']!r} has a store and a resource_key", hint="give one of them")
        return {options["resource_key"]: self.store}


@dataclass(frozen=True)
class _ComponentTranslator(BlobflowTranslator):
    """Asks the component for specs, and adds the kinds, which a pipeline with partitions does not know yet."""

    component: _StoreComponent
    ends: Mapping[str, Any]

    def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
        kind = props.backend or getattr(self.ends.get(props.stage), "kind", None)
        spec = self.component.get_asset_spec(replace(props, backend=kind))
        if spec.partitions_def is not None:
            raise UsageError(
                f"the translation of {props.pipeline!r} has partitions", hint="write partitions_def beside translation"
            )
        return spec


def _has_partitions(attributes: Any) -> bool:
    return attributes.partitions_def is not None


class ArtifactPipelineScaffoldParams(BaseModel):
    """Options of `dg scaffold defs` for a pipeline; all have defaults."""

    name: str | None = Field(default=None, description="Name of the pipeline; by default that of the folder.")
    source: str | None = Field(
        default=None, description="Directory to export; by default data/NAME in the project's directory."
    )
    target: str | None = Field(
        default=None, description="Directory of the mirror; by default mirror/NAME in the project's directory."
    )
    store: str | None = Field(
        default=None, description="URL of the store; by default store/ in the project's directory."
    )
    schedule: str | None = Field(default=None, description="Cron string of the export rounds; by default none.")


class ArtifactPipelineScaffolder(dg.Scaffolder[ArtifactPipelineScaffoldParams]):
    """Writes a pipeline that works without changes, inside the project's directory."""

    @classmethod
    def get_scaffold_params(cls) -> type[ArtifactPipelineScaffoldParams]:
        return ArtifactPipelineScaffoldParams

    def scaffold(self, request: dg.ScaffoldRequest[ArtifactPipelineScaffoldParams]) -> None:
        params = request.params
        name = params.name or _name_of(request.target_path)
        attributes = {
            "name": name,
            "exporter": {"kind": "directory", "path": params.source or _here("data", name)},
            "importer": {"kind": "directory", "path": params.target or _here("mirror", name)},
            "store": params.store or _here("store"),
            "schedule": params.schedule,
        }
        dg.scaffold_component(request, {key: value for key, value in attributes.items() if value is not None})


def _name_of(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", folder.name)


def _here(*names: str) -> str:
    return "/".join(["{{ context.project_root }}", *names])


@dg.scaffold_with(ArtifactPipelineScaffolder)
class ArtifactPipelineComponent(_StoreComponent):
    """Takes snapshots of a source, keeps them in a store, and imports them into a mirror.

    It defines three assets (snapshot, remote, mirror), a blocking check that the artifact in the store is complete, a
    job, and a schedule if one is given. Interrupted transfers continue where they stopped.
    """

    name: str = Field(description="Name of the pipeline: letters, digits and '_'. Keys in the store begin with it.")
    exporter: Annotated[Any, backend_resolver("exporter", EXPORTERS, _has_partitions)] = Field(
        description="The source: a kind and its settings, which may contain '{{ partition_key }}'. Or a template that"
        " returns an exporter made in Python."
    )
    importer: Annotated[Any, backend_resolver("importer", IMPORTERS, _has_partitions)] = Field(
        description="The target: a kind and its settings, which may contain '{{ partition_key }}'. Or a template that"
        " returns an importer made in Python."
    )
    partitions_def: Annotated[
        dg.PartitionsDefinition | None,
        dg.Resolver(
            resolve_partitions,
            model_field_type=HourlyPartitionsDefinitionModel
            | DailyPartitionsDefinitionModel
            | WeeklyPartitionsDefinitionModel
            | TimeWindowPartitionsDefinitionModel
            | StaticPartitionsDefinitionModel
            | DynamicPartitions,
            description="Partitions; each has its own artifacts, ref and mirror.",
        ),
    ] = None
    schedule: Annotated[
        ExportSchedule | str | None,
        dg.Resolver(
            resolve_schedule,
            model_field_type=ExportSchedule | str,
            description="Cron string of the export rounds, or settings. Partitions, if any, must be time windows.",
        ),
    ] = None
    ref: Annotated[str | None, _described("Name of the ref that moves to each verified artifact; null for no ref.")] = (
        "latest"
    )
    verify_mode: Annotated[
        VerifyMode,
        _described(
            "deep reads every byte (proven). shallow compares sizes, manifests and the store's checksum (attested, or"
            " unproven without a checksum). auto is deep unless the store attests a checksum."
        ),
    ] = "auto"
    deps: Annotated[Sequence[dg.ResolvedAssetKey], _described("Keys of assets that the export waits for.")] = ()
    ttl_s: Annotated[
        float,
        _described("Seconds without a heartbeat of an export after which another run may take over its round."),
    ] = DEFAULT_TTL_S
    max_silence_s: Annotated[
        float, _described("Seconds without progress of an export after which its round is no longer held.")
    ] = DEFAULT_SILENCE_S

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002  # Dagster's signature
        """Assets, check, job, schedule, and the resource if the component makes its own."""
        options = self._options(self.name, snapshot=self.exporter, mirror=self.importer)
        spec = PipelineSpec(
            exporter=self.exporter,
            importer=self.importer,
            partitions_def=self.partitions_def,
            ref=self.ref,
            verify_mode=self.verify_mode,
            deps=self.deps,
            ttl_s=self.ttl_s,
            max_silence_s=self.max_silence_s,
            **options,
        )
        pipeline = build_pipeline(spec)
        schedules = []
        if self.schedule is not None:
            timing = ExportSchedule(cron_schedule=self.schedule) if isinstance(self.schedule, str) else self.schedule
            status = dg.DefaultScheduleStatus.RUNNING if timing.running else dg.DefaultScheduleStatus.STOPPED
            zone = timing.execution_timezone
            schedules = [
                export_schedule(pipeline, timing.cron_schedule, execution_timezone=zone, default_status=status)
            ]
        own = dg.Definitions(schedules=schedules, resources=self._resources(options))
        return dg.Definitions.merge(pipeline.definitions, own)


class ArtifactMirrorScaffoldParams(BaseModel):
    """Options of `dg scaffold defs` for a mirror; all have defaults."""

    name: str | None = Field(
        default=None, description="Name of the publishing pipeline; by default that of the folder."
    )
    target: str | None = Field(
        default=None, description="Directory of the mirror; by default mirror/NAME in the project's directory."
    )
    store: str | None = Field(
        default=None, description="URL of the store; by default store/ in the project's directory."
    )


class ArtifactMirrorScaffolder(dg.Scaffolder[ArtifactMirrorScaffoldParams]):
    """Writes a mirror inside the project's directory."""

    @classmethod
    def get_scaffold_params(cls) -> type[ArtifactMirrorScaffoldParams]:
        return ArtifactMirrorScaffoldParams

    def scaffold(self, request: dg.ScaffoldRequest[ArtifactMirrorScaffoldParams]) -> None:
        params = request.params
        name = params.name or _name_of(request.target_path)
        attributes = {
            "name": name,
            "importer": {"kind": "directory", "path": params.target or _here("mirror", name)},
            "store": params.store or _here("store"),
        }
        dg.scaffold_component(request, attributes)


@dg.scaffold_with(ArtifactMirrorScaffolder)
class ArtifactMirrorComponent(_StoreComponent):
    """Imports the artifacts that another deployment publishes in the store.

    It defines an external asset (remote), the mirror, a job, and the sensor that starts it. The two deployments share
    only the store.
    """

    name: str = Field(description="Name of the publishing pipeline; its keys begin with it.")
    importer: Annotated[Any, backend_resolver("importer", IMPORTERS, lambda given: given.ref is None)] = Field(
        description="The target: a kind and its settings. Without a ref, they may contain '{{ partition_key }}', which"
        " is the artifact's key. Or a template that returns an importer made in Python."
    )
    ref: Annotated[
        str | None,
        _described(
            "The mirror shows the artifact that this ref of the pipeline names. null: every artifact is a partition"
            " with its own mirror."
        ),
    ] = "latest"
    key_prefix: Annotated[
        Sequence[str],
        _described(
            "Prefix of the assets' keys, before the name. Each further mirror of a pipeline in one deployment needs"
            " another prefix."
        ),
    ] = MIRRORS
    announce: Annotated[
        Announce,
        _described(
            "Without a ref: verified announces artifacts that a ref `latest` of the pipeline names or has named;"
            " published announces every complete artifact, verified or not."
        ),
    ] = "verified"
    digest: Annotated[str | None, _described("Accept only this artifact (sha256:...).")] = None
    minimum_interval_seconds: Annotated[int, _described("Seconds between two checks of the store.")] = 30
    running: Annotated[
        bool, _described("Whether the sensors run from the start; otherwise turn them on in the UI.")
    ] = False

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002  # Dagster's signature
        """Assets, job, sensors, and the resource if the component makes its own."""
        options = self._options(self.name, mirror=self.importer)
        mirror = artifact_mirror(
            importer=self.importer,
            ref=self.ref,
            key_prefix=self.key_prefix,
            announce=self.announce,
            digest=self.digest,
            minimum_interval_seconds=self.minimum_interval_seconds,
            running=self.running,
            **options,
        )
        return dg.Definitions.merge(mirror.definitions, dg.Definitions(resources=self._resources(options)))
