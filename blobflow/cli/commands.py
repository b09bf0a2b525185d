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
from blobflow.cli.settings import CommandGroup, DigestType, DurationType, Settings, shared_options
from blobflow.cli.words import human_size, human_time, printable, table
from blobflow.errors import BlobflowError, NotFoundError, TemporaryError
from blobflow.scratch import scratch_directory
from blobflow.version import __version__

if TYPE_CHECKING:
    from blobflow.artifact.manifest import Manifest
    from blobflow.lease import RefState
    from blobflow.mirror import ReceiverStatus, SnapshotId
    from blobflow.stores.base import Store
    from blobflow.transport import DownloadResult

_PATH: Final = click.Path(path_type=Path)


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


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@click.argument("dest", metavar="DEST", type=_PATH)
@_export_options
@click.pass_obj
def export(settings: Settings, source: Path, dest: Path, **options: Any) -> None:
    """Make an artifact of the directory SRC in the new directory DEST.

    The artifact keeps copies of the files unless --mode says otherwise.
    """
    from blobflow.backends import export_artifact

    with show_progress() as progress:
        result = export_artifact(
            source, dest, on_progress=processed(progress, "export"), **{"mode": "copy", **_given(options)}
        )
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
@click.argument("directory", metavar="DIR", type=_PATH)
@click.argument("key")
@_export_options
@click.option("--overwrite", is_flag=True, help="Replace another artifact under KEY.")
@click.pass_obj
def push(settings: Settings, directory: Path, key: str, overwrite: bool, **options: Any) -> None:
    """Upload the directory DIR, or an artifact made by `export`, under KEY.

    Files are read where they are; nothing is copied unless --mode says so. Run it again after a crash, on any machine
    that has the directory: it sends what is missing.
    """
    from blobflow.artifact.artifact import Artifact
    from blobflow.backends import export_artifact
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
        if Artifact.is_artifact(directory):
            if given := _given(options):
                raise click.UsageError(f"{directory} is an artifact already: --{next(iter(given))} comes too late")
            result = upload(store, key, directory, **arguments)
        else:
            store.exists(key)  # wrong credentials should not show only after an hour of hashing
            with scratch_directory(directory) as scratch:
                exported = export_artifact(
                    directory, scratch / "artifact", on_progress=processed(progress, "export"), **_given(options)
                )
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
    type=(click.Choice(["directory"]), _PATH),
    metavar="BACKEND TARGET",
    help="Bring the artifact to life at TARGET instead; BACKEND is 'directory', which keeps TARGET/current up to date.",
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
            status, path, result = _pull_into(target[1], store, key, digest, progress, options)
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
    target: Path, store: Store, key: str, digest: str | None, progress: Progress, options: dict[str, Any]
) -> tuple[str, Path, DownloadResult]:
    """Download into the importer's own staging, so that the import is a rename; what is alive there is left alone."""
    from blobflow.artifact.manifest import artifact_digest
    from blobflow.backends import DirectoryImporter, import_artifact
    from blobflow.transport import DownloadResult, download, read_manifest_bytes

    importer = DirectoryImporter(path=target)
    offered = artifact_digest(read_manifest_bytes(store, key))
    alive = importer.current()
    if alive is not None and alive.digest == offered == (digest or offered):
        path = importer.path / "current"
        unchanged = DownloadResult("unchanged", key, path, offered, alive.manifest, alive.payload_size, 0, 0, 0.0)
        return "unchanged", path, unchanged
    result = download(store, key, importer.staging(offered), **options)
    imported = import_artifact(result.path, importer, consume=True, on_progress=processed(progress, "import"))
    return imported.status, imported.path, result


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
@click.option("--digest", type=DigestType(), metavar="DIGEST", help="Refuse every artifact but this one (sha256:...).")
@click.pass_obj
def verify(settings: Settings, key: str, mode: Literal["deep", "shallow"] | None, digest: str | None) -> None:
    """Prove that the artifact under KEY is whole.

    Without --deep or --shallow every byte is read, except where the store itself attests the checksum of the payload.
    """
    from blobflow.transport import verify as verify_artifact

    with settings.open_store() as store, show_progress() as progress:
        result = verify_artifact(
            store,
            key,
            mode=mode or "auto",
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
@click.pass_obj
def mirror_push(
    settings: Settings, what: str, url: str, database: str, source: str, position: int | None, is_file: bool
) -> None:
    """Send the artifact under KEY to the receiver at URL. Run it again after a crash: it sends what is missing."""
    from blobflow.mirror import Snapshot
    from blobflow.mirror.client import MirrorClient

    settings.resumes = True
    names: dict[str, Any] = {"source": source, "database": database, "position": position}
    with (
        nullcontext() if is_file else settings.open_store() as store,
        MirrorClient(url, token=_mirror_token()) as client,
        show_progress() as progress,
    ):
        snapshot = Snapshot.of_file(what, **names) if store is None else Snapshot.of_artifact(store, what, **names)
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
