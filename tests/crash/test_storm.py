"""Two hundred kills over a network that spoils what passes: everything ends whole, or with an error that says why.

BLOBFLOW_STORM_SEED repeats a plan, BLOBFLOW_STORM_KILLS changes its length.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blobflow.testing import write_tree
from tests.crash.machines import KIB, MIB, LocalPlace, S3Place
from tests.crash.storm import WORKERS, Cargo, Figures, Storm
from tests.fault_proxy import FaultProxy
from tests.kit import noise, sized
from tests.servers import S3Endpoint
from tests.strict_s3 import StrictS3

LENGTHS = [
    pytest.param(8, id="short"),
    pytest.param(sized(200, 60), id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]


@pytest.fixture(scope="session")
def cargos(tmp_path_factory: pytest.TempPathFactory) -> list[Cargo]:
    """Trees of one part and of several, with large and with many small files; parts on S3 are 5 MiB."""
    directory = tmp_path_factory.mktemp("cargos")
    trees = [
        {"one": noise(300 * KIB, 1), "empty": {}},
        {"many": {f"{n:03}": noise(n * 40, n) for n in range(400)}, "a": noise(6 * MIB, 2)},
        {"a": noise(5 * MIB, 3), "nested": {"b": noise(7 * MIB, 4)}},
        {"a": noise(9 * MIB, 5), "many": {f"{n:03}": noise(50 * KIB, n) for n in range(120)}},
    ]
    return [Cargo.of(write_tree(directory / str(n), tree)) for n, tree in enumerate(trees)]


def plan(kills: int) -> tuple[int, int]:
    """Seed and number of kills. A short storm has the same plan each time, a long one another each time."""
    fresh = 1 if kills < 50 else random.SystemRandom().getrandbits(32)
    seed = int(os.environ.get("BLOBFLOW_STORM_SEED", str(fresh)))
    print(f"BLOBFLOW_STORM_SEED={seed}")
    return seed, int(os.environ.get("BLOBFLOW_STORM_KILLS", str(kills)))


def assert_little_was_sent_again(figures: Figures) -> None:
    """For every kill the parts that were in flight, and those that the network spoiled."""
    assert figures.parts_sent_again <= figures.kills["push"] * WORKERS + figures.parts_spoiled


@pytest.mark.parametrize("kills", LENGTHS)
def test_a_storm_of_kills_on_a_local_store(kills: int, cargos: list[Cargo], tmp_path: Path):
    """Whoever is killed whenever: what is visible is whole, and nothing is left over."""
    seed, kills = plan(kills)
    place = LocalPlace(tmp_path / "store")
    figures = Storm(seed, kills, place, cargos, tmp_path, "--chunk-size", str(128 * KIB)).run()
    assert_little_was_sent_again(figures)
    assert figures.looks > 0


@pytest.mark.parametrize("kills", LENGTHS)
def test_a_storm_of_kills_and_faults_on_a_strict_s3(kills: int, cargos: list[Cargo], tmp_path: Path):
    """The network cuts, stalls, resets, loses answers, damages bytes in both directions and slows down as well."""
    seed, kills = plan(kills)
    with StrictS3() as server, FaultProxy(server.url) as proxy:
        place = S3Place(server.endpoint)
        figures = Storm(
            seed, kills, place, cargos, tmp_path, "--chunk-size", "5MiB", proxy=proxy, damaged_requests=True
        ).run()
    assert_little_was_sent_again(figures)
    assert figures.faults or kills < 100


@pytest.mark.rgw
@pytest.mark.parametrize("kills", LENGTHS)
def test_a_storm_of_kills_and_faults_on_ceph(kills: int, cargos: list[Cargo], tmp_path: Path, rgw_s3: S3Endpoint):
    """The same on a real server. It stores what was damaged on its way up, so that is left out here."""
    seed, kills = plan(kills)
    with FaultProxy(rgw_s3.endpoint_url) as proxy:
        place = S3Place(rgw_s3)
        figures = Storm(seed, kills, place, cargos, tmp_path, "--chunk-size", "5MiB", proxy=proxy).run()
    assert_little_was_sent_again(figures)
    assert figures.faults or kills < 100
