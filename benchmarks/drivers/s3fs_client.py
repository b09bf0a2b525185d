"""s3fs's put and get of a directory: s3fs_client.py up|down DIR BUCKET PREFIX default."""

from __future__ import annotations

import os
import sys

import s3fs


def main() -> None:
    """Up or down."""
    way, directory, bucket, prefix = sys.argv[1:5]
    filesystem = s3fs.S3FileSystem(endpoint_url=os.environ["BENCH_ENDPOINT"])
    if way == "up":
        filesystem.put(directory + "/", f"{bucket}/{prefix}/", recursive=True)
    else:
        filesystem.get(f"{bucket}/{prefix}/", directory + "/", recursive=True)


main()
