"""obstore (Rust's object_store) with a directory: obstore_client.py up|down DIR BUCKET PREFIX [variant].

Runs in the peers' environment. Large objects: `put` cuts them itself; `get` streams into the file, or with the variant
`tuned` four threads fetch ranges of 8 MiB. Small ones: 32 at a time.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.store import S3Store

AT_ONCE = 32
RANGE_BYTES = 8 * 1024 * 1024
LARGE_BYTES = 8 * 1024 * 1024


def get_ranged(store: S3Store, key: str, path: Path, size: int) -> None:
    """Four ranges at a time, each written at its place."""
    with path.open("wb") as file, ThreadPoolExecutor(4) as pool:
        file.truncate(size)

        def fetch(start: int) -> None:
            end = min(size, start + RANGE_BYTES)
            os.pwrite(file.fileno(), obstore.get_range(store, key, start=start, end=end), start)

        list(pool.map(fetch, range(0, size, RANGE_BYTES)))


def get_streamed(store: S3Store, key: str, path: Path) -> None:
    """One request, chunk after chunk."""
    with path.open("wb") as file:
        for chunk in obstore.get(store, key).stream(min_chunk_size=RANGE_BYTES):
            file.write(chunk)


async def main() -> None:
    """Up or down."""
    way, directory, bucket, prefix, variant = sys.argv[1:6]
    store = S3Store(
        bucket,
        endpoint=os.environ["BENCH_ENDPOINT"],
        # It knows no way to name an authority; what TLS costs is the same.
        client_options={"allow_http": True, "allow_invalid_certificates": True},
        virtual_hosted_style_request=False,
    )
    root = Path(directory)
    gate = asyncio.Semaphore(AT_ONCE)

    async def put_small(path: Path) -> None:
        async with gate:
            await obstore.put_async(store, f"{prefix}/{path.relative_to(root)}", path)

    async def get_small(key: str) -> None:
        async with gate:
            answer = await obstore.get_async(store, key)
            data = await answer.bytes_async()
        (root / key.removeprefix(f"{prefix}/")).write_bytes(data)

    small = []
    if way == "up":
        for path in (Path(folder, name) for folder, _, names in os.walk(root) for name in names):
            if path.stat().st_size > LARGE_BYTES:
                obstore.put(store, f"{prefix}/{path.relative_to(root)}", path)
            else:
                small.append(put_small(path))
    else:
        for page in obstore.list(store, prefix=prefix):
            for entry in page:
                path = root / entry["path"].removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                if entry["size"] <= LARGE_BYTES:
                    small.append(get_small(entry["path"]))
                elif variant == "tuned":
                    get_ranged(store, entry["path"], path, entry["size"])
                else:
                    get_streamed(store, entry["path"], path)
    await asyncio.gather(*small)


asyncio.run(main())
# Its runtime's threads sometimes abort the process while the interpreter is taken down.
os._exit(0)
