"""`blobflow mirror`: push to a receiver, run one, import what it received, and show where a mirror stands."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from blobflow.cli import core
from blobflow.cli.artifacts import update_target
from blobflow.cli.formatting import from_before, human_size, members_of, table
from blobflow.cli.progress import processed, show_progress
from blobflow.cli.settings import (
    BACKENDS,
    DIRECTORY,
    FILE,
    PATH,
    SIZE,
    CommandGroup,
    DurationType,
    Settings,
    digest_option,
)
from blobflow.errors import NotFoundError

if TYPE_CHECKING:
    from blobflow.mirror import ReceiverStatus, SnapshotId


_TOKEN_VARIABLE: Final = "BLOBFLOW_MIRROR_TOKEN"


@click.group(cls=CommandGroup)
def mirror() -> None:
    """Push snapshots to a remote receiver, or run one.

    Both sides read their shared token, at least 16 characters, from the variable BLOBFLOW_MIRROR_TOKEN.
    """


@mirror.command("serve", uses="nothing")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8337, show_default=True, help="0 takes a free one.")
@click.option("--tls-cert", type=FILE, metavar="FILE", help="PEM; the server then speaks HTTPS.")
@click.option("--tls-key", type=FILE, metavar="FILE", help="Its private key.")
@click.option(
    "--tokens",
    type=FILE,
    metavar="FILE",
    help="Tokens of senders, one line each: SOURCE DATABASE TOKEN; * means any. Senders see only their own snapshots.",
)
@click.option("--max-snapshot", type=SIZE, metavar="SIZE", help="Refuse larger snapshots.")
@click.option("--max-total", type=SIZE, metavar="SIZE", help="Refuse more than this in all snapshots together.")
@click.option(
    "--max-sessions",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Incomplete snapshots of one source at the same time.",
)
@click.option(
    "--expire-after",
    type=DurationType(),
    default="7d",
    show_default=True,
    metavar="DURATION",
    help="Drop unfinished snapshots that were not continued for this long.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Connections at the same time, with and without a token.",
)
@click.pass_obj
def mirror_serve(
    settings: Settings,
    directory: Path,
    host: str,
    port: int,
    tls_cert: str | None,
    tls_key: str | None,
    tokens: str | None,
    max_snapshot: int | None,
    max_total: int | None,
    max_sessions: int,
    expire_after: float,
    max_connections: int,
) -> None:
    """Receive snapshots in DIR until a signal ends it.

    With --tokens, BLOBFLOW_MIRROR_TOKEN is optional; if it is set, senders with that token may push anything.

    What arrived is kept: a receiver that was killed continues at the last checkpoint when it is started again.
    """
    try:
        door, mirror_server = core.Door(max_connections=max_connections), core.MirrorServer
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is not installed: pip install 'blobflow[mirror]'") from error
    senders = core.read_senders(tokens) if tokens else []
    token = _mirror_token() if not senders or os.environ.get(_TOKEN_VARIABLE) else None
    with core.MirrorReceiver(
        directory,
        max_snapshot_bytes=max_snapshot,
        max_total_bytes=max_total,
        max_sessions=max_sessions,
        expire_after_s=expire_after,
    ) as receiver:
        try:
            server = mirror_server(
                receiver,
                host=host,
                port=port,
                certificate=tls_cert,
                private_key=tls_key,
                door=door,
                token=token,
                senders=senders,
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
@click.option("--database", required=True, metavar="NAME", help="The database of the snapshot.")
@click.option("--source", required=True, metavar="NAME", help="The origin of the snapshot, for example the cluster.")
@click.option(
    "--position",
    type=click.IntRange(0, (1 << 64) - 1),
    metavar="N",
    help="Place in the source's history; greater is newer.  [default: when the artifact was made or the file modified]",
)
@click.option("--file", "is_file", is_flag=True, help="KEY is the path of a local file instead.")
@digest_option
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
    """Send the artifact under KEY to the receiver at URL.

    Run it again after a crash: it sends what is missing.
    """
    if is_file and digest:
        raise click.UsageError("--digest names an artifact, and --file is none")
    settings.resumes = True
    names: dict[str, Any] = {"source": source, "database": database, "position": position}
    with (
        nullcontext() if is_file else settings.open_store() as store,
        core.MirrorClient(url, token=_mirror_token()) as client,
        show_progress() as progress,
    ):
        if store is None:
            snapshot = core.Snapshot.of_file(what, **names)
        else:
            snapshot = core.Snapshot.of_artifact(store, what, expected_digest=digest, **names)
        result = client.push(snapshot, on_progress=processed(progress, "push"))
    settings.report(
        {"status": result.status, "key": what, "url": client.url, **result.id._asdict(), **result.to_dict()},
        f"{result.status} {result.id}  {result.id.digest}",
        f"sent {human_size(result.bytes_sent)}{from_before(result.bytes_resumed)} in {result.seconds:.1f} s",
    )


@mirror.command("import")
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("database")
@click.argument("backend", metavar="BACKEND", type=BACKENDS)
@click.argument("target", metavar="TARGET", type=PATH)
@click.option("--source", metavar="NAME", help="Import only snapshots from this source.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Received artifacts of that source to keep, including the imported one.",
)
@click.pass_obj
def mirror_import(
    settings: Settings, directory: Path, database: str, backend: str, target: Path, source: str | None, keep: int
) -> None:
    """Import the newest received snapshot of DATABASE into TARGET.

    DIR is the directory of the receiver, and TARGET that of the mirror. Every byte is verified before TARGET/current
    shows it; then the snapshot is Following. Older ones are removed. The receiver may be running. Run it again after a
    crash.
    """
    settings.resumes = True
    started = time.monotonic()
    store = core.ReceivedStore(directory)
    state = core.read_ref(store, "/".join(filter(None, (database, source, "latest"))))
    if state is None:
        raise NotFoundError(f"no complete artifact of {database!r} was received in {directory}", path=str(directory))
    with show_progress() as progress:
        profile = settings.transfer_profile()
        update = update_target(backend, target, store, state.key, state.manifest_sha256, profile, progress)
    result, imported = update.download, update.imported
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
        f"{members_of(result.manifest)} in {seconds:.1f} s",
    )


@mirror.command("status", uses="store")
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.option("--ref", metavar="REF", help="Compare the mirror with this ref, such as orders/latest.")
@click.pass_obj
def mirror_status(settings: Settings, directory: Path, ref: str | None) -> None:
    """Show where the mirror in DIR stands, or what a receiver holds.

    A mirror is compared with the store, if one is named: with REF, or with the key that it was imported from. Nothing
    is changed or locked; imports and the receiver may be running.
    """
    snapshots = core.read_snapshots(directory)
    if snapshots:
        _show_snapshots(settings, directory, snapshots)
        return
    with settings.open_store() if settings.store else nullcontext() as store:
        status = core.mirror_status(directory, store, ref)
    settings.report({"status": status.state, **status.to_dict()}, str(status))


def _show_snapshots(settings: Settings, directory: Path, snapshots: Mapping[SnapshotId, ReceiverStatus]) -> None:

    rows: list[tuple[str, str, str, str]] = []
    documents: list[dict[str, Any]] = []
    for snapshot, status in snapshots.items():
        document: dict[str, Any] = snapshot._asdict()
        if isinstance(status, core.Following):
            document |= {"status": "following", "cursor": status.cursor}
            words = f"following {json.dumps(status.cursor)}"
        else:
            document |= {"status": "bootstrapping", **vars(status)}
            words = f"bootstrapping, {human_size(status.bytes_done)} of {human_size(status.bytes_total)}"
        documents.append(document)
        rows.append((snapshot.database, str(snapshot.position), snapshot.source, words))
    if settings.json:
        settings.report({"status": "found", "path": str(directory.absolute()), "snapshots": documents})
    else:
        table(("database", "position", "source", "status"), rows)


def _mirror_token() -> str:
    token = os.environ.get(_TOKEN_VARIABLE)
    if not token:
        raise click.UsageError("no token: set BLOBFLOW_MIRROR_TOKEN")
    return token
