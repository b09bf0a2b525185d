"""Running a command and knowing what it cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.native import compiled

_POLL_S = 0.002


class CommandFailed(Exception):
    """A measured command did not do what it was asked to."""


@dataclass(frozen=True)
class Cost:
    """Of a process and all its descendants."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    """Of the largest single process."""


@dataclass(frozen=True)
class Command:
    """A command line; `display` is how somebody else would type it."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    display: str = ""


def run(command: Command, *, log: Path, timeout_s: float = 3600.0) -> Cost:
    """Run a command to its end.

    Args:
        log: Its output; quoted when it fails.

    Raises:
        CommandFailed: a non-zero exit code, or it took longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory(dir=log.parent) as directory:
        report = Path(directory, "report.json")
        process = _start(command, report, log)
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{command.display}: not done after {timeout_s:.0f} s") from None
        finally:
            _end(process)
        cost = json.loads(report.read_text(encoding="utf-8"))
    if cost["exit_code"] != 0:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise CommandFailed(f"{command.display}: exit code {cost['exit_code']}\n{said}")
    return Cost(cost["wall_s"], cost["user_s"] + cost["system_s"], cost["max_rss_bytes"])


def run_until_killed(command: Command, when: Callable[[], bool], *, log: Path, timeout_s: float = 600.0) -> float:
    """Run a command and kill it, with its descendants, by SIGKILL as soon as `when()` is true.

    Returns the seconds until then.

    Raises:
        CommandFailed: it ended before, or the time never came.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=log.parent) as directory:
        process = _start(command, Path(directory, "report.json"), log)
        try:
            while not when():
                if process.poll() is not None:
                    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise CommandFailed(f"{command.display}: ended before it could be killed\n{said}")
                if time.monotonic() - started > timeout_s:
                    raise CommandFailed(f"{command.display}: not at the point to be killed after {timeout_s:.0f} s")
                time.sleep(_POLL_S)
        finally:
            _end(process)
    return time.monotonic() - started


def _start(command: Command, report: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(compiled("meter")), str(report), *command.arguments],
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of it behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
