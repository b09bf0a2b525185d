"""The scratch directories of export rounds. Each is named after its run.

| entry | means |
|---|---|
| `artifact/` | the artifact that the export writes |
| `round.json` | the export has ended; the file holds its round |
| `run-<id>` | that run needs the directory |
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import dagster as dg

from blobflow.artifact.artifact import Artifact
from blobflow.errors import BlobflowError, IntegrityError, NotFoundError, writing
from blobflow.private import PrivateDirectory

ARTIFACT: Final = "artifact"
_NOTE: Final = "round.json"
_USER_MARK: Final = "run-"


@dataclass(frozen=True)
class Exported:
    """An artifact whose export has ended, and its round; the numbers are None without a lease store."""

    artifact: Artifact
    round_number: int | None
    generation: int | None


def leave_note(scratch: Path, round_number: int | None, generation: int | None) -> None:
    """Record that the export into a scratch directory has ended, and its round."""
    made = scratch / f"{_NOTE}.new"
    made.write_text(json.dumps({"round_number": round_number, "generation": generation}))
    os.replace(made, scratch / _NOTE)


def read_exported(scratch: Path) -> Exported | None:
    """The export in a scratch directory; None if it has not ended."""
    try:
        note = json.loads((scratch / _NOTE).read_bytes())
        return Exported(Artifact.open(scratch / ARTIFACT), note["round_number"], note["generation"])
    except (OSError, ValueError, KeyError, TypeError, BlobflowError):
        return None


def newest_first(root: Path) -> list[Path]:
    """The scratch directories whose export has ended, the latest first."""

    def ended_at(scratch: Path) -> float:
        try:
            return (scratch / _NOTE).stat().st_mtime
        except OSError:
            return 0.0

    return sorted((note.parent for note in root.glob(f"*/{_NOTE}")), key=ended_at, reverse=True)


def artifact_in(scratch: str | None) -> Artifact | None:
    """The artifact in a scratch directory; None if there is none."""
    if scratch is None:
        return None
    try:
        return Artifact.open(Path(scratch) / ARTIFACT)
    except (NotFoundError, IntegrityError):
        return None


def mark_used(scratch: Path, context: dg.OpExecutionContext) -> None:
    """Record that this run needs the directory, so that no other run removes it."""
    with writing(scratch), PrivateDirectory.at(scratch) as directory:
        os.close(directory.open(f"{_USER_MARK}{context.run_id}", os.O_WRONLY | os.O_CREAT))


def remove(scratch: Path) -> None:
    """Remove a scratch directory. Best effort; otherwise a later round tries again."""
    with suppress(OSError), PrivateDirectory.at(scratch.parent, make=False) as root:
        root.remove(scratch.name)


def discard(scratch: Path, context: dg.OpExecutionContext) -> None:
    """Remove a scratch directory, unless another run that is not finished needs it."""
    users = {mark.name.removeprefix(_USER_MARK) for mark in scratch.glob(f"{_USER_MARK}*")} - {context.run_id}
    runs = [context.instance.get_run_by_id(user) for user in users]
    if all(run is None or run.is_finished for run in runs):
        remove(scratch)


def discard_all(root: Path, context: dg.OpExecutionContext) -> None:
    """Remove the scratch directories of earlier rounds, and of earlier attempts of this step.

    A failed run keeps its artifact for a retry only until a newer round begins. If it were published later, an old
    snapshot would replace a newer one.
    """
    for scratch in root.iterdir() if root.is_dir() else ():
        discard(scratch, context)
