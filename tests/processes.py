"""Processes that tests start, end and wait for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 300.0
"""No test waits that long; it is how long a broken one may hang on a busy machine."""


def wait_for(holds: Callable[[], Any], seconds: float = PATIENCE_S, log: Path | None = None) -> Any:
    """Look every 50 ms at what only another process can change, and return it once it is true.

    Args:
        log: What the other process wrote; its end is shown if the wait is in vain.
    """
    pause, ends_at = threading.Event(), time.monotonic() + seconds
    while not (found := holds()):
        said = log.read_text(errors="replace")[-5000:] if log is not None else ""
        assert time.monotonic() < ends_at, f"not within {seconds} s\n{said}"
        pause.wait(0.05)
    return found


def kill(pid: int) -> None:
    """SIGKILL one process."""
    os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
