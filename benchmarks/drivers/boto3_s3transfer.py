"""boto3's S3 transfers of a directory: boto3_s3transfer.py up|down DIR BUCKET PREFIX default|tuned|crt.

Runs in the peers' environment.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import sys
from typing import Any

import boto3
import botocore.session
from boto3.s3.transfer import MB, TransferConfig, create_transfer_manager
from botocore.config import Config


def crt_manager(endpoint: str) -> Any:
    """What boto3 makes of `preferred_transfer_client="crt"`, which forgets the endpoint."""
    from s3transfer.crt import (
        BotocoreCRTCredentialsWrapper,
        BotocoreCRTRequestSerializer,
        CRTTransferManager,
        create_s3_crt_client,
    )

    session = botocore.session.get_session()
    region = os.environ["AWS_REGION"]
    serializer = BotocoreCRTRequestSerializer(session, {"region_name": region, "endpoint_url": endpoint})
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    secure = endpoint.startswith("https:")
    client = create_s3_crt_client(region, crt_credentials_provider=credentials, use_ssl=secure)
    return CRTTransferManager(client, serializer)


def main() -> None:
    """Up or down."""
    way, directory, bucket, prefix, variant = sys.argv[1:6]
    endpoint = os.environ["BENCH_ENDPOINT"]
    options: dict[str, Any] = {}
    config = TransferConfig(preferred_transfer_client="classic")
    if variant == "tuned":
        config = TransferConfig(
            multipart_chunksize=16 * MB, max_concurrency=16, max_io_queue=1000, preferred_transfer_client="classic"
        )
        options["config"] = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
        )
    client = boto3.client("s3", endpoint_url=endpoint, **options)
    with crt_manager(endpoint) if variant == "crt" else create_transfer_manager(client, config) as manager:
        if way == "up":
            pairs = [
                (path, f"{prefix}/{os.path.relpath(path, directory)}")
                for folder, _, names in os.walk(directory)
                for path in (os.path.join(folder, name) for name in names)
            ]
            transfers = [manager.upload(path, bucket, key, {}) for path, key in pairs]
        else:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
            transfers = []
            for page in pages:
                for entry in page.get("Contents", ()):
                    path = os.path.join(directory, os.path.relpath(entry["Key"], prefix))
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    transfers.append(manager.download(bucket, entry["Key"], path, {}))
        for transfer in transfers:
            transfer.result()


main()
