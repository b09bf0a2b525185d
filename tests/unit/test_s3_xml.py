"""The documents of S3: what is read from them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, strategies as st

from blobflow.stores.base import PartMeta
from blobflow.stores.s3.xml import (
    ErrorResponse,
    ListedObject,
    ListedUpload,
    Made,
    MalformedResponse,
    ObjectPage,
    PartPage,
    UploadPage,
    error_in,
    read_made,
    read_objects,
    read_parts,
    read_time,
    read_upload_id,
    read_uploads,
    write_completion,
)

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
NOON = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)
READERS = [read_objects, read_uploads, read_parts, read_upload_id, read_made]


def test_a_page_of_objects_is_read() -> None:
    """Keys are decoded if, and only if, the server says that it encoded them; the token tells whether more comes."""
    entries = (
        "<Contents><Key>a%2Bb+c%0A</Key><LastModified>2026-11-21T12:00:00.000Z</LastModified>"
        "<ETag>&quot;1&quot;</ETag><Size>5</Size><Owner><ID>o</ID></Owner></Contents>"
    )
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t/+=</NextContinuationToken>"
    document = f"<ListBucketResult {NAMESPACE}>{more}<EncodingType>url</EncodingType>{entries}</ListBucketResult>"
    assert read_objects(document.encode()) == ObjectPage([ListedObject("a+b c\n", 5, '"1"', NOON)], "t/+=")
    document = f"<ListBucketResult>{entries}<IsTruncated>false</IsTruncated></ListBucketResult>"
    assert read_objects(document.encode()) == ObjectPage([ListedObject("a%2Bb+c%0A", 5, '"1"', NOON)], None)
    assert read_objects(b"<ListBucketResult/>") == ObjectPage([], None)


def test_a_page_of_uploads_is_read() -> None:
    """Uploads, and the two markers behind which the next page begins."""
    entry = "<Upload><Key>k</Key><UploadId>u&amp;1</UploadId><Initiated>2026-11-21T12:00:00Z</Initiated></Upload>"
    markers = "<NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>u&amp;1</NextUploadIdMarker>"
    page = "<ListMultipartUploadsResult><IsTruncated>{}</IsTruncated>{}</ListMultipartUploadsResult>"
    expected = [ListedUpload("k", "u&1", NOON)]
    assert read_uploads(page.format("true", markers + entry).encode()) == UploadPage(expected, ("k", "u&1"))
    assert read_uploads(page.format("false", entry).encode()) == UploadPage(expected, None)


def test_a_page_of_parts_is_read() -> None:
    """Parts with their checksums where they have one; an entity tag gets its quotes."""
    parts = (
        "<Part><PartNumber>1</PartNumber><ETag>1</ETag><Size>5</Size></Part>"
        '<Part><PartNumber>2</PartNumber><ETag>"2"</ETag><Size>6</Size><ChecksumCRC32C>AAAAAQ==</ChecksumCRC32C></Part>'
    )
    document = f"<ListPartsResult><IsTruncated> TRUE </IsTruncated>{parts}</ListPartsResult>"
    assert read_parts(document.encode()) == PartPage([PartMeta(1, 5, '"1"'), PartMeta(2, 6, '"2"', 1)], True)


@pytest.mark.parametrize(
    ("told", "crc"), [("AAAAAQ==", 1), ("AAAAAQ==-3", None), ("", None), ("AAAA", None), ("é", None)]
)
def test_what_was_made_is_read(told: str, crc: int | None) -> None:
    """Entity tag, time and checksum of a new object; a checksum that is none of the whole does not count."""
    document = "<{0}><ETag>t-2</ETag><LastModified>x</LastModified>{1}<ChecksumCRC32C>{2}</ChecksumCRC32C></{0}>"
    assert read_made(document.format("CopyObjectResult", "", told).encode()) == Made('"t-2"', None, crc)
    composite = document.format("CompleteMultipartUploadResult", "<ChecksumType>COMPOSITE</ChecksumType>", told)
    assert read_made(composite.encode()) == Made('"t-2"', None, None)
    assert read_made(b"<CopyObjectResult/>") == Made("", None, None)


def test_blanks_before_and_behind_the_declaration_are_passed_over() -> None:
    """What a server sends to keep the connection alive may stand anywhere before the root."""
    document = (
        b'\r\n  <?xml version="1.0" encoding="UTF-8"?>\n   \n<InitiateMultipartUploadResult>\n<UploadId>u</UploadId>'
    )
    assert read_upload_id(document + b"</InitiateMultipartUploadResult>\n\n") == "u"


@pytest.mark.parametrize("root", ["InitiateMultipartUpload", "ListBucket", "s3:InitiateMultipartUploadResult", "Parts"])
def test_a_root_of_another_name_is_read(root: str) -> None:
    """What the elements say counts, not the name of the root, which some servers invent (gofakes3 for one)."""
    prefix = root.rpartition(":")[0]
    space = f' xmlns:{prefix}="http://s3.amazonaws.com/doc/2006-03-01/"' if prefix else ""

    def document(elements: str) -> bytes:
        if prefix:
            elements = elements.replace("</", f"</{prefix}:").replace("<", f"<{prefix}:").replace(f"<{prefix}:/", "</")
        return f"<{root}{space}>{elements}</{root}>".encode()

    last = "<IsTruncated>false</IsTruncated>"
    assert read_upload_id(document("<UploadId>u</UploadId>")) == "u"
    assert read_made(document("<ETag>t</ETag>")) == Made('"t"', None, None)
    entry = "<Contents><Key>k</Key><Size>1</Size><ETag>t</ETag></Contents>"
    assert read_objects(document(entry)) == ObjectPage([ListedObject("k", 1, '"t"', None)], None)
    assert read_objects(document(last)) == ObjectPage([], None)
    assert read_uploads(document(last)) == UploadPage([], None)
    assert read_parts(document(last)) == PartPage([], False)


@pytest.mark.parametrize("document", [b"", b"  \n", b"<ListBucketResult><Contents>", b"<ListBucketResult>a</ListBu"])
def test_what_may_go_on_is_told_from_what_is_wrong(document: bytes) -> None:
    """A document that only ended early may come whole the next time; one of something else may not."""
    for read in READERS:
        with pytest.raises(MalformedResponse) as early:
            read(document)
        assert early.value.ended_early
        with pytest.raises(MalformedResponse) as other:
            read(b"<html>busy<br></html>")
        assert not other.value.ended_early


def test_an_error_in_the_place_of_a_result_is_an_error() -> None:
    """A document of another operation's kind, Error, is raised with code and message."""
    document = b"  <?xml version='1.0'?><Error><Code>SlowDown</Code><Message>a &lt; b</Message></Error>"
    for read in READERS:
        with pytest.raises(ErrorResponse) as late:
            read(document)
        assert (late.value.code, late.value.message) == ("SlowDown", "a < b")


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<ListBucketResult><Contents><Key>&b;</Key><Size>1</Size><ETag>t</ETag></Contents></ListBucketResult>"
)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"   ",
        b"\0",
        b"OK",
        b"<html>busy</html>",
        b"<html>busy<br></html>",
        b"<ListBucketResult><Contents>",
        b"<ListBucketResult></ListBucketResult>trailing",
        b"<ListBucketResult>\xff\xfe</ListBucketResult>",
        b'<!DOCTYPE ListBucketResult SYSTEM "file:///etc/passwd"><ListBucketResult/>',
        BOMB.encode(),
        BOMB.encode("utf-16"),
    ],
)
def test_what_is_no_answer_is_refused(read: Callable[[bytes], object], document: bytes) -> None:
    """Pages of proxies, halves of documents, and documents that bring entities of their own are no answers."""
    with pytest.raises(MalformedResponse):
        read(document)


@pytest.mark.parametrize(
    ("read", "document"),
    [
        (read_objects, "<Contents><Size>1</Size><ETag>t</ETag></Contents>"),
        (read_objects, "<Contents><Key>k</Key><Size>-1</Size><ETag>t</ETag></Contents>"),
        (read_objects, "<Contents><Key>k</Key><Size>99999999999999999999</Size><ETag>t</ETag></Contents>"),
        (read_objects, "<Contents><Key>k</Key><Size>1</Size></Contents>"),
        (read_objects, "<IsTruncated>true</IsTruncated>"),
        (read_uploads, "<Upload><Key>k</Key></Upload>"),
        (read_uploads, "<IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker>"),
        (read_parts, "<Part><PartNumber>one</PartNumber><ETag>t</ETag><Size>1</Size></Part>"),
        (read_parts, "<Part><PartNumber>1</PartNumber><Size>1</Size></Part>"),
    ],
)
def test_an_entry_without_what_it_must_have_is_refused(read: Callable[[bytes], object], document: str) -> None:
    """An entry that lacks its name, its size or its tag is not passed over, nor guessed."""
    with pytest.raises(MalformedResponse):
        read(f"<AnyResult>{document}</AnyResult>".encode())


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-21T12:00:00Z", NOON),
        ("2026-11-21T12:00:00.5Z", NOON + timedelta(seconds=0.5)),
        ("2026-11-21T12:00:00.123456789Z", NOON + timedelta(microseconds=123457)),
        ("2026-11-21T12:00:00+00:00", NOON),
        ("Sat, 21 Nov 2026 12:00:00 GMT", NOON),
        ("2026-13-41T12:00:00Z", None),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_times_are_read_in_both_spellings(text: str | None, time: datetime | None) -> None:
    """ISO 8601 as bodies have it, with any fraction, and the date of headers; anything else is no time."""
    assert read_time(text) == time


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20))
def test_a_completion_says_what_it_was_told(tag: str) -> None:
    """Numbers and entity tags stand in the document in order, whatever characters a tag has."""
    root = ET.fromstring(write_completion([PartMeta(1, 5, f'"{tag}"'), PartMeta(2, 5, '"2"')]))
    space = "{http://s3.amazonaws.com/doc/2006-03-01/}"
    assert root.tag == f"{space}CompleteMultipartUpload"
    parts = [(each.findtext(f"{space}PartNumber"), each.findtext(f"{space}ETag")) for each in root]
    assert parts == [("1", f'"{tag}"'), ("2", '"2"')]


@given(st.binary(max_size=200))
def test_any_error_document_is_read(document: bytes) -> None:
    """An error page never raises: it has a code and a message, or none."""
    assert error_in(document + b"<Code>Slow&amp;Down</Code>")[0] in ("Slow&Down", error_in(document)[0])
