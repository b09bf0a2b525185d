"""`PipelineSpec`: the settings of a pipeline as one value; and the translator, which describes its assets."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import dagster as dg

from blobflow.backends import Exporter, Importer
from blobflow.coordination.rounds import DEFAULT_SILENCE_S, DEFAULT_TTL_S
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.resource import BlobflowResource
from blobflow.errors import UsageError
from blobflow.fields import check_choice
from blobflow.transport import VerifyMode

MAX_LANES: Final = 64
"""A graph of more steps is too large to read, and each step costs seconds of processor time."""

ExporterOf: TypeAlias = Exporter | Callable[[str], Exporter]
ImporterOf: TypeAlias = Importer | Callable[[str], Importer]
Stage = Literal["snapshot", "remote", "mirror"]

_DESCRIPTIONS: dict[Stage, str] = {
    "snapshot": "One consistent artifact of the source: every file read once, manifest and index written.",
    "remote": "The artifact in the store: sent, verified there, and named by the ref.",
    "mirror": "The artifact imported at its target: fetched, every member verified, swapped in at once.",
}


@dataclass(frozen=True)
class BlobflowAssetProps:
    """Facts about an asset that a translator may use."""

    pipeline: str
    stage: Stage
    backend: str | None
    """Kind of the exporter (snapshot) or importer (mirror), such as `directory`; None if it is not known yet."""


class BlobflowTranslator:
    """Turns the assets of a pipeline into asset specs.

    ```python
    class Ours(BlobflowTranslator):
        def get_asset_spec(self, props):
            return super().get_asset_spec(props).replace_attributes(owners=["team:data"])
    ```
    """

    def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
        """Key, group, description, tags, kinds, owners, metadata, automation condition and so on of one asset.

        The pipeline waits for the assets in the spec's `deps`. Partitions belong to the pipeline, not to the spec.
        """
        return dg.AssetSpec(
            key=[props.pipeline, props.stage],
            group_name=props.pipeline,
            description=_DESCRIPTIONS[props.stage],
            kinds={"blobflow", *([props.backend] if props.backend else [])},
        )


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline as plain values: `build_pipeline` makes its definitions, and the step functions read it.

    The fields are the arguments of `artifact_pipeline`, with two additions.

    Args:
        exporter: None if another deployment publishes the artifacts and this one has only the mirror. The partitions,
            if any, are then the keys of artifacts in the store.
        digest: The only artifact that the mirror may show; None for any.

    Raises:
        UsageError: a value is invalid; the message names it.
    """

    name: str
    exporter: ExporterOf | None
    importer: ImporterOf
    partitions_def: dg.PartitionsDefinition[str] | None = None
    lanes: int = 1
    ref: str | None = "latest"
    verify_mode: VerifyMode = "auto"
    digest: str | None = None
    deps: Sequence[dg.AssetKey | Sequence[str] | str] = ()
    freshness_policy: dg.FreshnessPolicy | None = None
    group_name: str | None = None
    translator: BlobflowTranslator | None = None
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY
    pool: str | None = None
    ttl_s: float = DEFAULT_TTL_S
    max_silence_s: float = DEFAULT_SILENCE_S
    resource_key: str = "blobflow"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise UsageError(f"invalid pipeline name {self.name!r}", hint="use letters, digits and underscores")
        if not 1 <= self.lanes <= MAX_LANES:
            raise UsageError(f"lanes must be 1 to {MAX_LANES}, not {self.lanes}")
        check_choice("verify_mode", self.verify_mode, VerifyMode)
        if self.partitions_def is None and not _is_backend(self.importer, self.exporter):
            if self.exporter is None:
                raise UsageError("an importer that depends on the partition needs partitions, which are for `ref=None`")
            raise UsageError("an exporter or importer that depends on the partition needs a partitions_def")

    @cached_property
    def snapshot(self) -> dg.AssetSpec:
        """The asset spec of exported snapshots."""
        return self._asset("snapshot", self.exporter).merge_attributes(deps=self.deps)

    @cached_property
    def remote(self) -> dg.AssetSpec:
        """The asset spec of artifacts in the store."""
        return self._asset("remote", None)

    @cached_property
    def mirror(self) -> dg.AssetSpec:
        """The asset spec of the mirror."""
        spec = self._asset("mirror", self.importer)
        if self.freshness_policy is not None:
            spec = spec.replace_attributes(freshness_policy=self.freshness_policy)
        return spec

    def _asset(self, stage: Stage, backend: object) -> dg.AssetSpec:
        known = str(getattr(backend, "backend", "")) or None
        spec = (self.translator or BlobflowTranslator()).get_asset_spec(BlobflowAssetProps(self.name, stage, known))
        return spec.replace_attributes(group_name=self.group_name) if self.group_name else spec


def step_op(
    spec: PipelineSpec, node: str, *, waits: Iterable[str] = (), pool: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], dg.OpDefinition]:
    """The decorator of a step's op. The op's name is unique in the code location, the node's is not.

    Args:
        waits: Names of inputs without data.
        pool: Whether the step takes a slot of the pipeline's pool.
        options: Further options of `dg.op`.
    """
    return dg.op(
        name=f"{spec.name}__{node}",
        ins={each: dg.In(dg.Nothing) for each in waits},
        required_resource_keys={spec.resource_key},
        retry_policy=spec.retry_policy,
        pool=spec.pool if pool else None,
        **options,
    )


def resource_of(context: dg.OpExecutionContext, spec: PipelineSpec) -> BlobflowResource:
    """The resource that the code location configures for the pipeline."""
    return getattr(context.resources, spec.resource_key)


def _is_backend(*candidates: object) -> bool:
    return all(candidate is None or hasattr(candidate, "backend") for candidate in candidates)
