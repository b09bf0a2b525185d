"""The scratch directory of an export: private, small, and always removed at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blobflow.durable import names_file
from blobflow.errors import RefusedError, TransferBusy, writing
from blobflow.private import PrivateDirectory
from blobflow.trees import make_directories

_PREFIX: Final = ".blobflow-push-"
_ATTEMPTS: Final = 10


@contextmanager
def scratch_directory(source: Path, parent: Path | None = None) -> Generator[Path]:
    """A private directory that is removed at the end; leftovers of killed processes are removed first.

    Its owner holds a lock on it, which ends with the process. So a directory without a lock is a leftover.

    Args:
        source: The directory that is exported; the scratch directory must not be inside it.
        parent: Where to create it; by default the system's directory for temporary files.
    """
    remedy = "set TMPDIR to a directory elsewhere" if parent is None else "name a scratch directory elsewhere"
    parent = parent or temporary_directory()
    if parent.resolve().is_relative_to(source.resolve()):
        raise RefusedError(
            f"the directory for temporary files, {parent}, is inside {source}", hint=remedy, path=str(parent)
        )
    with writing(parent):
        make_directories(parent)
        above = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(above):
            # Another process may remove it at this moment, and we must not remove another user's.
            if name.startswith(_PREFIX):
                with suppress(OSError, RefusedError), PrivateDirectory.within(above, name, parent / name) as leftover:
                    _remove(above, name, leftover)
        for _ in range(_ATTEMPTS):
            with writing(parent):
                name = os.path.basename(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            # Another process may remove it as a leftover in the moment before it is locked.
            try:
                scratch = PrivateDirectory.within(above, name, parent / name)
            except FileNotFoundError:
                continue
            with scratch:
                if not scratch.hold() or not names_file(name, scratch.descriptor, dir_fd=above):
                    continue
                try:
                    yield scratch.path
                finally:
                    _remove(above, name, scratch)
                return
    finally:
        os.close(above)
    raise TransferBusy(f"no directory for temporary files stays in {parent}", path=str(parent))


def temporary_directory() -> Path:
    """The system's directory for temporary files.

    Raises:
        RefusedError: none of the places for them is writable.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise RefusedError(
            f"there is no place for temporary files: {error.strerror}",
            hint="set TMPDIR to a directory that can be written to; a full disk and `ulimit -f` forbid it as well",
        ) from error


def _remove(above: int, name: str, directory: PrivateDirectory) -> None:
    """Remove a directory unless another process holds it."""
    if directory.hold():
        directory.clear()
        os.rmdir(name, dir_fd=above)
