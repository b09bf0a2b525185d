"""The table that SQL leases and the layers' state are kept in."""

from __future__ import annotations

import threading

from sqlalchemy import Column, MetaData, String, Table

from blobflow.errors import BlobflowError
from blobflow.sql import SqlTable


def test_a_table_is_made_by_many_at_once(postgres_url: str):
    """Whoever is second finds it, in whatever order the server makes its parts: 30 tables, eight threads each."""
    failed: list[BlobflowError] = []
    for number in range(30):
        barrier = threading.Barrier(8)

        def make(number: int, barrier: threading.Barrier) -> None:
            table = Table(f"made_at_once_{number}", MetaData(), Column("name", String(8), primary_key=True))
            database = SqlTable(postgres_url, table, operation="test")
            barrier.wait()
            try:
                with database.connection("row"):
                    pass
            except BlobflowError as error:
                failed.append(error)

        threads = [threading.Thread(target=make, args=(number, barrier)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
