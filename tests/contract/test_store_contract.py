"""The contract suite, against every store there is."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import SecretStr

from blobflow.stores import Store
from blobflow.stores.fsspec.store import FsspecStore
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Options, S3Store
from blobflow.testing import StoreContract
from tests.servers import S3Endpoint

pytestmark = pytest.mark.seed("1.11")


class TestLocal(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "store")

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, LocalStore)
        return LocalStore(store.root)

    def how_to_open(self, store: Store) -> tuple[str, dict[str, Any]]:
        return store.url, {}


class TestLocalWithRetries(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> RetryingStore:
        return RetryingStore(LocalStore(tmp_path / "st\u00f6re with space"))

    def how_to_open(self, store: Store) -> tuple[str, dict[str, Any]]:
        return store.url, {}


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[FsspecStore]:
        name = uuid.uuid4().hex
        yield FsspecStore(f"memory://{name}")
        memory = fsspec.filesystem("memory")
        if memory.exists(f"/{name}"):
            memory.rm(f"/{name}", recursive=True)

    def reopen(self, store: Store) -> Store:
        return FsspecStore(store.url)


class TestFsspecDirectory(StoreContract):
    """fsspec's own local file system stands for those that publish by renaming, like sftp."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> FsspecStore:
        return FsspecStore(f"file://{tmp_path}")

    def test_names_are_free_after_delete(self, store: Store) -> None:
        """The file system keeps directories that became empty, so a prefix never becomes a key again."""
        pytest.skip("not promised where fsspec has real directories")


def _open_s3(endpoint: S3Endpoint) -> S3Store:
    return S3Store(
        S3Options(
            bucket=endpoint.new_bucket(),
            prefix="some/prefix",
            endpoint_url=endpoint.endpoint_url,
            region=endpoint.region,
            access_key_id=endpoint.access_key_id,
            secret_access_key=SecretStr(endpoint.secret_access_key),
        )
    )


def _options(store: Store) -> S3Options:
    inner = store.store if isinstance(store, RetryingStore) else store
    assert isinstance(inner, S3Store)
    return inner.options


class _S3Contract(StoreContract):
    def reopen(self, store: Store) -> Store:
        return S3Store(_options(store))

    def how_to_open(self, store: Store) -> tuple[str, dict[str, Any]]:
        options = _options(store)
        assert options.secret_access_key is not None
        return store.url, {
            "endpoint_url": options.endpoint_url,
            "region": options.region,
            "access_key_id": options.access_key_id,
            "secret_access_key": options.secret_access_key.get_secret_value(),
        }


class TestS3OnMoto(_S3Contract):
    @pytest.fixture
    def store(self, moto_s3: S3Endpoint) -> Iterator[Store]:
        store = _open_s3(moto_s3)
        yield store
        store.close()

    def test_an_upload_id_belongs_to_its_key(self, store: Store) -> None:
        """Here moto looks uploads up by their id alone."""
        pytest.skip("moto takes an upload id under any key")

    def test_a_second_complete_changes_nothing(self, store: Store) -> None:
        """Here moto dies of a KeyError when an unknown upload is completed."""
        pytest.skip("moto answers 500 to the second complete")


@pytest.mark.rgw
class TestS3OnCeph(_S3Contract):
    longest_key_bytes = 150  # tests/tools/start-rgw.sh: osd max object name len

    @pytest.fixture
    def store(self, rgw_s3: S3Endpoint) -> Iterator[Store]:
        """With retries: a gateway that races with itself for one object answers 500 now and then."""
        store = RetryingStore(_open_s3(rgw_s3))
        yield store
        store.close()
