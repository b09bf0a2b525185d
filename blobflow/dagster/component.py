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
`dg.EnvVar`: the process that needs it reads it, and it is rendered nowhere.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import dagster as dg
from dagster.components.resolved.core_models import (
    DailyPartitionsDefinitionModel,
    HourlyPartitionsDefinitionModel,
    StaticPartitionsDefinitionModel,
    TimeWindowPartitionsDefinitionModel,
    WeeklyPartitionsDefinitionModel,
    resolve_partitions_def,
)
from dagster.components.resolved.errors import ResolutionException
from dagster.components.utils.translation import TranslationFn, TranslationFnResolver
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import InitErrorDetails

from blobflow.backends.registry import BACKENDS, backend_classes
from blobflow.config import ChunkProfile
from blobflow.coordination.rounds import DEFAULT_SILENCE_S, DEFAULT_TTL_S
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.mirror import MIRRORS, artifact_mirror
from blobflow.dagster.pipeline import build_pipeline, export_schedule
from blobflow.dagster.resource import BlobflowResource, ProfileConfig
from blobflow.dagster.sensors import Announce
from blobflow.dagster.spec import BlobflowAssetProps, BlobflowTranslator, PipelineSpec
from blobflow.errors import UsageError, expanded
from blobflow.fields import check_names
from blobflow.stores.base import key_segment
from blobflow.transport import VerifyMode

EXPORTERS: Final[Mapping[str, type[BaseModel]]] = {name: backend_classes(name)[0] for name in BACKENDS}
"""What `kind` of an exporter may be; the fields of the class are its settings."""
IMPORTERS: Final[Mapping[str, type[BaseModel]]] = {name: backend_classes(name)[1] for name in BACKENDS}
"""What `kind` of an importer may be."""

_Template: Any = Annotated[str, Field(pattern=r"\{\{.*\}\}")]
"""In the place of any value: `{{ ... }}`. The pattern keeps typing errors out of it."""
_SECRETS: Final = ("access_key_id", "secret_access_key", "session_token", "leases")
_ENVIRONMENT: Final = re.compile(r"\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


def _settings_of(
    source: type[BaseModel], more: Mapping[str, Any] | None = None, *, skip: Sequence[str] = ()
) -> type[BaseModel]:
    """The fields of `source` as YAML gives them: a value, or a template that makes one. And `more` fields."""
    fields: dict[str, Any] = {}
    for name, field in source.model_fields.items():
        if name in skip:
            continue
        plain: Any = str if field.annotation is Path else field.annotation
        constrained = Annotated[(plain, *field.metadata)] if field.metadata else plain
        default = ... if field.is_required() else field.default
        told = constrained if plain is str else constrained | _Template
        fields[name] = (told, Field(default=default, description=field.description))
    return create_model(
        f"{source.__name__}Settings", __base__=dg.Model, __doc__=source.__doc__, **fields, **(more or {})
    )


# ------------------------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class _PerPartition:
    """A function of the partition key that returns a backend, and knows its kind beforehand."""

    kind: str
    make: Callable[[Mapping[str, str]], Any]

    def __call__(self, partition_key: str) -> Any:
        return self.make({"partition_key": key_segment(partition_key)})


def _backend_resolver(
    field: str, kinds: Mapping[str, type[BaseModel]], partitioned: Callable[[Any], bool]
) -> dg.Resolver:
    """Makes the backend that the YAML field describes: at once, or for each partition when it is known."""

    def resolve(context: dg.ResolutionContext, attributes: Any) -> Any:
        context, settings = context.at_path(field), getattr(attributes, field)
        if isinstance(settings, str):
            made = context.resolve_value(settings)
            if isinstance(made, str):
                raise ResolutionException(f"{field}: a mapping with a kind, or a template that makes an {field}")
            return made
        backend = kinds[settings.kind]
        given = settings.model_dump(exclude_unset=True, exclude={"kind"})
        per_partition = partitioned(attributes)
        _check_names(field, given, {*context.scope, *(["partition_key"] if per_partition else [])})

        def make(scope: Mapping[str, str]) -> Any:
            values = context.with_scope(**scope).resolve_value(given)
            for name, value in values.items():
                if backend.model_fields[name].annotation is Path:
                    _require_absolute(f"{field}.{name}", value)
            return backend.model_validate(values)

        return _PerPartition(settings.kind, make) if per_partition else make({})

    models = [
        _settings_of(backend, {"kind": (Literal[kind], Field(description="What is read or written."))})
        for kind, backend in kinds.items()
    ]
    return dg.Resolver.from_model(resolve, model_field_type=reduce(or_, models))


def _check_names(field: str, value: Any, known: set[str]) -> None:
    """Refuse a template that names what there is not: Dagster would put nothing in its place, and export `/data/`."""
    from jinja2 import Environment, meta  # only components that have templates need it

    if isinstance(value, str):
        environment = Environment()
        unknown = meta.find_undeclared_variables(environment.parse(value)) - known - environment.globals.keys()
        if unknown:
            raise ResolutionException(
                f"{field}: {value!r} names {', '.join(sorted(unknown))}, which does not exist here"
            )
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_names(f"{field}.{name}", item, known)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_names(field, item, known)


def _require_absolute(field: str, path: object) -> None:
    if not expanded(str(path)).is_absolute():
        raise ResolutionException(
            f"{field}: {str(path)!r} is relative, and the processes of Dagster have no directory in common."
            " Give an absolute path, for example '{{ context.project_root }}/...'."
        )


# -------------------------------------------------------------------------------------------------------------- store

_FROM_ENVIRONMENT: Final = "As '{{ env.NAME }}' only: the variable is read by the steps, and written down nowhere."

_Profile = _settings_of(ChunkProfile)
_STORE: Final = BlobflowResource.model_fields
_Store = _settings_of(
    BlobflowResource,
    {
        "url": (str | None, Field(default=None, description=_STORE["store"].description)),
        "profile": (
            Literal["datacenter", "tactical", "edge"] | _Profile | _Template,
            Field(default="tactical", description=f"{_STORE['profile'].description} Or a profile of your own."),
        ),
        **{name: (str | None, Field(default=None, description=_FROM_ENVIRONMENT)) for name in _SECRETS},
        "leases": (
            str | None,
            Field(
                default=None,
                description="SQLAlchemy URL of a database that keeps the leases of rounds; by default the store keeps"
                f" them, which needs conditional writes. {_FROM_ENVIRONMENT}",
            ),
        ),
    },
    skip=("store", "profile", "custom_profile", "s3", *_SECRETS),
)


def _resolve_store(context: dg.ResolutionContext, value: Any) -> Any:
    """A resource of a URL or of settings; a template may give a resource that Python made."""
    if value is None:
        return None
    if isinstance(value, str):
        made = _from_environment(value) or context.resolve_value(value)
        if isinstance(made, BlobflowResource):
            return made
        given: dict[str, Any] = {"store": made}
    else:
        settings = value.model_dump(exclude_unset=True)
        given = {
            # Only strings can wait for the run; the profile is one of three words.
            name: (name != "profile" and _from_environment(told))
            or (_refused(name) if name in _SECRETS else context.resolve_value(told))
            for name, told in settings.items()
            if told is not None
        }
        if "url" in given:
            given["store"] = given.pop("url")
        if isinstance(given.get("profile"), Mapping):
            given["custom_profile"] = ProfileConfig(**given.pop("profile"))
    for field in ("store", "scratch_dir"):
        told = given.get(field)
        if isinstance(told, str) and not isinstance(told, dg.EnvVar) and "://" not in told:
            _require_absolute(field, told)
    return BlobflowResource(**given)


def _from_environment(value: object) -> dg.EnvVar | None:
    named = _ENVIRONMENT.fullmatch(value.strip()) if isinstance(value, str) else None
    return dg.EnvVar(named[1]) if named else None


def _refused(name: str) -> Any:
    # No source position and no value: both would show the secret.
    raise ResolutionException(f"store.{name}: write '{{{{ env.NAME }}}}'. A secret has no place in a file.")


# --------------------------------------------------------------------------------------------- partitions and schedule


class DynamicPartitions(dg.Model):
    """Partitions that are added while the deployment runs, by a sensor or in the UI."""

    type: Literal["dynamic"]
    name: str = Field(description="Of the set of partitions; assets with the same name share them.")


def _resolve_partitions(context: dg.ResolutionContext, value: Any) -> dg.PartitionsDefinition | None:
    if isinstance(value, DynamicPartitions):
        return dg.DynamicPartitionsDefinition(name=value.name)
    return resolve_partitions_def(context, value)


class ExportSchedule(dg.Model):
    """When export rounds begin."""

    cron_schedule: str = Field(description="For example '0 * * * *'.")
    execution_timezone: str | None = Field(default=None, description="Of the cron string, e.g. Europe/Berlin; UTC.")
    running: bool = Field(default=False, description="Runs from the start; otherwise it is switched on in the UI.")


def _resolve_schedule(context: dg.ResolutionContext, value: Any) -> Any:
    if isinstance(value, BaseModel):
        return ExportSchedule(**context.resolve_value(value.model_dump(exclude_unset=True)))
    return context.resolve_value(value)


class MirrorFreshness(dg.Model):
    """How old the mirror may be."""

    fail_after_hours: float = Field(description="After which it counts as stale.")
    warn_after_hours: float | None = Field(default=None, description="After which there is a warning; less than that.")

    def policy(self) -> dg.FreshnessPolicy:
        """As Dagster takes it."""
        return dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=self.fail_after_hours),
            warn_window=None if self.warn_after_hours is None else timedelta(hours=self.warn_after_hours),
        )


def _resolve_freshness(context: dg.ResolutionContext, value: Any) -> dg.FreshnessPolicy | None:
    if isinstance(value, BaseModel):
        return MirrorFreshness(**context.resolve_value(value.model_dump(exclude_unset=True))).policy()
    return context.resolve_value(value)


# ------------------------------------------------------------------------------------------------------ unknown fields


@cache
def _without_unknown_fields(model: type[BaseModel]) -> type[BaseModel]:
    """`model` with one clear error for a field that there is not, at whatever depth.

    Pydantic refuses it too, but with an error for every kind of exporter that there is, and with the value, which may
    be a secret.
    """

    class Known(model):
        model_config = ConfigDict(hide_input_in_errors=True, title=model.__name__)

        @model_validator(mode="before")
        @classmethod
        def _no_unknown_fields(cls, given: Any) -> Any:
            _check_fields((), model, given)
            return given

    Known.__name__, Known.__qualname__, Known.__doc__ = model.__name__, model.__qualname__, model.__doc__
    return Known


def _check_fields(where: tuple[str, ...], model: type[BaseModel], given: Any) -> None:
    """Check the names of a mapping, and of the mappings in it, against the models of their fields.

    Raises:
        ValidationError: with the place, so that Dagster names file and line.
    """
    if not isinstance(given, Mapping):
        return
    try:
        check_names(".".join(where) or "the component", model.model_fields, given)
    except UsageError as error:
        # Of a type that pydantic has, or else Dagster cannot repeat it.
        place = InitErrorDetails(
            type="value_error", loc=(*where, str(error.field)), input=None, ctx={"error": error.message}
        )
        raise ValidationError.from_exception_data(model.__name__, [place]) from None
    for name, value in given.items():
        kinds = [kind for kind in _models_in(model.model_fields[name].annotation) if _may_be(kind, value)]
        if len(kinds) == 1:
            _check_fields((*where, name), kinds[0], value)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a value of this annotation may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _may_be(model: type[BaseModel], given: Any) -> bool:
    """Whether the mapping does not say that it is of another kind."""
    if not isinstance(given, Mapping):
        return False
    words = ((name, field.annotation) for name, field in model.model_fields.items() if name in ("kind", "type"))
    return all(given.get(name) in get_args(word) for name, word in words if get_origin(word) is Literal)


# ---------------------------------------------------------------------------------------------------------- components


def _described(description: str) -> dg.Resolver:
    # Dagster drops the description of a pydantic Field that has a default.
    return dg.Resolver.default(description=description)


_TRANSLATION: Final = TranslationFnResolver[BlobflowAssetProps](lambda props: {"props": props, "stage": props.stage})
_TRANSLATION.description = (
    "Changes keys, groups, owners, tags and so on of the assets; sees `stage` (snapshot, remote or mirror), `props` and"
    " `spec`."
)


class _StoreComponent(dg.Component, dg.Model, dg.Resolvable):
    """What pipelines and mirrors have in common."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    # `Any` stands for a BlobflowResource, and in the subclasses for exporters and importers: Dagster would look for
    # fields in the one, and pydantic would check the others, which are protocols.
    store: Annotated[
        Any,
        dg.Resolver(
            _resolve_store,
            model_field_type=_Store | str | None,
            inject_before_resolve=False,
            description="URL or settings of the store; the component then has a resource of its own. By default it"
            " takes the resource `resource_key` of the code location.",
        ),
    ] = None
    resource_key: Annotated[
        str,
        _described("Of the BlobflowResource in the code location; not together with `store`."),
    ] = "blobflow"
    max_retries: Annotated[
        int,
        _described("How often a step is tried again after an error that may pass (a store that is down)."),
    ] = DEFAULT_RETRY_POLICY.max_retries
    pool: Annotated[str | None, _described("Concurrency pool of which uploads and downloads take a slot.")] = None
    lanes: Annotated[
        int,
        _described(
            "Among how many steps each upload and download is divided, for executors that spread steps over machines."
        ),
    ] = 1
    freshness: Annotated[
        dg.FreshnessPolicy | None,
        dg.Resolver(
            _resolve_freshness,
            model_field_type=MirrorFreshness | _Template | None,
            description="How old the mirror may be before the UI and alerts say so.",
        ),
    ] = None
    translation: Annotated[TranslationFn[BlobflowAssetProps] | None, _TRANSLATION] = None

    @classmethod
    def model(cls) -> type[BaseModel]:
        return _without_unknown_fields(super().model())

    # Not a constraint of the field: Dagster would hold templates to it as well.
    @field_validator("max_retries")
    @classmethod
    def _not_negative(cls, max_retries: int) -> int:
        if max_retries < 0:
            raise ValueError("max_retries is a number of retries, or 0")
        return max_retries

    def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
        """The spec of one asset; to be overridden where `translation` is not enough."""
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
    """Asks the component, and knows the kinds that a pipeline with partitions cannot know beforehand."""

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
    """What `dg scaffold defs` takes; everything has a default."""

    name: str | None = Field(default=None, description="Of the pipeline; by default that of the folder.")
    source: str | None = Field(default=None, description="The directory to export; by default data/NAME here.")
    target: str | None = Field(default=None, description="Where the mirror lives; by default mirror/NAME here.")
    store: str | None = Field(default=None, description="URL of the store; by default store/ here.")
    schedule: str | None = Field(default=None, description="Cron string of the export rounds; by default none.")


class ArtifactPipelineScaffolder(dg.Scaffolder[ArtifactPipelineScaffoldParams]):
    """Writes a component that works as it is, inside the project's directory."""

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
    """Takes snapshots of a source, keeps them in a store, and brings them to life at a mirror.

    Three assets (snapshot, remote, mirror), a blocking check that the artifact in the store is whole, a job, and a
    schedule if one is given. Interrupted transfers continue where they stopped.
    """

    name: str = Field(description="Of the pipeline: letters, digits and '_'. Keys in the store begin with it.")
    exporter: Annotated[Any, _backend_resolver("exporter", EXPORTERS, _has_partitions)] = Field(
        description="The source, by kind; its settings may contain '{{ partition_key }}'. Or a template that gives an"
        " exporter made by Python."
    )
    importer: Annotated[Any, _backend_resolver("importer", IMPORTERS, _has_partitions)] = Field(
        description="The target, by kind; its settings may contain '{{ partition_key }}'. Or a template that gives an"
        " importer made by Python."
    )
    partitions_def: Annotated[
        dg.PartitionsDefinition | None,
        dg.Resolver(
            _resolve_partitions,
            model_field_type=HourlyPartitionsDefinitionModel
            | DailyPartitionsDefinitionModel
            | WeeklyPartitionsDefinitionModel
            | TimeWindowPartitionsDefinitionModel
            | StaticPartitionsDefinitionModel
            | DynamicPartitions,
            description="One artifact, one ref and one mirror for each partition.",
        ),
    ] = None
    schedule: Annotated[
        ExportSchedule | str | None,
        dg.Resolver(
            _resolve_schedule,
            model_field_type=ExportSchedule | str,
            description="Cron string of the export rounds, or settings. Partitions, if any, have to be of time.",
        ),
    ] = None
    ref: Annotated[str | None, _described("The name that moves to each verified artifact; null: none.")] = "latest"
    verify_mode: Annotated[
        VerifyMode,
        _described(
            "deep reads every byte (proven), shallow compares sizes, manifests and the store's checksum (attested, or"
            " unproven where it has none), auto is deep except where the store attests a checksum."
        ),
    ] = "auto"
    deps: Annotated[Sequence[dg.ResolvedAssetKey], _described("Keys of assets that the export waits for.")] = ()
    ttl_s: Annotated[
        float,
        _described("Seconds without a sign of life of an export after which another run takes its round over."),
    ] = DEFAULT_TTL_S
    max_silence_s: Annotated[
        float, _described("Seconds without progress of an export after which its round is no longer held.")
    ] = DEFAULT_SILENCE_S

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002  # Dagster's signature
        """Assets, check, job, schedule, and the resource if the component has its own."""
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
            timing = self.schedule
            if isinstance(timing, str):
                timing = ExportSchedule(cron_schedule=timing)
            schedules = [
                export_schedule(
                    pipeline,
                    timing.cron_schedule,
                    execution_timezone=timing.execution_timezone,
                    default_status=dg.DefaultScheduleStatus.RUNNING
                    if timing.running
                    else dg.DefaultScheduleStatus.STOPPED,
                )
            ]
        own = dg.Definitions(schedules=schedules, resources=self._resources(options))
        return dg.Definitions.merge(pipeline.definitions, own)


class ArtifactMirrorScaffoldParams(BaseModel):
    """What `dg scaffold defs` takes; everything has a default."""

    name: str | None = Field(default=None, description="Of the publishing pipeline; by default that of the folder.")
    target: str | None = Field(default=None, description="Where the mirror lives; by default mirror/NAME here.")
    store: str | None = Field(default=None, description="URL of the store; by default store/ here.")


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
    """Brings to life what another deployment publishes in the store.

    An external asset (remote), the mirror, a job, and the sensor that starts it. The two deployments share nothing but
    the store.
    """

    name: str = Field(description="Of the publishing pipeline: what its keys begin with.")
    importer: Annotated[Any, _backend_resolver("importer", IMPORTERS, lambda given: given.ref is None)] = Field(
        description="The target, by kind. Without a ref its settings may contain '{{ partition_key }}', which is the"
        " artifact's key. Or a template that gives an importer made by Python."
    )
    ref: Annotated[
        str | None,
        _described(
            "The mirror shows what this ref of the pipeline names. null: every artifact is a partition with a mirror"
            " of its own."
        ),
    ] = "latest"
    key_prefix: Annotated[
        Sequence[str],
        _described(
            "Of the assets' keys, before the name. Each further mirror of a pipeline in one deployment needs another."
        ),
    ] = MIRRORS
    announce: Annotated[
        Announce,
        _described(
            "Without a ref: verified, what a ref `latest` of the pipeline names or has named; or published, every"
            " complete artifact, verified or not."
        ),
    ] = "verified"
    digest: Annotated[str | None, _described("Refuse every artifact but this one (sha256:...).")] = None
    minimum_interval_seconds: Annotated[int, _described("Seconds between two looks into the store.")] = 30
    running: Annotated[
        bool, _described("The sensors run from the start; otherwise they are switched on in the UI.")
    ] = False

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002  # Dagster's signature
        """Assets, job, sensors, and the resource if the component has its own."""
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
