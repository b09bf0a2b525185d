"""The import history of a mirror: one line of JSON for each import, the newest last."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, JsonValue

from blobflow.durable import append_lines, replace_file, whole_lines
from blobflow.errors import ArtifactInvalid
from blobflow.private import open_own
from blobflow.untrusted import UtcTime, read_model

HISTORY_NAME: Final = "history.jsonl"

_MAX_BYTES: Final = 1024 * 1024
"""About 3,000 imports with small cursors; beyond it the older half is dropped."""


class HistoryEntry(BaseModel):
    """One import of an artifact into a mirror. Fields added by later versions are ignored."""

    model_config = ConfigDict(frozen=True)

    imported_at: UtcTime
    artifact_digest: str
    backend: str
    cursor: JsonValue = None
    """The artifact's position in the source's history."""
    created_at: UtcTime
    """When the artifact was made."""
    key: str | None = None
    """Key under which it was published, if the importing process knew it."""


def read_history(mirror: Path) -> list[HistoryEntry]:
    """The recorded imports into a mirror, oldest first; a line torn by a kill is skipped."""
    try:
        # O_NONBLOCK: a pipe in its place must not hang; for files it has no effect.
        with open(mirror / HISTORY_NAME, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return []
    entries: list[HistoryEntry] = []
    for _, line in whole_lines(io.BytesIO(data)):
        try:
            entries.append(read_model(HistoryEntry, line, "line of the history"))
        except ArtifactInvalid:
            continue
    return entries


def add_to_history(mirror: Path, entry: HistoryEntry) -> None:
    """Append an import, durably. The caller must hold the mirror, because a long history is rewritten."""
    path = mirror / HISTORY_NAME
    descriptor = open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        append_lines(descriptor, [entry.model_dump_json()])
        os.fsync(descriptor)
        too_long = os.fstat(descriptor).st_size > _MAX_BYTES
    finally:
        os.close(descriptor)
    if too_long:
        kept: list[bytes] = []
        size = 0
        for old in reversed(read_history(mirror)):
            line = old.model_dump_json().encode() + b"\n"
            size += len(line)
            if kept and size > _MAX_BYTES // 2:
                break
            kept.append(line)
        replace_file(path, b"".join(reversed(kept)))
