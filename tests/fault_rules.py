"""Which requests meet a fault, and the fault that several servers know; used by the strict S3 and by the fault proxy.

A fault says what goes wrong, a rule says for which requests. The names of faults are those of `blobflow.testing`, where
the fault is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

Side: TypeAlias = Literal["request", "answer"]

PAUSE_S = 0.05
"""Between two pieces of a slow body."""

F_co = TypeVar("F_co", covariant=True)


@dataclass(frozen=True)
class Slow:
    """The body moves at this rate."""

    bytes_per_s: float

    @property
    def piece_bytes(self) -> int:
        """Sent at once, before a pause of `PAUSE_S`."""
        return max(1, int(self.bytes_per_s * PAUSE_S))


class Passing(Protocol):
    """A request, or an answer, that a rule looks at."""

    @property
    def side(self) -> Side: ...
    @property
    def operation(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def part_number(self) -> int | None: ...
    @property
    def status(self) -> int | None: ...


@dataclass
class Rule(Generic[F_co]):
    """`fault` for what fits: from the `nth` one on, `times` times (None: for ever), or every `nth` one."""

    fault: F_co
    operation: str = "*"
    """A pattern, as of a shell."""
    key: str = "*"
    """A pattern of the whole key."""
    part: int | None = None
    side: Side = "request"
    success: bool = False
    """Only answers with a status below 300."""
    nth: int = 1
    times: int | None = 1
    every: bool = False
    seen: int = field(default=0, init=False)

    def strikes(self, passing: Passing) -> bool:
        """Count what fits; whether it is one of those that are hit."""
        if not (
            passing.side == self.side
            and fnmatchcase(passing.operation, self.operation)
            and fnmatchcase(passing.key, self.key)
            and self.part in (None, passing.part_number)
            and (not self.success or (passing.status is not None and passing.status < 300))
        ):
            return False
        self.seen += 1
        if self.every:
            return self.seen % self.nth == 0
        return self.nth <= self.seen and (self.times is None or self.seen < self.nth + self.times)
