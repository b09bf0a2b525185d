"""CRC32C and its algebra."""

from __future__ import annotations

import hashlib

import pytest

from blobflow.checksum import EMPTY_SHA256, combine_all, combine_crc32c, crc32c, sha256
from tests.kit import noise


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_vectors_of_rfc_3720_hold(data: bytes, expected: int):
    """The checksum is CRC32C: the values of RFC 3720, appendix B.4, come out."""
    assert crc32c(data) == expected
    assert crc32c(memoryview(bytearray(data))) == expected


def test_a_checksum_continues_where_an_earlier_one_ended():
    """Feeding data in pieces gives what feeding it at once gives."""
    data = noise(10_000)
    assert crc32c(data[3_333:], crc32c(data[:3_333])) == crc32c(data)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 255, 256, 4096, 65_537])
def test_two_checksums_combine_to_that_of_the_whole(length: int):
    """The checksum of A + B follows from those of A and B and the length of B."""
    first, second = noise(1000, 1), noise(length, 2)
    assert combine_crc32c(crc32c(first), crc32c(second), length) == crc32c(first + second)


def test_lengths_far_beyond_memory_combine():
    """A terabyte of zeros: doubling the combination forty times equals combining once with the whole length."""
    zeros = crc32c(bytes(1))
    for power in range(40):
        zeros = combine_crc32c(zeros, zeros, 1 << power)
    one = crc32c(b"x")
    step_by_step = one
    for power in range(40):
        half = crc32c(bytes(1))
        for lower in range(power):
            half = combine_crc32c(half, half, 1 << lower)
        step_by_step = combine_crc32c(step_by_step, half, 1 << power)
    step_by_step = combine_crc32c(step_by_step, crc32c(bytes(1)), 1)
    assert combine_crc32c(one, zeros, 1 << 40) == step_by_step


def test_parts_combine_in_order():
    """All parts in order give the whole; in another order they do not."""
    data = noise(10_000)
    pieces = [data[:100], b"", data[100:5000], data[5000:]]
    parts = [(crc32c(piece), len(piece)) for piece in pieces]
    assert combine_all(parts) == crc32c(data)
    assert combine_all(reversed(parts)) != crc32c(data)
    assert combine_all([]) == 0


def test_sha256_is_that_of_hashlib():
    """Digests are raw bytes, for every kind of buffer."""
    data = noise(1000)
    assert sha256(memoryview(data)) == hashlib.sha256(data).digest()
    assert sha256(b"") == EMPTY_SHA256
