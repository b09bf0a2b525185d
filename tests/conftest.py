"""Fixtures shared by all tests: running S3 servers, and a PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from blobflow.testing import StoreContract
from tests.servers import S3Endpoint, missing_ceph_programs, moto_server, rgw_server


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


@pytest.fixture(scope="module")
def postgres() -> Generator[str]:
    """The URL of a private cluster, on a unix socket alone; its server never runs as root."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    driver = next((name for name in ("psycopg2", "psycopg") if find_spec(name)), None)
    if not binaries or driver is None:
        pytest.skip("needs PostgreSQL (Debian: postgresql) and psycopg2 or psycopg")
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    home = Path(tempfile.mkdtemp(prefix="pg-"))  # not below pytest's: the path of a unix socket is short
    os.chown(home, user.pw_uid, user.pw_gid)

    def run(program: str, *arguments: str) -> None:
        become = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        command = [binaries[-1] / program, "-D", home / "data", *arguments]
        subprocess.run(command, check=True, cwd=home, stdout=subprocess.DEVNULL, **become)

    try:
        run("initdb", "-A", "trust", "-U", "tester", "--no-sync")
        run("pg_ctl", "-w", "-l", str(home / "log"), "-o", f"-c listen_addresses='' -k {home} -F", "start")
        try:
            yield f"postgresql+{driver}://tester:secret@/postgres?host={home}"
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)
