"""Fixtures shared by all tests: running servers."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator

import pytest

from blobflow.testing import StoreContract
from tests.servers import S3Endpoint, find_postgres, missing_ceph_programs, moto_server, postgres_server, rgw_server

# A job that a shell started in the background ignores SIGINT, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_this_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that this user's own commands found out about servers is believed here, nor the reverse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a failed one: what CI does not run, nobody runs.

    The contract's tests are exempt: they skip what a store says it cannot do, on every machine alike.
    """
    report = yield
    kind: type | None = getattr(item, "cls", None)
    exempt = hasattr(report, "wasxfail") or (kind is not None and issubclass(kind, StoreContract))
    if report.skipped and os.environ.get("BLOBFLOW_CI") == "1" and not exempt:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Endpoint]:
    """A moto server: fast, forgiving."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def rgw_s3() -> Iterator[S3Endpoint]:
    """A Ceph RADOS Gateway: a real S3. Skips where Ceph is not installed (a failure in CI)."""
    missing = missing_ceph_programs()
    if missing:
        pytest.skip(f"needs Ceph (Debian: radosgw ceph-mon ceph-osd); missing: {', '.join(missing)}")
    with rgw_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server. Skips where PostgreSQL or a driver is not installed (a failure in CI)."""
    found = find_postgres()
    if found is None:
        pytest.skip("needs PostgreSQL (Debian: postgresql) and psycopg2 or psycopg")
    with postgres_server(*found) as url:
        yield url
