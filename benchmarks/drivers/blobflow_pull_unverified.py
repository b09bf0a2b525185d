"""`blobflow pull` without the members' SHA-256 (CRC32C still proves the transport), which the command line never skips.

blobflow_pull_unverified.py STORE KEY DEST
"""

from __future__ import annotations

import os
import sys

from blobflow import ChunkProfile, download, open_store


def main() -> None:
    """Pull."""
    url, key, dest = sys.argv[1:4]
    store = open_store(url, endpoint_url=os.environ["BENCH_ENDPOINT"])
    download(store, key, dest, profile=ChunkProfile(verify_digest=False))
    store.close()


main()
