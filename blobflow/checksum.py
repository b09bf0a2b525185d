"""CRC32C that can be combined, and SHA-256, over the same buffers in one pass.

CRC32C (Castagnoli, RFC 3720 appendix B.4) is linear over GF(2): the checksum of `A + B` follows from the two
checksums and the length of `B` alone. So blobflow knows the checksum of a payload before it sends a byte of it,
and can prove an upload whose parts were sent by different processes (docs/format.md, "The algebra").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import TypeAlias

from crc32c import crc32c as _crc32c

Buffer: TypeAlias = bytes | bytearray | memoryview

SHA256_BYTES = 32
EMPTY_SHA256 = hashlib.sha256().digest()

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bit-reversed


def crc32c(data: Buffer, crc: int = 0) -> int:
    """The CRC32C of `data`, continuing from `crc` (the checksum of the bytes before it; 0 at the start)."""
    return _crc32c(data, crc)


def combine_crc32c(first: int, second: int, second_length: int) -> int:
    """The CRC32C of `A + B` from the checksums of A and B and the length of B in bytes.

    It costs about a microsecond for each set bit of the length. Moving a checksum past n bytes is a multiplication by
    x^(8n) modulo the polynomial; it is done here for the powers of two of n.
    """
    crc = first
    power = 0
    while second_length:
        if second_length & 1:
            t0, t1, t2, t3 = _shift_tables(power)
            crc = t0[crc & 0xFF] ^ t1[crc >> 8 & 0xFF] ^ t2[crc >> 16 & 0xFF] ^ t3[crc >> 24]
        second_length >>= 1
        power += 1
    return crc ^ second


def combine_all(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC32C of a whole from its `(crc32c, length)` parts in order."""
    whole = 0
    for crc, length in parts:
        whole = combine_crc32c(whole, crc, length)
    return whole


def sha256(data: Buffer) -> bytes:
    """The SHA-256 digest of `data`, 32 bytes."""
    return hashlib.sha256(data).digest()


@cache
def _shift_tables(power: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Four lookup tables, one for each byte of a checksum, that move it past 2**power bytes."""
    columns = _shift_columns(power)
    tables = tuple([0] * 256 for _ in range(4))
    for byte, table in enumerate(tables):
        for bit in range(8):
            column = columns[8 * byte + bit]
            for value in range(1 << bit):
                table[value | 1 << bit] = table[value] ^ column
    return tables  # pyright: ignore[reportReturnType]  # a generator of four makes a tuple of four


@cache
def _shift_columns(power: int) -> tuple[int, ...]:
    """The 32 x 32 matrix over GF(2) that moves a checksum past 2**power bytes, by columns."""
    if power:
        half = _shift_columns(power - 1)
        return tuple(_apply(half, column) for column in half)
    columns: list[int] = []
    for bit in range(32):
        crc = 1 << bit
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        columns.append(crc)
    return tuple(columns)


def _apply(columns: tuple[int, ...], vector: int) -> int:
    result = 0
    for column in columns:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
