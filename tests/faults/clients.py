"""Plain clients and stores for tests of faults."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import botocore.config
import botocore.session
from pydantic import SecretStr

from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Options, S3Store
from tests.fault_proxy import FaultProxy
from tests.kit import declare
from tests.servers import S3Endpoint
from tests.strict_s3 import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, StrictS3

PREFIX = "some/prefix"


class Stores:
    """Makes stores of a bucket, with retries whose waits are noted instead of waited for.

    Attributes:
        naps: Seconds of every wait, in order.
    """

    def __init__(self) -> None:
        self.naps: list[float] = []
        self._stack = ExitStack()
        self._buckets: dict[str, str] = {}

    def __call__(
        self, server: StrictS3 | S3Endpoint, proxy: FaultProxy | None = None, *, min_part_size: int = 1, **options: Any
    ) -> RetryingStore:
        """A store of the server's bucket; every store of one server has the same bucket.

        Args:
            proxy: Stands between the two.
            min_part_size: As in the rules of the server.
            options: See `S3Options`.
        """
        endpoint = server.endpoint if isinstance(server, StrictS3) else server
        given: dict[str, Any] = {
            "bucket": self.bucket(server),
            "prefix": PREFIX,
            "endpoint_url": proxy.url if proxy else endpoint.endpoint_url,
            "region": endpoint.region,
            "access_key_id": endpoint.access_key_id,
            "secret_access_key": SecretStr(endpoint.secret_access_key),
        }
        inner = S3Store(S3Options.model_validate(given | options))
        # As a probe would find out; the strict S3 is proven to be strict.
        attests = isinstance(server, StrictS3)
        declare(inner, min_part_size=min_part_size, attests_crc32c=attests)
        store = RetryingStore(inner, sleep=self.naps.append)
        self._stack.callback(store.close)
        return store

    def bucket(self, server: StrictS3 | S3Endpoint) -> str:
        """The name of the bucket that the stores of this server use."""
        url = server.url if isinstance(server, StrictS3) else server.endpoint_url
        if url not in self._buckets:
            self._buckets[url] = server.new_bucket()
        return self._buckets[url]

    def close(self) -> None:
        self._stack.close()


class Clients:
    """Makes plain botocore clients that try once."""

    def __init__(self) -> None:
        self._session = botocore.session.Session(profile=None)
        self._made: list[Any] = []

    def __call__(self, server: StrictS3 | FaultProxy, **changes: Any) -> Any:
        config = {
            "s3": {"addressing_style": "path"},
            "retries": {"total_max_attempts": 1},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **changes.pop("config", {}),
        }
        given = {
            "endpoint_url": server.url,
            "region_name": REGION,
            "aws_access_key_id": ACCESS_KEY_ID,
            "aws_secret_access_key": SECRET_ACCESS_KEY,
            **changes,
        }
        self._made.append(self._session.create_client("s3", config=botocore.config.Config(**config), **given))
        return self._made[-1]

    def close(self) -> None:
        while self._made:
            self._made.pop().close()
