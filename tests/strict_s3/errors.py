"""AWS's errors, and how S3 writes documents, times and checksums."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import TypeAlias
from urllib.parse import unquote
from xml.sax.saxutils import escape

_STATUS = {
    "AccessDenied": 403,
    "AuthorizationHeaderMalformed": 400,
    "BadDigest": 400,
    "BucketAlreadyOwnedByYou": 409,
    "ConditionalRequestConflict": 409,
    "EntityTooLarge": 400,
    "EntityTooSmall": 400,
    "ExpiredToken": 400,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidArgument": 400,
    "InvalidDigest": 400,
    "InvalidPart": 400,
    "InvalidPartOrder": 400,
    "InvalidRange": 416,
    "InvalidRequest": 400,
    "KeyTooLongError": 400,
    "MalformedXML": 400,
    "MethodNotAllowed": 405,
    "MissingContentLength": 411,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "NotModified": 304,
    "PreconditionFailed": 412,
    "RequestTimeTooSkewed": 403,
    "RequestTimeout": 400,
    "ServiceUnavailable": 503,
    "SignatureDoesNotMatch": 403,
    "SlowDown": 503,
    "XAmzContentSHA256Mismatch": 400,
}


class S3Error(Exception):
    """A refusal, by AWS's code."""

    def __init__(self, code: str, message: str = "", *, status: int | None = None, **headers: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.status = status or _STATUS[code]
        self.message = message or code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def document(self) -> bytes:
        return xml_document("Error", [("Code", self.code), ("Message", self.message)])


XML_DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>\n'

Children: TypeAlias = "list[tuple[str, Value]]"
Value: TypeAlias = "str | int | bool | Children | None"


def xml_document(name: str, children: Sequence[tuple[str, Value]]) -> bytes:
    def element(name: str, value: Value) -> Iterable[str]:
        if value is None:
            return
        yield f"<{name}>"
        if isinstance(value, list):
            for child in value:
                yield from element(*child)
        else:
            yield escape(str(value).lower() if isinstance(value, bool) else str(value))
        yield f"</{name}>"

    return XML_DECLARATION + "".join(element(name, list(children))).encode()


def query_pairs(query: str) -> list[tuple[str, str]]:
    pairs = [each.partition("=") for each in query.split("&") if each]
    return [(unquote(name), unquote(value)) for name, _, value in pairs]


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def base64_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
