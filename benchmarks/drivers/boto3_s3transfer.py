"""boto3's S3 transfers (s3transfer, or the CRT) of a directory: boto3_s3transfer.py up|down DIR BUCKET PREFIX [variant].

Runs in the peers' environment. Variants: default, tuned, crt.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import sys

import boto3
from boto3.s3.transfer import MB, TransferConfig, create_transfer_manager
from botocore.config import Config


def main() -> None:
    way, directory, bucket, prefix, variant = sys.argv[1:6]
    options = {}
    config = TransferConfig(preferred_transfer_client="crt" if variant == "crt" else "classic")
    if variant == "tuned":
        config = TransferConfig(
            multipart_chunksize=16 * MB, max_concurrency=16, max_io_queue=1000, preferred_transfer_client="classic"
        )
        options["config"] = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
        )
    client = boto3.client("s3", endpoint_url=os.environ["BENCH_ENDPOINT"], **options)
    with create_transfer_manager(client, config) as manager:
        if way == "up":
            pairs = [
                (path, f"{prefix}/{os.path.relpath(path, directory)}")
                for folder, _, names in os.walk(directory)
                for path in (os.path.join(folder, name) for name in names)
            ]
            transfers = [manager.upload(path, bucket, key) for path, key in pairs]
        else:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
            transfers = []
            for page in pages:
                for entry in page.get("Contents", ()):
                    path = os.path.join(directory, os.path.relpath(entry["Key"], prefix))
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    transfers.append(manager.download(bucket, entry["Key"], path))
        for transfer in transfers:
            transfer.result()


main()
