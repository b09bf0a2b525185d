"""Sends one request to a bucket, translates its errors, and remembers what they say for the next request."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar
from urllib.parse import quote

from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    InvalidKey,
    StoreConfigurationError,
    StoreUnavailable,
    Unsupported,
)
from blobflow.forks import reset_after_fork_of
from blobflow.http.client import HttpError, Response
from blobflow.stores.base import Body, check_key
from blobflow.stores.s3.endpoint import UNSIGNED_PAYLOAD, S3Endpoint
from blobflow.stores.s3.errors import (
    BOTOCORE_ERRORS,
    HINTS,
    STALE_CREDENTIALS,
    RequestContext,
    S3Error,
    cut_short,
    refuses_checksums,
    translate,
)
from blobflow.stores.s3.messages import damaged, digests, is_intact, with_checksums
from blobflow.stores.s3.options import S3Options
from blobflow.stores.s3.xml import MAX_ANSWER_BYTES, ErrorResponse, MalformedResponse

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

PATIENCE_S = 900.0
"""Seconds without a byte for complete and copy. They answer after the server has processed gigabytes."""

_SKEW_S = 60.0
"""Less is not why a request is refused: S3 takes a quarter of an hour."""


class S3Requests:
    """A bucket, as far as requests go: connections, errors, checksums. Threads and coroutines share it.

    Attributes:
        options: Where the bucket is, and how it is used.
        url: The bucket and the prefix.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options
        self._prefix = options.prefix.strip("/") + "/" if options.prefix.strip("/") else ""
        self.url = f"s3://{options.bucket}/{self._prefix}".rstrip("/")
        self._access: S3Endpoint | None = None
        self.checksum_headers = True
        """Whether the server takes CRC32C headers, as far as is known."""
        self._software = ""
        self._answered = ("", 0.0)
        self._region: str | None = None
        """Where the bucket is, once a server has said that it is elsewhere."""
        self._skew_s = 0.0
        self.reset_after_fork()
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        """See `ResettableAfterFork`; only the child's copies of the descriptors are closed, the parent's live on."""
        self._connecting = threading.Lock()
        self.close()

    def close(self) -> None:
        """Release connections; the next call connects again."""
        access, self._access = self._access, None
        if access is not None:
            access.close()

    # Requests

    def full_key(self, key: str) -> str:
        """The key with the prefix; that is the bucket's own for the empty one."""
        return self._prefix + key

    def _relative(self, full: str) -> str | None:
        """The key without the prefix; None if it is not a valid key."""
        try:
            return check_key(full.removeprefix(self._prefix)) if full.startswith(self._prefix) else None
        except InvalidKey:
            _log.debug("foreign_key store=%s key=%r", self.url, full)
            return None

    @staticmethod
    def _tag(e_tag: str, call: RequestContext) -> str:
        if not e_tag:
            raise StoreUnavailable(f"no ETag returned for {call.key!r}", operation=call.operation, key=call.key)
        return e_tag

    def connected(self) -> S3Endpoint:
        """This process's way to the bucket."""
        access = self._access
        if access is None:
            with self._connecting:
                access = self._access
                if access is None:
                    try:
                        options = self.options.model_copy(update={"region": self._region or self.options.region})
                        access = self._access = S3Endpoint(options, skew_s=self._skew_s)
                    except (*BOTOCORE_ERRORS, ValueError, OSError) as error:
                        raise translate(error, RequestContext("connect to", self.options.bucket)) from error
        return access

    @contextmanager
    def _exchange(
        self,
        call: RequestContext,
        method: str,
        full_key: str,
        query: Mapping[str, str] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        payload: str = UNSIGNED_PAYLOAD,
        idempotent: bool = True,
        patient: bool = False,
    ) -> Generator[Response, None, None]:
        """Send one request, and return a successful response. All errors are blobflow's.

        Args:
            full_key: Key with the prefix; empty for the bucket itself.
            payload: See `S3Endpoint.signed`.
            idempotent: Whether it may be sent again without notice if a connection turns out to be dead.
            patient: Whether the server may be silent for minutes.
        """
        access = self.connected()
        target = access.target(full_key) + _written(query or {})
        given = headers or {}
        try:
            with access.client.send(
                method,
                target,
                lambda: access.signed(method, target, given, payload),
                body,
                idempotent=idempotent,
                idle_timeout_s=max(PATIENCE_S, self.options.idle_timeout) if patient else None,
            ) as answer:
                self.heard(answer.headers)
                refusal = None if answer.status < 300 else S3Error.by_answer(answer)
                if refusal is None:
                    yield answer
            if refusal is not None:  # raised out here, so that the connection survives a mere "no"
                raise refusal
        except HttpError as error:
            if call.offset is not None or body is not None or error.moved:
                call = replace(call, offset=(call.offset or 0) + error.moved)
            raise self.failed(error, call) from error
        except (S3Error, *BOTOCORE_ERRORS) as error:
            raise self.failed(error, call, access) from error

    def _ask(
        self,
        call: RequestContext,
        method: str,
        full_key: str,
        query: Mapping[str, str] | None = None,
        *,
        read: Callable[[bytes], _T],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        patient: bool = False,
        idempotent: bool = True,
    ) -> _T:
        """One request that is answered with a document, as `read` understands it; see `_exchange`.

        What cannot be understood of a GET is asked for once more: a byte may have been damaged on the way.
        """
        may_ask_again = method == "GET"
        while True:
            document, size, answered = self._document(
                call, method, full_key, query, headers=headers, body=body, patient=patient, idempotent=idempotent
            )
            try:
                return read(document)
            except MalformedResponse as error:
                if error.ended_early and (size is None or document):
                    raise cut_short(call, len(document), None) from error
                if not may_ask_again:
                    raise self._not_understood(call, str(error)) from error
                may_ask_again = False
            except ErrorResponse as error:
                # What fails after it began may succeed another time, as botocore has it too, unless the code says more.
                refusal = S3Error(500, error.code, error.message, answered)
                raise self.failed(refusal, call) from refusal

    def _document(
        self,
        call: RequestContext,
        method: str,
        full_key: str,
        query: Mapping[str, str] | None,
        *,
        headers: Mapping[str, str] | None,
        body: bytes | None,
        patient: bool,
        idempotent: bool,
    ) -> tuple[bytes, int | None, Mapping[str, str]]:
        """The document that a request is answered with, its length if the server said it, and the answer's headers."""
        with self._exchange(
            call,
            method,
            full_key,
            query,
            headers=headers,
            body=None if body is None else Body(len(body), lambda: (body,)),
            payload=UNSIGNED_PAYLOAD if body is None else hashlib.sha256(body).hexdigest(),
            idempotent=idempotent,
            patient=patient,
        ) as answer:
            size, document = answer.length, answer.read(MAX_ANSWER_BYTES)
            answered = answer.headers
        if len(document) == MAX_ANSWER_BYTES:
            raise self._not_understood(call, f"it has more than {MAX_ANSWER_BYTES} bytes and does not end")
        if size is not None and len(document) < size:
            raise cut_short(call, len(document), size)
        return document, size, answered

    def _not_understood(self, call: RequestContext, reason: str) -> Unsupported:
        """An answer in another dialect. It is final: the server would give it the next time as well."""
        return Unsupported(
            f"{call}: the answer of {self.connected().endpoint} cannot be understood: {reason}",
            hint="check that the endpoint is an S3 API and not a web page; `blobflow probe` shows what it can do",
            store=self.url,
            capability=call.operation,
            key=call.key,
        )

    def _upload(
        self,
        call: RequestContext,
        body: Body,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None = None,
        *,
        idempotent: bool = True,
    ) -> tuple[dict[str, str], int]:
        """PUT a body with its checksums; returns the answer's headers and the CRC32C."""
        crc, md5 = self.checksums_of(body, call)
        if self.checksum_headers:
            try:
                return self._put(call, body, with_checksums(headers, body, crc, md5), query, idempotent=idempotent), crc
            except BlobflowError as error:
                if not self.has_refused_checksums(error, call):
                    raise
        return self._put(call, body, with_checksums(headers, body, None, md5), query, idempotent=idempotent), crc

    def has_refused_checksums(self, error: BlobflowError, call: RequestContext) -> bool:
        """Whether the server turned a request down for its checksum header, which it will not get again then."""
        if not refuses_checksums(error.__cause__):
            return False
        self.checksum_headers = False
        _log.info("checksum_refused store=%s operation=%r", self.url, call.operation)
        return True

    def _put(
        self,
        call: RequestContext,
        body: Body,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None,
        *,
        idempotent: bool,
    ) -> dict[str, str]:
        full_key = self.full_key(call.key or "")
        try:
            with self._exchange(
                call, "PUT", full_key, query, headers=headers, body=body, idempotent=idempotent
            ) as answer:
                return answer.headers
        except ChecksumMismatch as error:
            if not is_intact(body, headers):
                raise
            raise damaged(call) from error

    def checksums_of(self, body: Body, call: RequestContext) -> tuple[int, bytes | None]:
        """CRC32C and MD5 that go along; the latter only where it was asked for."""
        hashing = self.options.content_md5 and body.md5 is None
        if body.crc32c is not None and not hashing:
            return body.crc32c, body.md5
        crc, md5 = digests(body, with_md5=hashing)
        if body.crc32c not in (None, crc):
            raise ChecksumMismatch(f"{call}: the source has other bytes than before", what=str(call))
        return crc, md5 if hashing else body.md5

    def heard(self, headers: Mapping[str, str]) -> None:
        """Remember the server's name and clock from the headers of a response."""
        self._software = headers.get("server", self._software)
        self._answered = (headers.get("date", ""), time.monotonic())

    def failed(self, error: Exception, call: RequestContext, access: S3Endpoint | None = None) -> BlobflowError:
        """The blobflow error for an error of the connection, of the server or of botocore.

        Stale credentials are dropped, and another region or the server's clock is remembered. The error asks for the
        next attempt, which uses them.

        Args:
            access: The endpoint by which the refused request was sent.
        """
        refusal = S3Error.by(error)
        if refusal is not None and refusal.code in STALE_CREDENTIALS:
            if self.options.explicit:
                return StoreConfigurationError(f"{call}: {refusal}", hint=HINTS["ExpiredToken"], status=refusal.status)
            self.close()  # not for good: the next call connects again, with new credentials from the chain
        if refusal is not None and access is not None and (learned := self._learn(refusal, access)):
            return StoreUnavailable(
                f"{call}: {refusal}; {learned}", operation=call.operation, key=call.key, status=refusal.status
            )
        if refusal is not None and refusal.status == 404 and refusal.code in call.means_no_bucket:
            # Not the object that was asked for, which may be one of the probe's.
            return StoreConfigurationError(
                f"there is no bucket {self.options.bucket!r}" + (f": {refusal.message}" if refusal.message else ""),
                hint=HINTS["NoSuchBucket"],
                operation=call.operation,
                bucket=self.options.bucket,
                status=404,
                code="NoSuchBucket",
            )
        return translate(error, call)

    def _learn(self, refusal: S3Error, access: S3Endpoint) -> str:
        """What a refusal says about how to ask, which the next attempt does; empty where it says nothing new."""
        region, skew_s = refusal.region, refusal.clock_skew_s()
        if region is not None and region != access.region:
            _log.info("s3.region store=%s signed=%s actual=%s", self.url, access.region, region)
            self._region = region
            if self._access is access:  # else another thread has learned it before
                self.close()
            return f"the bucket is in region {region}"
        if skew_s is not None and abs(skew_s - access.skew_s) > _SKEW_S:
            _log.warning("s3.clock store=%s ahead_s=%.0f", self.url, skew_s)
            self._skew_s = access.skew_s = skew_s
            return f"the server's clock is {skew_s:+.0f} s from this machine's"
        return ""


def _written(query: Mapping[str, str]) -> str:
    """A query as it stands on the request line, and as it is signed."""
    pairs = (f"{name}={quote(value, safe='-_.~')}" for name, value in query.items())
    return f"?{'&'.join(pairs)}" if query else ""
