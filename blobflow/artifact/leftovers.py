"""Removes what killed downloads left beside their destinations."""

from __future__ import annotations

import logging
from pathlib import Path

from blobflow.artifact.landing import REPLACED_NAME, STAGE_PREFIX, lock_of, remove_stage
from blobflow.durable import try_lock
from blobflow.errors import BlobflowError, RefusedError

_log = logging.getLogger(__name__)


def remove_stages(directory: Path, *, idle_since: float, dry_run: bool = False) -> list[Path]:
    """Remove the stages in `directory` that no process holds and that were not written to after `idle_since`.

    Args:
        idle_since: Unix time in seconds.
        dry_run: Only find them.

    Returns:
        The stages that were removed, or would be. Those of other users stay.
    """
    removed: list[Path] = []
    for path in sorted(directory.glob(f"{STAGE_PREFIX}*")):
        try:
            written = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if written > idle_since:
                continue
            if (path / REPLACED_NAME).exists():
                _log.warning("stage.stays path=%s reason=it may hold what somebody changed; restore again", path)
                continue
            with lock_of(path) as lock:
                if lock is None or not try_lock(lock):
                    continue
                if not dry_run:
                    remove_stage(path)
                removed.append(path)
        except RefusedError:
            continue
        except (BlobflowError, OSError) as error:  # it landed meanwhile, is not a directory, or is on a failing disk
            _log.warning("stage.stays path=%s error=%s", path, error)
    return removed
