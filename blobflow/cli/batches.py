"""Batches of small operations, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from blobflow.cli import core
from blobflow.cli.formatting import printable
from blobflow.cli.progress import counted
from blobflow.cli.settings import PATH, Command, DurationType, Settings
from blobflow.errors import BlobflowError, TemporaryError


@click.command(cls=Command)
@click.argument("operations", metavar="FILE", type=PATH)
@click.option("--results", type=PATH, metavar="FILE", help="The table of results.  [default: FILE.results.parquet]")
@click.option("--window", type=click.IntRange(1, 1000), default=32, show_default=True, help="Operations at once.")
@click.option("--deadline", type=DurationType(), default="300s", show_default=True, help="Time for one operation.")
@click.option("--ordered", is_flag=True, help="Execute operations on one key in the order of the file.")
@click.option(
    "--allow",
    type=click.Choice(["read", "write", "delete"]),
    multiple=True,
    help="Allow only this kind of operation; may be repeated.  [default: all kinds]",
)
@click.option("--payloads", is_flag=True, help="Keep the payloads that gets read in the table.")
@click.option("--fresh", is_flag=True, help="Forget earlier results and execute everything.")
@click.pass_obj
def batch(
    settings: Settings, operations: Path, results: Path | None, payloads: bool, fresh: bool, **options: Any
) -> int | None:
    """Execute the operations in FILE: insert, get, delete.

    FILE has JSON lines or is a Parquet table. The results become a Parquet table. Run it again after a crash or after
    failures: it executes the operations that are not done.
    """
    settings.resumes = True
    with settings.open_store() as store:
        window, deadline_s = options["window"], options["deadline"]
        executor = core.BatchExecutor(
            store,
            permits=window,
            window=window,
            deadline_s=deadline_s,
            ordered=options["ordered"],
            allow=options["allow"] or ("read", "write", "delete"),
        )
        report = core.run_batch_file(
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
