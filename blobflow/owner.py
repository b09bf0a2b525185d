"""Who holds a lease or an intent: a process that others on the same machine can find to be gone."""

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

    Of a process of another machine nothing is known: then False, and only the lease's expiry counts.
    """
    machine, _, pid = owner.rpartition("/")
    if machine != _machine() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):  # no pid is that large
        return True
    except PermissionError:
        return False
    return False


@cache
def boot_id() -> str:
    """Differs after every start of the machine; empty where the system does not tell (not Linux)."""
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
        namespace = "-"  # not Linux: the host name has to do
    return f"{socket.gethostname()}/{boot_id()[:8] or '-'}/{namespace}"
