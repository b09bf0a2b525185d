"""Leases under every order of events: lost answers, late arrivals, skewed clocks and sleepers, beside an oracle.

The oracle knows nothing of versions, write ids or generations of the code under test: it keeps who has the lease and
until when, by the true time, and a list of what was published.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blobflow.coordination.lease import Lease
from blobflow.coordination.lease_store import Found, LeaseState, LeaseStore
from blobflow.errors import LeaseLost, StoreUnavailable, TransferBusy
from tests.clock import Clock
from tests.kit import sized

TTL_S = 60.0
ACTORS = 4
actors = st.integers(0, ACTORS - 1)
fates = st.sampled_from(["arrives", "arrives", "arrives", "answer lost", "never sent", "late", "conflict"])
"""Of a write: "late" looks unsent, and arrives before somebody else's next write; "conflict" is refused unlooked at."""


class Cell(LeaseStore):
    """A record in memory whose writes meet their fates."""

    url = "cell:"

    def __init__(self, clock: Callable[[], float]) -> None:
        self.record: Found | None = None
        self.fate = "arrives"
        self.late: list[tuple[int, LeaseState, str | None]] = []
        self.log: list[LeaseState] = []
        self.actor = -1
        """Who writes now; its life, not its place."""
        self.written_by = (-1, False)
        """Who wrote the record, and whether it arrived late."""
        self._clock = clock
        self._count = 0

    def read(self, name: str) -> Found | None:
        return self.record

    def time_s(self) -> float:
        return self._clock()

    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        fate, self.fate = self.fate, "arrives"
        if fate == "never sent":
            raise StoreUnavailable("not sent", operation="get")
        if fate == "late":
            self.late.append((self.actor, state, version))
            raise StoreUnavailable("slow", operation="get")
        if fate == "conflict":
            return None
        written = self._apply(self.actor, state, version)
        if fate == "answer lost":
            raise StoreUnavailable("lost", operation="get")
        return written

    def deliver(self) -> None:
        """What was under way arrives."""
        waiting, self.late = self.late, []
        for actor, state, version in waiting:
            if self._apply(actor, state, version):
                self.written_by = (actor, True)

    def _apply(self, actor: int, state: LeaseState, version: str | None) -> str | None:
        if version != (self.record.version if self.record else None):
            return None
        self._count += 1
        self.written_by = (actor, False)
        self.record = Found(state, f"v{self._count}")
        self.log.append(state)
        return self.record.version


@dataclass
class Belief:
    """What the oracle knows of the lease."""

    holder: int | None = None
    until: float = 0.0


class LeaseStory(RuleBasedStateMachine):
    """Four actors, one lease, one place to publish."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.cell = Cell(self.clock)
        self.truth = Belief()
        self.unsure: set[int] = set()
        """Actors whose write may still arrive, or has arrived without their knowing."""
        self.published: list[int] = []
        self.lives = list(range(ACTORS))
        """Of the actors; each new process is another life."""

    @initialize()
    def begin(self) -> None:
        self.leases = [self._lease() for _ in range(ACTORS)]

    def _lease(self) -> Lease:
        # The holder's process is alive all the time: only expiry frees the lease.
        return Lease(self.cell, "round", ttl_s=TTL_S, ticks=self.clock)

    def _believes(self, actor: int) -> bool:
        try:
            self.leases[actor].check()
        except LeaseLost:
            return False
        return True

    def _free(self) -> bool:
        return self.truth.holder is None or self.clock.now >= self.truth.until

    def _acts(self, actor: int, fate: str) -> int:
        """Its life; its next write meets `fate`."""
        self.cell.fate, self.cell.actor = fate, self.lives[actor]
        return self.lives[actor]

    @rule(seconds=st.sampled_from([1.0, 19.0, 25.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(actor=actors, fate=fates)
    def acquire(self, actor: int, fate: str) -> None:
        if self._believes(actor):
            self.renew(actor, fate)
            return
        life = self._acts(actor, fate)
        if self.unsure:
            self._vaguely(actor, self.leases[actor].try_acquire)
            return
        # A late success is recognised by who has caused it.
        free = self._free() or self.truth.holder == life
        try:
            won = self.leases[actor].try_acquire()
        except StoreUnavailable:
            assert free, "a held lease is asked for with a read alone"
            assert fate in ("never sent", "late")
            if fate == "late":
                self.unsure.add(actor)
            return
        assert won is free
        if won:
            self.truth = Belief(life, self.clock.now + TTL_S)

    @rule(actor=actors, fate=fates)
    def renew(self, actor: int, fate: str) -> None:
        if not self._believes(actor):
            with pytest.raises(LeaseLost):
                self.leases[actor].renew()
            return
        life = self._acts(actor, fate)
        if self.unsure:
            self._vaguely(actor, self.leases[actor].renew)
            return
        owns = self.truth.holder == life
        try:
            self.leases[actor].renew()
        except LeaseLost:
            assert not owns, "a false conflict"
        except StoreUnavailable:
            assert fate in ("never sent", "late")
            if fate == "late":
                self.unsure.add(actor)
        else:
            assert owns, "renewed what somebody else has taken"
            self.truth.until = self.clock.now + TTL_S

    @rule(actor=actors, fate=fates, completes=st.booleans())
    def release(self, actor: int, fate: str, completes: bool) -> None:
        if not self._believes(actor):
            self.leases[actor].abandon()
            return
        life = self._acts(actor, fate)
        if self.unsure:
            self._vaguely(actor, lambda: self.leases[actor].complete(actor))
            return
        owns = self.truth.holder == life
        try:
            if completes:
                self.leases[actor].complete({"by": actor})
            else:
                self.leases[actor].abandon()
        except LeaseLost:
            assert not owns, "a false conflict"
        except StoreUnavailable:
            assert completes
            assert fate in ("never sent", "late")
        else:
            record = self.cell.record
            if owns and fate in ("never sent", "late") and record and record.state.owner:
                self.truth.holder = -1  # given up, and only time frees it
            elif owns:
                self.truth = Belief()  # also where a second write arrived: it was tried again over an own late one
        if owns and fate == "late":
            self.unsure.add(actor)

    @rule()
    def what_was_under_way_arrives(self) -> None:
        """From here on the record itself says who has the lease, and the oracle takes its word once."""
        self.cell.deliver()
        if self.unsure:
            self.unsure.clear()
            self._take_its_word()

    @rule(actor=actors)
    def dies(self, actor: int) -> None:
        """A new process takes the place of the old one, and knows nothing."""
        self.leases[actor] = self._lease()
        self.lives[actor] = max(self.lives) + 1

    @rule(actor=actors)
    def publish(self, actor: int) -> None:
        """As a round does: a renewal first, then the fence."""
        if not self._believes(actor) or self.unsure:
            return
        lease, owns = self.leases[actor], self.truth.holder == self._acts(actor, "arrives")
        try:
            lease.renew()
        except LeaseLost:
            assert not owns
            return
        assert owns, "a sleeper would have published"
        self.truth.until = self.clock.now + TTL_S
        self.published.append(lease.generation)

    def _vaguely(self, actor: int, act: Callable[[], object]) -> None:
        """While writes are under way, nobody outside knows more than that errors are typed and the invariants hold."""
        with suppress(LeaseLost, StoreUnavailable, TransferBusy):
            act()

    def _take_its_word(self) -> None:
        record, (life, late) = self.cell.record, self.cell.written_by
        self.truth = Belief()
        if record and record.state.owner:
            knows = late or any(
                self.lives[actor] == life and self._generation(actor) == record.state.generation
                for actor in range(ACTORS)
            )
            self.truth = Belief(life if knows else -1, record.state.expires_at)

    def _generation(self, actor: int) -> int | None:
        return self.leases[actor].generation if self._believes(actor) else None

    @invariant()
    def generations_never_fall_and_belong_to_one_holder(self) -> None:
        """The fencing token: it grows by one with each acquisition, and no two actors ever hold the same."""
        generations = [state.generation for state in self.cell.log]
        assert all(later - earlier in (0, 1) for earlier, later in pairwise(generations))
        if hasattr(self, "leases"):
            held = [number for actor in range(ACTORS) if (number := self._generation(actor)) is not None]
            assert len(held) == len(set(held))

    @invariant()
    def what_is_published_goes_forward(self) -> None:
        """No round publishes after a later one."""
        assert self.published == sorted(self.published)

    @invariant()
    def the_cursor_is_the_last_completed_one(self) -> None:
        """Renewals and abandoned rounds carry it on."""
        cursor = None
        for state in self.cell.log:
            if state.cursor != cursor:
                assert state.owner == "", "only a completion changes the cursor"
                cursor = state.cursor


LeaseStory.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_leases_under_every_order_of_events = LeaseStory.TestCase


@pytest.mark.slow
class TestAtLength(LeaseStory.TestCase):
    """The same, for longer; at full size 3,000 stories."""

    settings = settings(max_examples=sized(3000, 500), stateful_step_count=60, deadline=None)
