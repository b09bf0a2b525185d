"""Small objects of an S3 bucket, read and written by the coroutines of one event loop.

Requests and errors are those of `blobflow.stores.s3.requests`; only the connections are separate.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from typing_extensions import override

from blobflow.errors import BlobflowError, ChecksumMismatch, ObjectNotFound
from blobflow.http.async_client import AsyncHttpClient, BufferedResponse
from blobflow.http.client import HttpError
from blobflow.stores.base import Body, ObjectMeta, StoredObject, check_key
from blobflow.stores.optional import Coroutines
from blobflow.stores.s3.endpoint import S3Endpoint
from blobflow.stores.s3.errors import BOTOCORE_ERRORS, RequestContext, S3Error
from blobflow.stores.s3.messages import damaged, is_intact, put_headers, put_result, stored, with_checksums
from blobflow.stores.s3.requests import S3Requests


class S3Coroutines(Coroutines):
    """See `Coroutines`. Every call is one attempt, with a new signature."""

    def __init__(self, store: S3Requests) -> None:
        self._store = store
        self._access: S3Endpoint | None = None
        self._client: AsyncHttpClient | None = None

    @override
    async def put(self, key: str, body: Body) -> ObjectMeta:
        check_key(key)
        call = RequestContext("put", key)
        headers = put_headers(body)
        crc, md5 = self._store.checksums_of(body, call)
        data = b"".join(body)
        if self._store.checksum_headers:
            try:
                answered = await self._put(call, body, data, with_checksums(headers, body, crc, md5))
                return put_result(call, body, answered)
            except BlobflowError as error:
                if not self._store.has_refused_checksums(error, call):
                    raise
        answered = await self._put(call, body, data, with_checksums(headers, body, None, md5))
        return put_result(call, body, answered)

    async def _put(self, call: RequestContext, body: Body, data: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        try:
            return (await self._exchange(call, "PUT", headers, data)).headers
        except ChecksumMismatch as error:
            if not is_intact(body, headers):
                raise
            raise damaged(call) from error

    @override
    async def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        call = RequestContext("get", key)
        answer = await self._exchange(call, "GET", {"x-amz-checksum-mode": "ENABLED"}, limit=max_bytes)
        return stored(call, answer.headers, answer.body, answer.length, max_bytes)

    @override
    async def delete(self, key: str) -> None:
        check_key(key)
        with suppress(ObjectNotFound):  # absent is not an error
            await self._exchange(RequestContext("delete", key), "DELETE", {})

    @override
    async def close(self) -> None:
        if self._client is not None:
            self._client.close()

    async def _exchange(
        self, call: RequestContext, method: str, headers: Mapping[str, str], body: bytes = b"", *, limit: int = 0
    ) -> BufferedResponse:
        access = self._store.connected()
        try:
            target = access.target(self._store.full_key(call.key or ""))
            answer = await self._client_of(access).request(
                method, target, lambda: access.signed(method, target, headers), body, limit=limit
            )
            self._store.heard(answer.headers)
            if answer.status >= 300:
                raise S3Error.of(answer.status, answer.body, answer.headers)
        except HttpError as error:
            if body or error.moved:
                call = replace(call, offset=error.moved)
            raise self._store.failed(error, call) from error
        except (S3Error, *BOTOCORE_ERRORS) as error:
            raise self._store.failed(error, call, access) from error
        return answer

    def _client_of(self, access: S3Endpoint) -> AsyncHttpClient:
        """The connections that belong to `access`; it is another one once its credentials were stale."""
        if self._client is None or access is not self._access:
            if self._client is not None:
                self._client.retire()
            self._access, self._client = access, access.async_client()
        return self._client
