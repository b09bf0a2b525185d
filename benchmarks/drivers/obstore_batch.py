"""A batch through obstore's asynchronous calls: obstore_batch.py COUNT BUCKET PREFIX.

Inserts, gets and deletes COUNT objects, 32 at a time. Runs in the peers' environment.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable

import obstore
from obstore.store import S3Store

PAYLOAD = os.urandom(4096 - 8)
AT_ONCE = 32


def payload(number: int) -> bytes:
    """Of the object with that number."""
    return number.to_bytes(8, "big") + PAYLOAD


async def main() -> None:
    """One kind after the other."""
    count, bucket, prefix = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    store = S3Store(
        bucket,
        prefix=prefix,
        endpoint=os.environ["BENCH_ENDPOINT"],
        client_options={"allow_http": True, "allow_invalid_certificates": True},
        virtual_hosted_style_request=False,
    )

    async def insert(number: int) -> None:
        await obstore.put_async(store, f"f{number:06d}", payload(number), use_multipart=False)

    async def get(number: int) -> None:
        answer = await obstore.get_async(store, f"f{number:06d}")
        assert bytes(await answer.bytes_async()) == payload(number)

    async def delete(number: int) -> None:
        await obstore.delete_async(store, f"f{number:06d}")

    async def execute(operation: Callable[[int], Awaitable[None]]) -> None:
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await operation(number)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    for operation in (insert, get, delete):
        await execute(operation)


asyncio.run(main())
# Its runtime's threads sometimes abort the process while the interpreter is taken down.
os._exit(0)
