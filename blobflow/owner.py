"""Owners of leases and intents: processes whose end other processes of the machine can detect."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path


def process_owner() -> str:
    """This process, as `<host>/<boot>/<pid namespace>/<pid>`: the same pid elsewhere is another owner."""
    return f"{_machine()}/{os.getpid()}"


def owner_is_gone(owner: str) -> bool:
    """Whether `owner` was a process of this machine that no longer exists.

    It is False for a process of another machine: its state is unknown, and only the lease's expiry counts.
    """
    machine, _, pid = owner.rpartition("/")
    if machine != _machine() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):  # a pid is never that large
        return True
    except PermissionError:
        return False
    return False


@cache
def boot_id() -> str:
    """An id that changes with every start of the machine; empty if the system has none (not Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@cache
def _machine() -> str:
    try:
        # Containers of one host share the boot id, and their pids mean different processes.
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = "-"  # not Linux: the host name must do
    return f"{socket.gethostname()}/{boot_id()[:8] or '-'}/{namespace}"
