"""What the S3 store makes of what servers say: errors, refused checksums, lost tags, stale credentials."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blobflow.checksum import combine_all, crc32c
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    InvalidKey,
    NoSuchUpload,
    ObjectNotFound,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    Unsupported,
    UploadIncomplete,
)
from blobflow.stores.base import Body, PartMeta, PutMode
from blobflow.stores.s3 import S3Options, S3Store
from tests.servers import Peer, S3Endpoint, scripted_server

SECRET = "a-secret-that-must-never-show"  # noqa: S105
TOKEN = "a-token-that-must-never-show"  # noqa: S105

Request = tuple[str, dict[str, str], bytes]


@pytest.fixture
def open_s3() -> Iterator[Callable[..., S3Store]]:
    stores: list[S3Store] = []

    def make(url: str, **options: Any) -> S3Store:
        keys = {"access_key_id": "key", "secret_access_key": SECRET, "session_token": TOKEN}
        stores.append(S3Store(S3Options(bucket="bucket", endpoint_url=url, **keys | options)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


class Script:
    """Answers one request after the other, whatever connections they come on, and remembers them."""

    def __init__(self, *answers: Callable[[Peer], None]) -> None:
        self.requests: list[Request] = []
        self._answers = answers

    def __call__(self, peer: Peer) -> None:
        for answer in self._answers:
            self.requests.append(peer.request())
            answer(peer)

    @property
    def connections(self) -> tuple[Callable[[Peer], None], ...]:
        """The two planes' calls mixed need a connection each: one script per request."""

        def one(answer: Callable[[Peer], None]) -> Callable[[Peer], None]:
            def play(peer: Peer) -> None:
                self.requests.append(peer.request())
                answer(peer)

            return play

        return tuple(one(answer) for answer in self._answers)


def refuses(status: int, code: str, message: str = "", **headers: str) -> Callable[[Peer], None]:
    return lambda peer: peer.refuse(status, code, message, **headers)


def answers(body: str = "", status: int = 200, **headers: str) -> Callable[[Peer], None]:
    return lambda peer: peer.answer(status, body.encode(), **headers)


CREATED = "<InitiateMultipartUploadResult><UploadId>the-id</UploadId></InitiateMultipartUploadResult>"
COMPLETED = "<CompleteMultipartUploadResult><ETag>whole-2</ETag></CompleteMultipartUploadResult>"


@pytest.mark.parametrize(
    ("status", "code", "kind", "retryable"),
    [
        (404, "NoSuchKey", ObjectNotFound, False),
        (404, "NoSuchBucket", StoreConfigurationError, False),
        (404, "NoSuchUpload", NoSuchUpload, False),
        (403, "AccessDenied", StoreConfigurationError, False),
        (403, "InvalidAccessKeyId", StoreConfigurationError, False),
        (403, "SignatureDoesNotMatch", StoreConfigurationError, False),
        (403, "RequestTimeTooSkewed", StoreUnavailable, True),
        (400, "AuthorizationHeaderMalformed", StoreConfigurationError, False),
        (400, "ExpiredToken", StoreConfigurationError, False),
        (400, "RequestTimeout", StoreUnavailable, True),
        (400, "IncompleteBody", StoreUnavailable, True),
        (400, "KeyTooLongError", InvalidKey, False),
        (400, "InvalidArgument", StoreConfigurationError, False),
        (405, "MethodNotAllowed", Unsupported, False),
        (409, "OperationAborted", StoreUnavailable, True),
        (429, "TooManyRequests", SlowDown, True),
        (500, "InternalError", StoreUnavailable, True),
        (501, "NotImplemented", Unsupported, False),
        (502, "", StoreUnavailable, True),
        (503, "SlowDown", SlowDown, True),
        (503, "ServiceUnavailable", SlowDown, True),
        (504, "", StoreUnavailable, True),
        (418, "", StoreConfigurationError, False),
    ],
)
def test_both_planes_understand_the_same(
    open_s3: Callable[..., S3Store], status: int, code: str, kind: type[BlobflowError], retryable: bool
) -> None:
    """An error answer means the same on the data plane and on the control plane, and shows no secret."""
    refusal = refuses(status, code, "as the server says")
    with scripted_server(Script(refusal), Script(refusal)) as url:
        store = open_s3(url)
        with pytest.raises(kind) as by_data:
            store.get("k", max_bytes=1)
        with pytest.raises(kind) as by_control:
            list(store.list("k"))
    for error in (by_data.value, by_control.value):
        assert type(error) is kind
        assert error.retryable is retryable
        assert SECRET not in repr(error.to_dict()) + repr(error)
        assert TOKEN not in repr(error.to_dict()) + repr(error)
    if kind not in (ObjectNotFound, NoSuchUpload):
        assert "as the server says" in str(by_data.value)


def test_the_region_to_configure_is_named(open_s3: Callable[..., S3Store]) -> None:
    """A bucket of another region is a configuration error whose hint names that region."""
    moved = refuses(301, "PermanentRedirect", x_amz_bucket_region="eu-central-1")
    with scripted_server(Script(moved)) as url, pytest.raises(StoreConfigurationError) as wrong:
        open_s3(url).get("k", max_bytes=1)
    assert "eu-central-1" in wrong.value.hint


def test_retry_after_is_handed_on(open_s3: Callable[..., S3Store]) -> None:
    """SlowDown carries the seconds the server asks for, on both planes, and nothing where it says nothing."""
    script = (
        Script(refuses(503, "SlowDown", retry_after="3"), refuses(503, "SlowDown")),
        Script(refuses(503, "SlowDown", retry_after="4")),
    )
    with scripted_server(*script) as url:
        store = open_s3(url)
        asked: list[float | None] = []
        for call in (
            lambda: store.get("k", max_bytes=1),
            lambda: store.get("k", max_bytes=1),
            lambda: list(store.list()),
        ):
            with pytest.raises(SlowDown) as slow:
                call()
            asked.append(slow.value.fields.get("retry_after_s"))
    assert asked == [3.0, None, 4.0]


def test_garbage_is_unavailable(open_s3: Callable[..., S3Store]) -> None:
    """Something that is not HTTP, and a page of a proxy instead of XML, are passing failures."""

    def garbage(peer: Peer) -> None:
        peer.request()
        peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")

    with scripted_server(garbage, Script(answers("<html>busy<br></html>"))) as url:
        store = open_s3(url)
        with pytest.raises(StoreUnavailable):
            store.get("k", max_bytes=1)
        with pytest.raises(StoreUnavailable):
            list(store.list())


def test_bodies_carry_their_checksum_in_a_header(open_s3: Callable[..., S3Store]) -> None:
    """Parts and objects go out with a signed CRC32C header and an unsigned, untouched payload."""
    script = Script(answers(etag='"1"'), answers(etag='"2"'))
    with scripted_server(script) as url:
        store = open_s3(url)
        store.put("k", b"whole", content_type="text/x")
        store.put_part("k", "id/+", 7, Body.of(b"part"))
    for (line, headers, body), data in zip(script.requests, (b"whole", b"part"), strict=True):
        assert body == data
        assert headers["x-amz-checksum-crc32c"] == base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()
        assert "x-amz-checksum-crc32c" in headers["authorization"]
        assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert headers["x-amz-security-token"] == TOKEN
        assert not headers.keys() & {"transfer-encoding", "x-amz-trailer", "content-encoding", "expect"}, line
    assert script.requests[0][1]["content-type"] == "text/x"
    assert script.requests[1][0] == "PUT /bucket/k?partNumber=7&uploadId=id%2F%2B HTTP/1.1"


def test_a_server_without_checksums_is_asked_without(open_s3: Callable[..., S3Store]) -> None:
    """A server that refuses the checksum headers gets the same request without them, and is not asked again."""
    parts = [PartMeta(1, 5, '"1"', 11), PartMeta(2, 4, '"2"', 22)]
    control = Script(
        refuses(501, "NotImplemented"),
        answers(CREATED),
        answers(CREATED),
        refuses(400, "InvalidRequest", "Checksum Type mismatch occurred, expected checksum Type: null"),
        answers(COMPLETED),
    )
    data = Script(
        refuses(400, "InvalidArgument", "unknown header x-amz-checksum-crc32c"),
        answers(etag='"1"'),
        answers(etag='"1"'),
    )
    with scripted_server(data, *control.connections) as url:
        store = open_s3(url)
        assert store.put_part("k", "id", 1, Body.of(b"x")).crc32c == crc32c(b"x")
        store.put_part("k", "id", 1, Body.of(b"x"))
        for _ in range(2):
            store.close()  # the client would use the connection again, and the script ends with it
            assert store.create_multipart("k", part_size=5) == "the-id" if _ else True
    assert ["x-amz-checksum-crc32c" in headers for _, headers, _ in data.requests] == [True, False, False]
