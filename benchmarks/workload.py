"""What is moved: one large file, or many small ones; incompressible, the same on every machine."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

MIB = 1024 * 1024
SMALL_FILE_BYTES = 32 * 1024
FILES_PER_DIRECTORY = 100
BATCH_PAYLOAD_BYTES = 4 * 1024
ONE_NAME = "blob.bin"
_SEED = 20_261_120
_BLOCK = b"\1" * MIB


@dataclass(frozen=True)
class Workload:
    """A directory that is moved."""

    name: str
    path: Path
    files: int
    bytes: int


@contextmanager
def working_directory(needed_bytes: int) -> Generator[Path]:
    """A directory in memory (so that no disk is measured), removed afterwards.

    All of its memory is touched before, for whoever comes first; see `touch_memory`.

    Raises:
        SystemExit: there is not enough memory for it.
    """
    base = Path("/dev/shm")
    if not os.access(base, os.W_OK):
        base = Path(tempfile.gettempdir())
        print(f"benchmarks: no writable /dev/shm; the figures contain the disk under {base}")
    free = shutil.disk_usage(base).free
    if free < needed_bytes:
        raise SystemExit(
            f"benchmarks: {base} has {free / MIB:,.0f} MiB left, this takes {needed_bytes / MIB:,.0f} MiB: "
            "choose a smaller --size or --files"
        )
    with tempfile.TemporaryDirectory(prefix="blobflow-bench-", dir=base) as directory:
        touch_memory(Path(directory), needed_bytes)
        yield Path(directory)


def touch_memory(directory: Path, size: int) -> None:
    """Fill so much of a directory in memory, and empty it again.

    On a virtual machine a page that was not used for a while has to be found by the host, for several times as much
    processor time as it takes to fill it.
    """
    path = directory / "touched"
    with path.open("wb") as file:
        file.writelines(repeat(_BLOCK, -(-size // MIB)))
    path.unlink()


def available_memory_bytes() -> int:
    """What Linux could give away without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def one_file(directory: Path, size: int) -> Workload:
    """One file of `size` bytes."""
    path = directory / "one"
    path.mkdir(parents=True)
    noise = random.Random(_SEED)
    with (path / ONE_NAME).open("wb") as file:
        for length in chain(repeat(MIB, size // MIB), [size % MIB] * bool(size % MIB)):
            file.write(noise.randbytes(length))
    return Workload("one", path, 1, size)


def many_files(directory: Path, count: int) -> Workload:
    """`count` files of 32 KiB, 100 in a directory."""
    path = directory / "many"
    noise = random.Random(_SEED + 1)
    for number in range(count):
        folder = path / f"d{number // FILES_PER_DIRECTORY:04d}"
        if number % FILES_PER_DIRECTORY == 0:
            folder.mkdir(parents=True)
        (folder / f"f{number:06d}").write_bytes(noise.randbytes(SMALL_FILE_BYTES))
    return Workload("many", path, count, count * SMALL_FILE_BYTES)


def layered_files(directory: Path, size: int) -> Workload:
    """Files of 4 KiB to 8 MiB that compress about as well as a container's: words, and a quarter of noise."""
    path = directory / "layers"
    dice = random.Random(_SEED + 2)
    words = [dice.randbytes(dice.randint(2, 9)).hex() for _ in range(8192)]
    blocks = [" ".join(dice.choices(words, k=6000)).encode()[: 64 * 1024] for _ in range(192)]
    blocks += [dice.randbytes(64 * 1024) for _ in range(64)]
    done = number = 0
    while done < size:
        folder = path / f"d{number // FILES_PER_DIRECTORY:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        length = min(size - done, 4096 << dice.randint(0, 11))
        with (folder / f"f{number:06d}").open("wb") as file:
            for start in range(0, length, 64 * 1024):
                file.write(dice.choice(blocks)[: length - start])
        done += length
        number += 1
    return Workload("layers", path, number, size)


def batch_files(directory: Path, count: int) -> Workload:
    """`count` files of 4 KiB in one directory: what those insert who take nothing but files."""
    path = directory / "batch"
    path.mkdir(parents=True)
    noise = random.Random(_SEED + 3)
    for number in range(count):
        (path / f"f{number:06d}").write_bytes(noise.randbytes(BATCH_PAYLOAD_BYTES))
    return Workload("batch", path, count, count * BATCH_PAYLOAD_BYTES)


def files_below(path: Path) -> dict[str, int]:
    """Relative path -> size of every file below `path`."""
    return {
        os.path.relpath(os.path.join(folder, name), path): os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    }


def difference(expected: Path, actual: Path, *, contents: bool) -> str:
    """What differs between two directories, in words; empty if nothing does."""
    wanted, found = files_below(expected), files_below(actual)
    if wanted != found:
        return (
            f"{len(found)} files with {sum(found.values())} bytes instead of {len(wanted)} with {sum(wanted.values())}"
        )
    for name in wanted if contents else ():
        with (expected / name).open("rb") as left, (actual / name).open("rb") as right:
            while chunk := left.read(MIB):
                if chunk != right.read(MIB):
                    return f"{name} differs"
    return ""
