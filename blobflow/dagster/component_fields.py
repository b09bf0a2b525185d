"""The fields of the components in YAML: models for the schema, and resolvers that turn them into values.

`{{ partition_key }}` in the settings of a backend is filled in when a step runs. A secret is written as
`{{ env.NAME }}` and becomes a `dg.EnvVar`: only the process that needs it reads it, and it is never rendered.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import dagster as dg
from dagster.components.resolved.core_models import resolve_partitions_def
from dagster.components.resolved.errors import ResolutionException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails

from blobflow.backends.registry import BACKENDS, backend_classes
from blobflow.config import ChunkProfile
from blobflow.dagster.resource import BlobflowResource, ProfileConfig
from blobflow.errors import UsageError, expanded
from blobflow.fields import check_names
from blobflow.stores.base import key_segment

EXPORTERS: Final[Mapping[str, type[BaseModel]]] = {name: backend_classes(name)[0] for name in BACKENDS}
"""Values of `kind` for exporters; the fields of the class are its settings."""
IMPORTERS: Final[Mapping[str, type[BaseModel]]] = {name: backend_classes(name)[1] for name in BACKENDS}
"""Values of `kind` for importers; the fields of the class are its settings."""

Template: Any = Annotated[str, Field(pattern=r"\{\{.*\}\}")]
"""A template in place of any value: `{{ ... }}`. The pattern rejects other strings, such as misspelled values."""
_SECRETS: Final = ("access_key_id", "secret_access_key", "session_token", "leases")
_ENVIRONMENT: Final = re.compile(r"\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


def _settings_of(
    source: type[BaseModel], more: Mapping[str, Any] | None = None, *, skip: Sequence[str] = ()
) -> type[BaseModel]:
    """A model of `source` for YAML: each field takes a value or a template. `more` fields are added."""
    fields: dict[str, Any] = {}
    for name, field in source.model_fields.items():
        if name in skip:
            continue
        plain: Any = str if field.annotation is Path else field.annotation
        constrained = Annotated[(plain, *field.metadata)] if field.metadata else plain
        default = ... if field.is_required() else field.default
        given = constrained if plain is str else constrained | Template
        fields[name] = (given, Field(default=default, description=field.description))
    return create_model(
        f"{source.__name__}Settings", __base__=dg.Model, __doc__=source.__doc__, **fields, **(more or {})
    )


# ------------------------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class _PerPartition:
    """A function from partition key to backend; the kind is known before it is called."""

    kind: str
    make: Callable[[Mapping[str, str]], Any]

    def __call__(self, partition_key: str) -> Any:
        return self.make({"partition_key": key_segment(partition_key)})


def backend_resolver(
    field: str, kinds: Mapping[str, type[BaseModel]], partitioned: Callable[[Any], bool]
) -> dg.Resolver:
    """A resolver that makes the backend of the YAML field: at once, or per partition when a step runs."""

    def resolve(context: dg.ResolutionContext, attributes: Any) -> Any:
        context, settings = context.at_path(field), getattr(attributes, field)
        if isinstance(settings, str):
            made = context.resolve_value(settings)
            if isinstance(made, str):
                raise ResolutionException(f"{field}: give a mapping with a kind, or a template that returns an {field}")
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
        _settings_of(backend, {"kind": (Literal[kind], Field(description="Kind of the source or target."))})
        for kind, backend in kinds.items()
    ]
    return dg.Resolver.from_model(resolve, model_field_type=reduce(or_, models))


def _check_names(field: str, value: Any, known: set[str]) -> None:
    """Refuse a template with an unknown name. Dagster would render it as an empty string, and export `/data/`.

    Raises:
        ResolutionException: a template uses a name that is not in `known`.
    """
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
            f"{field}: {str(path)!r} is relative, and Dagster's processes do not share a working directory."
            " Give an absolute path, for example '{{ context.project_root }}/...'."
        )


# -------------------------------------------------------------------------------------------------------------- store

_FROM_ENVIRONMENT: Final = "Only as '{{ env.NAME }}': steps read the variable, and its value is never stored."

_Profile = _settings_of(ChunkProfile)
_STORE: Final = BlobflowResource.model_fields
StoreSettings = _settings_of(
    BlobflowResource,
    {
        "url": (str | None, Field(default=None, description=_STORE["store"].description)),
        "profile": (
            Literal["datacenter", "tactical", "edge"] | _Profile | Template,
            Field(
                default="tactical", description=f"{_STORE['profile'].description} Or a mapping with custom settings."
            ),
        ),
        **{name: (str | None, Field(default=None, description=_FROM_ENVIRONMENT)) for name in _SECRETS},
        "leases": (
            str | None,
            Field(
                default=None,
                description="SQLAlchemy URL of a database that keeps the leases of rounds. By default the store keeps"
                f" them, which needs conditional writes. {_FROM_ENVIRONMENT}",
            ),
        ),
    },
    skip=("store", "profile", "custom_profile", "s3", *_SECRETS),
)


def resolve_store(context: dg.ResolutionContext, value: Any) -> Any:
    """The resource made from a URL or from settings; a template may return a resource made in Python."""
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
            # An EnvVar is read in the run, which only strings can wait for; the profile must be known now.
            name: (name != "profile" and _from_environment(setting))
            or (_refused(name) if name in _SECRETS else context.resolve_value(setting))
            for name, setting in settings.items()
            if setting is not None
        }
        if "url" in given:
            given["store"] = given.pop("url")
        if isinstance(given.get("profile"), Mapping):
            given["custom_profile"] = ProfileConfig(**given.pop("profile"))
    for field in ("store", "scratch_dir"):
        path = given.get(field)
        if isinstance(path, str) and not isinstance(path, dg.EnvVar) and "://" not in path:
            _require_absolute(field, path)
    return BlobflowResource(**given)


def _from_environment(value: object) -> dg.EnvVar | None:
    named = _ENVIRONMENT.fullmatch(value.strip()) if isinstance(value, str) else None
    return dg.EnvVar(named[1]) if named else None


def _refused(name: str) -> Any:
    # No source position and no value: both would show the secret.
    raise ResolutionException(f"store.{name}: write '{{{{ env.NAME }}}}'. A secret must not be written in a file.")


# --------------------------------------------------------------------------------------------- partitions and schedule


class DynamicPartitions(dg.Model):
    """Partitions that are added while the deployment runs, by a sensor or in the UI."""

    type: Literal["dynamic"]
    name: str = Field(description="Name of the set of partitions; assets with the same name share it.")


def resolve_partitions(context: dg.ResolutionContext, value: Any) -> dg.PartitionsDefinition | None:
    """The partitions that the YAML field describes: Dagster's own kinds, and dynamic ones."""
    if isinstance(value, DynamicPartitions):
        return dg.DynamicPartitionsDefinition(name=value.name)
    return resolve_partitions_def(context, value)


class ExportSchedule(dg.Model):
    """Times at which export rounds begin."""

    cron_schedule: str = Field(description="Cron string, for example '0 * * * *'.")
    execution_timezone: str | None = Field(
        default=None, description="Time zone of the cron string, such as Europe/Berlin; by default UTC."
    )
    running: bool = Field(
        default=False, description="Whether the schedule runs from the start; otherwise turn it on in the UI."
    )


def resolve_schedule(context: dg.ResolutionContext, value: Any) -> Any:
    """The schedule's settings, or its cron string."""
    if isinstance(value, BaseModel):
        return ExportSchedule(**context.resolve_value(value.model_dump(exclude_unset=True)))
    return context.resolve_value(value)


class MirrorFreshness(dg.Model):
    """Age limits of the mirror."""

    fail_after_hours: float = Field(description="Hours after which the mirror counts as stale.")
    warn_after_hours: float | None = Field(
        default=None, description="Hours after which there is a warning; less than fail_after_hours."
    )

    def policy(self) -> dg.FreshnessPolicy:
        """The same limits as Dagster's freshness policy."""
        return dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=self.fail_after_hours),
            warn_window=None if self.warn_after_hours is None else timedelta(hours=self.warn_after_hours),
        )


def resolve_freshness(context: dg.ResolutionContext, value: Any) -> dg.FreshnessPolicy | None:
    """The freshness policy that the YAML field describes."""
    if isinstance(value, BaseModel):
        return MirrorFreshness(**context.resolve_value(value.model_dump(exclude_unset=True))).policy()
    return context.resolve_value(value)


# ------------------------------------------------------------------------------------------------------ unknown fields


@cache
def without_unknown_fields(model: type[BaseModel]) -> type[BaseModel]:
    """`model`, which also refuses an unknown field at any depth with one clear error.

    Pydantic refuses it too, but with an error for every kind of exporter, and with the value, which may be a secret.
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
        ValidationError: a field is unknown. It names the place, from which Dagster derives file and line.
    """
    if not isinstance(given, Mapping):
        return
    try:
        check_names(".".join(where) or "the component", model.model_fields, given)
    except UsageError as error:
        # The type must be one of pydantic's, or Dagster cannot raise the error again.
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
    """Whether `given` is a mapping whose `kind` or `type` fits the model."""
    if not isinstance(given, Mapping):
        return False
    words = ((name, field.annotation) for name, field in model.model_fields.items() if name in ("kind", "type"))
    return all(given.get(name) in get_args(word) for name, word in words if get_origin(word) is Literal)
