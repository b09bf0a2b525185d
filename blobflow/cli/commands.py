"""The commands. Each is a thin shell: it calls the core and words the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from blobflow.cli.progress import Progress, counted, processed, show_progress, transferred
from blobflow.cli.settings import CommandGroup, DigestType, DurationType, SampleType, Settings, shared_options
from blobflow.cli.words import human_size, human_time, printable, table
from blobflow.errors import BlobflowError, NotFoundError, RefusedError, TemporaryError
from blobflow.scratch import scratch_directory
from blobflow.version import __version__

if TYPE_CHECKING:
    from blobflow.artifact.manifest import Manifest
    from blobflow.backends import Exporter, ImportResult
    from blobflow.lease import RefState
    from blobflow.mirror import ReceiverStatus, SnapshotId
    from blobflow.stores.base import Store
    from blobflow.transport import DownloadResult

_PATH: Final = click.Path(path_type=Path)
_BACKENDS: Final = click.Choice(["append-log", "directory", "parquet", "sqlite"])
"""`blobflow.backends.BACKENDS`, without the import."""


@click.group(
    cls=CommandGroup,
    params=shared_options(),
    epilog="The options above may stand before the command or after it. Exit codes: 0 done, 1 failed, 2 usage, "
    "3 integrity, 4 not found, 5 refused, 75 temporary (run it again).",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Move large directories through object stores: resumable, verified, whole or not at all."""


def _export_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--from", "backend", type=_BACKENDS, help="What SRC is.  [default: directory]"),
        click.option(
            "--cursor-query",
            metavar="SQL",
            help="Of sqlite: its first row says where in its history the database stands.",
        ),
        click.option(
            "--mode",
            type=click.Choice(["reference", "link", "copy"]),
            help="How the artifact holds the files: it points to them, as hard links, or as copies.",
        ),
        click.option(
            "--symlinks",
            type=click.Choice(["refuse", "skip", "follow"]),
            help="What to do with symbolic links; follow stays inside.  [default: refuse]",
        ),
        click.option(
            "--exclude",
            multiple=True,
            metavar="PATTERN",
            help="Leave out names that match or, if the pattern has a '/', paths; may be repeated.",
        ),
    ):
        function = option(function)
    return function


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value}


def _exporter(source: Path, backend: str, options: dict[str, Any]) -> Exporter:
    """The exporter of SRC; an option that another backend has is refused."""
    from blobflow.backends import backend_classes

    kind, _ = backend_classes(backend)
    for name in options:
        if name not in kind.model_fields:
            raise click.UsageError(f"--{name.replace('_', '-')} is no option for --from {backend}")
    return kind(path=source, **options)


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@click.argument("dest", metavar="DEST", type=_PATH)
@_export_options
@click.pass_obj
def export(settings: Settings, source: Path, dest: Path, backend: str | None, **options: Any) -> None:
    """Make an artifact of SRC, a directory unless --from says otherwise, in the new directory DEST.

    The artifact of a directory keeps copies of the files unless --mode says otherwise.
    """
    given = _given(options)
    if backend in (None, "directory"):
        given = {"mode": "copy", **given}
    with show_progress() as progress:
        exporter = _exporter(source, backend or "directory", given)
        result = exporter.export(dest, on_progress=processed(progress, "export"))
    artifact = result.artifact
    settings.report(
        {
            "status": "exported",
            "path": str(artifact.path.absolute()),
            "artifact_digest": artifact.digest,
            "content_digest": artifact.manifest.content_digest,
            "bytes_total": artifact.payload_size,
            "content_bytes": result.bytes,
            "members": result.members,
            "excluded": result.excluded,
            "symlinks_skipped": result.symlinks_skipped,
            "seconds": result.seconds,
        },
        f"exported {artifact.path}  {artifact.digest}",
        f"{_members(artifact.manifest)} in {result.seconds:.1f} s",
        *_left_out(result.excluded, result.symlinks_skipped),
    )


def _members(manifest: Manifest) -> str:
    return f"{manifest.members} {'member' if manifest.members == 1 else 'members'}, {human_size(manifest.bytes)}"


def _left_out(excluded: int, symlinks_skipped: int) -> list[str]:
    counts = [f"{excluded} excluded"] * bool(excluded) + [f"{symlinks_skipped} symbolic links"] * bool(symlinks_skipped)
    return [f"left out: {', '.join(counts)}"] if counts else []


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@click.argument("key")
@_export_options
@click.option("--overwrite", is_flag=True, help="Replace another artifact under KEY.")
@click.pass_obj
def push(settings: Settings, source: Path, key: str, overwrite: bool, backend: str | None, **options: Any) -> None:
    """Upload SRC, a directory unless --from says otherwise, or an artifact made by `export`, under KEY.

    The files of a directory are read where they are; nothing is copied unless --mode says so. Of a database or a log a
    copy lies among the temporary files meanwhile. Run it again after a crash, on any machine that has the source: it
    sends what is missing.
    """
    from blobflow.artifact.artifact import Artifact
    from blobflow.transport import check_artifact_key, upload

    settings.resumes = True
    started = time.monotonic()
    check_artifact_key(key)
    with settings.open_store() as store, show_progress() as progress:
        arguments: dict[str, Any] = {
            "profile": settings.transfer_profile(),
            "overwrite": overwrite,
            "on_progress": transferred(progress),
        }
        excluded = symlinks_skipped = 0
        given = _given(options)
        if Artifact.is_artifact(source):
            if late := ["from"] * bool(backend) + list(given):
                raise click.UsageError(f"{source} is an artifact already: --{late[0].replace('_', '-')} comes too late")
            result = upload(store, key, source, **arguments)
        else:
            store.exists(key)  # wrong credentials should not show only after an hour of hashing
            exporter = _exporter(source, backend or "directory", given)
            with scratch_directory(source) as scratch:
                exported = exporter.export(scratch / "artifact", on_progress=processed(progress, "export"))
                excluded, symlinks_skipped = exported.excluded, exported.symlinks_skipped
                result = upload(store, key, exported.artifact, **arguments)
    seconds = time.monotonic() - started
    settings.report(
        {
            "status": result.status,
            "key": key,
            "store": store.url,
            "artifact_digest": result.artifact_digest,
            "content_digest": result.manifest.content_digest,
            "bytes_total": result.bytes_total,
            "bytes_sent": result.bytes_sent,
            "bytes_resumed": result.bytes_resumed,
            "content_bytes": result.manifest.bytes,
            "members": result.manifest.members,
            "excluded": excluded,
            "symlinks_skipped": symlinks_skipped,
            "parts": result.parts,
            "checkpoints_saved": result.checkpoints_saved,
            "seconds": seconds,
        },
        f"{result.status} {key}  {result.artifact_digest}",
        f"{_members(result.manifest)}; sent {human_size(result.bytes_sent)}{_resumed(result.bytes_resumed)}"
        f" in {seconds:.1f} s",
        *_left_out(excluded, symlinks_skipped),
    )


def _resumed(count: int) -> str:
    return f", {human_size(count)} were there from before," if count else ""


@cli.command()
@click.argument("key")
@click.argument("dest", required=False, type=_PATH)
@click.option(
    "--import",
    "target",
    nargs=2,
    type=(_BACKENDS, _PATH),
    metavar="BACKEND TARGET",
    help="Bring the artifact to life at TARGET instead, which keeps TARGET/current up to date; BACKEND is append-log,"
    " directory, parquet or sqlite.",
)
@click.option("--digest", type=DigestType(), metavar="DIGEST", help="Refuse every artifact but this one (sha256:...).")
@click.pass_obj
def pull(settings: Settings, key: str, dest: Path | None, target: tuple[str, Path] | None, digest: str | None) -> None:
    """Download the artifact under KEY to DEST, which must be new or empty.

    Every byte is verified beside DEST, which then appears whole, in one step. Run it again after a crash: it fetches
    what is missing.
    """
    from blobflow.transport import download

    if (dest is None) == (target is None):
        raise click.UsageError("name either DEST or --import BACKEND TARGET")
    settings.resumes = True
    started = time.monotonic()
    with settings.open_store() as store, show_progress() as progress:
        options: dict[str, Any] = {
            "profile": settings.transfer_profile(),
            "expected_digest": digest,
            "on_progress": transferred(progress),
        }
        if target is not None:
            imported, result = _pull_into(*target, store, key, progress, options)
            status, path = imported.status, imported.path
        else:
            result = download(store, key, dest or "", **options)
            status, path = result.status, result.path
    seconds = time.monotonic() - started
    settings.report(
        {
            "status": status,
            "key": key,
            "store": store.url,
            "path": str(path),
            "artifact_digest": result.artifact_digest,
            "content_digest": result.manifest.content_digest,
            "bytes_total": result.bytes_total,
            "bytes_received": result.bytes_received,
            "bytes_resumed": result.bytes_resumed,
            "content_bytes": result.manifest.bytes,
            "members": result.manifest.members,
            "parts": result.parts,
            "checkpoints_saved": result.checkpoints_saved,
            "seconds": seconds,
        },
        f"{status} {path}  {result.artifact_digest}",
        f"{_members(result.manifest)}; received {human_size(result.bytes_received)}{_resumed(result.bytes_resumed)}"
        f" in {seconds:.1f} s",
    )


def _pull_into(
    backend: str, target: Path, store: Store, key: str, progress: Progress, options: dict[str, Any]
) -> tuple[ImportResult, DownloadResult]:
    """Download into the importer's own staging, so that the import is a rename; what is alive there is left alone."""
    from blobflow.artifact.manifest import Manifest, artifact_digest
    from blobflow.backends import backend_classes, import_artifact
    from blobflow.transport import DownloadResult, download, read_manifest_bytes

    importer = backend_classes(backend)[1](path=target)
    manifest_bytes = read_manifest_bytes(store, key)
    offered, manifest = artifact_digest(manifest_bytes), Manifest.parse(manifest_bytes)
    if manifest.backend != backend:  # the importer would say so as well, after the download
        raise RefusedError(
            f"{key!r} was made by backend {manifest.backend!r}, not {backend!r}",
            hint=f"--import {manifest.backend} TARGET",
            key=key,
        )
    alive = importer.current()
    if alive is not None and alive.digest == offered == (options["expected_digest"] or offered):
        result = DownloadResult("unchanged", key, importer.data, offered, alive.manifest, alive.payload_size, 0, 0, 0.0)
        artifact = alive
    else:
        result = download(store, key, importer.staging(offered), **options)
        artifact = result.path
    show = processed(progress, "import")
    return import_artifact(artifact, importer, consume=True, on_progress=show, key=key), result


@cli.command()
@click.argument("operations", metavar="FILE", type=_PATH)
@click.option("--results", type=_PATH, metavar="FILE", help="The table of results.  [default: FILE.results.parquet]")
@click.option("--window", type=click.IntRange(1, 1000), default=32, show_default=True, help="Operations at once.")
@click.option("--deadline", type=DurationType(), default="300s", show_default=True, help="For one operation.")
@click.option("--ordered", is_flag=True, help="Operations on one key one after the other, in the order of the file.")
@click.option(
    "--allow",
    type=click.Choice(["read", "write", "delete"]),
    multiple=True,
    help="What operations may do; may be repeated.  [default: everything]",
)
@click.option("--payloads", is_flag=True, help="Keep what gets read in the table.")
@click.option("--fresh", is_flag=True, help="Forget earlier results and execute everything.")
@click.pass_obj
def batch(
    settings: Settings, operations: Path, results: Path | None, payloads: bool, fresh: bool, **options: Any
) -> int | None:
    """Execute the operations (insert, get, delete) in FILE, which has JSON lines or is a Parquet table.

    Their results become a Parquet table. Run it again after a crash, or after failures: it executes what is not done.
    """
    from blobflow.batch import BatchExecutor
    from blobflow.batch.tables import run_batch_file

    settings.resumes = True
    with settings.open_store() as store:
        window, deadline_s = options["window"], options["deadline"]
        executor = BatchExecutor(
            store,
            permits=window,
            window=window,
            deadline_s=deadline_s,
            ordered=options["ordered"],
            allow=options["allow"] or ("read", "write", "delete"),
        )
        report = run_batch_file(
            executor, operations, results, payloads=payloads, fresh=fresh, on_progress=counted("batch", "operations")
        )
    for failure in report.failures if not settings.json else ():
        click.echo(f"{failure.index}: {printable(f'{failure.error}: {failure.message}')}", err=True)
    settings.report(
        {
            "status": "executed" if report.executed else "unchanged",
            "store": store.url,
            "results": str(report.results),
            "operations": report.operations,
            "executed": report.executed,
            "resumed": report.resumed,
            "done": report.done,
            "absent": report.absent,
            "failed": report.failed,
            "kinds": report.kinds,
            "failures": [vars(failure) for failure in report.failures],
            "seconds": report.seconds,
        },
        f"{report.operations} operations: {report.done} done, {report.absent} absent, {report.failed} failed",
        f"executed {report.executed} in {report.seconds:.1f} s; results in {report.results}",
    )
    if report.failed:
        return TemporaryError.exit_code if report.retryable else BlobflowError.exit_code
    return None


@cli.command()
@click.argument("key")
@click.option("--deep", "mode", flag_value="deep", help="Read and check every byte.")
@click.option("--shallow", "mode", flag_value="shallow", help="Check sizes, manifests and what the store attests.")
@click.option(
    "--sample",
    type=SampleType(),
    metavar="N/T",
    help="Read only the Nth of T slices of the files: 1/7 on Mondays, 2/7 on Tuesdays, and so on.",
)
@click.option("--digest", type=DigestType(), metavar="DIGEST", help="Refuse every artifact but this one (sha256:...).")
@click.pass_obj
def verify(
    settings: Settings,
    key: str,
    mode: Literal["deep", "shallow"] | None,
    sample: tuple[int, int] | None,
    digest: str | None,
) -> None:
    """Prove that the artifact under KEY is whole.

    Without --deep or --shallow every byte is read, except where the store itself attests the checksum of the payload.
    """
    from blobflow.transport import verify as verify_artifact

    with settings.open_store() as store, show_progress() as progress:
        result = verify_artifact(
            store,
            key,
            mode=mode or "auto",
            sample=sample,
            expected_digest=digest,
            profile=settings.transfer_profile(),
            on_progress=transferred(progress),
        )
    settings.report(
        {
            "status": result.status,
            "mode": result.mode_used,
            "key": key,
            "store": store.url,
            "artifact_digest": result.artifact_digest,
            "content_digest": result.manifest.content_digest,
            "bytes_total": result.bytes_total,
            "bytes_received": result.bytes_read,
            "bytes_resumed": 0,
            "content_bytes": result.manifest.bytes,
            "members": result.manifest.members,
            "seconds": result.seconds,
        },
        f"verified {key}  {result.artifact_digest}",
        f"{_members(result.manifest)}; {result.mode_used}: read {human_size(result.bytes_read)} of"
        f" {human_size(result.bytes_total)} in {result.seconds:.1f} s",
    )


@cli.command()
@click.argument("source", metavar="SOURCE_STORE")
@click.argument("source_key", metavar="KEY")
@click.argument("target", metavar="TARGET_STORE")
@click.argument("target_key", metavar="[KEY]", required=False)
@click.option("--overwrite", is_flag=True, help="Replace another artifact under the target's key.")
@click.option("--digest", type=DigestType(), metavar="DIGEST", help="Refuse every artifact but this one (sha256:...).")
@click.option("--source-endpoint-url", metavar="URL", help="S3 server of SOURCE_STORE, if it is another one.")
@click.option("--source-region", metavar="NAME", help="S3 region of SOURCE_STORE, likewise.")
@click.pass_obj
def copy(
    settings: Settings,
    source: str,
    source_key: str,
    target: str,
    target_key: str | None,
    overwrite: bool,
    digest: str | None,
    source_endpoint_url: str | None,
    source_region: str | None,
) -> None:
    """Copy the artifact under KEY from one store to another, by default under the same key.

    Nothing is written to local disk. What was copied is proven before it becomes visible. Run it again after a crash,
    on any machine: parts that the target holds are not sent again. --store is not used.
    """
    from blobflow.transport import copy_artifact

    settings.resumes = True
    from_settings = settings.for_one_of_two(source, source_endpoint_url, source_region)
    to_settings = settings.for_one_of_two(target)
    key = target_key or source_key
    with from_settings.open_store() as source_store, to_settings.open_store() as store, show_progress() as progress:
        result = copy_artifact(
            source_store,
            source_key,
            store,
            key,
            profile=settings.transfer_profile(),
            overwrite=overwrite,
            expected_digest=digest,
            on_progress=transferred(progress),
        )
    how = "the server copied, read back" if result.server_side else "received"
    settings.report(
        {
            "status": result.status,
            "key": key,
            "store": store.url,
            "source_key": source_key,
            "source_store": source_store.url,
            "artifact_digest": result.artifact_digest,
            "content_digest": result.manifest.content_digest,
            "server_side": result.server_side,
            "bytes_total": result.bytes_total,
            "bytes_received": result.bytes_received,
            "bytes_sent": result.bytes_sent,
            "bytes_resumed": result.bytes_resumed,
            "content_bytes": result.manifest.bytes,
            "members": result.manifest.members,
            "parts": result.parts,
            "checkpoints_saved": result.checkpoints_saved,
            "seconds": result.seconds,
        },
        f"{result.status} {key}  {result.artifact_digest}",
        f"{_members(result.manifest)}; {how} {human_size(result.bytes_received)}, sent {human_size(result.bytes_sent)}"
        f"{_resumed(result.bytes_resumed)} in {result.seconds:.1f} s",
    )


# ls, show, ref


@cli.command()
@click.argument("prefix", default="")
@click.pass_obj
def ls(settings: Settings, prefix: str) -> None:
    """List the complete artifacts whose keys start with PREFIX."""
    from blobflow.transport import list_artifacts

    with settings.open_store() as store:
        entries = list_artifacts(store, prefix)
        if settings.json:
            artifacts = [
                {"key": entry.key, "last_modified": entry.last_modified and entry.last_modified.isoformat()}
                for entry in entries
            ]
            settings.report({"status": "listed", "store": store.url, "prefix": prefix, "artifacts": artifacts})
        else:
            table(("key", "published"), ((entry.key, human_time(entry.last_modified)) for entry in entries))


@cli.command()
@click.argument("key")
@click.pass_obj
def show(settings: Settings, key: str) -> None:
    """Show the manifest of the artifact under KEY; nothing of its payload is read."""
    from blobflow.artifact.manifest import Manifest, artifact_digest
    from blobflow.transport import read_manifest_bytes

    with settings.open_store() as store:
        manifest_bytes = read_manifest_bytes(store, key)
        payload = store.head(key)
    manifest = Manifest.parse(manifest_bytes)
    digest = artifact_digest(manifest_bytes)
    if settings.json:
        settings.report(
            {
                "status": "found",
                "key": key,
                "store": store.url,
                "artifact_digest": digest,
                "bytes_total": payload.size,
                "manifest": manifest.model_dump(mode="json"),
            }
        )
        return
    table(
        ("", ""),
        [
            ("key", key),
            ("store", store.url),
            ("artifact", digest),
            ("content", manifest.content_digest),
            ("backend", manifest.backend),
            ("cursor", json.dumps(manifest.cursor)),
            ("created", human_time(manifest.created_at)),
            ("producer", manifest.producer),
            ("members", str(manifest.members)),
            ("bytes", f"{manifest.bytes} ({human_size(manifest.bytes)})"),
            ("payload", f"{payload.size} ({human_size(payload.size)})"),
            ("published", human_time(payload.last_modified)),
        ],
    )


@cli.group()
def ref() -> None:
    """Read and move refs: names, like orders/latest, that point to an artifact."""


@ref.command("get")
@click.argument("name")
@click.pass_obj
def ref_get(settings: Settings, name: str) -> None:
    """Print the key that the ref NAME points to."""
    from blobflow.lease import read_ref

    with settings.open_store() as store:
        state = read_ref(store, name)
    if state is None:
        raise NotFoundError(f"no ref {name!r} in {store.url}", name=name)
    settings.report(_ref_document("found", store, name, state), state.key)


@ref.command("set")
@click.argument("name")
@click.argument("key")
@click.pass_obj
def ref_set(settings: Settings, name: str, key: str) -> None:
    """Point the ref NAME to the artifact under KEY, in one step."""
    from blobflow.artifact.manifest import artifact_digest
    from blobflow.lease import move_ref
    from blobflow.transport import read_manifest_bytes

    with settings.open_store() as store:
        state = move_ref(store, name, key, artifact_digest(read_manifest_bytes(store, key)))
    settings.report(_ref_document("set", store, name, state), f"{name} -> {state.key}  {state.manifest_sha256}")


@ref.command("log")
@click.argument("name")
@click.pass_obj
def ref_log(settings: Settings, name: str) -> None:
    """Print where the ref NAME points and where it pointed before, the latest first."""
    from blobflow.lease import read_ref

    with settings.open_store() as store:
        state = read_ref(store, name)
    if state is None:
        raise NotFoundError(f"no ref {name!r} in {store.url}", name=name)
    if settings.json:
        moves = [
            {
                "key": entry.key,
                "artifact_digest": entry.manifest_sha256,
                "generation": entry.generation,
                "round_number": entry.round_number,
                "updated_at": entry.updated_at.isoformat(),
            }
            for entry in state.entries()
        ]
        settings.report({**_ref_document("found", store, name, state), "moves": moves})
    else:
        rows = ((human_time(entry.updated_at), entry.key, entry.manifest_sha256) for entry in state.entries())
        table(("moved", "key", "artifact"), rows)


def _ref_document(status: str, store: Store, name: str, state: RefState) -> dict[str, Any]:
    return {
        "status": status,
        "name": name,
        "store": store.url,
        "key": state.key,
        "artifact_digest": state.manifest_sha256,
        "generation": state.generation,
        "updated_at": state.updated_at.isoformat(),
    }


# layer


def _layer_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--state",
            envvar="BLOBFLOW_LAYERS_STATE",
            show_envvar=True,
            metavar="URL",
            help="SQLAlchemy URL of a database that hosts share.  [default: a file in --home]",
        ),
        click.option(
            "--home",
            type=_PATH,
            envvar="BLOBFLOW_LAYERS_HOME",
            show_envvar=True,
            metavar="DIR",
            help="For that file and the stat cache.  [default: ~/.local/state/blobflow/layers]",
        ),
    ):
        function = option(function)
    return function


@cli.group()
def layer() -> None:
    """Keep directories as compressed layers, named by their content: what is unchanged is not sent.

    NAME is that of the container, or whatever else the directory belongs to. The store knows everything that is needed
    for a restore; state and stat cache of this host only save requests and reads.
    """


@layer.command("sync")
@click.argument("directory", metavar="DIR", type=_PATH)
@click.argument("name")
@click.option("--level", type=click.IntRange(1, 22), default=3, show_default=True, help="Of zstd.")
@click.option(
    "--symlinks",
    type=click.Choice(["refuse", "skip", "follow"]),
    default="refuse",
    show_default=True,
    help="What to do with symbolic links; follow stays inside.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out names that match; may be repeated.")
@_layer_options
@click.pass_obj
def layer_sync(
    settings: Settings,
    directory: Path,
    name: str,
    level: int,
    symlinks: Literal["refuse", "skip", "follow"],
    exclude: tuple[str, ...],
    state: str | None,
    home: Path | None,
) -> None:
    """Bring the directory DIR into the store as the layer of NAME, unless it is there.

    Run it again after a crash, on any machine that has the directory: it compresses and sends what is missing.
    """
    from blobflow.layers import LayerSync

    settings.resumes = True
    with settings.open_store() as store, show_progress() as progress:
        result = LayerSync(
            store,
            level=level,
            profile=settings.transfer_profile(),
            state=state,
            home=home,
            exclude=exclude,
            symlinks=symlinks,
            on_progress=transferred(progress),
            on_scan=processed(progress, "scan"),
        ).sync(name, directory)
    settings.report(
        {
            "status": result.status,
            "name": name,
            "key": result.key,
            "store": store.url,
            "layer_digest": result.digest,
            "layer_bytes": result.layer.object_size,
            "bytes_total": result.layer.tar_size,
            "bytes_sent": result.bytes_sent,
            "bytes_resumed": result.bytes_resumed,
            "files_read": result.files_read,
            "parts": result.parts,
            "parts_resumed": result.parts_resumed,
            "codec": result.layer.codec,
            "seconds": result.seconds,
        },
        f"{result.status} {name}  {result.digest}",
        f"{human_size(result.layer.tar_size)}, compressed {human_size(result.layer.object_size)};"
        f" sent {human_size(result.bytes_sent)}{_resumed(result.bytes_resumed)} in {result.seconds:.1f} s",
    )


@layer.command("restore")
@click.argument("name")
@click.argument("dest", type=_PATH)
@click.option("--overwrite", is_flag=True, help="Replace any directory at DEST, whatever is in it.")
@_layer_options
@click.pass_obj
def layer_restore(
    settings: Settings, name: str, dest: Path, overwrite: bool, state: str | None, home: Path | None
) -> None:
    """Bring the layer of NAME to life as the directory DEST.

    Every byte is verified beside DEST, which then appears whole, in one step. An earlier restore of NAME is replaced if
    nobody wrote into it. Run it again after a crash: it fetches what is missing.
    """
    from blobflow.layers import LayerSync

    settings.resumes = True
    with settings.open_store() as store, show_progress() as progress:
        result = LayerSync(
            store,
            profile=settings.transfer_profile(),
            state=state,
            home=home,
            on_progress=transferred(progress),
            on_scan=processed(progress, "scan"),
        ).restore(name, dest, overwrite=overwrite)
    settings.report(
        {
            "status": result.status,
            "name": name,
            "key": result.key,
            "store": store.url,
            "path": str(result.path),
            "layer_digest": result.digest,
            "layer_bytes": result.layer.object_size,
            "bytes_total": result.layer.tar_size,
            "bytes_received": result.bytes_received,
            "bytes_resumed": result.bytes_resumed,
            "parts": result.parts,
            "seconds": result.seconds,
        },
        f"{result.status} {result.path}  {result.digest}",
        f"{human_size(result.layer.tar_size)} from {human_size(result.layer.object_size)}"
        f"{_resumed(result.bytes_resumed)} in {result.seconds:.1f} s",
    )


@layer.command("ls")
@_layer_options
@click.pass_obj
def layer_ls(settings: Settings, state: str | None, home: Path | None) -> None:
    """List the containers in the store, and those that this host registered; a lost state is rebuilt."""
    from blobflow.layers import LayerSync

    with settings.open_store() as store:
        states = LayerSync(store, state=state, home=home).list()
    if settings.json:
        containers = [one.model_dump(mode="json") for one in states]
        settings.report({"status": "listed", "store": store.url, "containers": containers})
    else:
        rows = ((one.container, human_time(one.last_sync), one.remote_digest or "", one.path or "") for one in states)
        table(("container", "synced", "layer", "directory"), rows)


# mirror


@cli.group()
def mirror() -> None:
    """Push snapshots to a receiver elsewhere, and be one.

    Both sides take their common secret, at least 16 characters, from the environment: BLOBFLOW_MIRROR_TOKEN.
    """


@mirror.command("serve")
@click.argument("directory", metavar="DIR", type=_PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8337, show_default=True, help="0 takes a free one.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="PEM; makes it https.")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Its private key.")
@click.pass_obj
def mirror_serve(
    settings: Settings, directory: Path, host: str, port: int, tls_cert: str | None, tls_key: str | None
) -> None:
    """Receive snapshots in DIR until a signal ends it.

    What arrived is kept: a receiver that is killed goes on at the last checkpoint when it is started again.
    """
    try:
        from blobflow.mirror.server import MirrorServer
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is not installed: pip install 'blobflow[mirror]'") from error
    from blobflow.mirror import MirrorReceiver

    token = _mirror_token()
    with MirrorReceiver(directory) as receiver:
        try:
            server = MirrorServer(
                receiver, host=host, port=port, certificate=tls_cert, private_key=tls_key, token=token
            )
        except OSError as error:
            raise click.UsageError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        settings.report(
            {"status": "listening", "url": server.url, "path": str(directory.absolute())},
            f"receiving in {directory} at {server.url}",
        )
        server.run()


@mirror.command("push")
@click.argument("what", metavar="KEY")
@click.argument("url")
@click.option("--database", required=True, metavar="NAME", help="What it is a snapshot of.")
@click.option("--source", required=True, metavar="NAME", help="Where it comes from, for example the cluster.")
@click.option(
    "--position",
    type=click.IntRange(0, (1 << 64) - 1),
    metavar="N",
    help="In the history of the source; greater is newer.  [default: when the artifact was made, or the file modified]",
)
@click.option("--file", "is_file", is_flag=True, help="KEY is the path of a local file instead.")
@click.option("--digest", type=DigestType(), metavar="DIGEST", help="Refuse every artifact but this one (sha256:...).")
@click.pass_obj
def mirror_push(
    settings: Settings,
    what: str,
    url: str,
    database: str,
    source: str,
    position: int | None,
    is_file: bool,
    digest: str | None,
) -> None:
    """Send the artifact under KEY to the receiver at URL. Run it again after a crash: it sends what is missing."""
    from blobflow.mirror import Snapshot
    from blobflow.mirror.client import MirrorClient

    if is_file and digest:
        raise click.UsageError("--digest names an artifact, and --file is none")
    settings.resumes = True
    names: dict[str, Any] = {"source": source, "database": database, "position": position}
    with (
        nullcontext() if is_file else settings.open_store() as store,
        MirrorClient(url, token=_mirror_token()) as client,
        show_progress() as progress,
    ):
        if store is None:
            snapshot = Snapshot.of_file(what, **names)
        else:
            snapshot = Snapshot.of_artifact(store, what, expected_digest=digest, **names)
        result = client.push(snapshot, on_progress=processed(progress, "push"))
    settings.report(
        {
            "status": result.status,
            "key": what,
            "url": client.url,
            **result.id._asdict(),
            "bytes_total": result.bytes_total,
            "bytes_sent": result.bytes_sent,
            "bytes_resumed": result.bytes_resumed,
            "seconds": result.seconds,
        },
        f"{result.status} {result.id}  {result.id.digest}",
        f"sent {human_size(result.bytes_sent)}{_resumed(result.bytes_resumed)} in {result.seconds:.1f} s",
    )


@mirror.command("import")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("database")
@click.argument("backend", metavar="BACKEND", type=_BACKENDS)
@click.argument("target", metavar="TARGET", type=_PATH)
@click.option("--source", metavar="NAME", help="Only what comes from there.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Received artifacts of that source that stay, the imported one included.",
)
@click.pass_obj
def mirror_import(
    settings: Settings, directory: Path, database: str, backend: str, target: Path, source: str | None, keep: int
) -> None:
    """Bring the newest snapshot of DATABASE that was received in DIR to life at TARGET.

    Every byte is proven before TARGET/current shows it; then the snapshot is Following. Older ones are removed. The
    receiver may be at work meanwhile. Run it again after a crash.
    """
    from blobflow.lease import read_ref
    from blobflow.mirror import ReceivedStore

    settings.resumes = True
    started = time.monotonic()
    store = ReceivedStore(directory)
    state = read_ref(store, "/".join(filter(None, (database, source, "latest"))))
    if state is None:
        raise NotFoundError(f"no complete artifact of {database!r} was received in {directory}", path=str(directory))
    with show_progress() as progress:
        options: dict[str, Any] = {
            "profile": settings.transfer_profile(),
            "expected_digest": state.manifest_sha256,
            "on_progress": transferred(progress),
        }
        imported, result = _pull_into(backend, target, store, state.key, progress, options)
    snapshot, cursor = store.snapshot(state.key), store.follow(state.key, imported.cursor)
    removed = store.prune(state.key, keep)
    seconds = time.monotonic() - started
    settings.report(
        {
            "status": imported.status,
            "key": state.key,
            "path": str(imported.path),
            **snapshot._asdict(),
            "artifact_digest": imported.artifact_digest,
            "cursor": cursor,
            "bytes_total": result.bytes_total,
            "bytes_received": result.bytes_received,
            "bytes_resumed": result.bytes_resumed,
            "removed": [each.position for each in removed],
            "seconds": seconds,
        },
        f"{imported.status} {imported.path}  {snapshot}  following {json.dumps(cursor)}",
        f"{_members(result.manifest)} in {seconds:.1f} s",
    )


@mirror.command("status")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--ref", metavar="REF", help="Compare a mirror of imports with this ref, such as orders/latest.")
@click.pass_obj
def mirror_status(settings: Settings, directory: Path, ref: str | None) -> None:
    """Show where the mirror in DIR stands: the snapshots of a receiver, or what was imported last.

    A mirror of imports is compared with the store, if one is named: with REF, or with the key that it was imported
    from. Nothing is changed or locked; what works on DIR may be at work meanwhile.
    """
    from blobflow.follow import mirror_status
    from blobflow.mirror import read_snapshots

    snapshots = read_snapshots(directory)
    if snapshots:
        _show_snapshots(settings, directory, snapshots)
        return
    with settings.open_store() if settings.store else nullcontext() as store:
        status = mirror_status(directory, store, ref)
    settings.report({"status": status.state, **status.to_dict()}, str(status))


def _show_snapshots(settings: Settings, directory: Path, snapshots: Mapping[SnapshotId, ReceiverStatus]) -> None:
    from blobflow.mirror import Following

    rows: list[tuple[str, str, str, str]] = []
    documents: list[dict[str, Any]] = []
    for snapshot, status in snapshots.items():
        document: dict[str, Any] = snapshot._asdict()
        if isinstance(status, Following):
            document |= {"status": "following", "cursor": status.cursor}
            words = f"following {json.dumps(status.cursor)}"
        else:
            document |= {
                "status": "bootstrapping",
                "bytes_done": status.bytes_done,
                "bytes_total": status.bytes_total,
            }
            words = f"bootstrapping, {human_size(status.bytes_done)} of {human_size(status.bytes_total)}"
        documents.append(document)
        rows.append((snapshot.database, str(snapshot.position), snapshot.source, words))
    if settings.json:
        settings.report({"status": "found", "path": str(directory.absolute()), "snapshots": documents})
    else:
        table(("database", "position", "source", "status"), rows)


def _mirror_token() -> str:
    token = os.environ.get("BLOBFLOW_MIRROR_TOKEN")
    if not token:
        raise click.UsageError("no token: set BLOBFLOW_MIRROR_TOKEN")
    return token


# probe, gc


@cli.command()
@click.option("--fresh", is_flag=True, help="Try everything out again, whatever the report in the store says.")
@click.pass_obj
def probe(settings: Settings, fresh: bool) -> None:
    """Show what the store's server can really do.

    An S3 server is probed when it is first relied upon, and again after 30 days; the report lies in the store.
    What does not hold is not relied upon.
    """
    from blobflow.stores.probe import ProbedStore
    from blobflow.stores.probe import probe as probe_store

    with settings.open_store() as store:
        report = store.report(fresh=fresh) if isinstance(store, ProbedStore) else probe_store(store)
    if settings.json:
        settings.report({"status": "probed", **report.model_dump(mode="json")})
        return
    server = " ".join(filter(None, [report.endpoint, report.software]))
    about = [("store", report.store), ("server", server or "none"), ("probed", human_time(report.probed_at))]
    table(("", ""), about)
    table(
        ("ability", "holds", "evidence"),
        [
            (name.replace("_", " "), "yes" if finding.holds else "no", finding.evidence)
            for name, finding in report.findings.items()
        ],
    )


@cli.command()
@click.argument("prefix", default="")
@click.option(
    "--older-than",
    "older_than_s",
    type=DurationType(),
    default="24h",
    show_default=True,
    metavar="AGE",
    help="What is younger stays: 90s, 30m, 24h, 7d.",
)
@click.option("--dry-run", is_flag=True, help="Find everything, remove nothing.")
@click.option("--payloads", is_flag=True, help="Also remove payloads whose manifest never came.")
@click.option(
    "--stages",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also remove what killed downloads left in the directory DIR.",
)
@click.pass_obj
def gc(
    settings: Settings, prefix: str, older_than_s: float, dry_run: bool, payloads: bool, stages: Path | None
) -> int | None:
    """Remove what killed uploads left behind under keys that start with PREFIX.

    It may run at any time, next to transfers. Multipart uploads that nobody will take up again are aborted and their
    intents removed; payloads whose manifest never came are only shown unless --payloads is given.
    """
    from blobflow.gc import collect, collect_stages

    with settings.open_store() as store:
        report = collect(store, prefix, older_than_s=older_than_s, payloads=payloads, dry_run=dry_run)
    collected_stages = collect_stages(stages, older_than_s=older_than_s, dry_run=dry_run) if stages else []
    removed = "would remove" if dry_run else "removed"
    rows = [
        *(("would abort" if dry_run else "aborted", f"upload {u.upload_id} of {u.key}") for u in report.uploads),
        *((removed, f"intent of {key}") for key in report.intents),
        *((removed, key) for key in report.trials),
        *((removed if payloads else "found", f"payload without manifest {key}") for key in report.payloads),
        *((removed, str(path)) for path in collected_stages),
        *(("left alone", f"unreadable intent of {key}") for key in report.unreadable),
        *(("failed", f"{key}: run it again") for key in report.failed),
    ]
    settings.report(
        {
            "status": "found" if dry_run else "collected",
            "store": store.url,
            "prefix": prefix,
            "older_than_s": older_than_s,
            "uploads": [{"key": upload.key, "upload_id": upload.upload_id} for upload in report.uploads],
            "intents": report.intents,
            "trials": report.trials,
            "payloads": report.payloads,
            "payloads_removed": len(report.payloads) if payloads and not dry_run else 0,
            "stages": [str(path) for path in collected_stages],
            "unreadable": report.unreadable,
            "failed": report.failed,
            "uploads_kept": report.uploads_kept,
        },
        *(f"{what}  {which}" for what, which in rows),
        f"{len(rows)} found, {report.uploads_kept} {'upload' if report.uploads_kept == 1 else 'uploads'} kept",
    )
    return TemporaryError.exit_code if report.failed else None


@cli.command()
@click.argument("prefix", default="")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the last N of each directory.")
@click.option(
    "--keep-within",
    "keep_within_s",
    type=DurationType(),
    metavar="AGE",
    help="Keep what is younger: 90s, 30m, 24h, 7d.",
)
@click.option("--dry-run", is_flag=True, help="Show what would go, remove nothing.")
@click.pass_obj
def prune(
    settings: Settings, prefix: str, keep_last: int | None, keep_within_s: float | None, dry_run: bool
) -> int | None:
    """Remove old artifacts under keys that start with PREFIX.

    Kept is what one of the rules keeps, and whatever a ref names. At least one rule has to be given.
    """
    from blobflow.retention import prune as prune_artifacts

    with settings.open_store() as store:
        report = prune_artifacts(store, prefix, keep_last=keep_last, keep_within_s=keep_within_s, dry_run=dry_run)
    rows = [
        *(("would remove" if dry_run else "removed", key) for key in report.removed),
        *(("kept", f"{key}: a ref names it") for key in report.named),
        *(("left alone", f"{key}: an upload is under way") for key in report.busy),
        *(("failed", f"{key}: run it again") for key in report.failed),
    ]
    settings.report(
        {
            "status": "found" if dry_run else "pruned",
            "store": store.url,
            "prefix": prefix,
            "keep_last": keep_last,
            "keep_within_s": keep_within_s,
            "removed": report.removed,
            "named": report.named,
            "busy": report.busy,
            "failed": report.failed,
            "kept": report.kept,
        },
        *(f"{what}  {which}" for what, which in rows),
        f"{len(report.removed)} {'to remove' if dry_run else 'removed'}, {report.kept + len(report.named)} kept",
    )
    return TemporaryError.exit_code if report.failed else None
