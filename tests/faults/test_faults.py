"""Lost answers, lost requests, corrupt reads: transfers finish, once, or say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from blobflow import Artifact, download, upload, verify
from blobflow.errors import IntegrityError, StoreUnavailable
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.testing import (
    CorruptRead,
    FailAfter,
    FailBefore,
    Fault,
    FaultyStore,
    Request,
    Truncate,
    random_faults,
    read_tree,
)
from blobflow.uploads.intent import SUFFIX
from tests.clock import Clock
from tests.kit import SERIAL, SMALL, TREE, artifact_of, keys, local_store

KEY = "a.tar"
MANIFEST_KEY = f"{KEY}.manifest.json"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path / "made")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return local_store(tmp_path)


def retrying(store: Store) -> RetryingStore:
    return RetryingStore(store, sleep=lambda _: None)


class Once:
    """A fault for the first request of an operation and a key."""

    def __init__(self, operation: str, key: str, fault: Fault) -> None:
        self._target = (operation, key)
        self._fault: Fault | None = fault

    def __call__(self, request: Request) -> Fault | None:
        if (request.operation, request.key) != self._target:
            return None
        fault, self._fault = self._fault, None
        return fault


def check_published(store: LocalStore, artifact: Artifact) -> None:
    """Exactly one whole artifact, and nothing left over."""
    assert verify(store, KEY, mode="deep").artifact_digest == artifact.digest
    assert keys(store) == [KEY, MANIFEST_KEY]
    assert store.list_uploads() == []


@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("complete_multipart", KEY),
        ("put", MANIFEST_KEY),
        ("put", f"{KEY}{SUFFIX}"),
        ("put_part", KEY),
        ("delete", f"{KEY}{SUFFIX}"),
    ],
)
@pytest.mark.parametrize("fault", [FailBefore(), FailAfter()])
def test_a_lost_answer_is_settled(operation: str, key: str, fault: Fault, artifact: Artifact, store: LocalStore):
    """Whether the store did it or not: the upload succeeds, and there is one artifact."""
    faulty = FaultyStore(store, Once(operation, key, fault))
    assert upload(retrying(faulty), KEY, artifact, profile=SERIAL).status == "uploaded"
    assert faulty.count(operation) >= 2
    check_published(store, artifact)


@pytest.mark.parametrize(
    ("operation", "key"), [("complete_multipart", KEY), ("put", MANIFEST_KEY), ("put", f"{KEY}{SUFFIX}")]
)
def test_without_retries_the_next_run_settles_it(operation: str, key: str, artifact: Artifact, store: LocalStore):
    """The answer is lost and the process gives up: running it again finds what was done."""
    with pytest.raises(StoreUnavailable):
        upload(FaultyStore(store, Once(operation, key, FailAfter())), KEY, artifact, profile=SERIAL)
    upload(store, KEY, artifact, profile=SERIAL)
    assert verify(store, KEY, mode="deep").artifact_digest == artifact.digest
    assert store.list_uploads() == []


@pytest.mark.parametrize("fault", [FailBefore(), FailAfter(), Truncate(keep=100)])
def test_every_second_request_may_fail(fault: Fault, artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Each request fails once and works the second time: uploads, verifications and downloads do not mind.

    `create_multipart` is left out: an answer of it that is lost leaves an empty upload, which `gc` removes.
    """
    failed: set[object] = set()

    def faults(request: Request) -> Fault | None:
        if request.operation == "create_multipart":
            return None
        failed.symmetric_difference_update({(request.operation, request.key)})
        return fault if (request.operation, request.key) in failed else None

    faulty = retrying(FaultyStore(store, faults))
    upload(faulty, KEY, artifact, profile=SERIAL)
    verify(faulty, KEY, mode="deep", profile=SERIAL)
    download(faulty, KEY, tmp_path / "dest", profile=SERIAL)
    assert read_tree(tmp_path / "dest" / "data") == TREE
    assert faulty.retries > 20
    check_published(store, artifact)


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_of_all_requests_may_fail_at_random(seed: int, artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Before, after, in the middle: the tree arrives, and the payload is whole."""
    faulty = retrying(FaultyStore(store, random_faults(seed, 0.2)))
    upload(faulty, KEY, artifact, profile=SMALL)
    download(faulty, KEY, tmp_path / "dest", profile=SMALL)
    assert read_tree(tmp_path / "dest" / "data") == TREE
    assert verify(store, KEY, mode="deep").artifact_digest == artifact.digest


@pytest.mark.seed("1.3", "3.20", "W0.8")
@pytest.mark.parametrize("number", range(1, 9))
def test_a_corrupt_read_fails_the_download_and_the_next_one_succeeds(
    number: int, artifact: Artifact, store: LocalStore, tmp_path: Path
):
    """Whichever range came wrong: an integrity error, nothing at the destination, and a second run that lands."""
    upload(store, KEY, artifact, profile=SMALL)

    def faults(request: Request) -> Fault | None:
        return CorruptRead(at=17) if (request.operation, request.number) == ("get_range", number) else None

    with pytest.raises(IntegrityError) as refusal:
        download(FaultyStore(store, faults), KEY, tmp_path / "dest", profile=SERIAL)
    assert refusal.value.exit_code == 3
    assert not (tmp_path / "dest").exists()
    download(store, KEY, tmp_path / "dest", profile=SERIAL)
    assert read_tree(tmp_path / "dest" / "data") == TREE


def test_a_corrupt_manifest_read_is_an_error(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The sibling came wrong once; the next read is right."""
    upload(store, KEY, artifact, profile=SMALL)
    faulty = FaultyStore(store, Once("get", MANIFEST_KEY, CorruptRead(at=1)))
    with pytest.raises(IntegrityError):
        download(faulty, KEY, tmp_path / "dest")
    download(faulty, KEY, tmp_path / "dest")


def test_a_store_that_stays_away_is_temporary(artifact: Artifact, store: LocalStore):
    """After the patience is used up: exit code 75, and what was sent is kept."""

    def faults(request: Request) -> Fault | None:
        return FailBefore() if request.operation == "put_part" and request.number > 3 else None

    clock = Clock()
    impatient = RetryingStore(FaultyStore(store, faults), patience_s=5, sleep=clock.sleep, clock=clock)
    with pytest.raises(StoreUnavailable) as answer:
        upload(impatient, KEY, artifact, profile=SERIAL)
    assert answer.value.exit_code == 75
    assert upload(store, KEY, artifact, profile=SERIAL).bytes_resumed == 3 * 4096
