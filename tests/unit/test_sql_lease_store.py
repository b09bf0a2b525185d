"""Leases in a SQL database: SQLite embedded, and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Column, MetaData, String, Table

from blobflow import DirectoryExporter, Lease, read_ref, run_export_round
from blobflow.coordination.lease_store import LeaseState
from blobflow.coordination.sql_lease_store import SqlLeaseStore
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    DiskFull,
    LeaseLost,
    StoreConfigurationError,
    StoreUnavailable,
    Unsupported,
)
from blobflow.sql import SqlTable
from blobflow.testing import write_tree
from tests.clock import Clock
from tests.kit import TREE, declare, local_store


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database, or of one whose table others have used."""
    return f"sqlite:///{tmp_path}/leases.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a lease that no other test uses."""
    return f"orders/{request.node.name}"


def test_one_holds_a_lease_at_a_time(url: str, name: str):
    """Across connections: no for the second, and the next generation with the last cursor after the release."""
    first, second = Lease(SqlLeaseStore(url), name), Lease(SqlLeaseStore(url), name)
    assert first.try_acquire()
    assert not second.try_acquire()
    first.complete({"lsn": [1, None, "é"]})
    assert second.try_acquire()
    assert second.generation == 2
    found = SqlLeaseStore(url).read(name)
    assert found is not None
    assert found.state.cursor == {"lsn": [1, None, "é"]}


def test_of_many_that_try_at_once_one_wins(url: str, name: str):
    """The table is made by the first use, also where eight begin at once."""
    barrier = threading.Barrier(8)
    won: list[bool] = []

    def race() -> None:
        mine = Lease(SqlLeaseStore(url), name)
        barrier.wait()
        won.append(mine.try_acquire())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_taken_lease_is_lost(url: str, name: str):
    """The sleeper can neither renew nor complete, and what it does changes nothing."""
    clock = Clock()
    sleeper, successor = (Lease(SqlLeaseStore(url), name, clock=clock) for _ in range(2))
    sleeper.try_acquire()
    clock.now += 59.0
    assert not successor.try_acquire()
    clock.now += 1.0
    assert successor.try_acquire()
    with pytest.raises(LeaseLost, match="taken over after generation 1"):
        sleeper.renew()
    sleeper.abandon()
    successor.renew()
    assert successor.generation == 2


def test_a_lost_commit_is_settled_by_reading_back(url: str, name: str):
    """The row was written, the answer was not heard: the holder recognises its write id."""

    class Deaf(SqlLeaseStore):
        def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
            super().swap(name, state, version)
            raise StoreUnavailable("the answer was lost", operation="get")

    mine = Lease(Deaf(url), name)
    assert mine.try_acquire()
    mine.renew()
    mine.complete("done")
    found = SqlLeaseStore(url).read(name)
    assert found is not None
    assert (found.state.generation, found.state.owner, found.state.cursor) == (1, "", "done")


@pytest.mark.slow
def test_the_clock_is_the_servers(postgres_url: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """A machine whose clock is a day ahead takes nothing over, and one a day behind holds nothing too long."""
    leases = SqlLeaseStore(postgres_url)
    holder = Lease(leases, name)
    holder.try_acquire()
    monkeypatch.setattr("time.time", lambda: 1e10)
    assert not Lease(SqlLeaseStore(postgres_url), name).try_acquire()
    told = leases.time_s()
    assert told is not None
    assert told < 1e10
    assert not holder.renewal_due()


@pytest.mark.seed("1.20")
def test_a_store_without_conditional_writes_has_rounds(url: str, tmp_path: Path):
    """With its lease in a database; without one it is told where to put it."""
    store = local_store(tmp_path)
    declare(store, conditional=False)
    exporter = DirectoryExporter(path=write_tree(tmp_path / "source", TREE))
    with pytest.raises(Unsupported) as refusal:
        run_export_round(store, "orders", exporter)
    assert "SQL" in refusal.value.hint
    before = SqlLeaseStore(url).read("orders/round")
    done = run_export_round(store, "orders", exporter, leases=url)
    assert done is not None
    assert done.ref == read_ref(store, "orders/latest")
    found = SqlLeaseStore(url).read("orders/round")
    assert found is not None
    assert (found.state.owner, found.state.generation) == ("", (before.state.generation if before else 0) + 1)
    held = Lease(SqlLeaseStore(url), "orders/round")
    held.try_acquire()
    assert run_export_round(store, "orders", exporter, leases=SqlLeaseStore(url)) is None
    held.abandon()


def test_a_database_that_is_away_is_a_passing_matter(tmp_path: Path):
    """Typed as retryable, so that callers wait; the directory may be mounted a moment later."""
    leases = SqlLeaseStore(f"sqlite:///{tmp_path}/absent/leases.db")
    with pytest.raises(StoreUnavailable, match="OperationalError") as failure:
        leases.read("orders/round")
    assert failure.value.retryable


@pytest.mark.parametrize(
    ("pragma", "type_of_error", "says"),
    [
        ("max_page_count = 1", DiskFull, "database or disk is full"),
        ("query_only = 1", StoreConfigurationError, "attempt to write a readonly database"),
    ],
)
def test_what_fails_in_a_sqlite_file_is_told_apart(
    tmp_path: Path, pragma: str, type_of_error: type[BlobflowError], says: str
):
    """A full disk and a file that may not be written have an error each, and the reason in it."""

    def write() -> None:
        with table.connection("x") as connection:
            connection.exec_driver_sql(f"PRAGMA {pragma}")
            connection.exec_driver_sql("CREATE TABLE other AS SELECT hex(randomblob(100000)) AS a")

    table = SqlTable(f"sqlite:///{tmp_path}/x.db", Table("one", MetaData(), Column("a", String(9))), operation="lease")
    with pytest.raises(type_of_error, match=says):
        write()


def test_a_file_that_is_no_database_is_called_that(tmp_path: Path):
    """Final, with the reason: somebody named the wrong file."""
    (tmp_path / "text").write_text("not a database at all" * 100)
    with pytest.raises(StoreConfigurationError, match="file is not a database"):
        SqlLeaseStore(f"sqlite:///{tmp_path}/text").read("orders/round")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SqlLeaseStore("not a url"), "not the URL of a SQL database"),
        (lambda: SqlLeaseStore("nosuchdb://host/db"), "not the URL of a SQL database"),
        (lambda: SqlLeaseStore("oracle+cx_oracle://u:hidden@host/db"), "is not installed"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(make: Callable[[], SqlLeaseStore], says: str):
    """What is wrong is said, and nothing secret."""
    with pytest.raises(StoreConfigurationError, match=says) as refusal:
        make()
    assert "hidden" not in str(refusal.value.to_dict())


def test_a_row_of_somebody_else_is_named(tmp_path: Path):
    """What is no lease is not replaced."""
    import sqlite3

    leases = SqlLeaseStore(f"sqlite:///{tmp_path}/leases.db")
    Lease(leases, "orders/round").try_acquire()
    with closing(sqlite3.connect(tmp_path / "leases.db")) as database, database:
        database.execute("UPDATE blobflow_leases SET generation = 'many'")
    with pytest.raises(ArtifactInvalid, match="is not a lease"):
        Lease(leases, "orders/round").try_acquire()
