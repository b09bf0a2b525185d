"""Artifacts: made, brought into a store and back, verified, copied, listed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from blobflow.cli import core
from blobflow.cli.formatting import from_before, human_size, human_time, left_out, left_out_facts, members_of, table
from blobflow.cli.progress import Progress, processed, show_progress, transferred
from blobflow.cli.settings import BACKENDS, PATH, Command, SampleType, Settings, digest_option, exclude_option
from blobflow.errors import IntegrityError, RefusedError, SourceChanged
from blobflow.scratch import scratch_directory

if TYPE_CHECKING:
    from blobflow.artifact.artifact import Artifact
    from blobflow.backends import Exporter, ExportResult
    from blobflow.config import ChunkProfile
    from blobflow.mirror.update import MirrorUpdate
    from blobflow.stores.base import Reader, Store
    from blobflow.transport import CopyResult, DownloadResult, UploadResult, VerifyResult
    from blobflow.uploads.progress import OnProgress


def _export_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--from", "backend", type=BACKENDS, help="What SRC is.  [default: directory]"),
        click.option(
            "--cursor-query",
            metavar="SQL",
            help="For sqlite: a query whose first row is the position in the database's history.",
        ),
        click.option(
            "--mode",
            type=click.Choice(["reference", "link", "copy"]),
            help="Let the artifact point to the files, hold hard links to them, or copies.",
        ),
        click.option(
            "--schemas",
            type=click.Choice(["one", "any"]),
            help="For parquet: whether all files must have the same columns.  [default: one]",
        ),
        click.option(
            "--symlinks",
            type=click.Choice(["refuse", "skip", "follow"]),
            help="What to do with symbolic links; follow stays inside.  [default: refuse]",
        ),
        exclude_option,
    ):
        function = option(function)
    return function


def _facts(result: UploadResult | DownloadResult | VerifyResult | CopyResult) -> dict[str, Any]:
    """What every transfer of an artifact reports under `--json`."""
    return {
        "artifact_digest": result.artifact_digest,
        "content_digest": result.manifest.content_digest,
        **result.to_dict(),
        "content_bytes": result.manifest.bytes,
        "members": result.manifest.members,
    }


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value}


def _exporter(source: Path, backend: str, options: dict[str, Any]) -> Exporter:
    """The exporter of SRC; an option that another backend has is refused."""
    kind, _ = core.backend_classes(backend)
    for name in options:
        if name not in kind.model_fields:
            raise click.UsageError(f"--{name.replace('_', '-')} does not apply to --from {backend}")
    return kind(path=source, **options)


@click.command(cls=Command, uses="nothing")
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("dest", metavar="DEST", type=PATH)
@_export_options
@click.pass_obj
def export(settings: Settings, source: Path, dest: Path, backend: str | None, **options: Any) -> None:
    """Make an artifact of SRC in the new directory DEST.

    SRC is a directory unless --from says otherwise. Its artifact holds copies of the files unless --mode says
    otherwise.
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
            **left_out_facts(result),
            "seconds": result.seconds,
        },
        f"exported {artifact.path}  {artifact.digest}",
        f"{members_of(artifact.manifest)} in {result.seconds:.1f} s",
        *left_out(left_out_facts(result)),
    )


@click.command(cls=Command)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("key")
@_export_options
@click.option("--overwrite", is_flag=True, help="Replace another artifact under KEY.")
@click.option(
    "--heal",
    is_flag=True,
    help="If KEY has this content already, read every byte of it, and upload it again if it is damaged.",
)
@click.pass_obj
def push(
    settings: Settings, source: Path, key: str, overwrite: bool, heal: bool, backend: str | None, **options: Any
) -> None:
    """Upload the directory or artifact SRC under KEY.

    SRC is a directory unless --from says otherwise, or an artifact made by `export`. The files of a directory are read
    where they are, unless --mode says otherwise. A database or a log is copied to a temporary directory first. Run it
    again after a crash, on any machine that has the source: it sends what is missing.
    """
    settings.resumes = True
    started = time.monotonic()
    core.check_artifact_key(key)
    with settings.open_store() as store, show_progress() as progress:
        arguments: dict[str, Any] = {
            "profile": settings.transfer_profile(),
            "overwrite": overwrite,
            "heal": heal,
            "on_progress": transferred(progress),
        }
        exported: ExportResult | None = None
        given = _given(options)
        if core.Artifact.is_artifact(source):
            if late := ["from"] * bool(backend) + list(given):
                raise click.UsageError(f"{source} is an artifact already: --{late[0].replace('_', '-')} comes too late")
            result, status = _sent(store, key, core.Artifact.open(source), **arguments)
        else:
            # Wrong credentials, or a server that nobody could read, should not show only after an hour of hashing.
            if not store.exists(key):
                core.check_readable(store)
            exporter = _exporter(source, backend or "directory", given)
            with scratch_directory(source) as scratch:
                exported = exporter.export(scratch / "artifact", on_progress=processed(progress, "export"))
                try:
                    result, status = _sent(store, key, exported.artifact, **arguments)
                except SourceChanged as error:  # the next push exports it again
                    raise error.while_exporting() from error
    seconds = time.monotonic() - started
    settings.report(
        {
            "status": status,
            "key": key,
            "store": store.url,
            **_facts(result),
            **left_out_facts(exported),
            "seconds": seconds,
        },
        f"{status} {key}  {result.artifact_digest}",
        f"{members_of(result.manifest)}; sent {human_size(result.bytes_sent)}{from_before(result.bytes_resumed)}"
        f" in {seconds:.1f} s",
        *left_out(left_out_facts(exported)),
    )


def _sent(
    store: Store,
    key: str,
    artifact: Artifact,
    *,
    profile: ChunkProfile,
    overwrite: bool,
    heal: bool,
    on_progress: OnProgress,
) -> tuple[UploadResult, str]:
    """Upload an artifact; the result, and its status. With `heal`, content that was there already is verified first."""
    result = core.upload(store, key, artifact, profile=profile, overwrite=overwrite, on_progress=on_progress)
    if not heal or result.status != "unchanged":
        return result, result.status
    _, healed = core.verify_or_heal(
        store,
        key,
        artifact,
        mode="deep",
        expected_digest=result.artifact_digest,
        profile=profile,
        on_progress=on_progress,
    )
    return (healed.upload, "healed") if healed else (result, result.status)


@click.command(cls=Command)
@click.argument("key")
@click.argument("dest", required=False, type=PATH)
@click.option(
    "--import",
    "target",
    nargs=2,
    type=(BACKENDS, PATH),
    metavar="BACKEND TARGET",
    help="Import the artifact into the mirror TARGET instead, which shows it as TARGET/current; BACKEND is append-log,"
    " directory, parquet or sqlite.",
)
@click.option(
    "--rewind", is_flag=True, help="For append-log: import an older artifact, and delete the records that follow it."
)
@digest_option
@click.pass_obj
def pull(
    settings: Settings,
    key: str,
    dest: Path | None,
    target: tuple[str, Path] | None,
    rewind: bool,
    digest: str | None,
) -> None:
    """Download the artifact under KEY to DEST.

    DEST must be new or empty. Every byte is verified beside DEST, which then appears whole, in one step. Run it again
    after a crash: it fetches what is missing.
    """
    if (dest is None) == (target is None):
        raise click.UsageError("name either DEST or --import BACKEND TARGET")
    if rewind and (target is None or target[0] != "append-log"):
        raise click.UsageError("--rewind belongs to --import append-log TARGET")
    settings.resumes = True
    started = time.monotonic()
    with settings.open_store() as store, show_progress() as progress:
        profile = settings.transfer_profile()
        if target is not None:
            made_with = {"rewind": True} if rewind else {}
            update = update_target(*target, store, key, digest, profile, progress, **made_with)
            result, status, path = update.download, update.imported.status, update.imported.path
        else:
            watch = transferred(progress)
            result = core.download(store, key, dest or "", profile=profile, expected_digest=digest, on_progress=watch)
            status, path = result.status, result.path
    seconds = time.monotonic() - started
    settings.report(
        {
            "status": status,
            "key": key,
            "store": store.url,
            "path": str(path),
            **_facts(result),
            "seconds": seconds,
        },
        f"{status} {path}  {result.artifact_digest}",
        f"{members_of(result.manifest)}; received {human_size(result.bytes_received)}"
        f"{from_before(result.bytes_resumed)} in {seconds:.1f} s",
    )


def update_target(
    backend: str,
    target: Path,
    store: Reader,
    key: str,
    expected_digest: str | None,
    profile: ChunkProfile,
    progress: Progress,
    **made_with: Any,
) -> MirrorUpdate:
    """Have the mirror in `target` show the artifact under `key`.

    Args:
        made_with: Fields of the importer beside its path.
    """
    importer = core.backend_classes(backend)[1](path=target, **made_with)
    offered = core.read_manifest_file(store, key)
    made_by = offered.manifest.backend
    if made_by != backend:  # the importer would say so as well, after the download
        raise RefusedError(
            f"{key!r} was made by backend {core.quoted(made_by)}, not {backend!r}",
            hint=f"--import {core.plain(made_by)} TARGET",
            key=key,
        )
    core.check_expected(key, offered.digest, expected_digest)
    watch, show = transferred(progress), processed(progress, "import")
    return core.update_mirror(store, key, offered.digest, importer, profile=profile, on_progress=watch, on_import=show)


@click.command(cls=Command)
@click.argument("key")
@click.option("--deep", "mode", flag_value="deep", help="Read and check every byte.")
@click.option(
    "--shallow", "mode", flag_value="shallow", help="Compare sizes, manifests and the checksum that the store attests."
)
@click.option(
    "--sample",
    type=SampleType(),
    metavar="N/T",
    help="Read only the Nth of T slices of the files: 1/7 on Mondays, 2/7 on Tuesdays, and so on.",
)
@digest_option
@click.pass_obj
def verify(
    settings: Settings,
    key: str,
    mode: Literal["deep", "shallow"] | None,
    sample: tuple[int, int] | None,
    digest: str | None,
) -> None:
    """Check the artifact under KEY, and say what is known of it.

    proven: every byte was read and has the digests that the artifact digest covers. sampled: a share of the bytes has.
    attested: only the server's checksum agrees, which anybody who may write to the store can forge. unproven: none of
    the content was checked.

    Without --deep or --shallow every byte is read, unless the store itself attests the checksum of the payload. Exit
    code 0 means that nothing wrong was found in what was checked.
    """
    with settings.open_store() as store, show_progress() as progress:
        try:
            result = core.verify(
                store,
                key,
                mode=mode or "auto",
                sample=sample,
                expected_digest=digest,
                profile=settings.transfer_profile(),
                on_progress=transferred(progress),
            )
        except IntegrityError as error:
            heal = f"`blobflow push SRC {key} --heal` uploads it again from a source of the same content"
            hint = f"{error.hint}; or {heal}" if error.hint else heal
            error.advise(hint)
            raise
    settings.report(
        {
            "status": result.status,
            "mode": result.mode_used,
            "proof": result.proof,
            "key": key,
            "store": store.url,
            "bytes_received": result.bytes_read,
            **_facts(result),
        },
        f"{result.proof} {key}  {result.artifact_digest}",
        f"{result.proof}: {core.PROOF_MEANS[result.proof]}",
        f"{members_of(result.manifest)}; {result.mode_used}: read {human_size(result.bytes_read)} of"
        f" {human_size(result.bytes_total)} in {result.seconds:.1f} s",
    )


@click.command(cls=Command)
@click.argument("source", metavar="SOURCE_STORE")
@click.argument("source_key", metavar="KEY")
@click.argument("target", metavar="TARGET_STORE")
@click.argument("target_key", metavar="[KEY]", required=False)
@click.option("--overwrite", is_flag=True, help="Replace another artifact under the target's key.")
@digest_option
@click.option("--source-endpoint-url", metavar="URL", help="S3 server of SOURCE_STORE, if it has another one.")
@click.option("--source-region", metavar="NAME", help="S3 region of SOURCE_STORE, if it has another one.")
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
    """Copy the artifact under KEY from one store to another.

    It gets the same key unless another is given. Nothing is written to local disk. The copy is compared with the
    manifest's checksum before it becomes visible. Run it again after a crash, on any machine: parts that the target
    holds are not sent again. --store is not used.
    """
    settings.resumes = True
    from_settings = settings.for_one_of_two(source, source_endpoint_url, source_region)
    to_settings = settings.for_one_of_two(target)
    key = target_key or source_key
    with from_settings.open_store() as source_store, to_settings.open_store() as store, show_progress() as progress:
        result = core.copy_artifact(
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
            "server_side": result.server_side,
            **_facts(result),
        },
        f"{result.status} {key}  {result.artifact_digest}",
        f"{members_of(result.manifest)}; {how} {human_size(result.bytes_received)},"
        f" sent {human_size(result.bytes_sent)}{from_before(result.bytes_resumed)} in {result.seconds:.1f} s",
    )


@click.command(cls=Command, uses="store")
@click.argument("prefix", default="")
@click.pass_obj
def ls(settings: Settings, prefix: str) -> None:
    """List the complete artifacts whose keys start with PREFIX."""
    with settings.open_store() as store:
        entries = core.list_artifacts(store, prefix)
        if settings.json:
            artifacts = [
                {"key": entry.key, "last_modified": entry.last_modified and entry.last_modified.isoformat()}
                for entry in entries
            ]
            settings.report({"status": "listed", "store": store.url, "prefix": prefix, "artifacts": artifacts})
        else:
            table(("key", "published"), ((entry.key, human_time(entry.last_modified)) for entry in entries))


@click.command(cls=Command, uses="store")
@click.argument("key")
@click.pass_obj
def show(settings: Settings, key: str) -> None:
    """Show the manifest of the artifact under KEY.

    Its payload is not read.
    """
    with settings.open_store() as store:
        stored = core.read_manifest_file(store, key)
        payload = store.head(key)
    manifest, digest = stored.manifest, stored.digest
    if settings.json:
        settings.report(
            {
                "status": "found",
                "key": key,
                "store": store.url,
                "artifact_digest": digest,
                "bytes_total": payload.size,
                "manifest": manifest.document(),
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
