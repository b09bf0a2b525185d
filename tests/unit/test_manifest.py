"""The manifest: bytes in, a verified document out."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import BodyInfo, IndexInfo, Manifest, artifact_digest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.tarmap import manifest_entry
from blobflow.checksum import crc32c, sha256
from blobflow.errors import ArtifactInvalid

MANIFEST = Manifest(
    backend="directory",
    cursor={"lsn": 42},
    created_at=datetime(2026, 11, 20, 6, tzinfo=timezone.utc),
    producer="blobflow 0.1.0",
    members=2,
    bytes=5,
    content_digest="sha256:" + "0" * 64,
    executables_digest="sha256:" + "1" * 64,
    index=IndexInfo(size=100, sha256="2" * 64, crc32c=7),
    body=BodyInfo(size=4096, crc32c=8),
)


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(MANIFEST.encode()), **fields}).encode()


def without(field: str) -> bytes:
    document = json.loads(MANIFEST.encode())
    del document[field]
    return json.dumps(document).encode()


@pytest.mark.parametrize("data", [b"<html>", changed(format="another/1"), changed(members=-1), b"x" * 2_000_000])
def test_a_manifest_that_is_none_is_named(data: bytes):
    """Of a store's manifest the error says whose it is: a bucket holds many."""
    with pytest.raises(ArtifactInvalid, match="manifest of 'orders/monday'"):
        Manifest.parse(data, "orders/monday")


def test_a_manifest_file_knows_its_payload():
    """The bytes stay as they came, also with fields that this version does not know; the rest follows from them."""
    data = changed(colour="red")
    found = ManifestFile.parse(data)
    assert (found.data, found.manifest, found.digest) == (data, MANIFEST, artifact_digest(data))
    body = bytes(range(256)) * 16
    described = MANIFEST.model_copy(update={"body": BodyInfo(size=len(body), crc32c=crc32c(body))})
    made = ManifestFile.of(described)
    payload = manifest_entry(described.encode()) + body
    assert (made.entry, made.payload_size) == (payload[: -len(body)], len(payload))
    assert made.payload_crc32c == crc32c(payload)


def test_manifest_files_are_equal_if_their_bytes_are():
    """The same fields in other bytes are another artifact."""
    assert ManifestFile.of(MANIFEST) == ManifestFile.parse(MANIFEST.encode())
    assert ManifestFile.parse(changed()) != ManifestFile.of(MANIFEST)
    with pytest.raises(ArtifactInvalid, match="manifest of 'orders/monday'"):
        ManifestFile.parse(b"{}", "orders/monday")


def test_a_manifest_survives_its_encoding():
    """The document has the fields of the format page, times in UTC with a Z, and ends in a newline."""
    data = MANIFEST.encode()
    assert Manifest.parse(data) == MANIFEST
    assert Manifest.parse(data).encode() == data
    assert data.endswith(b"}\n")
    assert json.loads(data)["created_at"] == "2026-11-20T06:00:00Z"
    assert list(json.loads(data)) == [
        "format",
        "backend",
        "cursor",
        "created_at",
        "producer",
        "members",
        "bytes",
        "content_digest",
        "executables_digest",
        "index",
        "body",
    ]


def test_the_digest_is_that_of_the_bytes():
    """The identity of an artifact is the SHA-256 of its manifest as it is stored."""
    assert artifact_digest(b"anything") == "sha256:" + sha256(b"anything").hex()


def test_later_minor_versions_may_add_fields():
    """Unknown fields are ignored, and executables_digest may be missing."""
    assert Manifest.parse(changed(colour="red")) == MANIFEST
    assert Manifest.parse(without("executables_digest")).executables_digest is None


@pytest.mark.parametrize("found", ["blobflow.artifact/2", "", None, 1])
def test_another_format_is_refused_by_name(found: Any):
    """Whoever meets a newer format learns that a newer blobflow is needed."""
    with pytest.raises(ArtifactInvalid, match=r"this blobflow reads 'blobflow\.artifact/1'") as refusal:
        Manifest.parse(changed(format=found))
    assert "newer" in refusal.value.hint


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"{", b"null", b"[]", b'"text"', b"1e999", b"[" * 100_000, b'{"format": ' * 50_000]
)
def test_what_is_no_document_is_refused(data: bytes):
    """Not JSON, not an object, or nested without end."""
    with pytest.raises(ArtifactInvalid):
        Manifest.parse(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("members", -1),
        ("members", 2**63),
        ("bytes", "many"),
        ("content_digest", "sha256:123"),
        ("content_digest", "sha256:" + "A" * 64),
        ("content_digest", "sha256:" + "0" * 64 + "\n"),
        ("created_at", "yesterday"),
        ("index", {"size": 1, "sha256": "0" * 64, "crc32c": 2**32}),
        ("index", {"size": 1, "sha256": "xyz", "crc32c": 1}),
        ("body", {"size": -1, "crc32c": 1}),
        ("body", None),
        ("backend", None),
    ],
)
def test_fields_out_of_their_range_are_named(field: str, value: Any):
    """The message says which field is wrong."""
    with pytest.raises(ArtifactInvalid, match=f"manifest field '{field}"):
        Manifest.parse(changed(**{field: value}))


@pytest.mark.parametrize("field", ["format", "backend", "created_at", "members", "content_digest", "index", "body"])
def test_missing_fields_are_refused(field: str):
    """None of them has a default that could be meant."""
    with pytest.raises(ArtifactInvalid):
        Manifest.parse(without(field))


@pytest.mark.seed("1.5")
def test_a_mebibyte_is_the_limit():
    """Exactly 1 MiB is read, a byte more is refused; none is written that cannot be read."""
    data = MANIFEST.encode()
    full = data + b" " * (MAX_MANIFEST_BYTES - len(data))
    assert MAX_MANIFEST_BYTES == 1_048_576
    assert Manifest.parse(full) == MANIFEST
    with pytest.raises(ArtifactInvalid, match="exceeds 1048576 bytes"):
        Manifest.parse(full + b" ")
    with pytest.raises(ArtifactInvalid, match="exceeds 1048576 bytes") as refusal:
        MANIFEST.model_copy(update={"cursor": "x" * MAX_MANIFEST_BYTES}).encode()
    assert "cursor" in refusal.value.hint


def test_a_cursor_that_is_no_json_is_not_written():
    """NaN is a Python extension; a manifest that only Python can read is not portable."""
    with pytest.raises(ArtifactInvalid, match="cannot be encoded as JSON"):
        MANIFEST.model_copy(update={"cursor": float("nan")}).encode()


def test_the_same_content_is_the_same_tree():
    """Paths, bytes and execute bits count; times do not."""
    later = MANIFEST.model_copy(update={"created_at": datetime(2027, 1, 1, tzinfo=timezone.utc)})
    assert MANIFEST.same_content(later)
    assert MANIFEST.same_body(later)
    executable = MANIFEST.model_copy(update={"executables_digest": "sha256:" + "3" * 64})
    assert not MANIFEST.same_content(executable)
    touched = MANIFEST.model_copy(update={"index": IndexInfo(size=101, sha256="4" * 64, crc32c=9)})
    assert MANIFEST.same_content(touched)
    assert not MANIFEST.same_body(touched)
