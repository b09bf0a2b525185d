"""Signature version 4, as botocore computes it for S3, in a tenth of the time.

For thousands of small requests per second, signing is most of the cost. The rules are on
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html; a test compares the signatures with those
of botocore.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from typing import Protocol

_UNSIGNED = frozenset({"connection", "expect", "proxy-authorization", "transfer-encoding", "user-agent"})
"""What a proxy may change on the way; of the headers that this package sends."""


class Keys(Protocol):
    """Frozen credentials."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def token(self) -> str | None: ...


class Signer:
    """Signs requests for one service in one region.

    The key that signs is made of the secret once for each day and pair of keys.
    """

    def __init__(self, service: str, region: str) -> None:
        self._service = service
        self._region = region
        self._key: tuple[str, str, str, bytes] = ("", "", "", b"")
        """Day, access key, secret key, and their derived values; replaced as a whole, so threads need no lock."""

    def sign(
        self, method: str, target: str, headers: Mapping[str, str], payload: str, keys: Keys, now: datetime
    ) -> dict[str, str]:
        """`headers` and those that sign them.

        Args:
            target: Path and query as they are on the request line.
            payload: SHA-256 of the body in hex, or the word for an unsigned one.
            now: The time, in UTC.
        """
        moment = f"{now.year:04}{now.month:02}{now.day:02}T{now.hour:02}{now.minute:02}{now.second:02}Z"
        day = moment[:8]
        signed = {**headers, "X-Amz-Date": moment, "X-Amz-Content-SHA256": payload}
        if keys.token:
            signed["X-Amz-Security-Token"] = keys.token
        lowered = [(name.lower(), " ".join(value.split())) for name, value in signed.items()]
        canonical = sorted([field for field in lowered if field[0] not in _UNSIGNED])
        names = ";".join([name for name, _ in canonical])
        fields = "\n".join([f"{name}:{value}" for name, value in canonical])
        path, _, query = target.partition("?")
        if query:  # by name, then by value, and each name with its `=`
            pairs = sorted(pair.partition("=")[::2] for pair in query.split("&"))
            query = "&".join([f"{name}={value}" for name, value in pairs])
        request = f"{method}\n{path}\n{query}\n{fields}\n\n{names}\n{payload}"
        scope = f"{day}/{self._region}/{self._service}/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(self._key_of(day, keys), to_sign.encode(), "sha256").hex()
        signed["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return signed

    def _key_of(self, day: str, keys: Keys) -> bytes:
        known = self._key
        if known[:3] != (day, keys.access_key, keys.secret_key):
            key = f"AWS4{keys.secret_key}".encode()
            for step in (day, self._region, self._service, "aws4_request"):
                key = hmac.digest(key, step.encode(), "sha256")
            known = self._key = (day, keys.access_key, keys.secret_key, key)
        return known[3]
