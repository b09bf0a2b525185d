"""Translates the errors of requests to S3 into blobflow's.

Foreign exceptions end here: refusals of the server, failures of connections, and errors of botocore's search for
credentials and addresses.
"""
# botocore has no types
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypedDict, cast

import botocore.exceptions
import botocore.parsers

from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    InvalidKey,
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    SizeMismatch,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
    UploadIncomplete,
    setting,
)
from blobflow.http.client import HttpError, Response
from blobflow.stores.s3.xml import error_in, region_in

_ERROR_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class RequestContext:
    """What was being done, for messages and for the meaning of an answer."""

    operation: str
    key: str | None = None
    offset: int | None = None
    upload_id: str | None = None
    e_tag: str | None = None
    """The entity tag that the request demands."""
    conditional: bool = False
    """A conditional write: a missing or another object is an answer, not an error."""

    @property
    def means_no_bucket(self) -> frozenset[str]:
        """Codes of a 404 that mean that there is no bucket; none (""), where nothing else can be missing."""
        asks_the_bucket = self.operation in ("list", "list uploads", "put", "create upload of")
        return frozenset({"NoSuchBucket", ""} if asks_the_bucket and not self.conditional else {"NoSuchBucket"})

    def __str__(self) -> str:
        return self.operation if self.key is None else f"{self.operation} {self.key!r}"


class S3Error(Exception):
    """A response that refuses the request."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str], region: str = "") -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers
        self._region = region

    @classmethod
    def by_answer(cls, answer: Response) -> S3Error:
        """Reads the error document."""
        return cls.of(answer.status, answer.read(_ERROR_BODY_BYTES), answer.headers)

    @classmethod
    def of(cls, status: int, document: bytes, headers: Mapping[str, str]) -> S3Error:
        """The refusal that an answer is."""
        return cls(status, *error_in(document), headers, region_in(document))

    @property
    def region(self) -> str | None:
        """The region that the server says the bucket is in, where the one that was signed for is wrong."""
        if self.code not in _WRONG_REGION and self.status not in (301, 307, 308, 400):
            return None
        named = self.headers.get("x-amz-bucket-region") or self._region
        return named if re.fullmatch("[a-z0-9-]{1,40}", named) else None

    def clock_skew_s(self) -> float | None:
        """How far the server's clock is ahead of ours, if that may be why it refuses (a HEAD has no body to say so)."""
        if self.code != "RequestTimeTooSkewed" and (self.status != 403 or self.code):
            return None
        try:
            return parsedate_to_datetime(self.headers.get("date", "")).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None

    @classmethod
    def by(cls, error: BaseException | None) -> S3Error | None:
        """The refusal in an exception, if it is one: of the server, or of one that botocore asked for credentials."""
        if isinstance(error, S3Error):
            return error
        if not isinstance(error, botocore.exceptions.ClientError):
            return None
        response: dict[str, Any] = cast("Any", error).response
        about: dict[str, Any] = response.get("ResponseMetadata", {})
        said: dict[str, Any] = response.get("Error", {})
        code = str(said.get("Code") or "")
        return cls(
            about.get("HTTPStatusCode", 0),
            "" if code.isdigit() else code,  # botocore's stand-in where there is no body, as after a HEAD
            said.get("Message") or "",
            about.get("HTTPHeaders", {}),
            str(said.get("Region") or ""),
        )


BOTOCORE_ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
)

STALE_CREDENTIALS = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_SLOW_DOWN = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"})
_PASSING = frozenset({
    "InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody",
    "RequestTimeout", "RequestTimeTooSkewed",
    "XAmzContentSHA256Mismatch",  # what was signed here is right, so it was damaged on the way
})  # fmt: skip
_WRONG_PARTS = frozenset({"InvalidPart", "InvalidPartOrder", "EntityTooSmall"})
_WRONG_DIGEST = frozenset({"BadDigest", "XAmzContentChecksumMismatch"})
_WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
HINTS = {
    "NoSuchBucket": "create the bucket, or name another one; blobflow never creates buckets",
    "AccessDenied": "allow this operation to these credentials; without ListBucket a missing key looks like this too",
    "InvalidAccessKeyId": "the server does not know this access key: check the key and the endpoint",
    "SignatureDoesNotMatch": "check the secret key; behind a proxy, that it leaves path and Host as they are",
    "ExpiredToken": "get new temporary credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
}


class _About(TypedDict):
    operation: str
    key: str | None
    offset: int | None


class _Refused(_About):
    status: int
    code: str | None


def translate(error: Exception, call: RequestContext) -> BlobflowError:
    """The blobflow error for an error of botocore, of the connection or of the server."""
    about: _About = {"operation": call.operation, "key": call.key, "offset": call.offset}
    refusal = S3Error.by(error)
    if refusal is not None:
        return _translate_refusal(refusal, call)
    if isinstance(error, HttpError) and error.timeout_s is not None:
        if error.connecting:
            message = f"{call}: no connection to {error.connecting} within {error.timeout_s:g} s"
            return TimedOut(message, timeout_s=error.timeout_s, **about)
        where = "" if call.offset is None else f" at offset {call.offset}"
        return TimedOut(f"{call}: no byte for {error.timeout_s:g} s{where}", timeout_s=error.timeout_s, **about)
    reason = error.__cause__ if isinstance(error, HttpError) else error
    if isinstance(reason, ssl.SSLCertVerificationError | botocore.exceptions.SSLError):
        return StoreConfigurationError(
            f"{call}: the server's certificate is not trusted: {reason}",
            hint="name the CA bundle that signed it",
            **about,
        )
    if isinstance(reason, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return StoreConfigurationError(
            f"{call}: {reason}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, or pass the keys",
            **about,
        )
    if isinstance(reason, botocore.exceptions.CredentialRetrievalError):
        # The output of a credential process may hold a secret, so it is not repeated.
        provider = cast("Any", reason).kwargs.get("provider", "their provider")
        return StoreUnavailable(
            f"{call}: no credentials from {provider}",
            hint="run by hand what gives the credentials; what it says is not shown here, for it may hold a secret",
            **about,
        )
    passing = (
        HttpError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.ConnectionError,
        botocore.exceptions.MetadataRetrievalError,
        botocore.exceptions.IncompleteReadError,
        botocore.parsers.ResponseParserError,
    )
    if isinstance(error, passing):
        return StoreUnavailable(f"{call}: {error}", **about)
    return StoreConfigurationError(f"{call}: {error}", **about)


def _translate_refusal(refusal: S3Error, call: RequestContext) -> BlobflowError:
    status, code, key = refusal.status, refusal.code, call.key or ""
    said = f"{call}: {' '.join(filter(None, [str(status), code]))}{': ' if refusal.message else ''}{refusal.message}"
    about: _Refused = {
        "operation": call.operation,
        "key": call.key,
        "offset": call.offset,
        "status": status,
        "code": code or None,
    }
    match code:
        case "NoSuchUpload":
            return NoSuchUpload(said, key=key, upload_id=call.upload_id or "")
        case "KeyTooLongError":
            return InvalidKey(said, key=key, reason="the server says it is too long")
        case _ if code in STALE_CREDENTIALS:
            return StoreUnavailable(said, hint=HINTS["ExpiredToken"], **about)
        case _ if code in _WRONG_PARTS or "mp-object-size" in refusal.message:
            return UploadIncomplete(said, key=key)
        case _ if code in _WRONG_DIGEST:
            return ChecksumMismatch(said, what=str(call))
        case _ if code in _WRONG_REGION or status in (301, 307, 308):
            wanted = setting("region", refusal.region) if refusal.region else setting("region")
            return StoreConfigurationError(said, hint=f"name the bucket's region: {wanted}", **about)
        case _ if "content-md5" in refusal.message.lower() and status in (400, 411):
            return StoreConfigurationError(
                said, hint=f"this bucket takes nothing without an MD5: use {setting('content_md5')}", **about
            )
        case _ if code in _SLOW_DOWN or status in (429, 503):
            return SlowDown(said, retry_after_s=_seconds(refusal.headers.get("retry-after")), **about)
        case _ if status in (405, 501):
            return Unsupported(said, capability=call.operation)
        case _ if code in _PASSING or status >= 500 or status == 409:
            return StoreUnavailable(said, hint=HINTS.get(code, StoreUnavailable.hint), **about)
        case _:
            pass
    if call.conditional and status in (404, 412):
        return PreconditionFailed(said, key=key, expected=call.e_tag)
    if status == 412:
        return changed(key, call.e_tag, None)
    if status == 404 and call.upload_id is not None:  # Ceph says NoSuchKey
        return NoSuchUpload(said, key=key, upload_id=call.upload_id)
    if status == 404:
        return ObjectNotFound(f"no object {key!r}", key=key)
    if status == 416:
        return SizeMismatch(said, what=f"object {call.key!r}", expected=call.offset or 0)
    return StoreConfigurationError(said, hint=HINTS.get(code, ""), **about)


def refuses_checksums(error: BaseException | None) -> bool:
    """Whether a server turned a request down because it does not know the checksum headers."""
    refusal = S3Error.by(error)
    if refusal is None or refusal.code in _WRONG_DIGEST:
        return False
    message = refusal.message.lower()
    return refusal.status == 501 or (refusal.status == 400 and "checksum" in message and "content-md5" not in message)


def changed(key: str, expected: str | None, actual: str | None) -> ObjectChanged:
    """The error of an object that no longer has the demanded entity tag."""
    return ObjectChanged(f"{key!r} was replaced while it was read", key=key, expected=expected, actual=actual)


def cut_short(call: RequestContext, received: int, wanted: int | None) -> StoreUnavailable:
    """The error of a response whose body ended early."""
    return StoreUnavailable(
        f"{call}: the answer ended after {received} of {'an unknown number of' if wanted is None else wanted} bytes",
        operation=call.operation,
        key=call.key,
        offset=(call.offset or 0) + received,
    )


def _seconds(retry_after: str | None) -> float | None:
    """The number of seconds in a Retry-After header; a date is ignored, because it depends on two clocks."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
