"""docs/format.md quotes bytes; here they are compared with those that the code writes."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path

from blobflow.artifact.artifact import write_artifact
from blobflow.artifact.index import Index, Member
from blobflow.artifact.index_parquet import _SCHEMA
from blobflow.artifact.manifest import Manifest
from blobflow.artifact.tarmap import header
from blobflow.checksum import crc32c, sha256
from blobflow.coordination.lease_store import LeaseState
from blobflow.coordination.refs import RefState
from blobflow.uploads.intent import Intent
from tests.unit.test_intent import INTENT

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")

HELLO = (
    b"data/hello".ljust(100, b"\0")
    + b"0000644\0"
    + b"0000000\0"
    + b"0000000\0"
    + b"00000000005\0"
    + b"00000000000\0"
    + b"011137\0 "
    + b"0"
    + bytes(100)
    + b"ustar\0"
    + b"00"
    + bytes(64)
    + b"0000000\0"
    + b"0000000\0"
    + bytes(167)
)


def index_of_hello() -> Index:
    index = Index()
    index.append(Member("hello", 5, 0o644, 0, sha256(b"hello"), crc32c(b"hello")))
    return index


def rows(title: str) -> list[str]:
    """The names in the first column of the table that follows `title`."""
    table = re.search(r"(?:^\|.*\n)+", PAGE.split(title, 1)[1], re.MULTILINE)
    assert table is not None
    return [re.findall(r"`([^`]+)`", line)[0] for line in table[0].splitlines()[2:]]


def test_the_quoted_header_is_the_one_that_is_written():
    """Byte for byte, and its dump on the page says the same."""
    assert header("data/hello", 5, 0o644) == HELLO
    assert len(HELLO) == 512
    lines = re.findall(r"^(\d{4})  ((?:[0-9a-f]{2} )+)", PAGE, re.MULTILINE)
    shown = bytearray(512)
    for offset, dump in lines:
        data = bytes.fromhex(dump)
        shown[int(offset) : int(offset) + len(data)] = data
    assert bytes(shown) == HELLO


def test_the_table_of_the_header_covers_512_bytes():
    """Each field begins where the one before it ends."""
    cells = re.findall(r"^\| (\d+) \| (\d+) \|", PAGE, re.MULTILINE)
    position = 0
    for offset, size in cells:
        assert int(offset) == position
        position += int(size)
    assert position == 512


def test_the_quoted_pax_record_is_the_one_that_is_written():
    """A name that is not ASCII stands in a record, and as question marks in the block."""
    head = header("data/é", 0, 0o644)
    assert head[:14] == b"././@PaxHeader"
    assert head[512:].startswith(b"16 path=data/\xc3\xa9\n\0")
    assert head[1024:1031] == b"data/?\0"
    assert len(head) == 3 * 512


def test_a_fixed_tree_gives_the_documented_manifest(tmp_path: Path):
    """Fields, digests and time as the page defines them."""
    artifact = write_artifact(
        tmp_path, index_of_hello(), backend="directory", created_at=datetime(2026, 11, 20, 6, 0, 0, 5, timezone.utc)
    )
    document = json.loads(artifact.manifest_bytes)
    line = f"{sha256(b'hello').hex()} 5 hello\n".encode()
    assert document["content_digest"] == "sha256:" + sha256(line).hex()
    assert document["content_digest"] == "sha256:ed042c6f66e1050be34ec6efe378ecf92cb9097e99a2c29c525e18473e49091b"
    assert document["executables_digest"] == "sha256:" + sha256(b"").hex()
    assert document["created_at"] == "2026-11-20T06:00:00Z"
    size = document["index"]["size"]
    assert document["body"]["size"] == 512 + size + -size % 512 + 2 * 512 + 2 * 512


def test_the_tables_name_every_field():
    """Manifest, index, intent, ref and lease have the fields of their tables, and no others."""
    manifest = [name.partition(".")[0] for name in rows("## The manifest")]
    assert manifest == list(Manifest.model_fields)
    assert rows("## The index") == _SCHEMA.names
    assert rows("## The intent") == list(json.loads(INTENT.encode()))
    assert rows("`<prefix>/<name>.ref.json`") == list(RefState.model_fields)
    assert rows("`<prefix>/<name>.lease.json`") == list(LeaseState.model_fields)
    assert Intent.parse(INTENT.encode()) == INTENT
