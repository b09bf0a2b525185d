"""The scratch directory of an export: private, small, and gone afterwards whatever happens."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blobflow.errors import RefusedError, TransferBusy, writing

_PREFIX: Final = ".blobflow-push-"
_ATTEMPTS: Final = 10


@contextmanager
def scratch_directory(source: Path, parent: Path | None = None) -> Generator[Path]:
    """A private directory that goes at the end, and what killed processes left of theirs goes first.

    Its owner holds a lock on it, which ends with the process: a directory that nobody holds is left over.

    Args:
        source: What is exported; the directory must not lie inside it.
        parent: Where to make it; by default among the system's temporary files.
    """
    remedy = "set TMPDIR to a directory elsewhere" if parent is None else "name a scratch directory elsewhere"
    parent = parent or Path(tempfile.gettempdir())
    if parent.resolve().is_relative_to(source.resolve()):
        raise RefusedError(
            f"the directory for temporary files, {parent}, lies inside {source}", hint=remedy, path=str(parent)
        )
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or another process removes it at this moment
            if (descriptor := hold(leftover)) is not None:
                shutil.rmtree(leftover)
                os.close(descriptor)
    for _ in range(_ATTEMPTS):
        with writing(parent):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        descriptor = hold(path)
        if descriptor is not None:
            try:
                yield path
            finally:
                shutil.rmtree(path)
                os.close(descriptor)
            return
        # Another process took it for a leftover in the moment before it was held.
    raise TransferBusy(f"no directory for temporary files stays in {parent}", path=str(parent))


def hold(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the directory until it is closed, or until the process ends.

    None: somebody else holds it, or has removed or replaced it.

    Args:
        shared: With others that hold it shared, too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
