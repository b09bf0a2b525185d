"""Fixtures of the crash tests: what is sent, and where to."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from blobflow.testing import write_tree
from tests.crash.machines import KIB, MIB, LocalPlace, Machine, Place, S3Place
from tests.faults.clients import Stores
from tests.kit import noise
from tests.servers import S3Endpoint, missing_ceph_programs, rgw_server


@dataclass(frozen=True)
class Freight:
    """A directory to send, and the chunk that cuts it into enough parts to be interrupted among them."""

    source: Path
    chunk_size: int
    parts: int

    def is_whole(self, landed: Path) -> bool:
        """Whether `landed` has the same contents."""
        return subprocess.run(["diff", "-r", self.source, landed], check=False).returncode == 0


@pytest.fixture(scope="session")
def freight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Freight]:
    """Makes freight of about `parts` chunks of `chunk_size` bytes; sources are never written to again."""
    made: dict[tuple[int, int], Freight] = {}

    def make(chunk_size: int, parts: int) -> Freight:
        if (chunk_size, parts) not in made:
            size = chunk_size * parts
            source = tmp_path_factory.mktemp("freight")
            write_tree(source, {"a small one": "hello\n", "nested": {"empty": {}}})
            for name, share in (("nested/big.bin", size * 3 // 4), ("rest.bin", size // 4 - chunk_size // 2)):
                with open(source / name, "wb") as file:
                    file.writelines(noise(min(MIB, share - start), start + len(name)) for start in range(0, share, MIB))
            made[chunk_size, parts] = Freight(source, chunk_size, parts)
        return made[chunk_size, parts]

    return make


@pytest.fixture(params=["local", "moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def where(request: pytest.FixtureRequest) -> str:
    """Which kind of store the test runs on."""
    return request.param


@pytest.fixture
def place(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """An empty store."""
    if where == "local":
        return LocalPlace(tmp_path / "store")
    return S3Place(request.getfixturevalue(f"{where}_s3"))


@pytest.fixture
def cargo(where: str, freight: Callable[[int, int], Freight]) -> Freight:
    """Freight for an upload: S3 takes no parts below 5 MiB."""
    return freight(64 * KIB, 320) if where == "local" else freight(6 * MIB, 10)


@pytest.fixture
def machine(tmp_path: Path, place: Place) -> Callable[..., Machine]:
    """Makes machines that send to the place, each with a home and temporary files of its own."""
    count = 0

    def make(*options: str) -> Machine:
        nonlocal count
        count += 1
        return Machine(tmp_path / f"machine-{count}", place, *options)

    return make


@pytest.fixture
def stores() -> Iterator[Stores]:
    """Makes stores of buckets; they are closed at the end."""
    with closing(Stores()) as stores:
        yield stores


@pytest.fixture(scope="session")
def fine_grained_rgw() -> Iterator[S3Endpoint]:
    """A Ceph that takes small parts, so that thousands of them fit into memory."""
    if missing := missing_ceph_programs():
        pytest.skip(f"needs Ceph (Debian: radosgw ceph-mon ceph-osd); missing: {', '.join(missing)}")
    with rgw_server(min_part_size=1) as endpoint:
        yield endpoint
