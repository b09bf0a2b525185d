"""`ArtifactIOManager`: an asset returns a directory, and its consumer gets a verified copy. Nothing is pickled.

```python
@dg.asset(io_manager_key="artifacts")
def model() -> Path:
    return train(Path("/data/model"))

@dg.asset
def scores(model: Path) -> None:
    evaluate(model / "weights.bin")

blobflow = BlobflowResource(store="s3://models/prod")
defs = dg.Definitions(
    assets=[model, scores],
    resources={"artifacts": ArtifactIOManager(blobflow=blobflow)},
)
```

Each content has a separate key, so nothing is ever overwritten, and a ref names the newest. For an asset these are
`<asset key>[/<partition>]/<content digest>.tar` and `<asset key>[/<partition>]/latest`, as in a pipeline. Refs of op
outputs belong to their run, as with Dagster's own IO managers: `runs/<run id>/<step>/<output>/latest`. Their contents
do not (`ops/<step>/<output>/...`), so a new run continues the upload of a killed one.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin

import dagster as dg
from pydantic import Field, PrivateAttr, field_validator

from blobflow.artifact.artifact import Artifact
from blobflow.backends import export_artifact
from blobflow.backends.patterns import ExcludePatterns
from blobflow.coordination.lease_store import LeaseStore
from blobflow.coordination.refs import read_ref
from blobflow.coordination.rounds import check_name, content_key, take_token
from blobflow.dagster import metadata as md
from blobflow.dagster.checkpoints import ProgressLog, StepJournal, transfer_journal
from blobflow.dagster.failures import io_manager_errors, waits_logged
from blobflow.dagster.fencing import RunFence
from blobflow.dagster.resource import BlobflowResource, Configured
from blobflow.errors import ArtifactNotFound, LeaseLost, UsageError
from blobflow.scratch import scratch_directory
from blobflow.stores import Store
from blobflow.stores.base import check_readable, key_segment
from blobflow.transport import ProgressEvent, VerifyResult, upload, verify, verify_or_heal
from blobflow.transport.cache import ArtifactCache

CACHE_BYTES: Final = 20 << 30

_PARTITION_TAGS: Final = (
    "dagster/partition",
    "dagster/asset_partition_range_start",
    "dagster/asset_partition_range_end",
)
"""Tags of a run that name its partition, or the ends of its partition range."""


@dataclass(frozen=True)
class ArtifactRef:
    """Names an artifact in the store without fetching it. Plain data: it fits in JSON, config and tags."""

    key: str
    digest: str
    """`sha256:<hex>` of the manifest."""

    def to_json_dict(self) -> dict[str, str]:
        """Plain JSON values; `ArtifactRef(**values)` is the inverse."""
        return asdict(self)


Stored: TypeAlias = Path | ArtifactRef


class NotMaterialized(ArtifactNotFound):
    """No ref names the value to load; `key` is the missing ref."""


class ArtifactIOManager(Configured, dg.ConfigurableIOManager):
    """Keeps directories that assets and ops return as artifacts in a store, and hands verified copies to consumers.

    | a step returns | what is stored |
    |---|---|
    | `Path` of a directory | its content; the directory stays where it is, and is not needed afterwards |
    | `Path` of an artifact directory (`blobflow export`) | that artifact, unchanged |
    | `ArtifactRef` | nothing: the ref is moved to an artifact that is already in the store |
    | a dict of these by partition key | one for each partition of the run |

    | annotation of an input | what the step gets |
    |---|---|
    | `Path`, or none | a directory in the local cache, every byte verified; for reading |
    | `ArtifactRef` | the key and digest of the artifact; nothing is fetched |
    | `dict[str, Path]`, `dict[str, ArtifactRef]` | one for each partition |

    Anything else is refused. After a temporary error, such as a store that fails, the step's `RetryPolicy` may retry
    the step; other errors are final. Each attempt, in any run, moves only the missing bytes.
    """

    blobflow: dg.ResourceDependency[BlobflowResource]
    ref: str = Field(default="latest", description="Last segment of the ref that names the newest artifact.")
    exclude: list[str] = Field(
        default=[],
        description="Patterns of paths to leave out, as in a .gitignore file: `*.tmp` and `cache/` match anywhere,"
        " `/logs/*` matches from the directory's root. A pattern that matches nothing is named in the log.",
    )
    symlinks: Literal["refuse", "skip", "follow"] = Field(
        default="refuse",
        description="`refuse` fails on a symlink, `skip` leaves it out, `follow` follows it if its target is inside the"
        " directory.",
    )
    verify_mode: Literal["shallow", "auto", "deep"] = Field(
        default="shallow",
        description="Verification of an upload, before the ref names it. `shallow` compares sizes, manifests and the"
        " store's checksum (`attested`, or `unproven` without a checksum). `deep` reads every byte back (`proven`)."
        " `auto` is deep unless the store attests a checksum. Consumers always verify every byte.",
    )
    cache_max_bytes: int | None = Field(
        default=CACHE_BYTES,
        ge=0,
        description="Bytes of inputs to keep in the scratch directory. Before a download, inputs that no step uses are"
        " removed, least recently used first. None keeps all.",
    )
    cache_check: Literal["stamp", "sha256"] = Field(
        default="stamp",
        description="Check of a cached input before it is used again. `stamp` compares names, sizes, times and inodes"
        " of all files with those of the verified tree; `sha256` also reads every byte.",
    )

    @field_validator("exclude")
    @classmethod
    def _can_match(cls, exclude: list[str]) -> list[str]:
        ExcludePatterns(exclude)
        return exclude

    _instance: dg.DagsterInstance | None = PrivateAttr(default=None)
    _run_id: str | None = PrivateAttr(default=None)
    _cache: ArtifactCache | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Remember the run, and refuse it before any work if its partitions cannot be keys.

        Raises:
            dg.Failure: a partition key cannot be part of a key in the store.
        """
        tags = context.run.tags if context.run is not None else {}
        for tag in _PARTITION_TAGS:
            if (partition := tags.get(tag)) is not None:
                with io_manager_errors(RunFence(None, None)):
                    check_name(key_segment(partition))
        self._instance = context.instance
        self._run_id = context.run.run_id if context.run is not None else None

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:  # noqa: ARG002  # Dagster's signature
        """Release the inputs, so that other runs may evict them from the cache.

        Outside of a run (a notebook, `load_asset_value`) they stay in use until the process ends.
        """
        if self._cache is not None and self._run_id is not None:
            self._cache.close()

    # Outputs

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store the value that the step returned, and move the ref to it.

        Raises:
            dg.Failure: with a hint; retries are allowed if they may help.
        """
        what = _name_output(context)
        journal = self._journal(context)
        with waits_logged(context.log), self._errors(journal):
            values = _values_by_partition(context, what, obj)
            store = self.blobflow.get_store()
            leases = self.blobflow.get_leases(store)
            published = {
                partition: self._publish(
                    context, store, leases, self._location(context, what, partition), value, journal
                )
                for partition, value in values.items()
            }
            if len(published) == 1:
                (metadata,) = published.values()
                context.add_output_metadata({**(journal.metadata() if journal else {}), **metadata})
            else:
                context.add_output_metadata(_facts_of_many(published))

    def _publish(
        self,
        context: dg.OutputContext,
        store: Store,
        leases: LeaseStore | None,
        location: "_Location",
        value: Stored,
        journal: StepJournal | None,
    ) -> dict[str, Any]:
        """Store a value, verify it, and move the ref to it; return the facts for the materialization."""
        # Before the value is read: if two steps publish at once, the one that began later has the newer value.
        token = take_token(store, location.name, ref=location.ref, leases=leases if location.lasts else None)
        if isinstance(value, ArtifactRef):
            facts: dict[str, Any] = {md.STATUS: "referenced", md.BYTES_SENT: 0, md.BYTES_RESUMED: 0}
            verified = verify(store, value.key, expected_digest=value.digest, **self._verification(context, journal))
        else:
            verified, facts = self._upload(context, store, location, value, journal)
        stored = ArtifactRef(verified.key, verified.artifact_digest)
        if journal:
            journal.fence.check(now=True)
        try:
            token.publish(store, stored.key, stored.digest)
        except LeaseLost as lost:
            context.log.warning("output.superseded ref=%s key=%s reason=%r", location.ref, stored.key, lost.message)
            facts[md.STATUS] = "superseded"
        manifest, uri = verified.manifest, f"{store.url}/{stored.key}"
        context.log.info(
            "output.done status=%s uri=%s ref=%s bytes_sent=%d bytes_resumed=%d",
            *(facts[md.STATUS], uri, location.ref, facts[md.BYTES_SENT], facts[md.BYTES_RESUMED]),
        )
        return {
            md.URI: uri,
            md.KEY: stored.key,
            md.REF: location.ref,
            md.ARTIFACT_DIGEST: stored.digest,
            md.CONTENT_DIGEST: manifest.content_digest,
            md.BACKEND: manifest.backend,
            md.CREATED_AT: dg.MetadataValue.timestamp(manifest.created_at),
            **md.cursor(manifest.cursor),
            md.SIZE: verified.bytes_total,
            md.MEMBERS: manifest.members,
            md.PROOF: verified.proof,
            md.VERIFY_MODE: verified.mode_used,
            md.VERIFY_SECONDS: round(verified.seconds, 3),
            **facts,
        }

    def _upload(
        self,
        context: dg.OutputContext,
        store: Store,
        location: "_Location",
        directory: Path,
        journal: StepJournal | None,
    ) -> tuple[VerifyResult, dict[str, Any]]:
        """Upload a directory under the key of its content, and verify the artifact in the store."""
        check_readable(store)  # first, because hashing everything takes long
        with self._as_artifact(context, directory, journal) as (artifact, facts):
            result = upload(
                store,
                content_key(location.name, artifact),
                artifact,
                profile=self.blobflow.get_profile(),
                on_progress=_progress(context, "upload", journal),
                on_checkpoint=journal.save if journal else None,
            )
            facts |= {
                md.STATUS: result.status,
                md.BYTES_SENT: result.bytes_sent,
                md.BYTES_RESUMED: result.bytes_resumed,
                md.UPLOAD_SECONDS: round(result.seconds, 3),
                md.CHECKPOINTS: result.checkpoints_saved,
                **md.throughput(result.bytes_sent, result.seconds),
                **md.largest_members(artifact),
            }
            proven, healed = verify_or_heal(
                store,
                result.key,
                artifact,
                expected_digest=result.artifact_digest,
                on_damage=lambda found: context.log.warning(
                    "output.damaged key=%s error=%r: its content is on the disk and is uploaded again",
                    *(result.key, found.message),
                ),
                **self._verification(context, journal),
            )
            facts |= md.healing(healed)
        return proven, facts

    def _verification(self, context: dg.OutputContext, journal: StepJournal | None) -> dict[str, Any]:
        """The arguments with which a stored artifact is verified."""
        return {
            "mode": self.verify_mode,
            "profile": self.blobflow.get_profile(),
            "on_progress": _progress(context, "verify", journal),
        }

    @contextmanager
    def _as_artifact(
        self, context: dg.OutputContext, directory: Path, journal: StepJournal | None
    ) -> Iterator[tuple[Artifact, dict[str, Any]]]:
        """Yields the directory as an artifact that refers to its files, and the metadata of the export."""
        if Artifact.is_artifact(directory):
            yield Artifact.open(directory), {}
            return
        with scratch_directory(directory, self.blobflow.scratch_path("outputs")) as scratch:
            result = export_artifact(
                directory,
                scratch / "artifact",
                exclude=self.exclude,
                symlinks=self.symlinks,
                # A retry of the step writes its files again. New times would change the payload, and parts that are
                # already sent would not fit.
                mtimes="drop",
                on_progress=journal.watch("export") if journal else ProgressLog(context.log.info, "export").bytes,
            )
            yield (
                result.artifact,
                {
                    **md.left_out(result, context.log),
                    md.EXPORT_SECONDS: round(result.seconds, 3),
                },
            )

    # Inputs

    def load_input(self, context: dg.InputContext) -> Stored | dict[str, Stored]:
        """The artifact that the ref names, in the form that the input's annotation asks for.

        Paths are for reading: other steps may read the same files. They stay valid until the step ends, or with the
        in-process executor until the run ends.

        Raises:
            dg.Failure: with a hint; retries are allowed if they may help.
        """
        what = _name_input(context)
        journal = self._journal(context)
        with waits_logged(context.log), self._errors(journal):
            annotation = context.dagster_type.typing_type
            if not context.has_asset_key and get_origin(annotation) is list:
                # Several outputs are collected in one input; each is loaded by a separate call.
                (annotation,) = get_args(annotation)
            kind, many = _wanted(what, annotation)
            if not context.has_asset_key or not context.has_asset_partitions:
                if many:
                    raise UsageError(f"{what} has no partitions", hint=f"annotate it as {kind.__name__}")
                return self._load(context, what, None, kind, journal)
            keys = context.asset_partition_keys
            if len(keys) == 1 and not many:
                return self._load(context, what, keys[0], kind, journal)
            if many is False:
                raise UsageError(
                    f"{what} has {len(keys)} partitions in this run",
                    hint=f"annotate it as dict[str, {kind.__name__}], or map one partition to one",
                )
            loaded: dict[str, Stored] = {}
            for key in keys:
                try:
                    loaded[key] = self._load(context, what, key, kind, journal)
                except NotMaterialized as missing:
                    # The same metadata key as for Dagster's own IO managers.
                    if not context.definition_metadata.get("allow_missing_partitions"):
                        raise
                    context.log.warning("input.missing partition=%s reason=%r", key, missing.message)
            return loaded

    def _load(
        self,
        context: dg.InputContext,
        what: str,
        partition: str | None,
        kind: type[Stored],
        journal: StepJournal | None,
    ) -> Stored:
        store = self.blobflow.get_store()
        location = self._location(context, what, partition)
        named = read_ref(store, location.ref)
        if named is None:
            raise NotMaterialized(
                f"{what} is not in {store.url}: there is no ref {location.ref!r}",
                hint="materialize it with this IO manager; or, if something else stores it, name its ref in the"
                f" metadata {md.REF!r} of the asset or of the input",
                key=location.ref,
            )
        if kind is ArtifactRef:
            return ArtifactRef(named.key, named.manifest_sha256)
        if self._cache is None:
            self._cache = ArtifactCache(
                self.blobflow.scratch_path("inputs"), max_bytes=self.cache_max_bytes, check=self.cache_check
            )
        artifact, result = self._cache.get(
            store,
            named.key,
            named.manifest_sha256,
            profile=self.blobflow.get_profile(),
            on_wait=lambda: context.log.info("input.wait key=%s: another step is fetching it", named.key),
            on_progress=_progress(context, "download", journal),
            on_checkpoint=journal.save if journal else None,
        )
        received, resumed = (result.bytes_received, result.bytes_resumed) if result else (0, 0)
        context.log.info(
            "input.done status=%s uri=%s bytes_received=%d bytes_resumed=%d path=%s",
            *(result.status if result else "cached", f"{store.url}/{named.key}", received, resumed, artifact.data),
        )
        return artifact.data

    # Both

    def _journal(self, context: dg.InputContext | dg.OutputContext) -> StepJournal | None:
        """The journal of the step's transfers; None outside of a run."""
        if self._instance is None or self._run_id is None:
            return None
        return transfer_journal(context, instance=self._instance, run_id=self._run_id)

    def _errors(self, journal: StepJournal | None) -> AbstractContextManager[None]:
        """Raises the core's errors as Dagster's, with the step's progress as metadata."""
        if journal is None:
            return io_manager_errors(RunFence(None, None))
        return io_manager_errors(journal.fence, journal.metadata)

    def _location(self, context: dg.InputContext | dg.OutputContext, what: str, partition: str | None) -> "_Location":
        if not context.has_asset_key:
            if isinstance(context, dg.InputContext) and context.upstream_output is None:
                raise UsageError(f"{what} comes from no step and no asset", hint="connect it to an output or an asset")
            identifier = [key_segment(part) for part in context.get_identifier()]
            return _Location("/".join(("ops", *identifier[1:])), "/".join(("runs", *identifier, self.ref)), lasts=False)
        given = _given_ref(context)
        if given is None:
            name, last = "/".join(map(key_segment, context.asset_key.path)), self.ref
        else:
            name, _, last = given.rpartition("/")
            if not name:
                raise UsageError(f"{what} has the ref {given!r}", hint="name it like 'orders/latest'")
        if partition is not None:
            name = f"{name}/{key_segment(partition)}"
        return _Location(name, f"{name}/{last}", lasts=True)


@dataclass(frozen=True)
class _Location:
    """Place of a value in the store."""

    name: str
    """Prefix of the keys of its contents."""
    ref: str
    lasts: bool
    """Whether each run moves the same ref; the ref of an op's output belongs to one run."""


def _given_ref(context: dg.InputContext | dg.OutputContext) -> str | None:
    """The ref that the metadata of the input or of the asset names."""
    definitions = [context.definition_metadata]
    if isinstance(context, dg.InputContext) and context.upstream_output is not None:
        definitions.append(context.upstream_output.definition_metadata)
    for definition in definitions:
        given = definition.get(md.REF)
        if given is not None:
            return str(given.value if isinstance(given, dg.MetadataValue) else given)
    return None


def _name_output(context: dg.OutputContext) -> str:
    if context.has_asset_key:
        return f"asset {context.asset_key.to_user_string()!r}"
    return f"output {context.name!r} of step {context.step_key!r}"


def _name_input(context: dg.InputContext) -> str:
    if context.has_asset_key:
        return f"asset {context.asset_key.to_user_string()!r}"
    return f"input {context.name!r}"


def _values_by_partition(context: dg.OutputContext, what: str, obj: object) -> dict[str | None, Stored]:
    """The returned values by partition of the run; the key is None for an output without partitions.

    Raises:
        UsageError: the partitions are not those of the run, or a value cannot be stored.
    """
    if not context.has_asset_key or not context.has_asset_partitions:
        return {None: _checked(what, obj)}
    keys = context.asset_partition_keys
    if isinstance(obj, Mapping):
        if set(obj) != set(keys):
            missing, unexpected = (sorted(map(str, one)) for one in (set(keys) - set(obj), set(obj) - set(keys)))
            raise UsageError(
                f"{what} returned other partitions than those of the run: missing {missing}, unexpected {unexpected}",
                hint="return one directory for each of context.partition_keys",
            )
        return {key: _checked(f"{what}, partition {key!r},", obj[key]) for key in keys}
    if len(keys) != 1:
        raise UsageError(
            f"{what} returned one value for {len(keys)} partitions",
            hint="return a dict with one directory per partition key, or use BackfillPolicy.multi_run()",
        )
    return {keys[0]: _checked(what, obj)}


def _checked(what: str, value: object) -> Stored:
    if isinstance(value, ArtifactRef):
        return value
    if isinstance(value, Path):
        if value.is_dir():
            return value
        raise UsageError(
            f"{what} returned {value}, which {'is not a directory' if value.exists() else 'does not exist'}",
            hint="return a directory; put a single file into a separate directory",
            path=str(value),
        )
    hint = "return the pathlib.Path of a directory, or an ArtifactRef; or give the asset another io_manager_key"
    if value is None:
        hint = "annotate the step with `-> None` if it returns nothing to store; otherwise " + hint
    raise UsageError(f"{what} returned {type(value).__name__}, which ArtifactIOManager does not store", hint=hint)


def _wanted(what: str, annotation: Any) -> tuple[type[Stored], bool | None]:
    """The type of an input's values, and whether the input is a dict of them; None if the annotation leaves it open.

    Raises:
        UsageError: an input cannot have this annotation.
    """
    if get_origin(annotation) in (Union, types.UnionType):
        others = [one for one in get_args(annotation) if one is not types.NoneType]
        annotation = others[0] if len(others) == 1 else annotation
    many: bool | None = None if annotation in (Any, object) else False
    if annotation is dict or get_origin(annotation) in (dict, Mapping):
        many = True
        annotation = (get_args(annotation) or (Any, Any))[1]
    if annotation in (Any, object, Path):
        return Path, many
    if annotation is ArtifactRef:
        return ArtifactRef, many
    raise UsageError(
        f"{what} cannot be loaded as {annotation}",
        hint="annotate the input as Path, ArtifactRef, dict[str, Path] or dict[str, ArtifactRef]",
    )


def _progress(
    context: dg.InputContext | dg.OutputContext, phase: str, journal: StepJournal | None
) -> Callable[[ProgressEvent], None]:
    return journal.progress if journal else ProgressLog(context.log.info, phase).transfer


def _facts_of_many(published: Mapping[str | None, Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of a run with several partitions: the bytes that it moved, and a table of all partitions.

    Dagster shows the same metadata with each partition of the run.
    """
    columns = {"key": md.KEY, "digest": md.ARTIFACT_DIGEST, "status": md.STATUS, "bytes": md.SIZE}
    rows = [
        dg.TableRecord({"partition": partition or "", **{name: facts[label] for name, label in columns.items()}})
        for partition, facts in published.items()
    ]
    kinds = [dg.TableColumn(name, "int" if name == "bytes" else "string") for name in ("partition", *columns)]
    sent = sum(facts[md.BYTES_SENT] for facts in published.values())
    return {
        md.PARTITIONS: dg.MetadataValue.table(rows, dg.TableSchema(kinds)),
        md.BYTES_SENT: sent,
        md.BYTES_RESUMED: sum(facts[md.BYTES_RESUMED] for facts in published.values()),
        **md.throughput(sent, sum(facts.get(md.UPLOAD_SECONDS, 0.0) for facts in published.values())),
    }
