"""What the tests of the core share: small trees, small profiles, and a process that dies at a chosen request."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blobflow import Artifact, ChunkProfile, export_artifact
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, Request, Tree, write_tree

if TYPE_CHECKING:
    import pytest

FULL_SIZE = bool(os.environ.get("BLOBFLOW_FULL_SIZE"))
"""Whether tests show what the project promises, on a machine that does nothing else meanwhile."""


def sized(full: int, usual: int) -> int:
    """The number that the project promises something for under `BLOBFLOW_FULL_SIZE=1`, otherwise a smaller one.

    The same test, and the same assertions but for seconds: what takes a machine hours is not what CI can do for each
    change, and what a second is worth there depends on the tests beside it.
    """
    return full if FULL_SIZE else usual


SMALL = ChunkProfile.custom(4096, 2, workers=2)
"""Parts of 4 KiB, a checkpoint after every second one."""
SERIAL = ChunkProfile.custom(4096, 1, workers=1)
"""One part after the other, a checkpoint after each: requests come in one order."""


def noise(size: int, seed: int = 0) -> bytes:
    """`size` bytes that no compression and no hole finding can shorten; the same ones for the same seed."""
    return random.Random(seed).randbytes(size)


TREE: Tree = {
    "big.bin": noise(20_000, 1),
    "empty": "",
    "empty dir": {},
    "nested": {"deep": {"file.txt": "hello\n", "other": noise(5_000, 2)}},
    "ünïcode": {"日本語.txt": "text"},
}
"""A file that spans parts, small ones, an empty one, an empty directory, names that need pax records."""


def artifact_of(path: Path, tree: Tree = TREE, **options: Any) -> Artifact:
    """The artifact `<path>/artifact` of `tree`, which is written to `<path>/source` unless it is there."""
    source = path / "source"
    if not source.exists():
        write_tree(source, tree)
    return export_artifact(source, path / "artifact", **options).artifact


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """A Parquet file of these columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), path)
    return path


def read_parquet(path: Path, column: str) -> list[Any]:
    """One column of a Parquet file."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read().column(column).to_pylist()


class Killed(BaseException):
    """The process is dead: no handler of an `Exception` sees it."""


def dies_at(request_number: int) -> Callable[[Request], None]:
    """Faults for a `FaultyStore`: the process dies at this request, counted from 1, and sends nothing after it."""
    sent = 0

    def faults(_: Request) -> None:
        nonlocal sent
        sent += 1
        if sent >= request_number:
            raise Killed

    return faults


def dies_before(operation: str, number: int = 1) -> Callable[[Request], None]:
    """Faults for a `FaultyStore`: the process dies at this request of an operation, and sends nothing after it."""
    dead = False

    def faults(request: Request) -> None:
        nonlocal dead
        dead = dead or (request.operation, request.number) == (operation, number)
        if dead:
            raise Killed

    return faults


def keys(store: Store) -> list[str]:
    """The keys of all objects."""
    return [meta.key for meta in store.list()]


def local_store(path: Path) -> LocalStore:
    """A local store at `<path>/store`."""
    return LocalStore(path / "store")


def declare(store: Store, **changes: Any) -> None:
    """Have a store say other capabilities from now on."""
    declared = replace(store.capabilities(), **changes)
    store.capabilities = lambda: declared


def watched(store: Store) -> FaultyStore:
    """`store`, writing down its requests."""
    return FaultyStore(store)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file or directory belong to another user; where this process may not do that, let it seem so."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345, follow_symlinks=False)
        return
    inode, fstat = path.lstat().st_ino, os.fstat

    def foreign(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        if status.st_ino != inode:
            return status
        fields = list(status)
        fields[stat.ST_UID] = fields[stat.ST_GID] = 12345
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", foreign)


def flip_a_byte(path: Path) -> None:
    """Damage a payload in the middle, where a member's content lies."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
