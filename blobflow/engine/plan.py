"""Cuts a byte range into numbered parts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from blobflow.config import MIB
from blobflow.errors import Unsupported, setting

MAX_PARTS: Final = 10_000
"""Maximum parts of one multipart upload, S3's limit."""


class Part(NamedTuple):
    """A numbered range; numbers start at 1, as in S3."""

    number: int
    offset: int
    length: int


class Parts(Protocol):
    """Parts that can be counted and iterated; they may be created on demand."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Part]: ...


@dataclass(frozen=True)
class TransferPlan:
    """Equal parts of `part_size` bytes over `size` bytes from `start`; only the last may be smaller.

    A plan of 0 bytes is one empty part, because an upload needs at least one.
    """

    size: int
    part_size: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.part_size <= 0 or self.size < 0 or self.start < 0:
            raise ValueError(f"not a plan: {self!r}")

    @classmethod
    def for_upload(
        cls,
        size: int,
        chunk_size: int,
        *,
        min_part_size: int = 1,
        max_part_size: int = 5 * 1024 * MIB,
        max_parts: int = MAX_PARTS,
    ) -> TransferPlan:
        """The plan of a multipart upload: parts of `chunk_size`, enlarged if the store's limits require it.

        Raises:
            Unsupported: even parts of `max_part_size` are too small.
        """
        part_size = max(chunk_size, min_part_size)
        if size > part_size * max_parts:
            needed = -(-size // max_parts)
            part_size = -(-needed // MIB) * MIB
        if part_size > max_part_size:
            raise Unsupported(
                f"{size} bytes do not fit in {max_parts} parts of at most {max_part_size} bytes",
                hint=f"split the artifact, or give a smaller {setting('chunk_size')}",
                capability="max_parts",
            )
        return cls(size, part_size)

    def __len__(self) -> int:
        return max(1, -(-self.size // self.part_size))

    def part(self, number: int) -> Part:
        """Part `number`, from 1.

        Raises:
            IndexError: there is no such part.
        """
        if not 1 <= number <= len(self):
            raise IndexError(f"part {number} of {len(self)}")
        done = (number - 1) * self.part_size
        return Part(number, self.start + done, min(self.part_size, self.size - done))

    def __iter__(self) -> Iterator[Part]:
        return (self.part(number) for number in range(1, len(self) + 1))

    def missing(self, done: Container[int]) -> list[Part]:
        """The parts whose numbers are not in `done`; for uploads, which have at most `MAX_PARTS` parts."""
        return [part for part in self if part.number not in done]

    def rest(self, numbers: range, done: Iterable[int]) -> Rest:
        """The parts among `numbers` that are not in the present content of `done`."""
        return Rest(self, numbers, frozenset(number for number in done if number in numbers))

    def bytes_of(self, numbers: Collection[int]) -> int:
        """The total bytes of the parts `numbers`, which must not repeat."""
        last = len(self)
        return len(numbers) * self.part_size - (last * self.part_size - self.size if last in numbers else 0)

    @property
    def numbers(self) -> range:
        """The numbers of all parts."""
        return range(1, len(self) + 1)

    def parts_of(self, offset: int, length: int) -> range:
        """The numbers of the parts that overlap a byte range inside the plan."""
        if not length:
            return range(0)
        first = (offset - self.start) // self.part_size
        last = (offset + length - 1 - self.start) // self.part_size
        return range(first + 1, last + 2)


@dataclass(frozen=True)
class Rest:
    """Some parts of a plan, created on demand: a size that a store reports may imply any number of parts."""

    plan: TransferPlan
    numbers: range
    done: frozenset[int]
    """The finished ones among `numbers`."""

    def __len__(self) -> int:
        return len(self.numbers) - len(self.done)

    def __iter__(self) -> Iterator[Part]:
        return (self.plan.part(number) for number in self.numbers if number not in self.done)
