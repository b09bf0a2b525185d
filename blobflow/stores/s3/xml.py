"""The XML documents of S3, written and read; bytes in, checked values out.

Documents come from an untrusted server. A document with a DOCTYPE is refused, so that there are no entities to expand,
and the caller bounds its size. Names are those of
https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote_plus
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from blobflow.stores.base import PartMeta
from blobflow.untrusted import bounded_time

MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""Twice what a page of a thousand keys takes whose every byte is escaped."""
_MAX_ELEMENTS = 100_000
"""A page of a thousand entries has some 15,000; each costs 300 bytes of memory, and four in the document."""
_MAX_DEPTH = 32
_MAX_TEXT = 64 * 1024
"""Characters of one element: names, tokens and keys have at most a few thousand."""


class MalformedResponse(Exception):
    """Not a document that the operation may answer with.

    Args:
        ended_early: It may have been one, if all of it had come.
    """

    def __init__(self, message: str, *, ended_early: bool = False) -> None:
        super().__init__(message)
        self.ended_early = ended_early


class ErrorResponse(Exception):
    """An error document in the place of a result: S3 may say 200 first, and fail later."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class ListedObject(NamedTuple):
    """An entry of ListObjectsV2; the key with the store's prefix."""

    key: str
    size: int
    e_tag: str
    modified: datetime | None


class ObjectPage(NamedTuple):
    """One page of ListObjectsV2."""

    entries: list[ListedObject]
    next_token: str | None
    """None on the last page."""


class ListedUpload(NamedTuple):
    """An entry of ListMultipartUploads; the key with the store's prefix."""

    key: str
    upload_id: str
    initiated: datetime | None


class UploadPage(NamedTuple):
    """One page of ListMultipartUploads."""

    entries: list[ListedUpload]
    next_markers: tuple[str, str] | None
    """Of key and upload id; None on the last page."""


class PartPage(NamedTuple):
    """One page of ListParts."""

    entries: list[PartMeta]
    truncated: bool
    """Whether the server says that there are more."""


class Made(NamedTuple):
    """The result of CompleteMultipartUpload, CopyObject or UploadPartCopy."""

    e_tag: str
    """Empty where the server leaves it out."""
    modified: datetime | None
    crc32c: int | None
    """Of the whole; None if it is told of the parts only."""


def write_completion(parts: Iterable[PartMeta]) -> bytes:
    """The body of CompleteMultipartUpload."""
    listed = "".join(
        f"<Part><PartNumber>{part.part_number}</PartNumber><ETag>{html.escape(part.e_tag, quote=False)}</ETag></Part>"
        for part in parts
    )
    namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<CompleteMultipartUpload xmlns="{namespace}">{listed}</CompleteMultipartUpload>'.encode()


def read_objects(document: bytes) -> ObjectPage:
    """Raises: MalformedAnswer, ErrorAnswer."""
    root = _read(document, "Contents", "IsTruncated")
    shown = _key_reader(root)
    entries = [
        ListedObject(shown(_text(each, "Key")), _number(each, "Size"), quoted(_text(each, "ETag")), _time(each))
        for each in root.iterfind("Contents")
    ]
    return ObjectPage(entries, _text(root, "NextContinuationToken") if _truncated(root) else None)


def read_uploads(document: bytes) -> UploadPage:
    """Raises: MalformedAnswer, ErrorAnswer."""
    root = _read(document, "Upload", "IsTruncated")
    shown = _key_reader(root)
    entries = [
        ListedUpload(shown(_text(each, "Key")), _text(each, "UploadId"), _time(each, "Initiated"))
        for each in root.iterfind("Upload")
    ]
    if not _truncated(root):
        return UploadPage(entries, None)
    return UploadPage(entries, (shown(_text(root, "NextKeyMarker")), _text(root, "NextUploadIdMarker")))


def read_parts(document: bytes) -> PartPage:
    """Raises: MalformedAnswer, ErrorAnswer."""
    root = _read(document, "Part", "IsTruncated")
    entries = [
        PartMeta(
            _number(each, "PartNumber"),
            _number(each, "Size"),
            quoted(_text(each, "ETag")),
            read_crc32c(each.findtext("ChecksumCRC32C")),
        )
        for each in root.iterfind("Part")
    ]
    return PartPage(entries, _truncated(root))


def read_upload_id(document: bytes) -> str:
    """The upload id that CreateMultipartUpload gives; empty where there is none.

    Raises: MalformedAnswer, ErrorAnswer.
    """
    return _read(document, "UploadId").findtext("UploadId") or ""


def read_made(document: bytes) -> Made:
    """Raises: MalformedAnswer, ErrorAnswer."""
    root = _read(document, "ETag")
    crc = read_crc32c(root.findtext("ChecksumCRC32C")) if root.findtext("ChecksumType") != "COMPOSITE" else None
    return Made(quoted(root.findtext("ETag") or ""), _time(root), crc)


def error_in(document: bytes) -> tuple[str, str]:
    """Code and message of an error document, empty where they are missing.

    Errors are also made by what stands between, in pages of its own: two patterns are enough, and no parser fails.
    """
    text = document.decode("utf-8", "replace")
    code = re.search(r"<Code>\s*([^<]{1,100}?)\s*</Code>", text)
    message = re.search(r"<Message>\s*([^<]{1,1000}?)\s*</Message>", text)
    return (html.unescape(code[1]) if code else "", html.unescape(message[1]) if message else "")


def region_in(document: bytes) -> str:
    """The region that an error document names as the right one; empty where it does not."""
    text = document.decode("utf-8", "replace")
    found = re.search(r"<Region>\s*([^<]{1,100}?)\s*</Region>", text) or re.search(r"expecting '([^']{1,100})'", text)
    return found[1] if found else ""


# Values, which headers have too


def quoted(e_tag: str) -> str:
    """Entity tags with their quotes, which some servers leave out in some answers; empty for what is no entity tag.

    It goes back to the server in a header, where RFC 9110 (8.8.3) allows what it allows here.
    """
    e_tag = e_tag.strip(" \t\r\n")
    if not re.fullmatch(r"[\x21-\x7e\x80-\xff ]{1,1024}", e_tag):
        return ""
    return e_tag if e_tag.endswith('"') else f'"{e_tag}"'


def write_crc32c(crc: int) -> str:
    """A CRC32C as S3 writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def read_crc32c(value: str | None) -> int | None:
    """A CRC32C as S3 writes it; None for one that is composed of the parts' ("...-3")."""
    try:
        raw = base64.b64decode(value or "", validate=True)
    except (binascii.Error, ValueError):
        return None
    return int.from_bytes(raw, "big") if len(raw) == 4 else None


@lru_cache(maxsize=64)  # objects that are written together have the same
def read_time(value: str | None) -> datetime | None:
    """The time in a body (ISO 8601) or header (RFC 9110); None if it has neither form, or cannot be represented."""
    iso = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(?:Z|[+-]00:?00)", (value or "").strip())
    try:
        if iso is None:
            return bounded_time(parsedate_to_datetime(value or ""))
        seconds = bounded_time(datetime.fromisoformat(iso[1]).replace(tzinfo=timezone.utc))
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
    return seconds and seconds + timedelta(seconds=float(iso[2] or 0))


# Documents


def _read(document: bytes, *known: str) -> Element:
    """The root of a result.

    Any name is accepted, as in botocore, because some servers invent names. But a page from something in between must
    not be taken for an empty listing. So a root with a strange name must contain one of the elements `known` to the
    operation.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate("UTF-8")  # whatever a declaration says: S3 writes nothing else
    parser.buffer_text = True
    # Without a namespace separator expat gives names as they are written, with the prefix that few servers write.
    # AWS sends blanks while it is busy: they should come behind the declaration, and do not everywhere.
    given = document.lstrip()
    readable = _without_controls(given)
    bounds = _Bounds(builder)
    parser.StartElementHandler = bounds.start
    parser.EndElementHandler = bounds.end
    is_same = readable == given
    parser.CharacterDataHandler = bounds.data if is_same else lambda text: bounds.data(text.translate(_CONTROLS))
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(readable, True)
        root = builder.close()
    except expat.ExpatError as error:
        raise MalformedResponse(f"no XML: {error}", ended_early=error.code in _ENDED_EARLY) from error
    if ":" in root.tag:
        for element in root.iter():
            element.tag = element.tag.rpartition(":")[2]
    if root.tag == "Error":
        raise ErrorResponse(*error_in(document))
    if not root.tag.endswith(("Result", "Response")) and all(root.find(name) is None for name in known):
        raise MalformedResponse(f"a document {root.tag[:100]!r}")
    return root


_ENDED_EARLY = frozenset(
    expat.errors.codes[reason]
    for reason in (
        expat.errors.XML_ERROR_NO_ELEMENTS,
        expat.errors.XML_ERROR_UNCLOSED_TOKEN,
        expat.errors.XML_ERROR_PARTIAL_CHAR,
        expat.errors.XML_ERROR_UNCLOSED_CDATA_SECTION,
    )
)


class _Bounds:
    """Builds the tree, and stops if it is larger than a response may be."""

    def __init__(self, builder: TreeBuilder) -> None:
        self._builder = builder
        self._elements = self._depth = self._text = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        self._depth += 1
        self._text = 0
        if self._elements > _MAX_ELEMENTS or self._depth > _MAX_DEPTH or len(attributes) > _MAX_DEPTH:
            raise MalformedResponse("XML with more elements than any answer has")
        self._builder.start(tag, attributes)

    def data(self, text: str) -> None:
        self._text += len(text)
        if self._text > _MAX_TEXT:
            raise MalformedResponse("XML with more text in an element than any answer has")
        self._builder.data(text)

    def end(self, tag: str) -> None:
        self._depth -= 1
        self._text = 0
        self._builder.end(tag)


_STAND_INS_AT = 0xF0000
"""A private plane of Unicode, for characters that XML 1.0 has no way to write."""
_CONTROLS = {_STAND_INS_AT + code: code for code in range(0x20)}
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]|&#(?:0*([0-9]{1,2})|x0*([0-9a-fA-F]{1,2}));")


def _without_controls(document: bytes) -> bytes:
    """The document with stand-ins for control characters, or as it is.

    S3 keys may hold them, and servers write them as they are. One such key must not hide all the others.
    """

    def stand_in(found: re.Match[bytes]) -> bytes:
        code = found[0][0] if len(found[0]) == 1 else int(found[1] or found[2], 10 if found[1] else 16)
        return chr(_STAND_INS_AT + code).encode() if code < 0x20 and code not in (9, 10, 13) else found[0]

    return _CONTROL.sub(stand_in, document)


def _refuse_doctype(*_: object) -> None:
    raise MalformedResponse("XML with a DOCTYPE, which no answer has")


def _key_reader(root: Element) -> Callable[[str], str]:
    """How keys are to be read, which servers write as they are asked to, or not."""
    return unquote_plus if root.findtext("EncodingType") == "url" else str


def _text(parent: Element, name: str) -> str:
    text = parent.findtext(name)
    if not text:
        raise MalformedResponse(f"{name} is missing in {parent.tag[:100]}")
    return text


def _number(parent: Element, name: str) -> int:
    text = _text(parent, name).strip()
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 1 << 63:
        raise MalformedResponse(f"{name} is no number")
    return int(text)


def _truncated(root: Element) -> bool:
    return (root.findtext("IsTruncated") or "").strip().lower() == "true"


def _time(parent: Element, name: str = "LastModified") -> datetime | None:
    return read_time(parent.findtext(name))
