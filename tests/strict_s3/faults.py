"""What a test tells the server to do wrong, and for which requests; the words are those of `blobflow.testing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from tests.fault_rules import Side, Slow


class Response(NamedTuple):
    """What is sent back; names of headers are in lower case."""

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes = b""


@dataclass
class Exchange:
    """One request and what became of it."""

    number: int
    """In order of arrival, from 1."""
    operation: str
    """AWS's name for it, or "Unknown"."""
    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    """Without Authorization."""
    bytes_in: int
    """Of the body, as many as arrived."""
    status: int | None = None
    """Of the answer, also of one that was dropped; None where it did not come to one."""
    code: str = ""
    """AWS's name of the error."""
    bytes_out: int = 0
    """Of the answer's body."""
    dropped: bool = False
    """The client did not get the answer."""

    @property
    def side(self) -> Side:
        """Rules see an exchange when its request is there."""
        return "request"

    @property
    def part_number(self) -> int | None:
        number = self.query.get("partNumber", "")
        return int(number) if number.isdecimal() else None


@dataclass(frozen=True)
class Refuse:
    """An error is answered, and nothing happens."""

    code: str
    status: int | None = None
    """Default: the one that AWS sends with this code."""
    retry_after_s: int | None = None


@dataclass(frozen=True)
class FailBefore:
    """The connection breaks, and nothing happens."""


@dataclass(frozen=True)
class FailAfter:
    """It happens, and the connection breaks before the answer."""


@dataclass(frozen=True)
class Tamper:
    """It happens, and the answer is another: without a header it should have, for example."""

    change: Callable[[Response], Response]


@dataclass(frozen=True)
class Hook:
    """`call` runs before it happens, when all of the request is there: to block it, or to do something before it."""

    call: Callable[[Exchange], object]


@dataclass(frozen=True)
class Late:
    """200 is said at once, then come blanks with pauses, then it happens: AWS's way with Complete and CopyObject.

    An error is then a part of the answer's body: the one that occurs, or `error`, with which nothing happens.
    """

    blanks: int = 0
    pause_s: float = 0.0
    error: str | None = None


class Throttle:
    """SlowDown for requests beyond a rate."""

    def __init__(
        self,
        per_second: float,
        *,
        burst: int = 1,
        retry_after_s: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refusal = Refuse("SlowDown", retry_after_s=retry_after_s)
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    def admits(self) -> bool:
        """Whether one more request is within the rate, which it then uses up."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


Fault: TypeAlias = Refuse | FailBefore | FailAfter | Tamper | Hook | Slow | Late | Throttle
