"""Freight of the size that the command line is for: what it costs in memory and in room, and that it arrives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.crash.conftest import Freight
from tests.crash.machines import MIB, LocalPlace, Machine, Place, kill_when
from tests.kit import noise

GIB = 1024 * MIB
PAX_LIMIT = 8 * GIB
"""From here on the size of a file no longer fits into the tar header."""

Machines = Callable[..., Machine]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def allocated(*directories: Path) -> int:
    """Bytes on disk below the directories; a hole takes none."""
    total = 0
    for directory in directories:
        for parent, _, names in os.walk(directory):
            for name in names:
                with suppress(FileNotFoundError):  # gone meanwhile
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


def high_water(pid: int) -> int:
    """The most memory the process ever had, in bytes; ru_maxrss survives exec, so that it counts the parent too."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0  # at its end it has none left


def measured(machine: Machine, *command: object, room: tuple[Path, ...]) -> tuple[dict[str, Any], int, int]:
    """Run a command; its document, its peak memory, and the most it had on disk in `room`, in bytes."""
    started = time.monotonic()
    with machine.start(*command) as process:
        memory = peak = 0
        while process.poll() is None:
            memory = max(memory, high_water(process.pid))
            peak = max(peak, allocated(*room))
            time.sleep(0.02)
        out, err = process.communicate()
    assert process.returncode == 0, out + err
    print(f"{command[0]}: {time.monotonic() - started:.1f} s, {memory / MIB:.0f} MiB, {peak / MIB:.1f} MiB on disk")
    return json.loads(out), memory, peak


@pytest.mark.seed("0.1", "1.15")
@pytest.mark.parametrize("where", ["local"], indirect=True)
def test_ten_gib_move_in_little_memory_and_without_a_staging_copy(place: LocalPlace, machine: Machines, tmp_path: Path):
    """A sparse file of 10 GiB: peak memory below 130 MiB, less than 16 MiB of room besides what is there at the end."""
    source, size = tmp_path / "source", 10 * GIB
    source.mkdir()
    with open(source / "disk.img", "wb") as file:
        file.truncate(size)
        for offset in (0, PAX_LIMIT - 1000, size - MIB):
            file.seek(offset)
            file.write(noise(MIB, offset))
    assert size > PAX_LIMIT
    user = machine()
    document, memory, room = measured(user, "push", source, "k", room=(user.tmp, user.home))
    assert document["bytes_sent"] == document["bytes_total"] > size
    assert memory < 130 * MIB
    assert room < 16 * MIB

    _, memory, _ = measured(user, "verify", "k", "--deep", room=())
    assert memory < 130 * MIB

    landing = tmp_path / "landing"
    document, memory, room = measured(user, "pull", "k", landing / "here", room=(landing, user.tmp, user.home))
    assert memory < 130 * MIB
    assert room - allocated(landing) < 16 * MIB
    subprocess.run(["cmp", source / "disk.img", landing / "here" / "data" / "disk.img"], check=True)
    assert allocated(landing) < 64 * MIB, "what was a hole is one again"
    listed = subprocess.run(["tar", "tvf", place.root / "k"], capture_output=True, text=True, check=True).stdout
    assert f" {size} " in listed


@pytest.mark.parametrize("where", ["local"], indirect=True)
def test_a_hundred_thousand_files_travel(place: LocalPlace, machine: Machines, tmp_path: Path):
    """Many small files, some of them deep: they arrive, and an unchanged push sends nothing."""
    source = tmp_path / "source"
    for number in range(100_000):
        directory = source / f"group {number // 500:03}"
        if not number % 500:
            directory = directory.joinpath(*["d" * 100] * (number // 500 % 5))
            directory.mkdir(parents=True)
        (directory / f"file-{number:06}").write_text(f"{number}\n")
    user = machine()
    document, memory, _ = measured(user, "push", source, "k", room=())
    assert document["members"] == 100_000
    assert memory < 170 * MIB
    document, _, _ = measured(user, "push", source, "k", room=())
    assert document["status"] == "unchanged"
    document, memory, _ = measured(user, "pull", "k", tmp_path / "landed", room=())
    assert document["members"] == 100_000
    assert memory < 170 * MIB
    subprocess.run(["diff", "-r", source, tmp_path / "landed" / "data"], check=True)


@pytest.mark.parametrize("where", ["local", pytest.param("rgw", marks=pytest.mark.rgw)], indirect=True)
def test_a_gib_killed_at_half_is_sent_once(
    place: Place, machine: Machines, freight: Callable[[int, int], Freight], tmp_path: Path
):
    """With the default profile the second run sends the other half, and a few parts at most come twice."""
    cargo = freight(8 * MIB, 128)
    assert kill_when(lambda: len(place.parts("k")) >= 64, machine().start("push", cargo.source, "k"))
    held = len(place.parts("k")) * cargo.chunk_size
    user = machine()
    document, memory, _ = measured(user, "push", cargo.source, "k", room=())
    assert document["bytes_sent"] + document["bytes_resumed"] == document["bytes_total"]
    assert held <= document["bytes_resumed"] <= held + 4 * cargo.chunk_size
    assert memory < 130 * MIB
    _, memory, _ = measured(user, "pull", "k", tmp_path / "landed", room=())
    assert memory < 130 * MIB
    assert cargo.is_whole(tmp_path / "landed" / "data")
