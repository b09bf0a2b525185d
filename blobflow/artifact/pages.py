"""Computes what a Parquet file would cost from its bytes, before anything of it is decoded.

A footer declares the sizes of everything, and a reader believes it: for a file of 10 kB, 64 MiB are decompressed for
one string, and a list of a million elements is allocated before its first element is read. So the footer's lists are
counted, and the header of every page is read here (Thrift's compact protocol, the fields of parquet.thrift). The size
in a page header is true, because the decompressor gets exactly that much room.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Final, NamedTuple, Protocol

from blobflow.errors import ArtifactInvalid

MAGIC: Final = b"PAR1"
MAX_FOOTER_BYTES: Final = 8 << 20
"""Maximum of our footers: at most 20 KB for each of 153 row groups."""
MAX_FOREIGN_FOOTER_BYTES: Final = 64 << 20
"""Maximum footer of files from other writers: 200,000 column chunks have about 20 MB."""
_ELEMENT_BYTES: Final = 8
"""Minimum bytes of a structure in a list of a foreign footer; one with any content has more."""
_ORDER_BYTES: Final = 3
_MAX_LIST: Final = 64
"""Maximum elements of a footer list other than the row groups: columns, encodings, notes."""
_MAX_DEPTH: Final = 16
_WINDOW_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 64 * 1024
"""Maximum bytes of a page header: it may hold the smallest and the largest value."""

# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_INTEGERS: Final = (_I16, _I32, _I64)

DATA, DICTIONARY, DATA_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 2, 3, 7, 8


class Page(NamedTuple):
    """The header of a page."""

    kind: int
    encoding: int
    values: int
    size: int
    """Bytes after decompression."""
    stored: int
    """Bytes in the file."""


class Octets(Protocol):
    """Bytes that are read one by one."""

    def __getitem__(self, at: int, /) -> int: ...


class FileBytes:
    """The bytes of a file, with a few of them in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._descriptor = file.fileno()
        self.size = os.fstat(self._descriptor).st_size
        self._start = 0
        self._held = b""

    def __getitem__(self, at: int, /) -> int:
        if not self._start <= at < self._start + len(self._held):
            self._start, self._held = at, os.pread(self._descriptor, _WINDOW_BYTES, at)
            if not self._held:
                raise _broken("it became shorter")
        return self._held[at - self._start]


def check_foreign_footer(file: IO[bytes]) -> int:
    """Count everything in the footer of a file from any writer; returns the offset of the footer.

    Raises:
        ArtifactInvalid: there is no footer, or it announces more than it has.
    """
    data = FileBytes(file)
    end = bytes(data[at] for at in range(max(0, data.size - 8), data.size))
    size, start = int.from_bytes(end[:4], "little"), data.size - 8 - int.from_bytes(end[:4], "little")
    if len(end) < 8 or end[4:] != MAGIC or start < 4:
        raise _broken("it does not end as Parquet does")
    if size > MAX_FOREIGN_FOOTER_BYTES:
        raise _broken(f"its footer would have {size} bytes")
    reader = _Reader(data, start, data.size - 8, foreign=True)
    for field, kind in reader.fields():
        if (
            field == 7 and kind == _LIST
        ):  # FileMetaData.column_orders, the last one: each is an empty structure in another
            reader.skip_list(0, 0, least=_ORDER_BYTES)
        else:
            reader.skip(kind)
    return start


def check_footer(data: bytes | memoryview, max_groups: int) -> int:
    """Count everything in the footer of a file; returns the offset of the footer.

    Raises:
        ArtifactInvalid: there is no footer, or it has more row groups than `max_groups`, or a list that our files never
            have.
    """
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise _broken("it does not begin and end as Parquet does")
    size = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - size
    if start < 4 or size > MAX_FOOTER_BYTES:
        raise _broken(f"its footer would have {size} bytes")
    reader = _Reader(data, start, len(data) - 8)
    for field, kind in reader.fields():
        if field == 4 and kind == _LIST:  # FileMetaData.row_groups
            reader.skip_list(0, max_groups)
        else:
            reader.skip(kind)
    return start


def column_chunks(data: Octets, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
    """The start and end of each column's pages, row group by row group, from a footer that was counted.

    pyarrow is not used: `RowGroupMetaData.column` ends the process if the statistics of a column contradict each other.
    """
    reader = _Reader(data, start, stop)
    for field, kind in reader.fields():
        if field != 4 or kind != _LIST:  # FileMetaData.row_groups
            reader.skip_counted(kind)
            continue
        for _ in range(reader.count()):
            chunks: list[tuple[int, int]] = []
            for inner, what in reader.fields(1):
                if inner != 1 or what != _LIST:  # RowGroup.columns
                    reader.skip_counted(what)
                    continue
                for _ in range(reader.count()):
                    numbers: dict[int, int] = {}
                    for part, shape in reader.fields(2):
                        if part == 3 and shape == _STRUCT:  # ColumnChunk.meta_data
                            numbers = reader.integers(counted=True)
                        else:
                            reader.skip_counted(shape)
                    # ColumnMetaData: 7 total_compressed_size, 9 data_page_offset, 11 dictionary_page_offset.
                    begin = min(numbers.get(9, -1), numbers.get(11) or numbers.get(9, -1))
                    chunks.append((begin, begin + numbers.get(7, -1)))
            yield chunks


def pages(data: Octets, start: int, stop: int) -> Iterator[Page]:
    """The headers of the pages of a column chunk.

    Raises:
        ArtifactInvalid: there is something other than pages between `start` and `stop`.
    """
    while start < stop:
        reader = _Reader(data, start, min(stop, start + _MAX_HEADER_BYTES))
        page, compressed = _page(reader)
        start = reader.position + compressed
        if start > stop:
            raise _broken("a page reaches beyond its column")
        yield page


def _page(reader: _Reader) -> tuple[Page, int]:
    """PageHeader: 1 type, 2 uncompressed_page_size, 3 compressed_page_size, and a struct for each type."""
    numbers: dict[int, int] = {}
    inner: dict[int, dict[int, int]] = {}
    for field, kind in reader.fields():
        if kind in _INTEGERS:
            numbers[field] = reader.integer()
        elif kind == _STRUCT:
            inner[field] = reader.integers()
        else:
            reader.skip(kind)
    try:
        kind, size, compressed = numbers[1], numbers[2], numbers[3]
        # DataPageHeader: 1 num_values, 2 encoding; DictionaryPageHeader: the same; DataPageHeaderV2: 1, 4.
        told = inner[{DATA: 5, DICTIONARY: 7, DATA_V2: 8}[kind]]
        values, encoding = told[1], told[4 if kind == DATA_V2 else 2]
    except KeyError:
        raise _broken("a page has no header that is known") from None
    if min(size, compressed, values) < 0:
        raise _broken("a page has a size below nothing")
    return Page(kind, encoding, values, size, compressed), compressed


class _Reader:
    """Reads Thrift's compact protocol, and keeps only numbers."""

    def __init__(self, data: Octets, position: int, stop: int, *, foreign: bool = False) -> None:
        self._data = data
        self._foreign = foreign
        """Whether lists may have any length that their bytes allow."""
        self.position = position
        self._stop = stop

    def fields(self, depth: int = 0) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; the caller reads or skips each before it asks for the next."""
        if depth > _MAX_DEPTH:
            raise _broken("its structures are nested too deeply")
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self.integer()
            yield field, head & 15

    def integer(self) -> int:
        """The next number, in zigzag encoding."""
        number = self._varint()
        return (number >> 1) ^ -(number & 1)

    def count(self) -> int:
        """The length of a list that was counted before; its elements are read next."""
        head = self._byte()
        return head >> 4 if head >> 4 < 15 else self._varint()

    def skip_counted(self, kind: int) -> None:
        """Skip a value that was counted before."""
        self._foreign = True
        if kind in (_LIST, _SET):
            self.skip_list(0, 0, least=1)
        else:
            self.skip(kind)

    def integers(self, *, counted: bool = False) -> dict[int, int]:
        """The numbers among the fields of a struct; other fields are skipped."""
        found: dict[int, int] = {}
        for field, kind in self.fields(1):
            if kind in _INTEGERS:
                found[field] = self.integer()
            elif counted:
                self.skip_counted(kind)
            else:
                self.skip(kind, 1)
        return found

    def skip(self, kind: int, depth: int = 0) -> None:
        """Skip a value."""
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self._advance(1)
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self._advance(8)
        elif kind == _BINARY:
            self._advance(self._varint())
        elif kind in (_LIST, _SET):
            self.skip_list(depth, _MAX_LIST)
        elif kind == _STRUCT:
            for _, inner in self.fields(depth + 1):
                self.skip(inner, depth + 1)
        else:
            raise _broken("it has a value of a type that Parquet does not use")

    def skip_list(self, depth: int, limit: int, least: int = _ELEMENT_BYTES) -> None:
        """Skip a list with at most `limit` elements."""
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if self._foreign:
            limit = (self._stop - self.position) // (least if head & 15 == _STRUCT else 1)
        if count > limit or depth > _MAX_DEPTH:
            raise _broken(f"it has a list of {count} elements")
        for _ in range(count):
            if head & 15 in (_TRUE, _FALSE):
                self._advance(1)
            else:
                self.skip(head & 15, depth + 1)

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
            if shift > 63:
                raise _broken("it has a number of more than 64 bits")

    def _byte(self) -> int:
        self._advance(1)
        return self._data[self.position - 1]

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._stop:
            raise _broken("it ends inside a structure")


def _broken(reason: str) -> ArtifactInvalid:
    return ArtifactInvalid(f"not a Parquet file that can be trusted: {reason}", what="footer")
