"""Layers: directories in a store, compressed, named by their content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click

from blobflow.cli import core
from blobflow.cli.formatting import from_before, human_size, human_time, left_out, left_out_facts, table
from blobflow.cli.progress import processed, show_progress, transferred
from blobflow.cli.settings import PATH, CommandGroup, Settings, exclude_option


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
            type=PATH,
            envvar="BLOBFLOW_LAYERS_HOME",
            show_envvar=True,
            metavar="DIR",
            help="For that file and the stat cache.  [default: ~/.local/state/blobflow/layers]",
        ),
    ):
        function = option(function)
    return function


@click.group(cls=CommandGroup)
def layer() -> None:
    """Keep directories as compressed layers named by their content.

    An unchanged directory is not sent again. NAME is the name of the container, or of anything else that the directory
    belongs to. The store has everything that a restore needs; the state and the stat cache of this host only save
    requests and reads.
    """


@layer.command("sync")
@click.argument("directory", metavar="DIR", type=PATH)
@click.argument("name")
@click.option("--level", type=click.IntRange(1, 22), default=3, show_default=True, help="Compression level of zstd.")
@click.option(
    "--symlinks",
    type=click.Choice(["refuse", "skip", "follow"]),
    default="refuse",
    show_default=True,
    help="What to do with symbolic links; follow stays inside.",
)
@exclude_option
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
    """Upload the directory DIR as the layer of NAME.

    Nothing is sent if the store has this content. Run it again after a crash, on any machine that has the directory: it
    compresses and sends what is missing.
    """
    settings.resumes = True
    with settings.open_store() as store, show_progress() as progress:
        result = core.LayerSync(
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
            **result.to_dict(),
            "files_read": result.files_read,
            **left_out_facts(result),
            "codec": result.layer.codec,
        },
        f"{result.status} {name}  {result.digest}",
        f"{human_size(result.layer.tar_size)}, compressed {human_size(result.layer.object_size)};"
        f" sent {human_size(result.bytes_sent)}{from_before(result.bytes_resumed)} in {result.seconds:.1f} s",
        *left_out(left_out_facts(result)),
    )


@layer.command("restore")
@click.argument("name")
@click.argument("dest", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace any directory at DEST, whatever is in it.")
@_layer_options
@click.pass_obj
def layer_restore(
    settings: Settings, name: str, dest: Path, overwrite: bool, state: str | None, home: Path | None
) -> None:
    """Restore the layer of NAME as the directory DEST.

    Every byte is verified beside DEST, which then appears whole, in one step. An earlier restore of NAME is replaced if
    it was not changed since. Run it again after a crash: it fetches what is missing.
    """
    settings.resumes = True
    with settings.open_store() as store, show_progress() as progress:
        result = core.LayerSync(
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
            "kept": str(result.kept) if result.kept else None,
            "layer_digest": result.digest,
            "layer_bytes": result.layer.object_size,
            **result.to_dict(),
        },
        f"{result.status} {result.path}  {result.digest}",
        f"{human_size(result.layer.tar_size)} from {human_size(result.layer.object_size)}"
        f"{from_before(result.bytes_resumed)} in {result.seconds:.1f} s",
        *([f"what was there was changed at the last moment, and is kept in {result.kept}"] if result.kept else []),
    )


@layer.command("ls", uses="store")
@_layer_options
@click.pass_obj
def layer_ls(settings: Settings, state: str | None, home: Path | None) -> None:
    """List the containers in the store and those of this host.

    A lost state of this host is rebuilt.
    """
    with settings.open_store() as store:
        states = core.LayerSync(store, state=state, home=home).list()
    if settings.json:
        containers = [one.model_dump(mode="json") for one in states]
        settings.report({"status": "listed", "store": store.url, "containers": containers})
    else:
        rows = ((one.container, human_time(one.last_sync), one.remote_digest or "", one.path or "") for one in states)
        table(("container", "synced", "layer", "directory"), rows)
