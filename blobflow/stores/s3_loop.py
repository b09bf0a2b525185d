"""Small objects of an S3 bucket, by the coroutines of one event loop.

What is asked and what the answers mean is `blobflow.stores.s3`'s; only the way there is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from typing_extensions import override

from blobflow.errors import BlobflowError, ChecksumMismatch, ObjectNotFound
from blobflow.stores.base import Body, Coroutines, ObjectMeta, StoredObject, check_key
from blobflow.stores.s3 import S3Store, damaged, is_intact, put_headers, put_result, stored, with_checksums
from blobflow.stores.s3_access import Access
from blobflow.stores.s3_errors import BOTOCORE_ERRORS, Call, Refusal
from blobflow.stores.s3_loop_wire import LoopWire, WholeAnswer
from blobflow.stores.s3_wire import WireError


class S3Coroutines(Coroutines):
    """See `Coroutines`. Every call is one attempt, signed for itself."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._access: Access | None = None
        self._wire: LoopWire | None = None

    @override
    async def put(self, key: str, body: Body) -> ObjectMeta:
        check_key(key)
        call = Call("put", key)
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

    async def _put(self, call: Call, body: Body, data: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        try:
            return (await self._exchange(call, "PUT", headers, data)).headers
        except ChecksumMismatch as error:
            if not is_intact(body, headers):
                raise
            raise damaged(call) from error

    @override
    async def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        call = Call("get", key)
        answer = await self._exchange(call, "GET", {"x-amz-checksum-mode": "ENABLED"}, limit=max_bytes)
        return stored(call, answer.headers, answer.body, answer.length, max_bytes)

    @override
    async def delete(self, key: str) -> None:
        check_key(key)
        with suppress(ObjectNotFound):  # absent is not an error
            await self._exchange(Call("delete", key), "DELETE", {})

    @override
    async def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    async def _exchange(
        self, call: Call, method: str, headers: Mapping[str, str], body: bytes = b"", *, limit: int = 0
    ) -> WholeAnswer:
        access = self._store.connected()
        try:
            target = access.target(self._store.full_key(call.key or ""))
            answer = await self._wire_of(access).request(
                method, target, lambda: access.signed(method, target, headers), body, limit=limit
            )
            self._store.heard(answer.headers)
            if answer.status >= 300:
                raise Refusal.of(answer.status, answer.body, answer.headers)
        except WireError as error:
            if body or error.moved:
                call = replace(call, offset=error.moved)
            raise self._store.failed(error, call) from error
        except (Refusal, *BOTOCORE_ERRORS) as error:
            raise self._store.failed(error, call, access) from error
        return answer

    def _wire_of(self, access: Access) -> LoopWire:
        """The connections that belong to `access`; it is another one once its credentials were stale."""
        if self._wire is None or access is not self._access:
            if self._wire is not None:
                self._wire.retire()
            self._access, self._wire = access, access.loop_wire()
        return self._wire
