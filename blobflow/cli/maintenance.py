"""Keeping a store: refs, what its server can do, and what may go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blobflow.cli import core
from blobflow.cli.formatting import human_time, table
from blobflow.cli.settings import AGE_HELP, DIRECTORY, Command, CommandGroup, DurationType, Settings, dry_run_option
from blobflow.errors import NotFoundError, TemporaryError

if TYPE_CHECKING:
    from blobflow.coordination.refs import RefState
    from blobflow.stores.base import Store


@click.group(cls=CommandGroup)
def ref() -> None:
    """Read and move refs: names of artifacts, such as orders/latest."""


@ref.command("get", uses="store")
@click.argument("name")
@click.pass_obj
def ref_get(settings: Settings, name: str) -> None:
    """Print the key that the ref NAME points to."""
    store, state = _read(settings, name)
    settings.report(_ref_document("found", store, name, state), state.key)


@ref.command("set", uses="store")
@click.argument("name")
@click.argument("key")
@click.pass_obj
def ref_set(settings: Settings, name: str, key: str) -> None:
    """Point the ref NAME to the artifact under KEY in one step."""
    with settings.open_store() as store:
        state = core.name_artifact(store, name, key, core.read_manifest_file(store, key).digest)
    settings.report(_ref_document("set", store, name, state), f"{name} -> {state.key}  {state.manifest_sha256}")


@ref.command("log", uses="store")
@click.argument("name")
@click.pass_obj
def ref_log(settings: Settings, name: str) -> None:
    """Print where the ref NAME points and pointed, latest first."""
    store, state = _read(settings, name)
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


def _read(settings: Settings, name: str) -> tuple[Store, RefState]:
    with settings.open_store() as store:
        state = core.read_ref(store, name)
    if state is None:
        raise NotFoundError(f"no ref {name!r} in {store.url}", name=name)
    return store, state


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


@click.command(cls=Command, uses="store")
@click.option("--fresh", is_flag=True, help="Probe again, whatever was found before.")
@click.pass_obj
def probe(settings: Settings, fresh: bool) -> None:
    """Show which capabilities the store's server really has.

    An S3 server is probed at its first use and again after 30 days; the findings are kept for this user on this
    machine. Capabilities that a probe did not find are not used.
    """
    with settings.open_store() as store:
        report = store.report(fresh=fresh) if isinstance(store, core.ProbedStore) else core.probe(store)
    if settings.json:
        settings.report({"status": "probed", **report.model_dump(mode="json")})
        return
    server = " ".join(filter(None, [report.endpoint, report.software]))
    about = [("store", report.store), ("server", server or "none"), ("probed", human_time(report.probed_at))]
    table(("", ""), about)
    table(
        ("capability", "holds", "evidence"),
        [
            (name.replace("_", " "), "yes" if finding.holds else "no", finding.evidence)
            for name, finding in report.findings.items()
        ],
    )


@click.command(cls=Command, uses="store")
@click.argument("prefix", default="")
@click.option(
    "--older-than",
    "older_than_s",
    type=DurationType(),
    default="24h",
    show_default=True,
    metavar="AGE",
    help=AGE_HELP,
)
@dry_run_option
@click.option("--payloads", is_flag=True, help="Also remove payloads without a manifest.")
@click.option(
    "--stages", type=DIRECTORY, metavar="DIR", help="Also remove the remains of killed downloads in the directory DIR."
)
@click.pass_obj
def gc(
    settings: Settings, prefix: str, older_than_s: float, dry_run: bool, payloads: bool, stages: Path | None
) -> int | None:
    """Remove the remains of killed uploads under PREFIX.

    It may run at any time, next to transfers. Abandoned multipart uploads are aborted and their intents removed.
    Payloads without a manifest are only shown, unless --payloads is given.
    """
    with settings.open_store() as store:
        report = core.collect(store, prefix, older_than_s=older_than_s, payloads=payloads, dry_run=dry_run)
    collected_stages = core.collect_stages(stages, older_than_s=older_than_s, dry_run=dry_run) if stages else []
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


@click.command(cls=Command, uses="store")
@click.argument("prefix", default="")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the last N of each directory.")
@click.option("--keep-within", "keep_within_s", type=DurationType(), metavar="AGE", help=AGE_HELP)
@dry_run_option
@click.pass_obj
def prune(
    settings: Settings, prefix: str, keep_last: int | None, keep_within_s: float | None, dry_run: bool
) -> int | None:
    """Remove old artifacts whose keys start with PREFIX.

    An artifact stays if one of the rules keeps it or a ref names it. Give at least one rule.
    """
    with settings.open_store() as store:
        report = core.prune(store, prefix, keep_last=keep_last, keep_within_s=keep_within_s, dry_run=dry_run)
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
