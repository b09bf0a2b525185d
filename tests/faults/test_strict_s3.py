"""The strict S3 keeps AWS's rules, seen through plain botocore: what the other tests prove stands on this."""

from __future__ import annotations

import base64
import hashlib
import io
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import botocore
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from crc32c import crc32c

from tests.clock import Clock
from tests.fault_rules import Rule, Slow
from tests.faults.clients import Clients
from tests.servers import Peer
from tests.strict_s3 import (
    ACCESS_KEY_ID,
    Exchange,
    FailAfter,
    FailBefore,
    Fault,
    Hook,
    Late,
    Limits,
    Refuse,
    StrictS3,
    Tamper,
    Throttle,
)

BUCKET = "bucket"


def crc(data: bytes) -> str:
    return base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


@pytest.fixture
def client(strict_s3: StrictS3, clients: Clients) -> Any:
    client = clients(strict_s3)
    client.create_bucket(Bucket=BUCKET)
    return client


def code_of(call: Callable[..., Any], *args: Any, **query: Any) -> str:
    """The code with which the server refuses a call; "" if it does not."""
    try:
        call(*args, **query)
    except ClientError as error:
        return error.response["Error"]["Code"]
    return ""


class Upload:
    """A multipart upload, for short calls."""

    def __init__(self, client: Any, key: str = "key", **query: Any) -> None:
        self.client = client
        self.where = {"Bucket": BUCKET, "Key": key}
        self.created = client.create_multipart_upload(**self.where, **query)
        self.where["UploadId"] = self.created["UploadId"]

    def part(self, number: int, data: bytes, **query: Any) -> dict[str, Any]:
        sent = self.client.upload_part(**self.where, PartNumber=number, Body=data, **query)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def complete(self, parts: list[dict[str, Any]], **query: Any) -> dict[str, Any]:
        return self.client.complete_multipart_upload(**self.where, MultipartUpload={"Parts": parts}, **query)


FULL = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
COMPOSITE = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "COMPOSITE"}


# Checksums


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"ChecksumCRC32C": crc(b"data")}, ""),
        ({"ChecksumCRC32C": crc(b"date")}, "BadDigest"),
        ({"ChecksumCRC32C": "AAAA"}, "InvalidRequest"),
        ({"ContentMD5": md5(b"data")}, ""),
        ({"ContentMD5": md5(b"date")}, "BadDigest"),
        ({"ContentMD5": "nonsense"}, "InvalidDigest"),
        ({"ChecksumCRC32": "AAAAAA=="}, "NotImplemented"),
    ],
)
def test_wrong_checksums_are_refused(client: Any, strict_s3: StrictS3, query: dict[str, str], code: str) -> None:
    """A body that is not what its checksum says is stored neither as an object nor as a part."""
    upload = Upload(client, "large", **(FULL if "ChecksumCRC32C" in query else {}))
    assert code_of(client.put_object, Bucket=BUCKET, Key="key", Body=b"data", **query) == code
    assert code_of(upload.part, 1, b"data", **query) == code
    assert ("key" in strict_s3.objects(BUCKET)) is (code == "")
    assert len(client.list_parts(**upload.where).get("Parts", [])) == (code == "")


def test_checksums_are_told(client: Any) -> None:
    """Put, part, list, complete, head and get tell the CRC32C; head and get only to those who ask, ranges never."""
    assert client.put_object(Bucket=BUCKET, Key="small", Body=b"data", ChecksumCRC32C=crc(b"data"))[
        "ChecksumCRC32C"
    ] == crc(b"data")
    upload = Upload(client, **FULL)
    assert (upload.created["ChecksumAlgorithm"], upload.created["ChecksumType"]) == ("CRC32C", "FULL_OBJECT")
    parts = [upload.part(1, b"one", ChecksumCRC32C=crc(b"one")), upload.part(2, b"two")]
    listed = client.list_parts(**upload.where)
    assert [part["ChecksumCRC32C"] for part in listed["Parts"]] == [crc(b"one"), crc(b"two")]
    assert (listed["ChecksumAlgorithm"], listed["ChecksumType"]) == ("CRC32C", "FULL_OBJECT")
    made = upload.complete(parts, ChecksumCRC32C=crc(b"onetwo"), ChecksumType="FULL_OBJECT", MpuObjectSize=6)
    assert (made["ChecksumCRC32C"], made["ChecksumType"]) == (crc(b"onetwo"), "FULL_OBJECT")
    where = {"Bucket": BUCKET, "Key": "key"}
    for read in (client.head_object, client.get_object):
        assert read(**where, ChecksumMode="ENABLED")["ChecksumCRC32C"] == crc(b"onetwo")
        assert "ChecksumCRC32C" not in read(**where)
    assert "ChecksumCRC32C" not in client.get_object(**where, ChecksumMode="ENABLED", Range="bytes=0-2")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"MpuObjectSize": 6, "ChecksumType": "FULL_OBJECT", "ChecksumCRC32C": crc(b"onetwo")}, ""),
        ({}, ""),
        ({"MpuObjectSize": 7}, "InvalidRequest"),
        ({"ChecksumCRC32C": crc(b"twoone")}, "BadDigest"),
        ({"ChecksumType": "COMPOSITE"}, "InvalidRequest"),
    ],
)
def test_complete_checks_the_whole(client: Any, strict_s3: StrictS3, query: dict[str, Any], code: str) -> None:
    """Size, checksum and kind of checksum of a full object must be those of the parts; else the upload stays."""
    upload = Upload(client, **FULL)
    parts = [upload.part(1, b"one"), upload.part(2, b"two")]
    assert code_of(upload.complete, parts, **query) == code
    assert strict_s3.objects(BUCKET) == ({} if code else {"key": b"onetwo"})
    assert len(strict_s3.uploads(BUCKET)) == bool(code)


def test_a_composite_checksum_needs_those_of_the_parts(client: Any, strict_s3: StrictS3) -> None:
    """Every part is sent and completed with its checksum, in dense numbers; the result is a checksum of checksums."""
    upload = Upload(client, **COMPOSITE)
    assert code_of(upload.part, 1, b"one") == "InvalidRequest"
    parts = [
        {**upload.part(number, data, ChecksumCRC32C=crc(data)), "ChecksumCRC32C": crc(data)}
        for number, data in enumerate((b"one", b"two", b"three"), start=1)
    ]
    bare = [{name: part[name] for name in ("PartNumber", "ETag")} for part in parts]
    assert code_of(upload.complete, bare) == "InvalidRequest"
    assert code_of(upload.complete, [parts[0], parts[2]]) == "InternalError"
    assert code_of(upload.complete, [parts[0], {**parts[1], "ChecksumCRC32C": crc(b"x")}]) == "InvalidPart"
    made = upload.complete(parts)
    raw = b"".join(crc32c(data).to_bytes(4, "big") for data in (b"one", b"two", b"three"))
    assert (made["ChecksumCRC32C"], made["ChecksumType"]) == (f"{crc(raw)}-3", "COMPOSITE")
    assert strict_s3.objects(BUCKET) == {"key": b"onetwothree"}


def test_an_upload_without_an_algorithm_takes_no_checksums(client: Any) -> None:
    """Parts with a checksum belong to an upload that was created with its algorithm."""
    upload = Upload(client)
    assert code_of(upload.part, 1, b"one", ChecksumCRC32C=crc(b"one")) == "InvalidRequest"
    assert "ChecksumCRC32C" not in upload.complete([upload.part(1, b"one")])


# Parts


def test_parts_have_limits(client: Any, strict_s3: StrictS3) -> None:
    """Numbers go from 1 to 10,000, sizes have a minimum (not for the last) and a maximum."""
    strict_s3.limits = Limits(min_part_size=4, max_part_size=8)
    upload = Upload(client)
    assert [code_of(upload.part, number, b"data") for number in (0, 1, 10_000, 10_001)] == [
        "InvalidArgument", "", "", "InvalidArgument",
    ]  # fmt: skip
    assert code_of(upload.part, 2, b"123456789") == "EntityTooLarge"
    small, last = upload.part(1, b"abc"), upload.part(2, b"d")
    assert code_of(upload.complete, [small, last]) == "EntityTooSmall"
    upload.complete([upload.part(1, b"abcd"), last])
    assert strict_s3.objects(BUCKET) == {"key": b"abcdd"}
    assert client.head_object(Bucket=BUCKET, Key="key")["ETag"].endswith('-2"')


def test_complete_takes_what_is_there_in_order(client: Any, strict_s3: StrictS3) -> None:
    """Unknown parts, wrong entity tags, a wrong order and no parts at all are refused; a part sent again replaces."""
    upload = Upload(client)
    old, two = upload.part(1, b"old"), upload.part(2, b"two")
    one = upload.part(1, b"one")
    for parts, code in (
        ([one, {"PartNumber": 3, "ETag": one["ETag"]}], "InvalidPart"),
        ([old, two], "InvalidPart"),
        ([two, one], "InvalidPartOrder"),
        ([one, one], "InvalidPartOrder"),
        ([], "MalformedXML"),
        ([one, two], ""),
    ):
        assert code_of(upload.complete, parts) == code
    assert strict_s3.objects(BUCKET) == {"key": b"onetwo"}


def test_an_upload_ends(client: Any) -> None:
    """A completed, an aborted, an unknown upload and one of another key are all NoSuchUpload."""
    completed, aborted, other = Upload(client), Upload(client), Upload(client)
    completed.complete([completed.part(1, b"one")])
    client.abort_multipart_upload(**aborted.where)
    other.where["Key"] = "another"
    for upload in (completed, aborted, other):
        assert code_of(upload.part, 1, b"late") == "NoSuchUpload"
        assert code_of(client.list_parts, **upload.where) == "NoSuchUpload"
        assert code_of(client.abort_multipart_upload, **upload.where) == "NoSuchUpload"
        assert code_of(upload.complete, [{"PartNumber": 1, "ETag": "x"}]) == "NoSuchUpload"


@pytest.mark.parametrize("outlives", [True, False])
def test_a_part_under_way_may_outlive_an_abort(client: Any, strict_s3: StrictS3, *, outlives: bool) -> None:
    """With `parts_outlive_abort` a part that arrives during an abort is there afterwards, until it is aborted again."""
    strict_s3.limits = replace(strict_s3.limits, parts_outlive_abort=outlives)
    upload = Upload(client)
    strict_s3.script(Rule(Hook(lambda _: client.abort_multipart_upload(**upload.where)), "UploadPart"))
    assert code_of(upload.part, 1, b"late") == ("" if outlives else "NoSuchUpload")
    assert bool(strict_s3.uploads(BUCKET)) is outlives
    if outlives:
        assert len(client.list_parts(**upload.where)["Parts"]) == 1
        assert code_of(upload.part, 2, b"new") == "NoSuchUpload"
        client.abort_multipart_upload(**upload.where)
    assert code_of(client.list_parts, **upload.where) == "NoSuchUpload"
    assert strict_s3.uploads(BUCKET) == {}


# Conditions


@pytest.mark.parametrize("way", ["put", "complete"])
def test_writes_keep_their_conditions(client: Any, strict_s3: StrictS3, way: str) -> None:
    """Create-only and compare-and-swap hold for PutObject and for Complete; of a missing object there is no swap."""

    def write(data: bytes, **condition: str) -> str:
        if way == "put":
            return code_of(client.put_object, Bucket=BUCKET, Key="key", Body=data, **condition)
        upload = Upload(client)
        return code_of(upload.complete, [upload.part(1, data)], **condition)

    assert write(b"0", IfMatch='"any"') == "NoSuchKey"
    assert write(b"1", IfNoneMatch="*") == ""
    assert write(b"2", IfNoneMatch="*") == "PreconditionFailed"
    assert write(b"2", IfMatch='"other"') == "PreconditionFailed"
    assert write(b"2", IfNoneMatch='"tag"') == "NotImplemented"
    assert write(b"2", IfMatch=client.head_object(Bucket=BUCKET, Key="key")["ETag"]) == ""
    assert strict_s3.objects(BUCKET) == {"key": b"2"}


def test_a_delete_during_a_create_is_a_conflict(client: Any, strict_s3: StrictS3) -> None:
    """409: the object was deleted while the conditional write was under way, which is neither won nor lost."""
    client.put_object(Bucket=BUCKET, Key="key", Body=b"1")
    strict_s3.script(Rule(Hook(lambda _: client.delete_object(Bucket=BUCKET, Key="key")), "PutObject"))
    create = {"Bucket": BUCKET, "Key": "key", "Body": b"2", "IfNoneMatch": "*"}
    assert code_of(client.put_object, **create) == "ConditionalRequestConflict"
    assert code_of(client.put_object, **create) == ""


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, b"0123456789"),
        ({"Range": "bytes=2-4"}, b"234"),
        ({"Range": "bytes=8-99"}, b"89"),
        ({"Range": "bytes=8-"}, b"89"),
        ({"Range": "bytes=-3"}, b"789"),
        ({"Range": "bytes=10-11"}, "InvalidRange"),
        ({"Range": "bytes=0-1,4-5"}, "NotImplemented"),
        ({"Range": "bytes=0-1", "IfMatch": '"781e5e245d69b566979b86e28d23f2c7"'}, b"01"),
        ({"Range": "bytes=0-1", "IfMatch": '"other"'}, "PreconditionFailed"),
        ({"IfNoneMatch": '"781e5e245d69b566979b86e28d23f2c7"'}, "304"),
        ({"Key": "absent"}, "NoSuchKey"),
        ({"Bucket": "absent"}, "NoSuchBucket"),
    ],
)
def test_reads(client: Any, query: dict[str, str], expected: bytes | str) -> None:
    """Ranges and conditions of a read."""
    client.put_object(Bucket=BUCKET, Key="key", Body=b"0123456789")
    asked = {"Bucket": BUCKET, "Key": "key", **query}
    if isinstance(expected, str):
        assert code_of(client.get_object, **asked) == expected
    else:
        found = client.get_object(**asked)
        assert found["Body"].read() == expected
        assert found["ContentLength"] == len(expected)


def test_copies(client: Any, strict_s3: StrictS3) -> None:
    """CopyObject and UploadPartCopy copy what is pinned, whole or in ranges, but nothing onto itself."""
    tag = client.put_object(Bucket=BUCKET, Key="a b+c", Body=b"0123456789", ChecksumCRC32C=crc(b"0123456789"))["ETag"]
    source = {"CopySource": {"Bucket": BUCKET, "Key": "a b+c"}}
    made = client.copy_object(Bucket=BUCKET, Key="copy", **source, CopySourceIfMatch=tag)["CopyObjectResult"]
    assert (made["ETag"], made["ChecksumCRC32C"]) == (tag, crc(b"0123456789"))
    assert code_of(client.copy_object, Bucket=BUCKET, Key="a b+c", **source) == "InvalidRequest"
    assert code_of(client.copy_object, Bucket=BUCKET, Key="x", **source, CopySourceIfMatch="no") == "PreconditionFailed"
    assert code_of(client.copy_object, Bucket=BUCKET, Key="x", CopySource=f"{BUCKET}/absent") == "NoSuchKey"
    upload = Upload(client, "parts", **FULL)

    def copy_part(number: int, wanted: str) -> dict[str, Any]:
        asked = {"PartNumber": number, "CopySourceRange": wanted, "CopySourceIfMatch": tag}
        result = client.upload_part_copy(**upload.where, **source, **asked)["CopyPartResult"]
        return {"PartNumber": number, "ETag": result["ETag"]}

    assert code_of(copy_part, 1, "bytes=5-10") == "InvalidArgument"
    upload.complete([copy_part(1, "bytes=5-9"), copy_part(2, "bytes=0-1")])
    assert strict_s3.objects(BUCKET)["parts"] == b"5678901"


# Listings

KEYS = ["a!", "a-b", "a/b", "a b+c", "a/c%41", "b&<x>", "grüße/日本語", "z"]


def test_keys_are_listed_in_pages(client: Any, strict_s3: StrictS3) -> None:
    """Pages follow each other by a token, in UTF-8 order, from anywhere, below any prefix."""
    strict_s3.limits = replace(strict_s3.limits, page_size=3)
    for key in KEYS:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"")

    def listed(**query: Any) -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, **query)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    ordered = sorted(KEYS, key=str.encode)
    assert listed() == ordered
    assert len(strict_s3.requests("ListObjectsV2")) == 3
    assert listed(MaxKeys=1) == ordered
    assert listed(Prefix="a/") == ["a/b", "a/c%41"]
    assert listed(StartAfter="a/b") == ordered[ordered.index("a/b") + 1 :]
    assert listed(Prefix="none") == []
    assert code_of(client.list_objects_v2, Bucket=BUCKET, ContinuationToken="?") == "InvalidArgument"
    assert code_of(client.list_objects_v2, Bucket="absent") == "NoSuchBucket"


def test_uploads_are_listed_in_pages(client: Any, strict_s3: StrictS3) -> None:
    """Pages go by key and, within a key, by upload; a marker without an upload id skips its whole key."""
    strict_s3.limits = replace(strict_s3.limits, page_size=2)
    started = [(key, Upload(client, key).where["UploadId"]) for key in ("b", "a", "b", "b", "c", "a/x")]

    def listed(**query: Any) -> list[tuple[str, str]]:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=BUCKET, **query)
        return [(entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", [])]

    assert listed() == sorted(started)
    assert len(strict_s3.requests("ListMultipartUploads")) == 3
    assert listed(Prefix="a") == sorted(started)[:2]
    after = client.list_multipart_uploads(Bucket=BUCKET, KeyMarker="b")["Uploads"]
    assert [entry["Key"] for entry in after] == ["c"]


def test_parts_are_listed_in_pages(client: Any, strict_s3: StrictS3) -> None:
    """Pages go by part number, whatever the order in which the parts came."""
    strict_s3.limits = replace(strict_s3.limits, page_size=2)
    upload = Upload(client)
    for number in (7, 1, 5, 3, 9):
        upload.part(number, b"x" * number)
    pages = list(client.get_paginator("list_parts").paginate(**upload.where))
    assert [[part["PartNumber"] for part in page["Parts"]] for page in pages] == [[1, 3], [5, 7], [9]]
    assert [part["Size"] for page in pages for part in page["Parts"]] == [1, 3, 5, 7, 9]


# Signatures


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"aws_secret_access_key": "wrong"}, "SignatureDoesNotMatch"),
        ({"aws_access_key_id": "nobody"}, "InvalidAccessKeyId"),
        ({"region_name": "eu-west-9"}, "AuthorizationHeaderMalformed"),
        ({"config": {"signature_version": botocore.UNSIGNED}}, "AccessDenied"),
    ],
)
def test_only_who_signs_is_served(
    strict_s3: StrictS3, client: Any, clients: Clients, changes: dict[str, Any], code: str
) -> None:
    """Another secret, an unknown key, another region and no signature at all are refused."""
    assert code_of(clients(strict_s3, **changes).list_objects_v2, Bucket=BUCKET) == code


def change_target(request: Any) -> None:
    request.url = request.url.replace("key", "yek")


def add_parameter(request: Any) -> None:
    request.url += "?uploads"


def change_header(request: Any) -> None:
    request.headers["x-amz-checksum-crc32c"] = crc(b"tada")


def add_header(request: Any) -> None:
    request.headers["x-amz-meta-x"] = "1"


def change_body(request: Any) -> None:
    request.body = io.BytesIO(b"tada")


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (change_target, "SignatureDoesNotMatch"),
        (add_parameter, "SignatureDoesNotMatch"),
        (change_header, "SignatureDoesNotMatch"),
        (add_header, "AccessDenied"),
        (change_body, "XAmzContentSHA256Mismatch"),
    ],
)
def test_what_was_signed_must_arrive(
    strict_s3: StrictS3, client: Any, clients: Clients, tamper: Callable[[Any], None], code: str
) -> None:
    """Path, parameters, headers and a signed body cannot be changed on the way, nor headers added."""
    signing = clients(strict_s3, config={"s3": {"addressing_style": "path", "payload_signing_enabled": True}})
    signing.meta.events.register("before-send.s3", lambda request, **_: tamper(request))
    put = {"Bucket": BUCKET, "Key": "key", "Body": b"data", "ChecksumCRC32C": crc(b"data")}
    assert code_of(signing.put_object, **put) == code
    assert strict_s3.objects(BUCKET) == {}


def test_keys_of_any_kind_are_signed_alike(client: Any, strict_s3: StrictS3) -> None:
    """The signature of odd keys and parameters verifies: the server encodes as AWS does."""
    for key in (*KEYS, "a//b", "tilde~!$()*,:@[]^`{|}", "?#&=%", "dots/../.x"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"")
        assert client.list_objects_v2(Bucket=BUCKET, Prefix=key)["Contents"][0]["Key"] == key
    assert code_of(client.put_object, Bucket=BUCKET, Key="k" * 1025, Body=b"") == "KeyTooLongError"


def test_old_signatures_and_tokens_are_refused(clients: Clients) -> None:
    """A clock 16 minutes away is too skewed, and a credential may expire at any time."""
    clock = Clock(time.time())
    with StrictS3(clock=clock) as server:
        client = clients(server)
        client.create_bucket(Bucket=BUCKET)
        clock.now += 16 * 60
        assert code_of(client.list_objects_v2, Bucket=BUCKET) == "RequestTimeTooSkewed"
        clock.now -= 30 * 60
        assert code_of(client.list_objects_v2, Bucket=BUCKET) == ""
        server.expired.add(ACCESS_KEY_ID)
        assert code_of(client.list_objects_v2, Bucket=BUCKET) == "ExpiredToken"


def test_what_is_unknown_is_refused(client: Any, strict_s3: StrictS3) -> None:
    """Nothing is ignored: what the server does not do, it says it does not do."""
    for call, query in (
        (client.put_object, {"Key": "key", "Body": b"", "Metadata": {"a": "b"}}),
        (client.put_object, {"Key": "key", "Body": b"", "ServerSideEncryption": "AES256"}),
        (client.get_object, {"Key": "key", "VersionId": "1"}),
        (client.get_object_tagging, {"Key": "key"}),
        (client.list_objects_v2, {"Delimiter": "/"}),
        (client.list_objects, {}),
        (client.delete_bucket, {}),
    ):
        assert code_of(call, Bucket=BUCKET, **query) == "NotImplemented"
    assert strict_s3.objects(BUCKET) == {}


# Faults


def test_faults_strike_whom_they_are_meant_for(client: Any, strict_s3: StrictS3) -> None:
    """A fault is found by operation, key, part and number of the request, and strikes as often as it says."""
    upload = Upload(client)
    strict_s3.script(
        Rule(Refuse("SlowDown"), "PutObject", "a*", nth=2, times=2),
        Rule(Refuse("InternalError"), "*Part", part=2),
        Rule(Refuse("AccessDenied"), key="forbidden", times=None),
    )

    def put(key: str) -> str:
        return code_of(client.put_object, Bucket=BUCKET, Key=key, Body=b"")

    assert [put("a1"), put("b"), put("a2"), put("a3"), put("a4")] == ["", "", "SlowDown", "SlowDown", ""]
    assert [code_of(upload.part, number, b"x") for number in (1, 2, 2)] == ["", "InternalError", ""]
    assert [put("forbidden"), put("forbidden")] == ["AccessDenied"] * 2
    assert sorted(strict_s3.objects(BUCKET)) == ["a1", "a4", "b"]
    strict_s3.script()
    assert put("forbidden") == ""


@pytest.mark.parametrize(("fault", "stored"), [(FailBefore(), False), (FailAfter(), True)])
def test_a_connection_breaks_before_or_after_the_effect(
    client: Any, strict_s3: StrictS3, fault: Fault, *, stored: bool
) -> None:
    """A dropped request changes nothing; a dropped answer hides what happened."""
    strict_s3.script(Rule(fault, "PutObject"))
    with pytest.raises(ConnectionClosedError):
        client.put_object(Bucket=BUCKET, Key="key", Body=b"data")
    assert ("key" in strict_s3.objects(BUCKET)) is stored
    assert strict_s3.log[-1].dropped
    assert strict_s3.log[-1].status == (200 if stored else None)


@pytest.mark.parametrize(
    ("late", "code"),
    [
        (Late(blanks=5), ""),
        (Late(error="InternalError"), "InternalError"),
        (Late(blanks=3, error="SlowDown"), "SlowDown"),
    ],
)
def test_complete_may_answer_before_it_happens(client: Any, strict_s3: StrictS3, late: Late, code: str) -> None:
    """200 comes first, then blanks, then the result or an error in the body."""
    upload = Upload(client)
    part = upload.part(1, b"one")
    strict_s3.script(Rule(late, "CompleteMultipartUpload"))
    assert code_of(upload.complete, [part]) == code
    assert ("key" in strict_s3.objects(BUCKET)) is (code == "")
    assert (strict_s3.log[-1].status, strict_s3.log[-1].code) == (200, code)


def test_a_body_may_be_slow(client: Any, strict_s3: StrictS3) -> None:
    """The bytes of an answer come in pieces, and all of them."""
    client.put_object(Bucket=BUCKET, Key="key", Body=b"0123456789")
    strict_s3.script(Rule(Slow(bytes_per_s=100), "GetObject"))
    assert client.get_object(Bucket=BUCKET, Key="key")["Body"].read() == b"0123456789"


def test_an_answer_may_lack_what_it_should_have(client: Any, strict_s3: StrictS3) -> None:
    """A scripted answer takes the place of the real one, after its effect."""
    strict_s3.script(Rule(Tamper(lambda answer: answer._replace(headers={})), "PutObject"))
    assert "ETag" not in client.put_object(Bucket=BUCKET, Key="key", Body=b"data")
    assert strict_s3.objects(BUCKET) == {"key": b"data"}


def test_a_rate_may_be_limited(client: Any, strict_s3: StrictS3) -> None:
    """Beyond so many requests per second there is SlowDown with Retry-After, until time has passed."""
    clock = Clock()
    throttle = Throttle(2, burst=2, retry_after_s=3, clock=clock)
    strict_s3.script(Rule(throttle, "ListObjectsV2", times=None))

    def codes(count: int) -> list[str]:
        return [code_of(client.list_objects_v2, Bucket=BUCKET) for _ in range(count)]

    assert codes(3) == ["", "", "SlowDown"]
    clock.now += 0.5
    assert codes(2) == ["", "SlowDown"]
    with pytest.raises(ClientError) as refused:
        client.list_objects_v2(Bucket=BUCKET)
    about = refused.value.response["ResponseMetadata"]
    assert (about["HTTPStatusCode"], about["HTTPHeaders"]["retry-after"]) == (503, "3")


def test_a_request_may_be_held_up(client: Any, strict_s3: StrictS3) -> None:
    """While one request is blocked, others are served."""
    blocked, go_on = threading.Event(), threading.Event()

    def block(_: Exchange) -> None:
        blocked.set()
        assert go_on.wait(20)

    strict_s3.script(Rule(Hook(block), "PutObject", "held"))
    put = threading.Thread(target=client.put_object, kwargs={"Bucket": BUCKET, "Key": "held", "Body": b"1"})
    put.start()
    assert blocked.wait(20)
    client.put_object(Bucket=BUCKET, Key="other", Body=b"2")
    assert list(strict_s3.objects(BUCKET)) == ["other"]
    go_on.set()
    put.join(20)
    assert list(strict_s3.objects(BUCKET)) == ["held", "other"]


def test_every_request_is_logged(client: Any, strict_s3: StrictS3) -> None:
    """The log names operation, key, part, sizes and outcome, and no signature."""
    upload = Upload(client, "dir/large")
    upload.part(3, b"12345")
    code_of(client.get_object, Bucket=BUCKET, Key="absent")
    part = strict_s3.requests("UploadPart")[0]
    assert (part.method, part.bucket, part.key, part.part_number) == ("PUT", BUCKET, "dir/large", 3)
    assert (part.bytes_in, part.status, part.code) == (5, 200, "")
    absent = strict_s3.requests(key="absent")[0]
    assert (absent.operation, absent.status, absent.code) == ("GetObject", 404, "NoSuchKey")
    assert absent.bytes_out > 0
    assert [each.number for each in strict_s3.log] == list(range(1, len(strict_s3.log) + 1))
    assert not any("authorization" in each.headers for each in strict_s3.log)


def test_a_body_that_ends_early_stores_nothing(strict_s3: StrictS3, client: Any) -> None:
    """A client that hangs up in the middle of a body has done nothing; the log shows what arrived."""
    with socket.create_connection(("127.0.0.1", strict_s3.port)) as connection:
        peer = Peer(connection)
        peer.send(f"PUT /{BUCKET}/key HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc".encode())
        connection.shutdown(socket.SHUT_WR)
        assert peer.read(1) == b""
        peer.close()
    strict_s3.wait_until(lambda: strict_s3.log[-1].bytes_in == 3)
    assert strict_s3.log[-1].status is None
    assert strict_s3.objects(BUCKET) == {}
