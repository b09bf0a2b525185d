"""What the S3 store makes of what servers say: errors, refused checksums, lost tags, stale credentials."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
import pytest
from botocore.credentials import ReadOnlyCredentials
from pydantic import SecretStr, ValidationError

from blobflow.checksum import combine_all, crc32c
from blobflow.cli.formatting import as_option
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
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.errors import RequestContext, S3Error
from blobflow.stores.s3.store import S3Options, S3Store
from tests.servers import Peer, S3Endpoint, scripted_server

SECRET = "a-secret-that-must-never-show"
TOKEN = "a-token-that-must-never-show"

Request = tuple[str, dict[str, str], bytes]


@pytest.fixture
def open_s3() -> Iterator[Callable[..., S3Store]]:
    stores: list[S3Store] = []

    def make(url: str, **options: Any) -> S3Store:
        keys = {"access_key_id": "key", "secret_access_key": SECRET, "session_token": TOKEN}
        stores.append(S3Store(S3Options.model_validate({"bucket": "bucket", "endpoint_url": url} | keys | options)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


class Script:
    """Answers one request after the other on one connection, and remembers them."""

    def __init__(self, *answers: Callable[[Peer], None]) -> None:
        self.requests: list[Request] = []
        self._answers = answers

    def __call__(self, peer: Peer) -> None:
        for answer in self._answers:
            self.requests.append(peer.request())
            answer(peer)


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
def test_a_refusal_means_the_same_everywhere(
    open_s3: Callable[..., S3Store], status: int, code: str, kind: type[BlobflowError], retryable: bool
) -> None:
    """An error answer means the same for an object and for a listing, and shows no secret."""
    refusal = refuses(status, code, "as the server says")
    with scripted_server(Script(refusal, refusal)) as url:
        store = open_s3(url)
        with pytest.raises(kind) as by_get:
            store.get("k", max_bytes=1)
        with pytest.raises(kind) as by_list:
            list(store.list("k"))
    for error in (by_get.value, by_list.value):
        assert type(error) is kind
        assert error.retryable is retryable
        assert SECRET not in repr(error.to_dict()) + repr(error)
        assert TOKEN not in repr(error.to_dict()) + repr(error)
    if kind not in (ObjectNotFound, NoSuchUpload):
        assert "as the server says" in str(by_get.value)


WRONG_REGION = (
    "<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; expecting 'eu-west-3'"
    "</Message><Region>eu-west-3</Region></Error>"
)


def scope(request: Request) -> str:
    """The region that a request was signed for."""
    return request[1]["authorization"].split("/")[2]


@pytest.mark.parametrize(
    ("moved", "region"),
    [
        (refuses(301, "PermanentRedirect", x_amz_bucket_region="eu-central-1"), "eu-central-1"),
        (lambda peer: peer.answer(400, b"", x_amz_bucket_region="eu-central-1"), "eu-central-1"),
        (answers(WRONG_REGION, 400), "eu-west-3"),
        (answers(WRONG_REGION.replace("<Region>eu-west-3</Region>", ""), 400), "eu-west-3"),
    ],
    ids=["header of a redirect", "header alone", "body", "words of the message"],
)
def test_the_region_that_the_server_names_is_followed(
    moved: Callable[[Peer], None], region: str, open_s3: Callable[..., S3Store]
) -> None:
    """The next attempt, which the error asks for, is signed for it, and so is everything after it."""
    first, second = Script(moved), Script(answers("x"), answers("y"))
    with scripted_server(first, second) as url:
        store = RetryingStore(open_s3(url), sleep=lambda _: None)
        assert store.get("k", max_bytes=1).data == b"x"
        assert store.get("k", max_bytes=1).data == b"y"
    assert scope(first.requests[0]) == "us-east-1"
    assert [scope(request) for request in second.requests] == [region, region]


def test_a_region_that_is_refused_as_it_was_named_is_final(open_s3: Callable[..., S3Store]) -> None:
    """Signed for the very region that the server names: then it is the configuration, and the hint names the option."""
    moved = refuses(301, "PermanentRedirect", x_amz_bucket_region="us-east-1")
    with scripted_server(Script(moved)) as url, pytest.raises(StoreConfigurationError) as wrong:
        RetryingStore(open_s3(url), sleep=lambda _: None).get("k", max_bytes=1)
    assert 'region="us-east-1"' in wrong.value.hint


def test_threads_that_meet_the_wrong_region_together_all_follow(open_s3: Callable[..., S3Store]) -> None:
    """What one has learned is not held against the others, whose requests were under way."""
    store = open_s3("http://127.0.0.1:1")
    access = store.connected()
    refusal = S3Error(301, "PermanentRedirect", "", {"x-amz-bucket-region": "eu-central-1"})
    for _ in range(2):
        assert isinstance(store.failed(refusal, RequestContext("get", "k"), access), StoreUnavailable)
    assert store.connected().region == "eu-central-1"


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", ""])
@pytest.mark.parametrize("skew_s", [-7200, 5400])
def test_a_clock_that_is_off_is_made_up_for(skew_s: int, code: str, open_s3: Callable[..., S3Store]) -> None:
    """A request that is refused for its date is signed again with the server's; a HEAD's refusal has no code."""
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=skew_s), usegmt=True)
    script = Script(refuses(403, code, date=date) if code else answers("", 403, date=date), answers("x"))
    with scripted_server(script) as url:
        assert RetryingStore(open_s3(url), sleep=lambda _: None).get("k", max_bytes=1).data == b"x"
    signed = [datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%S%z") for _, headers, _ in script.requests]
    assert abs((signed[1] - signed[0]).total_seconds() - skew_s) < 30


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("InvalidRequest", "Missing required header for this request: Content-MD5"),
        ("InvalidRequest", "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests"),
        ("MissingContentMD5", "Content-MD5 is required"),
    ],
)
def test_a_bucket_that_asks_for_md5_names_the_option(code: str, message: str, open_s3: Callable[..., S3Store]) -> None:
    """The remedy is one option, in the words of the surface; the request is not repeated without checksums."""
    with scripted_server(Script(refuses(400, code, message))) as url, pytest.raises(StoreConfigurationError) as asked:
        open_s3(url).put("k", b"x")
    assert "use --content-md5" in asked.value.to_dict(as_option)["hint"]


@pytest.mark.parametrize("foreign", ["&#x1;", "&#1;", "\x01", "&#x1F;"])
def test_a_foreign_upload_with_a_control_character_hides_no_other(
    foreign: str, open_s3: Callable[..., S3Store]
) -> None:
    """XML has no way to write it, servers write it all the same: it is passed over, and paged past."""

    def page(key: str, upload_id: str, more: str) -> str:
        return (
            f"<ListMultipartUploadsResult>{more}<Upload><Key>{key}</Key><UploadId>{upload_id}</UploadId></Upload>"
            "</ListMultipartUploadsResult>"
        )

    more = (
        f"<IsTruncated>true</IsTruncated><NextKeyMarker>a{foreign}b</NextKeyMarker>"
        "<NextUploadIdMarker>1</NextUploadIdMarker>"
    )
    script = Script(answers(page(f"a{foreign}b", "1", more)), answers(page("ours", "2", "")))
    with scripted_server(script) as url:
        assert [(each.key, each.upload_id) for each in open_s3(url).list_uploads()] == [("ours", "2")]
    marker = "%1F" if "1F" in foreign else "%01"
    assert f"key-marker=a{marker}b" in script.requests[1][0]


def test_retry_after_is_handed_on(open_s3: Callable[..., S3Store]) -> None:
    """SlowDown carries the seconds the server asks for, and nothing where it says nothing."""
    script = Script(
        refuses(503, "SlowDown", retry_after="3"),
        refuses(503, "SlowDown"),
        refuses(503, "SlowDown", retry_after="4"),
    )
    with scripted_server(script) as url:
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
    """Something that is not HTTP is a passing failure."""

    def garbage(peer: Peer) -> None:
        peer.request()
        peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")

    with scripted_server(garbage) as url, pytest.raises(StoreUnavailable):
        open_s3(url).get("k", max_bytes=1)


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
        assert not headers.keys() & {
            "transfer-encoding",
            "x-amz-trailer",
            "content-encoding",
            "expect",
            "content-md5",
        }, line
    assert script.requests[0][1]["content-type"] == "text/x"
    assert script.requests[1][0] == "PUT /bucket/k?partNumber=7&uploadId=id%2F%2B HTTP/1.1"


def test_bodies_carry_their_md5_where_it_is_wished(open_s3: Callable[..., S3Store]) -> None:
    """With content_md5 parts and objects go out with their MD5 too, which is signed."""
    script = Script(answers(etag='"1"'), answers(etag='"2"'))
    pieces = [b"pa", b"", b"rt"]
    with scripted_server(script) as url:
        store = open_s3(url, content_md5=True)
        store.put("k", b"whole")
        store.put_part("k", "id", 1, Body(4, lambda: pieces))
    for (_, headers, _), data in zip(script.requests, (b"whole", b"part"), strict=True):
        assert headers["content-md5"] == base64.b64encode(hashlib.md5(data).digest()).decode()
        assert headers["x-amz-checksum-crc32c"] == base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()
        assert "content-md5" in headers["authorization"]


def test_a_source_that_changed_is_noticed_while_it_is_hashed(open_s3: Callable[..., S3Store]) -> None:
    """With content_md5 the body is read before it is sent: bytes without the promised CRC32C are never sent."""
    store = open_s3("http://127.0.0.1:1", content_md5=True)
    with pytest.raises(ChecksumMismatch, match="other bytes than before"):
        store.put_part("k", "id", 1, Body(5, lambda: [b"wrong"], crc32c=crc32c(b"right")))


@pytest.mark.parametrize(
    "document",
    [
        "",
        "<html>busy</html>",
        "<html>busy<br></html>",
        '<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult><Prefix>&b;</Prefix></ListBucketResult>',
        "<ListBucketResult><Contents><Key>k</Key></Contents></ListBucketResult>",
    ],
)
def test_an_answer_that_cannot_be_understood_is_final(open_s3: Callable[..., S3Store], document: str) -> None:
    """A page instead of XML, or another dialect, is never an empty listing; it is asked for twice, not for minutes."""
    script = Script(answers(document), answers(document))
    with scripted_server(script) as url, pytest.raises(Unsupported, match="understood") as wrong:
        list(RetryingStore(open_s3(url)).list())
    assert len(script.requests) == 2
    assert url in wrong.value.message
    assert "S3 API" in wrong.value.hint


@pytest.mark.parametrize("head", ["", "content-length: 28\r\n"])
def test_half_a_document_is_unavailable(open_s3: Callable[..., S3Store], head: str) -> None:
    """A document that began well and has no end is a passing failure, whatever was said of its length."""

    def cut(peer: Peer) -> None:
        peer.request()
        peer.send(f"HTTP/1.1 200 -\r\n{head}\r\n<ListBucketResult><Contents>".encode())

    with scripted_server(cut) as url, pytest.raises(StoreUnavailable, match="ended after"):
        list(open_s3(url).list())


def test_an_upload_of_a_strange_server_is_begun_once(open_s3: Callable[..., S3Store]) -> None:
    """A create whose answer cannot be understood is not repeated: each one would leave an open upload."""
    script = Script(answers("<Started><Id>7</Id></Started>"))
    with scripted_server(script) as url, pytest.raises(Unsupported):
        RetryingStore(open_s3(url)).create_multipart("k", part_size=5)
    assert len(script.requests) == 1


def test_a_document_is_read_up_to_a_limit(open_s3: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """A document without an end does not fill the memory: what is beyond the limit is not even read."""
    monkeypatch.setattr("blobflow.stores.s3.requests.MAX_ANSWER_BYTES", 1000)

    def endless(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 -\r\ntransfer-encoding: chunked\r\n\r\n")
        with suppress(OSError):
            while True:
                peer.send(b"400\r\n" + b"<Key>" * 204 + b"<Key" + b"\r\n")

    with scripted_server(endless) as url, pytest.raises(Unsupported, match="does not end"):
        list(open_s3(url).list())


def test_a_document_that_ends_early_is_unavailable(open_s3: Callable[..., S3Store]) -> None:
    """A connection that ends inside a document is told as such, with the bytes that came."""

    def cut(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 -\r\ncontent-length: 100\r\n\r\n<ListBucketResult/>")

    with scripted_server(cut) as url, pytest.raises(StoreUnavailable, match="after 19 of 100 bytes"):
        list(open_s3(url).list())


def test_documents_that_are_sent_are_signed(open_s3: Callable[..., S3Store]) -> None:
    """The list of parts has no checksum of its own: its SHA-256 is part of the signature."""
    script = Script(answers(COMPLETED))
    with scripted_server(script) as url:
        open_s3(url).complete_multipart("k", "id", [PartMeta(1, 1, '"1"', 0)])
    _, headers, body = script.requests[0]
    assert headers["x-amz-content-sha256"] == hashlib.sha256(body).hexdigest()
    assert b'<Part><PartNumber>1</PartNumber><ETag>"1"</ETag></Part>' in body


def test_a_server_without_checksums_is_asked_without(open_s3: Callable[..., S3Store]) -> None:
    """A server that refuses the checksum headers gets the same requests without them, and is not asked again."""
    no_checksums = refuses(400, "InvalidArgument", "unknown header x-amz-checksum-crc32c")
    parts = (no_checksums, answers(etag='"1"'), answers(etag='"1"'))
    creations = (refuses(501, "NotImplemented"), answers(CREATED), answers(CREATED))
    completions = (refuses(400, "InvalidRequest", "Checksum Type mismatch occurred"), answers(COMPLETED))
    script = Script(*parts, *creations, *completions)
    with scripted_server(script) as url:
        store = open_s3(url)
        part = store.put_part("k", "id", 1, Body.of(b"x"))
        assert store.put_part("k", "id", 1, Body.of(b"x")) == part == PartMeta(1, 1, '"1"', crc32c(b"x"))
        assert store.create_multipart("k", part_size=5) == "the-id"
        assert store.create_multipart("k", part_size=5) == "the-id"
        assert store.complete_multipart("k", "id", [part]).e_tag == '"whole-2"'
    checked = [any(name.startswith("x-amz-checksum") for name in headers) for _, headers, _ in script.requests]
    assert checked == [True, False, False, True, False, False, True, False]


def test_an_upload_is_completed_with_what_it_must_be(open_s3: Callable[..., S3Store]) -> None:
    """Create asks for a CRC32C of the full object; complete sends the combination of the parts and the size."""
    one, two = b"first part", b"second"
    script = Script(answers(CREATED), answers(COMPLETED), answers(COMPLETED))
    with scripted_server(script) as url:
        store = open_s3(url)
        store.create_multipart("k", part_size=len(one), content_type="application/zstd")
        parts = [PartMeta(1, len(one), '"1"', crc32c(one)), PartMeta(2, len(two), '"2"', crc32c(two))]
        made = store.complete_multipart("k", "the-id", parts)
        store.complete_multipart("k", "the-id", [parts[0], parts[1]._replace(crc32c=None)])
    assert (made.size, made.e_tag) == (16, '"whole-2"')
    created, completed, unknown = (headers for _, headers, _ in script.requests)
    assert created["x-amz-checksum-algorithm"] == "CRC32C"
    assert created["x-amz-checksum-type"] == completed["x-amz-checksum-type"] == "FULL_OBJECT"
    assert created["content-type"] == "application/zstd"
    whole = combine_all((part.crc32c or 0, part.size) for part in parts)
    assert whole == crc32c(one + two)
    assert base64.b64decode(completed["x-amz-checksum-crc32c"]) == whole.to_bytes(4, "big")
    assert completed["x-amz-mp-object-size"] == unknown["x-amz-mp-object-size"] == "16"
    assert "x-amz-checksum-crc32c" not in unknown


def test_an_error_inside_a_success_is_an_error(open_s3: Callable[..., S3Store]) -> None:
    """Complete may say 200 first and fail later, in the body: that is a failure, and a retryable one."""
    failed = "<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
    with scripted_server(Script(answers(failed))) as url, pytest.raises(StoreUnavailable) as late:
        open_s3(url).complete_multipart("k", "id", [PartMeta(1, 1, '"1"', 0)])
    assert late.value.retryable


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("InvalidPart", "One or more of the specified parts could not be found"),
        ("InvalidPartOrder", ""),
        ("EntityTooSmall", ""),
        ("InvalidRequest", "The provided 'x-amz-mp-object-size' header value 1 does not match what was computed: 2"),
    ],
)
def test_wrong_parts_are_an_incomplete_upload(open_s3: Callable[..., S3Store], code: str, message: str) -> None:
    """A server that finds the parts wanting is believed, at once."""
    with scripted_server(Script(refuses(400, code, message))) as url, pytest.raises(UploadIncomplete):
        open_s3(url).complete_multipart("k", "id", [PartMeta(1, 1, '"1"', 0)])


@pytest.mark.parametrize("digest", ["BadDigest", "XAmzContentChecksumMismatch"])
def test_damage_on_the_way_is_told_from_a_wrong_promise(open_s3: Callable[..., S3Store], digest: str) -> None:
    """A refused digest is retryable if the bytes here are right, and an integrity error if they are not."""
    with scripted_server(Script(refuses(400, digest), refuses(400, digest))) as url:
        store = open_s3(url)
        with pytest.raises(StoreUnavailable, match="damaged on the way"):
            store.put_part("k", "id", 1, Body.of(b"right"))
        with pytest.raises(ChecksumMismatch):
            store.put_part("k", "id", 1, Body(5, lambda: [b"wrong"], crc32c=crc32c(b"right")))


@pytest.mark.seed("3.15")
def test_a_missing_entity_tag_is_refused(open_s3: Callable[..., S3Store]) -> None:
    """A part or an object acknowledged without an entity tag counts as not stored, retryably."""
    with scripted_server(Script(answers(), answers())) as url:
        store = open_s3(url)
        with pytest.raises(StoreUnavailable, match="no ETag returned for part 3 of 'k'"):
            store.put_part("k", "id", 3, Body.of(b"x"))
        with pytest.raises(StoreUnavailable, match="no ETag returned for 'k'"):
            store.put("k", b"x")


def test_a_head_without_a_size_is_not_understood(open_s3: Callable[..., S3Store]) -> None:
    """An answer that does not say how large the object is says nothing."""

    def sizeless(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 -\r\netag: x\r\n\r\n")

    with scripted_server(sizeless) as url, pytest.raises(Unsupported, match="tells no size"):
        open_s3(url).head("k")


def test_a_concurrent_conditional_put_may_be_repeated(open_s3: Callable[..., S3Store]) -> None:
    """409 says that another write was under way: not lost, not won, try again."""
    script = Script(refuses(409, "ConditionalRequestConflict"))
    with scripted_server(script) as url, pytest.raises(StoreUnavailable) as conflict:
        open_s3(url).put("k", b"x", mode=PutMode.CREATE)
    assert conflict.value.status == 409


def parts_page(numbers: range, *, truncated: bool, crc: bool = False) -> Callable[[Peer], None]:
    checksum = "<ChecksumCRC32C>AAAAAQ==</ChecksumCRC32C>" if crc else ""
    parts = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>t</ETag><Size>5</Size>{checksum}</Part>" for n in numbers)
    return answers(f"<ListPartsResult><IsTruncated>{str(truncated).lower()}</IsTruncated>{parts}</ListPartsResult>")


def test_a_full_page_is_not_believed_to_be_the_last(open_s3: Callable[..., S3Store]) -> None:
    """A server that forgets to say that the list of parts goes on does not cost the parts beyond 1,000."""
    script = Script(
        parts_page(range(1, 1001), truncated=False), parts_page(range(1001, 1004), truncated=False, crc=True)
    )
    with scripted_server(script) as url:
        parts = open_s3(url).list_parts("k", "id")
    assert [part.part_number for part in parts] == list(range(1, 1004))
    assert (parts[0].crc32c, parts[-1].crc32c) == (None, 1)
    assert "part-number-marker=1000" in script.requests[1][0]


def test_a_list_that_stands_still_is_given_up(open_s3: Callable[..., S3Store]) -> None:
    """A server that gives the same truncated page for ever is not understood: no loop, no loss, no second try."""
    same_parts = parts_page(range(1, 4), truncated=True)
    same_keys = answers(
        "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
        "<Contents><Key>a</Key><ETag>t</ETag><Size>1</Size></Contents></ListBucketResult>"
    )
    same_uploads = answers(
        "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>a</NextKeyMarker>"
        "<NextUploadIdMarker>1</NextUploadIdMarker><Upload><Key>a</Key><UploadId>1</UploadId></Upload>"
        "</ListMultipartUploadsResult>"
    )
    with scripted_server(Script(same_parts, same_parts, same_keys, same_keys, same_uploads, same_uploads)) as url:
        store = open_s3(url)
        for call in (lambda: store.list_parts("k", "id"), lambda: list(store.list()), store.list_uploads):
            with pytest.raises(Unsupported, match="stands still"):
                call()


def test_an_abort_that_nobody_can_look_after_is_believed(open_s3: Callable[..., S3Store]) -> None:
    """A server that lists no parts has no way to show what an abort left; the abort itself is no failure."""
    with scripted_server(Script(answers(status=204), refuses(501, "NotImplemented"))) as url:
        open_s3(url).abort_multipart("k", "id")


def test_abort_goes_on_until_no_part_is_left(open_s3: Callable[..., S3Store]) -> None:
    """A part that arrived during the abort is aborted too; one that keeps coming is an error, not an endless loop."""
    aborted, stragglers = answers(status=204), parts_page(range(1, 2), truncated=False)
    script = Script(aborted, stragglers, aborted, refuses(404, "NoSuchUpload"), *[aborted, stragglers] * 5)
    with scripted_server(script) as url:
        store = open_s3(url)
        store.abort_multipart("k", "id")
        assert len(script.requests) == 4
        with pytest.raises(StoreUnavailable, match="after 5 aborts"):
            store.abort_multipart("k", "id")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No trace of the machine's own AWS configuration."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_explicit_keys_ignore_the_environment(
    open_s3: Callable[..., S3Store], environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With keys in the options no variable and no file has a say: not in endpoint, region, profile, keys or CA."""
    (tmp_path / "config").write_text("this is [ no configuration file")
    environment.setenv("AWS_PROFILE", "no-such-profile")
    environment.setenv("AWS_REGION", "eu-west-9")
    environment.setenv("AWS_DEFAULT_REGION", "eu-west-9")
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    environment.setenv("AWS_CA_BUNDLE", "/no/such/bundle")
    environment.setenv("AWS_ACCESS_KEY_ID", "environment")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "environment")
    script = Script(answers(etag='"1"'))
    with scripted_server(script) as url:
        open_s3(url).put("k", b"1")
    assert "Credential=key/" in script.requests[0][1]["authorization"]
    assert "/us-east-1/s3/aws4_request" in script.requests[0][1]["authorization"]


def test_without_an_endpoint_explicit_keys_mean_aws(environment: pytest.MonkeyPatch) -> None:
    """Explicit keys and no endpoint_url address AWS itself in the given region, whatever AWS_ENDPOINT_URL says."""
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    options = S3Options(
        bucket="my-bucket", region="eu-central-1", access_key_id="k", secret_access_key=SecretStr(SECRET)
    )
    store = S3Store(options)
    access = store.connected()
    assert repr(access.client) == "<HttpClient https://my-bucket.s3.eu-central-1.amazonaws.com, 0 idle>"
    assert access.target("a b+c/ü") == "/a%20b%2Bc/%C3%BC"
    store.close()
    dotted = S3Store(options.model_copy(update={"bucket": "my.bucket"}))
    assert repr(dotted.connected().client) == "<HttpClient https://s3.eu-central-1.amazonaws.com, 0 idle>"
    assert dotted.connected().target("k") == "/my.bucket/k"
    dotted.close()


def test_the_usual_chain_is_used_without_keys(open_s3: Callable[..., S3Store], environment: pytest.MonkeyPatch) -> None:
    """Without keys in the options the variables count, for keys and region."""
    environment.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    environment.setenv("AWS_REGION", "eu-west-9")
    script = Script(answers(etag='"1"'))
    with scripted_server(script) as url:
        open_s3(url, access_key_id=None, secret_access_key=None, session_token=None).put("k", b"1")
    signature = script.requests[0][1]["authorization"]
    assert "Credential=from-the-environment/" in signature
    assert "/eu-west-9/s3/aws4_request" in signature


def test_expired_credentials_are_looked_up_again(
    open_s3: Callable[..., S3Store], environment: pytest.MonkeyPatch
) -> None:
    """ExpiredToken is retryable, and the next attempt uses what the chain gives then."""
    environment.setenv("AWS_ACCESS_KEY_ID", "old")
    environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    expired, renewed = Script(refuses(400, "ExpiredToken")), Script(answers(etag='"1"'))
    with scripted_server(expired, renewed) as url:
        store = open_s3(url, access_key_id=None, secret_access_key=None, session_token=None)
        with pytest.raises(StoreUnavailable) as stale:
            store.put("k", b"1")
        assert stale.value.retryable
        environment.setenv("AWS_ACCESS_KEY_ID", "new")
        store.put("k", b"1")
    assert "Credential=old/" in expired.requests[0][1]["authorization"]
    assert "Credential=new/" in renewed.requests[0][1]["authorization"]


def test_no_credentials_at_all_is_a_configuration_error(
    open_s3: Callable[..., S3Store], environment: pytest.MonkeyPatch
) -> None:
    """Where the chain finds nothing, the error says what to set, and nothing is sent."""
    store = open_s3("http://127.0.0.1:1", access_key_id=None, secret_access_key=None, session_token=None)
    for call in (lambda: store.get("k", max_bytes=1), lambda: list(store.list())):
        with pytest.raises(StoreConfigurationError) as nobody:
            call()
        assert "AWS_ACCESS_KEY_ID" in nobody.value.hint


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied"}}, "AssumeRole"), StoreConfigurationError),
        (botocore.exceptions.ClientError({"Error": {"Code": "Throttling"}}, "AssumeRole"), SlowDown),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://sts.test"), StoreUnavailable),
        (botocore.exceptions.CredentialRetrievalError(provider="sso", error_msg="x"), StoreUnavailable),
        (botocore.exceptions.PartialCredentialsError(provider="env", cred_var="x"), StoreConfigurationError),
    ],
)
def test_credentials_that_cannot_be_had_are_told_as_such(
    open_s3: Callable[..., S3Store], environment: pytest.MonkeyPatch, error: Exception, kind: type[BlobflowError]
) -> None:
    """What goes wrong where credentials are fetched is retryable if it passes, and costs no connection."""

    class Fetched:
        def get_frozen_credentials(self) -> Any:
            if requests.requests:
                raise error
            return ReadOnlyCredentials("key", "secret", None)

    environment.setattr(botocore.session.Session, "get_credentials", lambda _: Fetched())
    requests = Script(answers(etag='"1"'))
    with scripted_server(requests) as url:
        store = open_s3(url, access_key_id=None, secret_access_key=None, session_token=None)
        store.put("k", b"1")
        with pytest.raises(BlobflowError) as told:
            store.put("k", b"1")
        assert repr(store.connected().client) == f"<HttpClient {url}, 1 idle>"
    assert type(told.value) is kind


def test_anonymous_requests_are_not_signed(open_s3: Callable[..., S3Store]) -> None:
    """Anonymous access sends no signature, nor a document that is signed."""
    script = Script(answers(etag='"1"'), answers(COMPLETED))
    with scripted_server(script) as url:
        store = open_s3(url, access_key_id=None, secret_access_key=None, session_token=None, anonymous=True)
        part = store.put_part("k", "id", 1, Body.of(b"1"))
        store.complete_multipart("k", "id", [part])
    for _, headers, _ in script.requests:
        assert not headers.keys() & {"authorization", "x-amz-date", "x-amz-content-sha256"}


def test_secrets_do_not_show(caplog: pytest.LogCaptureFixture, moto_s3: S3Endpoint) -> None:
    """Neither options nor store nor our own log lines show key, secret or token."""
    caplog.set_level(logging.DEBUG, logger="blobflow")
    options = S3Options(
        bucket=moto_s3.new_bucket(),
        endpoint_url=moto_s3.endpoint_url,
        access_key_id="key-that-must-not-show",
        secret_access_key=SecretStr(SECRET),
        session_token=SecretStr(TOKEN),
    )
    store = S3Store(options)
    store.put("k", b"1")
    store.delete("k")
    store.close()
    shown = f"{options!r} {options} {store!r} {store.url} {caplog.text}"
    for secret in (SECRET, TOKEN, "key-that-must-not-show"):
        assert secret not in shown


@pytest.mark.parametrize(
    "options",
    [
        {"access_key_id": "k"},
        {"secret_access_key": "s"},
        {"session_token": "t"},
        {"anonymous": True, "access_key_id": "k", "secret_access_key": "s"},
        {"bucket": ""},
        {"bucket": "base--use1-az4--x-s3"},
        {"accelerate": True, "endpoint_url": "http://127.0.0.1:1"},
        {"accelerate": True, "addressing_style": "path"},
        {"idle_timeout": 0},
        {"unknown": 1},
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any]) -> None:
    """Options that cannot mean anything are refused when they are made."""
    with pytest.raises(ValidationError):
        S3Options.model_validate({"bucket": "bucket"} | options)


def test_the_url_names_bucket_and_prefix() -> None:
    """The store's URL is s3://bucket/prefix, however the prefix was written."""
    assert S3Store(S3Options(bucket="b")).url == "s3://b"
    assert S3Store(S3Options(bucket="b", prefix="/x/y/")).url == "s3://b/x/y"
    with pytest.raises(InvalidKey):
        S3Options(bucket="b", prefix="x/../y")
