"""The virtual tar: the origin of every byte of a payload, which never exists as a whole.

The index fixes every header and every offset. So any range of the payload can be produced from the source files and
written into the target files, in any order. Byte layout: docs/format.md; POSIX pax (IEEE Std 1003.1, "pax
Interchange Format"), which every stock `tar` unpacks. Pure arithmetic: no I/O happens here.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple

from blobflow.artifact.index import Index
from blobflow.artifact.manifest import DATA_NAME, FILE_MODE, INDEX_NAME, MANIFEST_NAME
from blobflow.artifact.privacy import PrivateRows
from blobflow.checksum import combine_crc32c, crc32c

BLOCK: Final = 512
_END: Final = bytes(2 * BLOCK)
_ZEROS: Final = bytes(BLOCK)
_NAME_BYTES: Final = 100
_OCTAL_LIMIT: Final = 8**11
"""The size field has eleven octal digits; a size of 8 GiB or more is in a pax record."""

INDEX: Final = 1
FIRST_MEMBER: Final = 2
"""Entries of the tar are numbered: 0 the manifest, 1 the index, then the members of the index in order."""


class Span(NamedTuple):
    """A run of payload bytes with one origin."""

    length: int
    entry: int
    """The entry that the bytes belong to (header, content or padding)."""
    content_offset: int
    """Where the run starts in the entry's content; -1 for header, padding and end blocks."""
    literal: bytes
    """The bytes themselves if they are not content; otherwise empty."""


def member_length(name: str, size: int) -> int:
    """Bytes of an entry in the tar: headers, content, padding."""
    return _header_length(name, size) + size + -size % BLOCK


def header(name: str, size: int, mode: int) -> bytes:
    """The normalised header of an entry: owner and times 0, pax records only if name or size need them."""
    records = _pax_records(name, size)
    kind = b"5" if name.endswith("/") else b"0"
    shown = name.encode("ascii", "replace")[:_NAME_BYTES]
    block = _ustar(shown, 0 if size >= _OCTAL_LIMIT else size, mode, kind)
    if not records:
        return block
    return _ustar(b"././@PaxHeader", len(records), FILE_MODE, b"x") + records + bytes(-len(records) % BLOCK) + block


def _ustar(name: bytes, size: int, mode: int, kind: bytes) -> bytes:
    before = b"%b%07o\x000000000\x000000000\x00%011o\x0000000000000\x00" % (name.ljust(_NAME_BYTES, b"\0"), mode, size)
    after = kind + _USTAR_TAIL
    checksum = sum(before) + _BLANK_CHECKSUM + sum(kind) + _USTAR_TAIL_SUM
    return b"%b%06o\x00 %b" % (before, checksum, after)


_USTAR_TAIL = (bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\x000000000\x00" + bytes(155)).ljust(355, b"\0")
_USTAR_TAIL_SUM = sum(_USTAR_TAIL)
_BLANK_CHECKSUM = 8 * ord(" ")


def _header_length(name: str, size: int) -> int:
    if len(name) <= _NAME_BYTES and size < _OCTAL_LIMIT and name.isascii():
        return BLOCK
    records = len(_pax_records(name, size))
    return 2 * BLOCK + records + -records % BLOCK


def _pax_records(name: str, size: int) -> bytes:
    records = b""
    if len(name) > _NAME_BYTES or not name.isascii():
        records += _pax_record(b"path", name.encode())
    if size >= _OCTAL_LIMIT:
        records += _pax_record(b"size", b"%d" % size)
    return records


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    """`<length> <keyword>=<value>` and a newline; the length includes its own digits."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, keyword, value)


class TarMap:
    """The layout of one payload.

    Args:
        manifest_size: Bytes of `MANIFEST.json`.
        index_size: Bytes of `INDEX.parquet`.
        index: The members.
    """

    def __init__(self, manifest_size: int, index_size: int, index: Index) -> None:
        self.index = index
        self.private = PrivateRows()
        """The members that only their owner may read, from the manifest; no byte of the payload depends on them."""
        self._own_sizes = (manifest_size, index_size)
        starts = array("Q", [0, manifest_entry_length(manifest_size)])
        position = starts[INDEX] + member_length(INDEX_NAME, index_size)
        for path, size in zip(index.paths, index.sizes, strict=True):
            starts.append(position)
            position += member_length(f"{DATA_NAME}/{path}", size)
        self._starts = starts
        self._end = position
        self.size = position + len(_END)

    def __repr__(self) -> str:
        return f"<TarMap {len(self.index)} members, {self.size} bytes>"

    @property
    def body_start(self) -> int:
        """Offset of the body: the first byte after the manifest's entry."""
        return self._starts[INDEX]

    @property
    def data_start(self) -> int:
        """Offset of the first member's entry, or of the end blocks if there are no members."""
        return self._starts[FIRST_MEMBER] if len(self.index) else self._end

    def entry(self, number: int) -> tuple[str, int, int]:
        """Name, size (bytes) and mode of an entry."""
        if number >= FIRST_MEMBER:
            member = number - FIRST_MEMBER
            return f"{DATA_NAME}/{self.index.paths[member]}", self.index.sizes[member], self.index.modes[member]
        return (MANIFEST_NAME, INDEX_NAME)[number], self._own_sizes[number], FILE_MODE

    def content_range(self, number: int) -> tuple[int, int]:
        """Payload offset and length of an entry's content."""
        name, size, _ = self.entry(number)
        return self._starts[number] + _header_length(name, size), size

    def slice_of_members(self, number: int, count: int) -> tuple[int, int]:
        """Payload offset and length of the `number`-th (from 1) of `count` slices of about equal size.

        Slices begin and end between entries, so each member is whole in one of them. Together they cover everything
        after the index. A slice can be empty, if one member is larger than a slice.
        """
        start, stop = (self._boundary((self.size - self.data_start) * part // count) for part in (number - 1, number))
        return start, stop - start

    def _boundary(self, distance: int) -> int:
        """The first place between two entries that is at least `distance` bytes after the start of the members."""
        wanted = self.data_start + distance
        if wanted > self._end:
            return self.size
        later = bisect_left(self._starts, wanted)
        return self._starts[later] if later < len(self._starts) else self._end

    def entries_in(self, offset: int, length: int) -> int:
        """The number of entries in a non-empty range."""
        return bisect_right(self._starts, offset + length - 1) - bisect_right(self._starts, offset) + 1

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        """The runs that make up `length` payload bytes from `offset`, in order.

        Raises:
            ValueError: the range is not inside the payload.
        """
        stop = offset + length
        if offset < 0 or length < 0 or stop > self.size:
            raise ValueError(f"range {offset}..{stop} is outside of 0..{self.size}")
        number = bisect_right(self._starts, offset) - 1
        while offset < stop and offset < self._end:
            for span in self._entry_spans(number, offset - self._starts[number], stop - offset):
                yield span
                offset += span.length
            number += 1
        if offset < stop:
            yield Span(stop - offset, number - 1, -1, _END[offset - self._end : stop - self._end])

    def _entry_spans(self, number: int, skip: int, limit: int) -> Iterator[Span]:
        """The runs of one entry from `skip` bytes into it, at most `limit` bytes of them."""
        name, size, mode = self.entry(number)
        head_length = _header_length(name, size)
        if skip < head_length:
            literal = header(name, size, mode)[skip : skip + limit]
            yield Span(len(literal), number, -1, literal)
            limit -= len(literal)
            skip = head_length
        skip -= head_length
        if skip < size and limit:
            run = min(size - skip, limit)
            yield Span(run, number, skip, b"")
            limit -= run
            skip += run
        padding = size + -size % BLOCK - skip
        if padding > 0 and limit:
            run = min(padding, limit)
            yield Span(run, number, -1, _ZEROS[:run])

    def body_crc32c(self, index_crc32c: int) -> int:
        """The CRC32C of the body, from the members' checksums alone.

        Args:
            index_crc32c: CRC32C of the bytes of `INDEX.parquet`.
        """
        crc = _add_entry(0, header(INDEX_NAME, self._own_sizes[INDEX], FILE_MODE), self._own_sizes[INDEX], index_crc32c)
        index = self.index
        for path, size, mode, member_crc in zip(index.paths, index.sizes, index.modes, index.crcs, strict=True):
            crc = _add_entry(crc, header(f"{DATA_NAME}/{path}", size, mode), size, member_crc)
        return crc32c(_END, crc)


def _add_entry(crc: int, head: bytes, size: int, content_crc: int) -> int:
    crc = crc32c(head, crc)
    if size:
        crc = combine_crc32c(crc, content_crc, size)
        crc = crc32c(_ZEROS[: -size % BLOCK], crc)
    return crc


def manifest_entry(manifest_bytes: bytes) -> bytes:
    """The payload's first bytes: the whole entry of the manifest."""
    size = len(manifest_bytes)
    return header(MANIFEST_NAME, size, FILE_MODE) + manifest_bytes + bytes(-size % BLOCK)


def manifest_entry_length(manifest_size: int) -> int:
    """Bytes of `manifest_entry`."""
    return member_length(MANIFEST_NAME, manifest_size)
