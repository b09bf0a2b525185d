"""What an input costs: at most 64 MiB beyond what its valid members take, whatever its numbers claim."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from blobflow.artifact.index import Index, Member
from blobflow.artifact.index_parquet import _SCHEMA, decode_index, encode_index
from blobflow.artifact.pages import check_footer, check_foreign_footer, pages
from blobflow.backends.parquet import ParquetExporter
from blobflow.batch.tables import _Journal, _Source
from blobflow.config import ChunkProfile
from blobflow.errors import (
    ArtifactInvalid,
    HostileArtifact,
    RefusedError,
    ResultsConflict,
    UnsupportedSource,
    UsageError,
)
from blobflow.layers.format import Codec, decompress
from blobflow.layers.remote import RemoteLayer
from blobflow.layers.restoring import _workers_for
from blobflow.untrusted import MAX_JSON_VALUES, read_json

MIB = 1 << 20
BOUND_MIB = 64

CHILD = """
import json, sys
from pathlib import Path
from tests.fuzz.targets import targets
from tests.unit.test_hostile_sizes import decode
from blobflow.errors import BlobflowError

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024, int(status.split("VmRSS:")[1].split()[0]) / 1024

what, path, members = sys.argv[1:]
run = decode(int(members)) if what == "index" else targets()[what].run
for seed in targets()[what].seeds:  # imports, and what a first call allocates for good
    try:
        (decode(3) if what == "index" else run)(seed)
    except BlobflowError:
        pass
data = Path(path).read_bytes()
Path("/proc/self/clear_refs").write_text("5")
before = peak()[1]
try:
    run(data)
    outcome, message = "value", ""
except BlobflowError as error:
    outcome, message = type(error).__name__, error.message + error.hint
print(json.dumps({"outcome": outcome, "message": len(message), "mib": peak()[0] - before}))
"""


def decode(members: int) -> Callable[[bytes], Index]:
    return lambda data: decode_index(data, members=members)


def cost(tmp_path: Path, what: str, data: bytes, members: int = 0) -> dict[str, Any]:
    """What reading `data` takes in a process of its own, beside the bytes themselves."""
    (path := tmp_path / "input").write_bytes(data)
    command = [sys.executable, "-c", CHILD, what, str(path), str(members)]
    done = subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2], timeout=110)
    return json.loads(done.stdout)


def table(paths: pa.Array, **columns: Any) -> pa.Table:
    """An index of these paths; all else is the same in each row."""
    rows = len(paths)
    values = {
        "path": paths,
        "size": pa.repeat(pa.scalar(1, pa.int64()), rows),
        "mode": pa.repeat(pa.scalar(0o644, pa.uint32()), rows),
        "mtime_ns": pa.repeat(pa.scalar(0, pa.int64()), rows),
        "sha256": pa.repeat(pa.scalar(bytes(32), pa.binary(32)), rows),
        "crc32c": pa.repeat(pa.scalar(0, pa.uint32()), rows),
        **columns,
    }
    return pa.table(values, schema=_SCHEMA.set(0, pa.field("path", paths.type, nullable=False)))


def written(found: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    settings: dict[str, Any] = {"compression": "zstd", "row_group_size": 65_536, "store_schema": False, **options}
    pq.write_table(found, sink, **settings)
    return sink.getvalue()


def with_lying_footer() -> bytes:
    """The footer says that the column of paths is small; its page is not."""
    honest = written(table(pa.array(["a" * (32 * MIB)])), use_dictionary=False, write_statistics=False)
    size = pq.ParquetFile(io.BytesIO(honest)).metadata.row_group(0).column(0).total_uncompressed_size

    def varint(number: int) -> bytes:
        out = bytearray()
        number <<= 1
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        return bytes((*out, number))

    told, lie = varint(size), varint(300)
    footer = honest.rindex(told)
    padded = bytes([*(byte | 128 for byte in lie[:-1]), lie[-1] | 128, *([128] * (len(told) - len(lie) - 1)), 0])
    return honest[:footer] + padded + honest[footer + len(told) :]


def bombs() -> dict[str, tuple[Callable[[], bytes], int]]:
    return {
        "one path of 64 MiB": (lambda: written(table(pa.array(["a" * (64 * MIB)]))), 1),
        "twenty paths of 20 MiB": (
            lambda: written(table(pa.array([chr(97 + i) * (20 * MIB) for i in range(20)])), use_dictionary=False),
            20,
        ),
        "one long path for every row": (
            lambda: written(table(pa.DictionaryArray.from_arrays(array("i", bytes(4 * 65_536)), ["a" * 4 * MIB]))),
            65_536,
        ),
        "paths that repeat their beginning": (
            lambda: written(
                table(pa.array(["a" * (2 * MIB) + f"{i:04}" for i in range(500)])),
                use_dictionary=False,
                column_encoding={"path": "DELTA_BYTE_ARRAY"},
            ),
            500,
        ),
        "a footer that lies": (with_lying_footer, 1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(bombs()))
def test_an_index_of_huge_paths_costs_no_more_than_a_small_one(tmp_path: Path, name: str) -> None:
    """Refused from the sizes of its pages, in few words."""
    make, members = bombs()[name]
    found = cost(tmp_path, "index", make(), members)
    assert found["outcome"] in ("ArtifactInvalid", "HostileArtifact")
    assert found["message"] < 500
    assert found["mib"] < BOUND_MIB


@pytest.mark.slow
def test_ten_million_equal_rows_are_refused_at_the_second_one(tmp_path: Path) -> None:
    """Each row is looked at before the next ones are decoded."""
    data = written(table(pa.repeat(pa.scalar("a"), 10_000_000)))
    found = cost(tmp_path, "index", data, 10_000_000)
    assert found["outcome"] == "HostileArtifact"
    assert found["mib"] < BOUND_MIB


def test_the_first_bad_row_is_the_one_that_is_named() -> None:
    """However many come after it, in later batches and row groups."""
    index = Index()
    for i in range(10_000):
        index.append(Member(f"{i:06}", 1, 0o644, 0, bytes(32), 0))
    index.paths[5000], index.paths[9000] = "..", "."
    with pytest.raises(HostileArtifact) as refusal:
        decode_index(encode_index(index), members=10_000)
    assert refusal.value.path == ".."


def test_a_list_in_a_footer_is_counted_before_it_is_allocated() -> None:
    """A million columns that three bytes announce: refused, and so is every other list that is too long."""
    data = written(table(pa.array(["a"])))
    assert check_footer(data, 1) < len(data)
    million = b"\xfc\xc0\x84\x3d"  # of structures
    for field in range(1, 9):
        footer = bytes((field << 4 | 9,)) + million
        with pytest.raises(ArtifactInvalid, match="list of 1000000 elements"):
            decode_index(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1", members=1)
    with pytest.raises(ArtifactInvalid, match="list of 1 elements"):
        check_footer(data, 0)


def test_the_pages_of_an_index_are_all_that_is_in_it() -> None:
    """Every column is read page by page to its end; its values are as many as its rows."""
    index = Index()
    for i in range(70_000):
        index.append(Member(f"{i:06}", i + 1, 0o644, i, i.to_bytes(32, "big"), i))
    data = encode_index(index)
    file = pq.ParquetFile(io.BytesIO(data))
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        for number in range(about.num_columns):
            column = about.column(number)
            start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
            found = list(pages(data, start, start + column.total_compressed_size))
            assert sum(page.values for page in found if page.kind == 0) == about.num_rows
    assert decode_index(data, members=70_000).paths == index.paths


DOCUMENTS: dict[str, tuple[str, bytes]] = {
    "a manifest of empty lists": (
        "manifest",
        b'{"format": "blobflow.artifact/1", "cursor": [' + b"[]," * 340_000 + b"0]}",
    ),
    "an intent of empty lists": ("intent", b"[" + b"[]," * 1_390_000 + b"0]"),
    "an intent of empty texts": ("intent", b"[" + b'"",' * 1_390_000 + b"0]"),
    "layer metadata of numbers": ("layer_meta", b"[" + b"9," * 2_000_000 + b"0]"),
    "a receiver that lists nothing": ("receiver", b"\0" + b"[" + b"{}," * 2_700_000 + b"0]"),
    "a listing of empty elements": ("s3_objects", b"<ListBucketResult>" + b"<a/>" * 2_000_000 + b"</ListBucketResult>"),
    "a listing of one long text": (
        "s3_objects",
        b"<ListBucketResult><a>" + "é€😀".encode() * 900_000 + b"</a></ListBucketResult>",
    ),
    "a journal of one line": ("stage_journal", b"1" * (64 * MIB)),
    "a journal of a store of one line": ("local_parts", b"1" * (64 * MIB)),
    "an upload of a store": ("local_upload", b"[" * (64 * MIB)),
    "a ref": ("ref", b"[" * (64 * MIB)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_a_document_costs_no_more_than_it_may(tmp_path: Path, name: str) -> None:
    """Small bytes that stand for many values, long ones that stand for none: refused, or passed over."""
    what, data = DOCUMENTS[name]
    found = cost(tmp_path, what, data)
    assert found["mib"] < BOUND_MIB
    assert found["message"] < 500


def test_a_document_has_so_many_values_and_no_more() -> None:
    """Counted outside of strings, where a manifest in an intent has its own."""
    text = json.dumps("," * (2 * MIB)).encode()
    assert read_json(text, "document") == "," * (2 * MIB)
    escaped = json.dumps('"' * MIB).encode()
    assert read_json(escaped, "document") == '"' * MIB
    with pytest.raises(ArtifactInvalid, match="values"):
        read_json(b"[" + b"0000000," * (MAX_JSON_VALUES + 1) + b"0]", "document")


def test_a_layer_of_huge_frames_is_refused_or_restored_by_fewer_workers() -> None:
    """A frame is held whole, twice: no more of them at once than the profile's memory and 64 MiB; none beyond that."""

    def workers(frame_size: int, tar_size: int = 1 << 42) -> int:
        meta = SimpleNamespace(frame_size=frame_size, tar_size=tar_size, key="layer")
        return _workers_for(cast("RemoteLayer", SimpleNamespace(meta=meta)), ChunkProfile.tactical())

    assert [workers(size * MIB) for size in (2, 8, 12, 24, 48)] == [4, 4, 4, 2, 1]
    assert workers(2048 * MIB, tar_size=MIB) == 4
    with pytest.raises(RefusedError, match="frames of 2147483648 bytes") as refusal:
        workers(2048 * MIB)
    assert f"chunk_size={2048 * MIB}" in refusal.value.hint


def test_a_frame_without_its_checksum_or_with_another_one_behind_it_is_refused() -> None:
    """One whole frame, proven by its own checksum: cut off, left out, changed, or followed by anything, it is none."""
    content = bytes(range(256)) * 1000 + bytes(300_000)
    frame = Codec().compress(content)
    into = memoryview(bytearray(len(content)))
    decompress(frame, into)
    assert into == content
    plain = zstandard.ZstdCompressor(write_checksum=False, write_content_size=True).compress(content)
    changed = frame[:-1] + bytes((frame[-1] ^ 1,))
    for wrong in (frame[:-4], frame[:-1], changed, frame + frame, frame + b"x", frame + Codec().compress(b""), plain):
        with pytest.raises(ArtifactInvalid):
            decompress(wrong, into)


def with_list(field: int, count: int, elements: bytes = b"") -> bytes:
    """A file whose footer is one list of structures that announces so many."""
    number = bytes(
        (count >> 7 * i & 127) | (128 if count >> 7 * (i + 1) else 0) for i in range((count.bit_length() + 6) // 7)
    )
    footer = bytes((field << 4 | 9, 0xFC)) + number + elements + b"\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize("field", range(1, 9))
def test_a_foreign_footer_has_the_bytes_of_what_it_announces(tmp_path: Path, field: int) -> None:
    """Of a dataset, of operations, of results: a list that is not there is not allocated."""
    (tmp_path / "data").mkdir()
    for data in (with_list(field, 1_000_000), with_list(field, 1_000_000, bytes(1_000_000))):
        (path := tmp_path / "data" / "x.parquet").write_bytes(data)
        with path.open("rb") as file, pytest.raises(ArtifactInvalid, match="list of 1000000 elements"):
            check_foreign_footer(file)
        with pytest.raises(UnsupportedSource, match="can be trusted"):
            ParquetExporter(path=tmp_path / "data").export(tmp_path / "artifact")
        with pytest.raises(UsageError, match="can be trusted"):
            _Source(path)
        with pytest.raises(ResultsConflict, match="not a table of results"):
            list(_Journal(path, "00", payloads=False, fresh=False)._of_table())


def test_the_footers_of_other_writers_are_counted_whole(tmp_path: Path) -> None:
    """With hundreds of columns and tens of row groups."""
    path = tmp_path / "wide.parquet"
    found = pa.table({f"column {i}": list(range(40)) for i in range(300)})
    pq.write_table(found, path, row_group_size=1)
    with path.open("rb") as file:
        assert path.stat().st_size - check_foreign_footer(file) > MIB


OPERATIONS: dict[str, Callable[[], pa.Table]] = {
    "one payload of 256 MiB": lambda: pa.table({"op": ["insert"], "key": ["a"], "payload": ["x" * (256 * MIB)]}),
    "one payload of 8 MiB for every row": lambda: pa.table(
        {
            "op": ["insert"] * 2000,
            "key": [f"{i}" for i in range(2000)],
            "payload": pa.DictionaryArray.from_arrays(array("i", bytes(4 * 2000)), ["x" * (8 * MIB)]),
        }
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_small_table_of_operations_does_not_stand_for_a_large_one(tmp_path: Path, name: str) -> None:
    """Its pages are measured before one is decompressed, and values that repeat are decoded a few at a time."""
    found = cost(tmp_path, "operations_table", written(OPERATIONS[name](), use_dictionary=True))
    assert found["mib"] < BOUND_MIB


def test_a_table_of_results_is_taken_up_however_much_its_payloads_repeat(tmp_path: Path) -> None:
    """Pages of ours are small enough for our own measure."""
    results = tmp_path / "results.parquet"
    row = {"kind": "get", "key": "a", "status": "done", "size": MIB, "payload": base64.b64encode(bytes(MIB)).decode()}
    with _Journal(results, "00", payloads=True, fresh=False) as journal:
        for index in range(20):
            journal.add({"index": index, **row})
        journal.publish()
    with _Journal(results, "00", payloads=True, fresh=False) as journal:
        assert journal.done == set(range(20))
