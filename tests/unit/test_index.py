"""The index: a table of members that may come from an enemy."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import tracemalloc
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blobflow.artifact.index import Index, Member, path_fault
from blobflow.artifact.index_parquet import (
    _SCHEMA as SCHEMA,
    decode_index,
    decode_origins,
    encode_index,
    encode_origins,
)
from blobflow.artifact.limits import ROWS_PER_GROUP
from blobflow.checksum import EMPTY_SHA256, crc32c, sha256
from blobflow.errors import ArtifactInvalid, HostileArtifact

HELLO = Member("hello", 5, 0o644, 1_700_000_000_000_000_000, sha256(b"hello"), crc32c(b"hello"))
EMPTY = Member("empty", 0, 0o644, 0, EMPTY_SHA256, 0)
DIRECTORY = Member("dir/", 0, 0o755, 0, EMPTY_SHA256, 0)


def index_of(*members: Member) -> Index:
    index = Index()
    for member in members:
        index.append(member)
    return index


def renamed(*paths: str, member: Member = HELLO) -> bytes:
    return encode_index(index_of(*(member._replace(path=path) for path in paths)))


def parquet(schema: pa.Schema = SCHEMA, rows: int = 1, **columns: Any) -> bytes:
    values = {
        "path": [f"{i:06}" for i in range(rows)],
        "size": [5] * rows,
        "mode": [0o644] * rows,
        "mtime_ns": [0] * rows,
        "sha256": [HELLO.sha256] * rows,
        "crc32c": [HELLO.crc32c] * rows,
        **columns,
    }
    sink = io.BytesIO()
    pq.write_table(pa.table({name: values[name] for name in schema.names}, schema=schema), sink)
    return sink.getvalue()


def test_an_index_survives_parquet():
    """Rows come back as they went in, in order."""
    members = [DIRECTORY, EMPTY, HELLO, HELLO._replace(path="ünï/日本", mode=0o755)]
    index = decode_index(encode_index(index_of(*members)), members=4)
    assert list(index) == members
    assert (len(index), index.total_bytes) == (4, 10)
    assert repr(index) == "<Index 4 members, 10 bytes>"
    assert index[0].is_directory
    assert not index[1].is_directory


def test_no_members_are_an_index():
    """An empty directory is exported as an index without rows."""
    assert len(decode_index(encode_index(Index()), members=0)) == 0


def test_many_members_span_row_groups():
    """More rows than a group holds come back in order."""
    count = 2 * ROWS_PER_GROUP + 10
    data = renamed(*(f"{i:08}" for i in range(count)))
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 3
    index = decode_index(data, members=count)
    assert index.paths[0] == "00000000"
    assert index.paths[-1] == f"{count - 1:08}"


def test_the_digests_depend_on_content_and_nothing_else():
    """Times do not count; the content digest is the documented one; the execute bit has a digest of its own."""
    index = index_of(EMPTY, HELLO)
    later = index_of(EMPTY, HELLO._replace(mtime_ns=1))
    executable = index_of(EMPTY, HELLO._replace(mode=0o755))
    lines = f"{EMPTY_SHA256.hex()} 0 empty\n{HELLO.sha256.hex()} 5 hello\n"
    assert index.content_digest() == "sha256:" + sha256(lines.encode()).hex() == later.content_digest()
    assert executable.content_digest() == index.content_digest()
    assert executable.executables_digest() == "sha256:" + sha256(b"hello\n").hex() != index.executables_digest()


@pytest.mark.seed("1.17")
@pytest.mark.parametrize(
    "path",
    [
        "../escape",
        "a/../../b",
        "..",
        ".",
        "./a",
        "/etc/passwd",
        "//a",
        "a//b",
        "/",
        "",
        "a/./b",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "a\x85b",
        "x" * 256,
        "é" * 128,
        "/".join(["d" * 200] * 21),
    ],
)
def test_paths_that_must_never_be_written_are_refused(path: str):
    """Each is refused by name, before anything of the payload is fetched."""
    with pytest.raises(HostileArtifact) as refusal:
        decode_index(renamed(path), members=1)
    assert refusal.value.path == path
    assert path_fault(path) == refusal.value.reason


def test_deep_paths_are_checked_in_the_memory_of_their_rows():
    """500 different directories of 2,000 levels each cost what their paths have in bytes, not one path per level."""
    paths = ["/".join([f"{number:03}", *"d" * 1_990, "f"]) for number in range(500)]
    index = index_of(*(EMPTY._replace(path=path) for path in paths))
    tracemalloc.start()
    try:
        index.check()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.seed("1.17")
@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([HELLO, HELLO], "duplicate or out of order"),
        ([HELLO._replace(path="b"), HELLO._replace(path="a")], "duplicate or out of order"),
        ([HELLO._replace(path="\ue000"), HELLO._replace(path="é")], "duplicate or out of order"),
        ([HELLO._replace(path="a"), HELLO._replace(path="a/b")], "a file and a directory"),
        ([HELLO._replace(path="a"), HELLO._replace(path="a/b/c/d")], "a file and a directory"),
        ([HELLO._replace(path="a"), DIRECTORY._replace(path="a/")], "a file and a directory"),
        ([HELLO._replace(mode=0o4755)], "neither 644 nor 755"),
        ([HELLO._replace(mode=0o120777)], "neither 644 nor 755"),
        ([HELLO._replace(mode=0o666)], "neither 644 nor 755"),
        ([HELLO._replace(size=-1)], "its size is -1"),
        ([DIRECTORY._replace(size=1)], "a directory has content"),
        ([DIRECTORY._replace(mode=0o644)], "a directory has content or another mode"),
        ([EMPTY._replace(sha256=HELLO.sha256)], "it is empty, but its checksums"),
        ([EMPTY._replace(crc32c=1)], "it is empty, but its checksums"),
    ],
)
def test_rows_that_contradict_the_rules_are_refused(members: list[Member], reason: str):
    """Duplicates, foreign modes, impossible sizes, a name that is a file and a directory at once."""
    with pytest.raises(HostileArtifact, match=reason):
        decode_index(encode_index(index_of(*members)), members=len(members))


@pytest.mark.seed("1.17")
def test_another_schema_is_refused():
    """Columns of other names, types, order or nullability are no index."""
    for schema in (
        SCHEMA.set(1, pa.field("size", pa.int32(), nullable=False)),
        SCHEMA.set(4, pa.field("sha256", pa.binary(), nullable=False)),
        SCHEMA.set(0, pa.field("path", pa.binary(), nullable=False)),
        SCHEMA.set(0, pa.field("path", pa.string(), nullable=True)),
        pa.schema(list(reversed(SCHEMA))),
        SCHEMA.remove(5),
    ):
        with pytest.raises(ArtifactInvalid, match="another schema"):
            decode_index(parquet(schema), members=1)


@pytest.mark.seed("1.17")
def test_another_name_of_the_first_column_is_refused():
    """That column is looked for by its name, before the schema is compared."""
    with pytest.raises(ArtifactInvalid, match="not readable as Parquet"):
        decode_index(parquet(SCHEMA).replace(b"path", b"peth"), members=1)


@pytest.mark.seed("1.17")
def test_null_cells_are_refused():
    """A nullable column is another schema, with or without a null in it."""
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
    for name in SCHEMA.names:
        with pytest.raises(ArtifactInvalid):
            decode_index(parquet(nullable, 1, **{name: [None]}), members=1)


@pytest.mark.parametrize("members", [0, 2, 10**9])
def test_another_number_of_rows_is_refused(members: int):
    """The manifest's count is held to."""
    with pytest.raises(ArtifactInvalid):
        decode_index(renamed("a"), members=members)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 100, renamed("a")[:-1], renamed("a")[20:]])
def test_what_is_not_parquet_is_refused(data: bytes):
    """Damage is ArtifactInvalid, whatever the reader says."""
    with pytest.raises(ArtifactInvalid):
        decode_index(data, members=1)


def test_paths_that_are_not_utf8_are_refused():
    """A column that calls itself text and is not."""
    good = parquet(path=["abcdefgh"])
    with pytest.raises((ArtifactInvalid, HostileArtifact)):
        decode_index(good.replace(b"abcdefgh", b"\xff\xfebcdefg"), members=1)


@pytest.mark.seed("1.17")
def test_a_row_group_beyond_the_limits_is_refused():
    """Too many rows in one group are refused from the footer, before they are decoded."""
    rows = ROWS_PER_GROUP + 1
    with pytest.raises(ArtifactInvalid, match=f"row group 0 of the index has {rows} rows"):
        decode_index(parquet(rows=rows), members=rows)


_BOMB = """
import io, resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from blobflow.artifact import index_parquet
from blobflow.errors import BlobflowError

rows = 65_536
digest = bytes(32)
columns = {
    "path": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 16_000])),
    "size": [5] * rows, "mode": [0o644] * rows, "mtime_ns": [0] * rows, "sha256": [digest] * rows, "crc32c": [0] * rows,
}
fields = [pa.field("path", columns["path"].type, nullable=False), *list(index_parquet._SCHEMA)[1:]]
sink = io.BytesIO()
pq.write_table(pa.table(columns, schema=pa.schema(fields)), sink, store_schema=False)
data = sink.getvalue()
del sink, columns
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    index_parquet.decode_index(data, members=rows)
except BlobflowError as error:
    print(type(error).__name__, len(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.seed("1.17")
def test_one_long_path_for_every_row_is_no_bomb():
    """A megabyte of Parquet that stands for a gigabyte of paths is refused without being unpacked."""
    output = subprocess.run([sys.executable, "-c", _BOMB], check=True, capture_output=True, text=True).stdout
    kind, size, growth_kib = output.split()
    assert kind == "HostileArtifact"
    assert int(size) < 2**20
    assert int(growth_kib) < 200 * 1024


def test_deep_paths_are_checked_once():
    """Every directory is looked at once, however many members lie below it."""
    deep = "/".join("d" * 2000)
    index = index_of(*(HELLO._replace(path=f"{deep}/{i:05}") for i in range(5000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    index.check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5


def test_origins_survive_and_damage_is_named():
    """The table of a reference artifact comes back; anything else is refused."""
    inodes, mtimes_ns = [0, 1, 2**64 - 1], [-(2**63), 0, 2**63 - 1]
    assert [list(column) for column in decode_origins(encode_origins(inodes, mtimes_ns), members=len(inodes))] == [
        inodes,
        mtimes_ns,
    ]
    with pytest.raises(ArtifactInvalid, match="reference table"):
        decode_origins(b"garbage", members=1)
    with pytest.raises(ArtifactInvalid, match="reference table"):
        decode_origins(renamed("a"), members=1)
