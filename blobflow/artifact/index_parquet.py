"""The Parquet files of an artifact: the index, and the origins of a reference artifact. Both may be hostile."""

# pyright: basic
# pyarrow has no type stubs: under the strict rules every line that uses it would be an error.

from __future__ import annotations

import io
from array import array
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blobflow.artifact.index import Index, IndexRules, index_bytes_limit, refused_member
from blobflow.artifact.limits import (
    MAX_GROUP_BYTES,
    MAX_INDEX_BYTES,
    MAX_MEMBERS,
    MAX_PATH_BYTES,
    MAX_PATHS_BYTES,
    ROWS_PER_GROUP,
)
from blobflow.artifact.pages import (
    DICTIONARY,
    PLAIN,
    PLAIN_DICTIONARY,
    RLE,
    RLE_DICTIONARY,
    check_footer,
    column_chunks,
    pages,
)
from blobflow.checksum import SHA256_BYTES
from blobflow.errors import ArtifactInvalid
from blobflow.untrusted import quoted

_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mode", pa.uint32(), nullable=False),
        pa.field("mtime_ns", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(SHA256_BYTES), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
    ]
)
_SCHEMA_READ = _SCHEMA.set(0, pa.field("path", pa.dictionary(pa.int32(), pa.string()), nullable=False))
_ORIGINS = pa.schema([pa.field("inode", pa.uint64()), pa.field("mtime_ns", pa.int64())])
_ENCODINGS: Final = frozenset({PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY})
"""Other encodings let a small page expand to large values: in DELTA_BYTE_ARRAY each repeats a part of the last one."""
_BATCH_ROWS: Final = 2048
"""Rows that are decoded before they are checked: 8 MiB with the longest paths."""
_MAX_GROUPS: Final = 1024
_MAX_PATH_PAGE_BYTES: Final = 8 << 20
"""Our pages: 1 MiB, plus what one more batch of 1,024 values of 4 KiB adds."""
_MAX_PAGE_BYTES: Final = 3 << 20
_PAGE_BYTES: Final = 64 * 1024
_UNREADABLE: Final = (pa.ArrowException, KeyError, OSError, RuntimeError, TypeError, UnicodeDecodeError)
"""What pyarrow raises for bytes that are not Parquet, or have other columns than ours."""


def encode_index(index: Index) -> bytes:
    """An index as Parquet: the explicit schema, zstd, row groups of `ROWS_PER_GROUP`."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, _SCHEMA, compression="zstd", store_schema=False) as writer:
        for start in range(0, len(index), ROWS_PER_GROUP):
            writer.write_batch(_batch(index, start, min(start + ROWS_PER_GROUP, len(index))))
    return sink.getvalue()


def _batch(index: Index, start: int, stop: int) -> pa.RecordBatch:
    def column(kind: pa.DataType, values: array[int] | bytearray, width: int = 1) -> pa.Array:
        return pa.Array.from_buffers(kind, stop - start, [None, pa.py_buffer(values[start * width : stop * width])])

    return pa.record_batch(
        [
            pa.array(index.paths[start:stop], pa.string()),
            column(pa.int64(), index.sizes),
            column(pa.uint32(), index.modes),
            column(pa.int64(), index.mtimes_ns),
            column(pa.binary(SHA256_BYTES), index.sha256s, SHA256_BYTES),
            column(pa.uint32(), index.crcs),
        ],
        schema=_SCHEMA,
    )


def decode_index(data: bytes, *, members: int) -> Index:
    """The index in `data` with every row checked; the data may be hostile.

    Args:
        members: The number of rows in the manifest.

    Raises:
        ArtifactInvalid: it is not Parquet, has another schema or another number of rows, or is too large.
        HostileArtifact: a row has a path, a mode or an order that must never be written.
    """
    if len(data) > MAX_INDEX_BYTES or members > MAX_MEMBERS:
        raise ArtifactInvalid(
            f"index of {members} members in {len(data)} bytes is over the limit"
            f" of {MAX_MEMBERS} members in {MAX_INDEX_BYTES} bytes",
            what="index",
        )
    if len(data) > index_bytes_limit(members):
        raise ArtifactInvalid(f"an index of {members} members cannot have {len(data)} bytes", what="index")
    index, paths_bytes = Index(), 0
    rules = IndexRules(index)
    try:
        footer = check_footer(data, _MAX_GROUPS)
        # Paths are read as a dictionary; otherwise one long string that stands for every row of a group would be
        # copied 65,536 times.
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["path"])
        _check_shape(file, members)
        chunks = list(column_chunks(data, footer, len(data) - 8))
        if [len(columns) for columns in chunks] != [len(_SCHEMA)] * file.num_row_groups:
            raise ArtifactInvalid("a row group of the index has other columns than an index", what="index")
        for group in range(file.num_row_groups):
            _check_pages(data, chunks[group], file.metadata.row_group(group).num_rows, footer)
            # A few rows at a time; each batch is checked before the next one is decoded.
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
                paths_bytes = _append_rows(index, batch, paths_bytes)
                rules.check()
    except _UNREADABLE as error:
        raise ArtifactInvalid(f"index is not readable as Parquet: {quoted(error)}", what="index") from error
    if len(index) != members:
        raise ArtifactInvalid(f"index has {len(index)} rows, the manifest says {members}", what="index")
    return index


def _append_rows(index: Index, batch: pa.RecordBatch, paths_bytes: int) -> int:
    """Append a batch to `index`; returns the bytes of all paths so far.

    Paths over the limit are refused before they become strings.
    """
    for name, values, width in (
        ("size", index.sizes, 8),
        ("mode", index.modes, 4),
        ("mtime_ns", index.mtimes_ns, 8),
        ("sha256", index.sha256s, SHA256_BYTES),
        ("crc32c", index.crcs, 4),
    ):
        raw = _raw(batch.column(name), width)
        values.extend(raw) if isinstance(values, bytearray) else values.frombytes(raw)
    paths = batch.column("path")
    if not len(paths):
        return paths_bytes
    if paths.null_count:
        raise ArtifactInvalid("a column has empty cells", what="index")
    places = pc.call_function("min_max", [paths.indices]).as_py()
    if not 0 <= places["min"] <= places["max"] < len(paths.dictionary):
        raise ArtifactInvalid("a path of the index points outside of its dictionary", what="index")
    lengths = pc.call_function("binary_length", [paths.dictionary])
    if pc.call_function("min_max", [lengths]).as_py()["max"] > MAX_PATH_BYTES:
        long = next(path for path in paths.dictionary if len(path.as_buffer()) > MAX_PATH_BYTES)
        shown = bytes(memoryview(long.as_buffer())[: 2 * MAX_PATH_BYTES]).decode("utf-8", "replace")
        raise refused_member(shown, f"it is longer than {MAX_PATH_BYTES} bytes")
    found = paths.dictionary_decode()
    paths_bytes += found.nbytes
    if paths_bytes > MAX_PATHS_BYTES:
        raise ArtifactInvalid(f"the paths of the index have more than {MAX_PATHS_BYTES} bytes", what="index")
    index.paths.extend(found.to_pylist())
    return paths_bytes


def encode_origins(inodes: Sequence[int], mtimes_ns: Sequence[int]) -> bytes:
    """The inode and the modification time of each member's file, as Parquet columns; for a reference artifact."""
    sink = io.BytesIO()
    pq.write_table(pa.table([inodes, mtimes_ns], schema=_ORIGINS), sink, compression="zstd")
    return sink.getvalue()


def decode_origins(data: bytes, *, members: int) -> tuple[array[int], array[int]]:
    """The inodes and modification times in `data`; the inverse of `encode_origins`.

    Raises:
        ArtifactInvalid: the data is not such columns.
    """
    try:
        _check_reference_footer(data)
        file = pq.ParquetFile(pa.BufferReader(data))
        if file.metadata.num_rows != members:
            raise ArtifactInvalid(
                "the reference table has another number of rows", hint="export again", what="references"
            )
        table = file.read(use_threads=False)
    except _UNREADABLE as error:
        raise ArtifactInvalid(
            f"the reference table is not readable: {quoted(error)}", hint="export again", what="references"
        ) from error
    if table.schema.remove_metadata() != _ORIGINS:
        raise ArtifactInvalid("the reference table has other columns", hint="export again", what="references")
    inodes, mtimes_ns = array("Q"), array("q")
    for column, values in zip(table.columns, (inodes, mtimes_ns), strict=True):
        for chunk in column.chunks:
            values.frombytes(_raw(chunk, values.itemsize))
    return inodes, mtimes_ns


def _check_pages(data: bytes, columns: Sequence[tuple[int, int]], rows: int, footer: int) -> None:
    """Refuse a row group whose pages are larger than its rows allow, before any of them is decompressed."""
    decoded = 0
    for number, (start, stop) in enumerate(columns):
        if not 4 <= start <= stop <= footer:
            raise ArtifactInvalid("a column of the index lies outside of its file", what="index")
        is_path = _SCHEMA.names[number] == "path"
        values = 0
        for at, page in enumerate(pages(data, start, stop)):
            width = MAX_PATH_BYTES + 4 if is_path else SHA256_BYTES
            if page.size > min(_MAX_PATH_PAGE_BYTES if is_path else _MAX_PAGE_BYTES, _PAGE_BYTES + page.values * width):
                raise ArtifactInvalid(
                    f"a page of the index has {page.size} bytes for {page.values} values", what="index"
                )
            if page.encoding not in _ENCODINGS or (page.kind == DICTIONARY and at):
                raise ArtifactInvalid("a page of the index has an encoding that no index uses", what="index")
            values += page.values if page.kind != DICTIONARY else 0
            decoded += page.size
        if values != rows:
            raise ArtifactInvalid(f"a column of the index has {values} values for {rows} rows", what="index")
    if decoded > MAX_GROUP_BYTES:
        raise ArtifactInvalid(
            f"a row group of the index has {decoded} bytes, over the limit of {MAX_GROUP_BYTES} bytes", what="index"
        )


def _check_reference_footer(data: bytes) -> None:
    try:
        check_footer(data, _MAX_GROUPS)
    except ArtifactInvalid as error:
        raise ArtifactInvalid(
            f"the reference table is not readable: {error.message}", hint="export again", what="references"
        ) from error


def _check_shape(file: pq.ParquetFile, members: int) -> None:
    if file.schema_arrow.remove_metadata() != _SCHEMA_READ:
        raise ArtifactInvalid(f"index has another schema: {', '.join(file.schema_arrow.names)[:200]}", what="index")
    metadata = file.metadata
    if metadata.num_rows != members:
        raise ArtifactInvalid(f"index has {metadata.num_rows} rows, the manifest says {members}", what="metadata")
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        if row_group.num_rows > ROWS_PER_GROUP or row_group.total_byte_size > MAX_GROUP_BYTES:
            raise ArtifactInvalid(
                f"row group {group} of the index has {row_group.num_rows} rows and {row_group.total_byte_size} bytes,"
                f" over the limit of {ROWS_PER_GROUP} rows and {MAX_GROUP_BYTES} bytes",
                what="index",
            )


def _raw(chunk: Any, width: int) -> memoryview:
    """The bytes of a column's values, `width` each."""
    if chunk.null_count:
        raise ArtifactInvalid("a column has empty cells", what="index")
    return memoryview(chunk.buffers()[1] or b"")[chunk.offset * width : (chunk.offset + len(chunk)) * width]
