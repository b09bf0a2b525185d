"""What faults leave in a bucket, and that `gc` takes all of it away."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blobflow import Artifact, upload
from blobflow.errors import BlobflowError
from blobflow.maintenance.gc import DEFAULT_AGE_S, collect
from blobflow.testing import FaultyStore
from tests.fault_proxy import FaultProxy, Reset, Truncate, random_faults
from tests.fault_rules import Rule
from tests.faults.clients import PREFIX, Stores
from tests.kit import SERIAL, SMALL, Killed, artifact_of, dies_at
from tests.strict_s3 import FailAfter, StrictS3

KEY = "orders.tar"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path)


def later(seconds: float) -> Callable[[], float]:
    """A clock that is ahead by so many seconds."""
    return lambda: time.time() + seconds


@pytest.mark.seed("W1.4")
def test_a_lost_answer_to_the_beginning_of_an_upload_leaves_an_orphan_until_gc(
    strict_s3: StrictS3, stores: Stores, artifact: Artifact
):
    """Nobody learned its id: the upload goes on with another one, and `gc` takes the first away when it is old."""
    strict_s3.script(Rule(FailAfter(), "CreateMultipartUpload", f"*/{KEY}"))
    store = stores(strict_s3)
    bucket = stores.bucket(strict_s3)
    upload(store, KEY, artifact, profile=SERIAL)
    assert list(strict_s3.uploads(bucket).values()) == [f"{PREFIX}/{KEY}"]
    assert sorted(strict_s3.objects(bucket)) == [f"{PREFIX}/{KEY}", f"{PREFIX}/{KEY}.manifest.json"]

    assert collect(store, clock=later(DEFAULT_AGE_S / 2)).uploads == []
    (collected,) = collect(store, clock=later(DEFAULT_AGE_S + 60)).uploads
    assert collected.key == KEY
    assert strict_s3.uploads(bucket) == {}
    assert upload(store, KEY, artifact).status == "unchanged"


@pytest.mark.seed("W1.4")
@pytest.mark.parametrize("seed", range(4))
def test_after_gc_no_fault_has_left_an_upload(
    seed: int,
    strict_s3: StrictS3,
    proxy: FaultProxy,
    stores: Stores,
    artifact: Artifact,
):
    """Whatever broke and whoever died on the way: no upload is listed afterwards, and what is whole stays."""
    store = stores(strict_s3, proxy)
    proxy.faults = random_faults(seed, 0.1, [Truncate(), Truncate(0), Truncate(100), Reset()])
    for number in range(1, 30, 3):
        with suppress(Killed, BlobflowError):
            upload(FaultyStore(store, dies_at(number + seed)), f"{number}.tar", artifact, profile=SMALL)
    proxy.faults = lambda _: None
    bucket = stores.bucket(strict_s3)
    assert strict_s3.uploads(bucket)

    report = collect(store, clock=later(DEFAULT_AGE_S * 2), payloads=True)

    assert report.failed == report.unreadable == []
    assert strict_s3.uploads(bucket) == {}
    left = {key.removeprefix(f"{PREFIX}/") for key in strict_s3.objects(bucket)}
    assert {key for key in left if key.endswith(".upload.json")} == set()
    assert {key.removesuffix(".manifest.json") for key in left} == {key for key in left if key.endswith(".tar")}
