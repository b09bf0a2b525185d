"""A batch through blobflow's executor: blobflow_batch.py COUNT BUCKET PREFIX.

Inserts, gets and deletes COUNT objects, 32 at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from blobflow import open_store
from blobflow.batch import BatchExecutor, Delete, Get, Got, Insert

PAYLOAD = os.urandom(4096 - 8)
AT_ONCE = 32


def key(number: int) -> str:
    """Of the object with that number."""
    return f"f{number:06d}"


def payload(number: int) -> bytes:
    """Of the object with that number."""
    return number.to_bytes(8, "big") + PAYLOAD


def execute(executor: BatchExecutor, operations: Iterable[Insert | Get | Delete]) -> None:
    """Execute operations in the order of their objects; a wrong result ends the process."""
    with executor.stream(operations) as results:
        for result in results:
            response = result.unwrap()
            if isinstance(response, Got):
                assert response.payload is not None
                assert response.payload.read() == payload(result.index)


def main() -> None:
    """One kind after the other."""
    count, bucket, prefix = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    executor = BatchExecutor(
        open_store(f"s3://{bucket}/{prefix}", endpoint_url=os.environ["BENCH_ENDPOINT"]), window=AT_ONCE
    )
    numbers = range(count)
    execute(executor, (Insert(key(number), payload(number)) for number in numbers))
    execute(executor, (Get(key(number)) for number in numbers))
    execute(executor, (Delete(key(number)) for number in numbers))


main()
