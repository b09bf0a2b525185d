"""Signatures, verified as AWS does."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from urllib.parse import quote, unquote

from tests.strict_s3.errors import S3Error, query_pairs
from tests.strict_s3.state import Request

REGION = "us-east-1"
MAX_SKEW_S = 15 * 60

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<id>[^/]+)/(?P<date>\d{8})/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request, ?"
    r"SignedHeaders=(?P<headers>[^,]+), ?Signature=(?P<signature>[0-9a-f]{64})"
)


def verify_signature(request: Request, secrets: Mapping[str, str], expired: Collection[str], now: float) -> None:
    """Refuse a request whose signature is wrong.

    Signature version 4: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html.
    """
    headers = request.headers
    if not request.authorization:
        raise S3Error("AccessDenied", "Access Denied")
    given = _AUTHORIZATION.fullmatch(request.authorization)
    if given is None:
        raise S3Error("AuthorizationHeaderMalformed", "The authorization header is malformed")
    secret = secrets.get(given["id"])
    if secret is None:
        raise S3Error("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
    if (given["region"], given["service"]) != (REGION, "s3"):
        raise S3Error("AuthorizationHeaderMalformed", f"expecting '{REGION}' and 's3'", x_amz_bucket_region=REGION)
    stamp = headers.get("x-amz-date", "")
    try:
        signed_at = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header") from None
    if abs(now - signed_at) > MAX_SKEW_S or not stamp.startswith(given["date"]):
        raise S3Error("RequestTimeTooSkewed", "The difference between the times is too large.")
    names = given["headers"].split(";")
    needed = {"host", *(name for name in headers if name.startswith("x-amz-"))}
    if not needed.issubset(names) or not headers.keys() >= set(names):
        raise S3Error("AccessDenied", "There were headers present in the request which were not signed")
    if "x-amz-content-sha256" not in headers:
        raise S3Error("InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
    path, _, query = request.target.partition("?")
    pairs = sorted((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in query_pairs(query))
    payload = headers["x-amz-content-sha256"]
    canonical = "\n".join((
        request.exchange.method,
        quote(unquote(path), safe="/-_.~"),
        "&".join(f"{name}={value}" for name, value in pairs),
        *(f"{name}:{' '.join(headers[name].split())}" for name in names),
        "",
        given["headers"],
        payload,
    ))  # fmt: skip
    scope = f"{given['date']}/{REGION}/s3/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{secret}".encode()
    for step in (*scope.split("/"), text):
        key = hmac.digest(key, step.encode(), "sha256")
    if not hmac.compare_digest(key.hex(), given["signature"]):
        raise S3Error("SignatureDoesNotMatch", f"The canonical request should have been: {canonical!r}")
    if given["id"] in expired:
        raise S3Error("ExpiredToken", "The provided token has expired.")
    if payload != "UNSIGNED-PAYLOAD" and payload != hashlib.sha256(request.body).hexdigest():
        raise S3Error("XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' is not that of the body.")
