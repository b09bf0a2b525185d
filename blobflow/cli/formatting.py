"""Numbers, times and tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from shlex import quote
from typing import TYPE_CHECKING, Any, Final

from blobflow.cli.streams import show
from blobflow.errors import Value

if TYPE_CHECKING:
    from blobflow.artifact.manifest import Manifest
    from blobflow.backends import ExportResult
    from blobflow.layers import LayerSyncResult


OPTIONS: Final = {
    "bandwidth_bytes_per_s": "--bwlimit",
    "keep_within_s": "--keep-within",
    "older_than_s": "--older-than",
    "verify": "AWS_CA_BUNDLE",
}
"""Settings that are not called on the command line as in Python, only with other dashes."""


def as_option(name: str, value: Value | None) -> str:
    """A setting of an error's message or hint (`blobflow.errors.setting`) as an option, or a variable, to type."""
    option = OPTIONS.get(name) or f"--{name.replace('_', '-')}"
    return option if value is None else f"{option} {value}"


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


def members_of(manifest: Manifest) -> str:
    """How many members an artifact has, and how large they are."""
    return f"{manifest.members} {'member' if manifest.members == 1 else 'members'}, {human_size(manifest.bytes)}"


def left_out_facts(result: ExportResult | LayerSyncResult | None) -> dict[str, Any]:
    """What an export left out, for `--json`; None: an earlier one did, which is not known here."""
    return {
        "excluded": result.excluded if result else 0,
        "symlinks_skipped": result.symlinks_skipped if result else 0,
        "left_out": list(getattr(result, "left_out", ())),
        "exclude_unmatched": list(result.unmatched) if result else [],
    }


def left_out(facts: dict[str, Any]) -> list[str]:
    """Lines about `left_out_facts`; empty if nothing was left out."""
    counts = [f"{facts['excluded']} excluded"] * bool(facts["excluded"])
    counts += [f"{facts['symlinks_skipped']} symbolic links"] * bool(facts["symlinks_skipped"])
    counts += map(printable, facts["left_out"])
    lines = [f"left out: {', '.join(counts)}"] if counts else []
    return lines + [f"--exclude {quote(pattern)} matched nothing" for pattern in facts["exclude_unmatched"]]


def from_before(count: int) -> str:
    """The part of a sentence about the bytes that an earlier attempt moved."""
    return f", {human_size(count)} were there from before," if count else ""


def printable(text: str) -> str:
    """`text` on one line, without control sequences for the terminal: a stranger may have chosen the names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere a line for each row as it comes, with tabs between the cells."""
    if not sys.stdout.isatty():
        for row in rows:
            show("\t".join(map(printable, row)))
        return
    # rich takes 0.1 s to import, and only a terminal needs it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(*headings, box=None, pad_edge=False, show_header=any(headings))
    for row in rows:
        grid.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    Console().print(grid)
