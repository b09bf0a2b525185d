"""Checks a payload against its index as it arrives, part by part, in any order.

The index is verified before the first byte, so the whole tar is known except the members' contents. Every header,
padding and end block is compared with its expected bytes; nothing in the payload is ever interpreted. A payload can
be wrong only in contents, and those are checked against their checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from threading import Condition
from typing import Final, TypeAlias

from blobflow.artifact.tarmap import FIRST_MEMBER, TarMap
from blobflow.checksum import Buffer, sha256
from blobflow.errors import ArtifactInvalid, DigestMismatch

Place: TypeAlias = Callable[[int, int, memoryview], None]
"""`place(member, content_offset, bytes)` stores a run of a member's content."""
ReadBack: TypeAlias = Callable[[int, int, int], Iterable[Buffer]]
"""`read_back(member, content_offset, length)` returns stored content, in order."""

_WORTH_WAITING: Final = 1 << 20
"""Bytes of a run from which waiting for its turn is cheaper than reading it back; the wait blocks one worker."""
_PATIENCE_S: Final = 0.1
"""The longest wait: a neighbour that is being hashed is done by then; one on a slow network is not."""


class _Frontier:
    """A member that spans parts: hashed up to `position`; `early` has the runs stored beyond it, start -> length."""

    __slots__ = ("busy", "digest", "early", "position")

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.position = 0
        self.early: dict[int, int] = {}
        self.busy = False


class PayloadChecker:
    """Checks parts against the layout; thread-safe.

    A member inside one part is hashed from memory, before it is stored. One that spans parts is hashed along a
    frontier: the thread with the next run hashes it. A run that came too early waits a moment for its turn. If its turn
    does not come, it is read back once the frontier reaches it. A checker without `read_back` must get the parts in
    order.

    Args:
        digests: False checks everything except the SHA-256 of the contents (the caller proves them by CRC32C).
        spanning: False skips the members that span parts; another checker that sees all parts checks them.
    """

    def __init__(
        self, layout: TarMap, *, digests: bool = True, spanning: bool = True, read_back: ReadBack | None = None
    ) -> None:
        self.layout = layout
        self._index = layout.index
        self._digests = digests
        self._digests_spanning = digests and spanning
        self._read_back = read_back
        self._spanning: dict[int, _Frontier] = {}
        self._moved = Condition()
        """Guards the frontiers; notified whenever one has moved."""

    def consume(self, offset: int, data: memoryview, place: Place | None = None) -> None:
        """Check a run of payload bytes and store its contents through `place`.

        Raises:
            ArtifactInvalid: a byte outside the contents differs from the layout.
            DigestMismatch: a member's content differs from the index.
        """
        position = 0
        for span in self.layout.spans(offset, len(data)):
            piece = data[position : position + span.length]
            position += span.length
            member = span.entry - FIRST_MEMBER
            if span.content_offset < 0:
                if bytes(piece) != span.literal:
                    at, name = offset + position - span.length, self.layout.entry(span.entry)[0]
                    raise ArtifactInvalid(
                        f"the payload differs from its index at byte {at}, in the tar header or padding of {name!r}",
                        what=name,
                        offset=at,
                    )
            elif span.length == self._index.sizes[member]:
                if self._digests:
                    self._compare(member, sha256(piece))
                if place:
                    place(member, 0, piece)
            else:
                if place:
                    place(member, span.content_offset, piece)
                if self._digests_spanning:
                    self._advance(member, span.content_offset, piece)

    def recall(self, offset: int, length: int) -> None:
        """Accept a range that an earlier process stored: its spanning members are read back when their turn comes."""
        if not self._digests_spanning:
            return
        for span in self.layout.spans(offset, length):
            member = span.entry - FIRST_MEMBER
            if span.content_offset >= 0 and member >= 0 and span.length != self._index.sizes[member]:
                self._frontier(member).early[span.content_offset] = span.length

    def settle(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Finish the members that only recalled ranges completed.

        Args:
            on_tick: Called from time to time while they are read back; an exception from it stops the work.

        Raises:
            DigestMismatch: a member's content differs from the index.
            ArtifactInvalid: a member is not complete.
        """
        if not self._digests_spanning:
            return
        for member, frontier in sorted(self._spanning.items()):
            self._drain(member, frontier, b"", on_tick)
            if frontier.position != (size := self._index.sizes[member]):
                name = self._index.paths[member]
                raise ArtifactInvalid(f"member {name!r} has {frontier.position} of {size} bytes", what=name)

    def _frontier(self, member: int) -> _Frontier:
        with self._moved:
            return self._spanning.setdefault(member, _Frontier())

    def _advance(self, member: int, offset: int, piece: memoryview) -> None:
        frontier = self._frontier(member)
        with self._moved:
            patience_s = _PATIENCE_S if len(piece) >= _WORTH_WAITING and self._read_back else 0.0
            at_hand = self._moved.wait_for(lambda: not frontier.busy and offset == frontier.position, patience_s)
            if not at_hand:
                frontier.early[offset] = len(piece)
                if frontier.busy or frontier.position not in frontier.early:
                    return
            frontier.busy = True
        self._drain(member, frontier, piece if at_hand else b"")

    def _drain(
        self, member: int, frontier: _Frontier, at_hand: Buffer, on_tick: Callable[[], None] = lambda: None
    ) -> None:
        """Hash `at_hand`, then every stored run that follows; only the thread that owns `frontier.busy` may call it."""
        frontier.digest.update(at_hand)
        position = frontier.position + len(at_hand)
        while True:
            with self._moved:
                frontier.position = position
                length = frontier.early.pop(position, None)
                if length is None:
                    frontier.busy = False
                    self._moved.notify_all()
                    break
            if self._read_back is None:
                raise AssertionError("a checker without read_back was given parts out of order")
            for chunk in self._read_back(member, position, length):
                frontier.digest.update(chunk)
                on_tick()
            position += length
        if position == self._index.sizes[member]:
            self._compare(member, frontier.digest.digest())

    def _compare(self, member: int, actual: bytes) -> None:
        expected = self._index.sha256_of(member)
        if actual != expected:
            path = self._index.paths[member]
            raise DigestMismatch(
                f"member {path!r} has SHA-256 {actual.hex()}, the index says {expected.hex()}",
                what=path,
                expected=expected.hex(),
                actual=actual.hex(),
                member=member,
            )
