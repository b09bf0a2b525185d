"""The commands. Each is a thin shell: it calls the core and words the result."""

from __future__ import annotations

import click

from blobflow.cli import artifacts, batches, layers, maintenance, mirrors
from blobflow.cli.settings import CommandGroup, shared_options
from blobflow.version import __version__


@click.group(
    cls=CommandGroup,
    params=shared_options(),
    epilog="The options above may stand before the command or after it. Exit codes: 0 done, 1 failed, 2 usage, "
    "3 integrity, 4 not found, 5 refused, 75 temporary (run it again).",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Move large directories through object stores: resumable, verified, whole or not at all."""


for _command in (
    *(artifacts.export, artifacts.push, artifacts.pull, artifacts.verify, artifacts.copy, artifacts.ls, artifacts.show),
    *(batches.batch, layers.layer, mirrors.mirror),
    *(maintenance.ref, maintenance.probe, maintenance.gc, maintenance.prune),
):
    cli.add_command(_command)
