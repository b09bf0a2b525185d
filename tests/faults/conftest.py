"""A strict S3 for each test, a proxy in front of it, and stores that wait in no real time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault_proxy import FaultProxy
from tests.faults.clients import Clients, Stores
from tests.servers import service_model_read_once
from tests.strict_s3 import Limits, StrictS3


@pytest.fixture(scope="session", autouse=True)
def _service_model_is_read_once() -> Iterator[None]:
    with service_model_read_once():
        yield


@pytest.fixture
def strict_s3() -> Iterator[StrictS3]:
    """A strict S3 of its own for each test, with parts of any size."""
    with StrictS3(Limits(min_part_size=1)) as server:
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


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    """Makes plain clients; they are closed at the end."""
    clients = Clients()
    yield clients
    clients.close()
