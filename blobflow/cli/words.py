"""Numbers, times and tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime

import click


def human_size(count: float) -> str:
    """`count` bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"


def human_duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def human_time(moment: datetime | None) -> str:
    """The moment in local time."""
    return moment.astimezone().isoformat(sep=" ", timespec="seconds") if moment else ""


def printable(text: str) -> str:
    """`text` on one line and without what a terminal would obey: names and manifests may come from a stranger."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere a line for each row as it comes, with tabs between the cells."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(map(printable, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(*headings, box=None, pad_edge=False, show_header=any(headings))
    for row in rows:
        grid.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    Console().print(grid)
