"""A strict S3 for each test, proxies in front of any server, and stores that wait in no real time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3 import S3Options, S3Store
from tests.fault_proxy import FaultProxy
from tests.servers import S3Endpoint
from tests.strict_s3 import StrictS3

PREFIX = "some/prefix"


class Stores:
    """Makes stores of a bucket, with retries whose waits are noted instead of waited for.

    Attributes:
        naps: Seconds of every wait, in order.
    """

    def __init__(self) -> None:
        self.naps: list[float] = []
        self._stack = ExitStack()
        self._buckets: dict[str, str] = {}

    def __call__(
        self, server: StrictS3 | S3Endpoint, proxy: FaultProxy | None = None, *, min_part_size: int = 1, **options: Any
    ) -> RetryingStore:
        """A store of the server's bucket; every store of one server has the same bucket.

        Args:
            proxy: Stands between the two.
            min_part_size: As in the rules of the server.
            options: See `S3Options`.
        """
        endpoint = server.endpoint if isinstance(server, StrictS3) else server
        given: dict[str, Any] = {
            "bucket": self.bucket(server),
            "prefix": PREFIX,
            "endpoint_url": proxy.url if proxy else endpoint.endpoint_url,
            "region": endpoint.region,
            "access_key_id": endpoint.access_key_id,
            "secret_access_key": SecretStr(endpoint.secret_access_key),
        }
        inner = S3Store(S3Options.model_validate(given | options))
        inner.abilities = replace(inner.abilities, min_part_size=min_part_size)
        store = RetryingStore(inner, sleep=self.naps.append)
        self._stack.callback(store.close)
        return store

    def bucket(self, server: StrictS3 | S3Endpoint) -> str:
        """The name of the bucket that the stores of this server use."""
        endpoint = server.endpoint if isinstance(server, StrictS3) else server
        if endpoint.endpoint_url not in self._buckets:
            self._buckets[endpoint.endpoint_url] = endpoint.new_bucket()
            self._stack.callback(endpoint.client.close)
        return self._buckets[endpoint.endpoint_url]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def strict_s3() -> Iterator[StrictS3]:
    """A strict S3 of its own for each test, with parts of any size."""
    from tests.strict_s3 import Rules

    with StrictS3(Rules(min_part_size=1)) as server:
        yield server


@pytest.fixture
def proxy(strict_s3: StrictS3) -> Iterator[FaultProxy]:
    """A proxy in front of the strict S3, without faults at first."""
    with FaultProxy(strict_s3.url) as proxy:
        yield proxy


@pytest.fixture
def stores() -> Iterator[Stores]:
    """Makes stores; they are closed at the end."""
    stores = Stores()
    yield stores
    stores.close()


MakeStore = Callable[..., RetryingStore]
