"""Rounds that publish under one ref, in every order: sleepers, lost answers, removed leases; beside an oracle.

The oracle knows nothing of leases, generations or entity tags: it keeps who took the round last, whose turn to publish
was opened last, and the list of what was published.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from typing_extensions import override

from blobflow.checksum import Buffer
from blobflow.coordination.lease import Lease
from blobflow.coordination.refs import MAX_HISTORY, fence_ref, move_ref, read_ref
from blobflow.errors import LeaseLost, ObjectNotFound, PreconditionFailed, StoreUnavailable
from blobflow.stores.base import Body, Capabilities, ObjectMeta, PutMode, Store, StoredObject
from tests.clock import Clock
from tests.kit import sized

TTL_S = 60.0
ACTORS = 2
DIGEST = f"sha256:{0:064x}"
actors = st.integers(0, ACTORS - 1)
fates = st.sampled_from(["arrives", "arrives", "answer lost", "never sent"])


class Shelf(Store):
    """Objects in memory, as far as leases and refs need them; the next write meets its fate."""

    url = "shelf:"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.fate = "arrives"
        self._numbers = count()

    @override
    def capabilities(self) -> Capabilities:
        return Capabilities()

    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        if key not in self.objects:
            raise ObjectNotFound(key, key=key)
        data, e_tag = self.objects[key]
        return StoredObject(data, ObjectMeta(key, len(data), e_tag))

    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        content_type: str = "",
        private: bool = False,
    ) -> ObjectMeta:
        fate, self.fate = self.fate, "arrives"
        if fate == "never sent":
            raise StoreUnavailable("not sent", operation="get")
        there = self.objects.get(key)
        if (there is not None) if mode is PutMode.CREATE else (there is None or there[1] != e_tag):
            raise PreconditionFailed(key, key=key)
        assert isinstance(body, bytes)
        self.objects[key] = body, str(next(self._numbers))
        if fate == "answer lost":
            raise StoreUnavailable("lost", operation="get")
        return ObjectMeta(key, len(body), self.objects[key][1])


Shelf.__abstractmethods__ = frozenset[str]()  # the rest is not called


@dataclass
class Actor:
    """A process, and how far its round is."""

    lease: Lease
    round: int = -1
    """The oracle's count of rounds that were taken."""
    number: int | None = None
    """Of its round, once its turn was opened."""


class RoundStory(RuleBasedStateMachine):
    """Two actors that want to publish; who dies is followed by another."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.shelf = Shelf()  # pyright: ignore[reportAbstractUsage]
        self.keys = count()
        self.actors = [self._actor() for _ in range(ACTORS)]
        self.taken = -1
        self.opened = -1
        """The round whose turn was opened last."""
        self.tidied = -1
        """The last round whose lease was removed under its holder, which loses it."""
        self.numbers: list[int] = []
        self.published: list[str] = []

    def _actor(self) -> Actor:
        return Actor(Lease(self.shelf, "orders/round", ttl_s=TTL_S, clock=self.clock, ticks=self.clock))

    def _holds(self, actor: Actor) -> bool:
        """As it believes itself."""
        try:
            actor.lease.check()
        except LeaseLost:
            return False
        return True

    @rule(which=actors, after_s=st.sampled_from([0.0, TTL_S]), sleeps=st.booleans(), fate=fates)
    def take_the_round(self, which: int, after_s: float, sleeps: bool, fate: str) -> None:
        """After so many seconds in which nobody renews anything; it may fall asleep before its turn is open."""
        self.clock.now += after_s
        actor = self.actors[which]
        if not self._holds(actor) and actor.lease.try_acquire():
            self.taken += 1
            actor.round, actor.number = self.taken, None
            if not sleeps:
                self.open_its_turn(which, fate)

    @rule(which=actors, fate=fates)
    def open_its_turn(self, which: int, fate: str) -> None:
        """However long it has slept since it took the round."""
        actor = self.actors[which]
        if actor.number is not None or not self._holds(actor):
            return
        self.shelf.fate = fate
        try:
            number = fence_ref(self.shelf, "orders/latest", actor.lease.generation, still_ours=actor.lease.renew)
        except LeaseLost:
            assert actor.round < self.taken or actor.round <= self.tidied, "a false conflict"
            return
        except StoreUnavailable:
            assert fate == "never sent" or actor.round < self.taken
            return
        finally:
            self.shelf.fate = "arrives"
        assert actor.round > self.opened, "a sleeper has closed its successor's turn"
        assert not self.numbers or number > self.numbers[-1], "two rounds with one number, or a later one with a lower"
        self.numbers.append(number)
        self.opened, actor.number = actor.round, number

    @rule(which=actors, fate=fates)
    def publish(self, which: int, fate: str) -> None:
        """Without a look at its lease: the worst that a sleeper can do."""
        actor = self.actors[which]
        if actor.number is None:
            return
        key = f"orders/{next(self.keys)}"
        self.shelf.fate = fate
        try:
            moved = move_ref(self.shelf, "orders/latest", key, DIGEST, round_number=actor.number)
        except LeaseLost:
            assert actor.round < self.opened, "a false conflict"
            actor.number = None
            return
        except StoreUnavailable:
            assert fate == "never sent"
            return
        finally:
            self.shelf.fate = "arrives"
        assert actor.round == self.opened, "a sleeper has published"
        assert moved.key == key
        self.published.append(key)

    @rule(which=actors)
    def end_its_round(self, which: int) -> None:
        self.actors[which].lease.abandon()
        self.actors[which].number = None

    @rule()
    def publish_by_hand(self) -> None:
        self.published.append(f"orders/{next(self.keys)}")
        move_ref(self.shelf, "orders/latest", self.published[-1], DIGEST)

    @rule(which=actors)
    def dies(self, which: int) -> None:
        self.actors[which] = self._actor()

    @precondition(lambda self: "orders/round.lease.json" in self.shelf.objects)
    @rule()
    def somebody_tidies_the_lease_away(self) -> None:
        """Its count begins again; that of the ref goes on."""
        del self.shelf.objects["orders/round.lease.json"]
        self.tidied = self.taken

    @invariant()
    def the_ref_shows_what_was_published_last(self) -> None:
        found = read_ref(self.shelf, "orders/latest")
        entries = [entry.key for entry in found.entries()] if found else []
        assert entries == self.published[::-1][: MAX_HISTORY + 1]


@pytest.mark.seed("W1.7")
def test_rounds_in_every_order_publish_in_theirs():
    """Whoever sleeps, dies or is not answered: no round publishes after a later one has begun, and none twice."""
    run_state_machine_as_test(RoundStory, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.seed("W1.7")
def test_ten_thousand_stories_of_rounds():
    """The same, 10,000 times at full size."""
    examples = sized(10_000, 1_000)
    run_state_machine_as_test(
        RoundStory, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None)
    )
