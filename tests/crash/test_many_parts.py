"""More parts than any page of a listing has, up to the most that S3 takes: killed at half, and continued."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow import Artifact, ChunkProfile, UploadResult, export_artifact, upload, verify
from blobflow.checksum import crc32c
from blobflow.stores.base import Store
from blobflow.testing import FaultyStore, Request, write_tree
from tests.crash.machines import LocalPlace, Machine, kill_when
from tests.faults.clients import Stores
from tests.kit import Killed, noise
from tests.servers import S3Endpoint
from tests.strict_s3 import Limits, StrictS3

KEY = "orders/today"

MANY = [
    1000,
    pytest.param(2500, marks=pytest.mark.slow),
    pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]
ROUND = [pytest.param(2500, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.slow)]
"""Numbers of parts; the smallest ones for S3 have a test among the faults."""


def source_of(path: Path, parts: int, part_size: int) -> Path:
    """A directory whose payload has exactly so many parts."""
    source = write_tree(path / "source", {"large": noise(parts * part_size), "small": "hello\n"})
    around = export_artifact(source, path / "measured").artifact.payload_size - parts * part_size
    os.truncate(source / "large", parts * part_size - around - 512)
    return source


def dies_at_half(parts: int) -> Callable[[Request], None]:
    """The process dies in the middle of its parts, and sends nothing after that."""
    dead = False

    def faults(request: Request) -> None:
        nonlocal dead
        dead = dead or (request.operation == "put_part" and request.number > parts // 2)
        if dead:
            raise Killed

    return faults


def killed_and_continued(store: Callable[[], Store], source: Path, parts: int, part_size: int) -> UploadResult:
    """Upload half of the parts, then the rest from another export of the same source, with nothing from before."""
    profile = ChunkProfile.custom(part_size, 500, workers=4)
    first, second = (export_artifact(source, source.parent / name).artifact for name in ("first", "second"))
    with pytest.raises(Killed):
        upload(FaultyStore(store(), dies_at_half(parts)), KEY, first, profile=profile)
    watched = FaultyStore(store())
    result = upload(watched, KEY, second, profile=profile)
    assert result.parts == parts
    assert result.bytes_sent + result.bytes_resumed == result.bytes_total == first.payload_size
    # A part that was in flight when the process died may have arrived, and is not sent again then.
    assert parts - parts // 2 - profile.workers <= watched.count("put_part") <= parts - parts // 2
    assert verify(store(), KEY, mode="deep").artifact_digest == first.digest
    assert store().list_uploads() == []
    return result


@pytest.mark.seed("3.18", "W3.1")
@pytest.mark.parametrize("parts", MANY)
def test_a_killed_process_is_continued_on_a_local_store(parts: int, tmp_path: Path):
    """A real command, killed when half of the parts are there: the other one sends the rest."""
    source = source_of(tmp_path, parts, 4096)
    place = LocalPlace(tmp_path / "store")
    options = ("--chunk-size", "4096", "--workers", "2")
    first, second = (Machine(tmp_path / name, place, *options) for name in ("first", "second"))
    assert kill_when(lambda: len(place.parts(KEY)) >= parts // 2, first.start("push", source, KEY)), "it was too quick"
    held = len(place.parts(KEY))
    document = second.run("push", source, KEY)
    assert document["parts"] == parts
    assert held * 4096 <= document["bytes_resumed"] <= (held + 2) * 4096
    assert document["bytes_sent"] + document["bytes_resumed"] == document["bytes_total"] == place.size(KEY)
    landed = tmp_path / "landed"
    second.run("pull", KEY, landed)
    assert (landed / "data" / "large").read_bytes() == (source / "large").read_bytes()
    assert place.leftovers() == []


@pytest.mark.seed("W3.1")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parts", ROUND)
def test_a_killed_upload_is_continued_on_a_strict_s3(parts: int, stores: Stores, tmp_path: Path):
    """Up to the last part number there is, found again page by page, and put together in their order."""
    source = source_of(tmp_path, parts, 2048)
    with StrictS3(Limits(min_part_size=1)) as server:
        killed_and_continued(lambda: stores(server), source, parts, 2048)
        pages = server.requests("ListParts")
        (payload,) = (data for key, data in server.objects(stores.bucket(server)).items() if key.endswith(KEY))
        assert crc32c(payload) == Artifact.open(tmp_path / "first").payload_crc32c
    assert len(pages) >= parts // 2 // 1000 + parts // 1000
    stores.close()


@pytest.mark.rgw
@pytest.mark.seed("W3.1")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parts", ROUND)
def test_a_killed_upload_is_continued_on_ceph(parts: int, fine_grained_rgw: S3Endpoint, stores: Stores, tmp_path: Path):
    """The same with the pages of a real server, which tells no checksums of parts."""
    source = source_of(tmp_path, parts, 2048)
    killed_and_continued(lambda: stores(fine_grained_rgw), source, parts, 2048)
