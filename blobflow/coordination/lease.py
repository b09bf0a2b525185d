"""Leases: the right to do one thing at a time, kept in a record that is replaced by compare-and-swap.

A lease makes a round at-most-once: its generation is the fencing token. A ref ("latest"), which names an artifact,
refuses the artifact of a round before the newest one. Every write carries a write id, so that a writer whose response
was lost recognises its success when it reads the record back.

`LeaseMachine` decides and does no I/O: it is given what was read and the result of a write, and returns the next
action. `Lease` drives it on a `LeaseStore`, which keeps records and can compare-and-swap: a store with conditional
writes here, a SQL database in `blobflow.coordination.sql_lease_store`.

| state | event | action |
|---|---|---|
| not held | `acquire` | `Look` |
| looking | `seen`: another process holds it | `End(False)` |
| looking | `seen`: free, expired, or its holder is gone | `Write` the next generation |
| held | `renew`, `release` | `Write` the same generation |
| writing | `written` | `End(True)` |
| writing | `doubtful`: refused, or no response | `Look` |
| settling | `seen`: the state that was written | `End(True)` |
| settling | `seen`: an earlier write of ours; or refused, and nothing has changed | `Write` again |
| settling | `seen`: no response, and nothing has changed | `Unsettled`: held or not as before |
| settling | `seen`: anything else | `End(False)`: not held |

Clocks decide only how long others wait. A suspended holder cannot publish, whatever any clock says.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from pydantic import JsonValue

from blobflow.coordination.lease_store import Found, LeaseState, LeaseStore, ObjectLeaseStore
from blobflow.coordination.records import next_count
from blobflow.errors import BlobflowError, LeaseLost, StoreUnavailable, TemporaryError, TimedOut, TransferBusy
from blobflow.owner import owner_is_gone, process_owner
from blobflow.stores.base import Store, check_key

log = logging.getLogger(__name__)

_WRITE_ATTEMPTS: Final = 5
"""Attempts at one change that is refused although the record has not changed, as S3 does with a 409."""


class Now(NamedTuple):
    """The present time, by two clocks."""

    time_s: float
    """Unix time in seconds."""
    ticks_s: float
    """Seconds of this process's monotonic clock, which never jumps."""
    shared: bool = True
    """Whether `time_s` is the store's time, or a clock that agrees with it; otherwise it may be off by one time to
    live."""


@dataclass(frozen=True)
class Look:
    """Action: read the record."""


@dataclass(frozen=True)
class Write:
    """Action: swap the record `version` (None: no record) for `state`."""

    state: LeaseState
    version: str | None


@dataclass(frozen=True)
class End:
    """Action: stop; the change was made, or another process has the lease."""

    done: bool


@dataclass(frozen=True)
class Unsettled:
    """Action: stop; the change was not made, but no other process has the lease. Trying again later may help."""


Action: TypeAlias = Look | Write | End | Unsettled


class LeaseMachine:
    """Decides the next action of a process that holds a lease or wants it; see the table above.

    Attributes:
        held: The record by which it holds the lease.
    """

    def __init__(self, owner: str, ttl_s: float) -> None:
        self.held: Found | None = None
        self._owner = owner
        self._ttl_s = ttl_s
        self._pending: Write | None = None
        self._releasing = False
        self._refused = False
        self._attempts = 0
        self._in_doubt: set[str] = set()
        """Write ids that may have been written already, or may still arrive."""
        self._watched: tuple[str, float] | None = None
        """Another holder's record, and when it was first seen, in ticks."""

    def __repr__(self) -> str:
        if self._pending is not None:
            return f"<LeaseMachine writing generation {self._pending.state.generation}>"
        return f"<LeaseMachine holding generation {self.held.state.generation}>" if self.held else "<LeaseMachine>"

    def acquire(self, now: Now) -> Action:
        """Take the lease if possible; a process that holds it renews it."""
        self._pending = None
        return self.renew(now) if self.held else Look()

    def renew(self, now: Now) -> Action:
        """Hold it for another time to live."""
        return self._begin(self._changed(expires_at=now.time_s + self._ttl_s))

    def release(self, **changes: JsonValue) -> Action:
        """Release it; `changes` is empty, or a new cursor."""
        return self._begin(self._changed(owner="", expires_at=0.0, **changes), releasing=True)

    def seen(self, found: Found | None, now: Now, *, owner_is_gone: bool = False) -> Action:
        """Process the record that was read."""
        if self._pending is None:
            return self._claim(found, now, owner_is_gone)
        pending, version = self._pending, found.version if found else None
        if found and found.state.write_id == pending.state.write_id:
            return self.written(found.version)
        if found and found.state.write_id in self._in_doubt and (found.state.owner or self._releasing):
            return self._again(found.version)  # but a late release stays a release
        if version == pending.version:
            return self._again(version) if self._refused else self._unsettled()
        self.held = self._pending = None
        self._in_doubt.clear()
        return End(done=False)

    def written(self, version: str) -> Action:
        """Process an acknowledged write."""
        assert self._pending is not None, "nothing was to be written"
        self.held = None if self._releasing else Found(self._pending.state, version)
        self._pending = None
        # Earlier writes name versions that no longer exist, so none of them can arrive any more.
        self._in_doubt.clear()
        return End(done=True)

    def doubtful(self, *, refused: bool) -> Action:
        """Process a write that was refused, or got no response."""
        assert self._pending is not None, "nothing was to be written"
        self._refused = refused
        self._in_doubt.add(self._pending.state.write_id)
        return Look()

    def _claim(self, found: Found | None, now: Now, owner_is_gone: bool) -> Action:
        if found and found.state.owner and not owner_is_gone and not self._is_expired(found, now):
            if found.state.write_id not in self._in_doubt:
                return End(done=False)
            self.held = found  # our write, whose response was lost
            return self.renew(now)
        return self._begin(
            Write(
                LeaseState(
                    generation=next_count(found.state.generation, "lease") if found else 1,
                    owner=self._owner,
                    expires_at=now.time_s + self._ttl_s,
                    write_id=uuid.uuid4().hex,
                    cursor=found.state.cursor if found else None,
                    ttl_s=self._ttl_s,
                ),
                found.version if found else None,
            )
        )

    def _is_expired(self, found: Found, now: Now) -> bool:
        """Whether it expired by the shared clock, or was not renewed while this process watched it."""
        if self._watched is None or self._watched[0] != found.version:
            self._watched = (found.version, now.ticks_s)
        allowance_s = 0.0 if now.shared else found.state.ttl_s
        by_clock = now.time_s >= found.state.expires_at + allowance_s
        return by_clock or now.ticks_s - self._watched[1] >= found.state.ttl_s

    def _changed(self, **changes: JsonValue) -> Write:
        assert self.held is not None, "the lease is not held"
        return Write(self.held.state.model_copy(update={**changes, "write_id": uuid.uuid4().hex}), self.held.version)

    def _begin(self, write: Write, *, releasing: bool = False) -> Action:
        self._pending, self._releasing, self._refused, self._attempts = write, releasing, False, 1
        return write

    def _again(self, version: str | None) -> Action:
        assert self._pending is not None, "nothing was to be written"
        if self._attempts == _WRITE_ATTEMPTS:
            return self._unsettled()
        self._attempts += 1
        self._pending = Write(self._pending.state, version)
        return self._pending

    def _unsettled(self) -> Action:
        self._pending = None
        return Unsettled()


# The driver


class Lease:
    """The right to do one thing at a time under a name, for `ttl_s` seconds from its last renewal.

    Threads may use it at the same time. Their requests are made one after the other, because each names the version
    that the last one wrote.

    Args:
        leases: A store with conditional writes, or another `LeaseStore`.
        ttl_s: Seconds without a renewal after which others may take it over.
        clock: Unix time in seconds, instead of the store's own clock. The clocks of all holders must then agree to well
            within `ttl_s`.

    Raises:
        Unsupported: the store has no conditional writes.
    """

    def __init__(
        self,
        leases: Store | LeaseStore,
        name: str,
        *,
        ttl_s: float = 60.0,
        clock: Callable[[], float] | None = None,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = ObjectLeaseStore(leases) if isinstance(leases, Store) else leases
        self._name = check_key(name)
        self._ttl_s = ttl_s
        self._clock = clock
        self._ticks = ticks
        self._machine = LeaseMachine(process_owner(), ttl_s)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        held = self._machine.held
        return f"<Lease {self._name} {f'held, generation {held.state.generation}' if held else 'not held'}>"

    @property
    def generation(self) -> int:
        """The fencing token of the held lease."""
        return self._held().state.generation

    def try_acquire(self) -> bool:
        """Take the lease if it is free, expired, or its holder is known to be gone. False if another process holds it.

        A lease expires by the store's clock. If that is unknown, it expires one time to live later by this machine's
        clock. It also counts as expired once this object has seen it unchanged for its time to live, so a waiting
        process should ask the same object again.
        """
        with self._lock:
            return self._perform(self._machine.acquire(self._now()))

    def renewal_due(self) -> bool:
        """Whether a third of the time to live has passed."""
        return self._held().state.expires_at - self._now().time_s < self._ttl_s * 2 / 3

    def renew(self) -> None:
        """Hold it for another `ttl_s` seconds.

        Raises:
            LeaseLost: another process has taken it.
        """
        with self._lock:
            self._update(lambda: self._machine.renew(self._now()))

    def check(self) -> None:
        """Return if, as far as is known without a request, the lease is held.

        Raises:
            LeaseLost: another process has taken it.
        """
        self._held()

    @contextmanager
    def heartbeat(self, is_alive: Callable[[], bool] = lambda: True) -> Generator[None]:
        """Renew in a separate thread, every third of the time to live, until the block ends.

        A renewal that fails temporarily is tried again. One that finds the lease taken is the last; then `check` and
        `renew` raise.

        Args:
            is_alive: Called before each renewal; it should return False if the work hangs, so that others may take
                over.
        """
        over = threading.Event()

        def beat() -> None:
            wait_s = self._ttl_s / 3
            while not over.wait(wait_s):
                if not is_alive():
                    log.warning("lease.not_renewed name=%s reason=no_progress", self._name)
                    return
                try:
                    self.renew()
                    wait_s = self._ttl_s / 3
                except LeaseLost as lost:
                    log.warning("lease.lost name=%s error=%s", self._name, lost)
                    return
                except BlobflowError as error:
                    log.warning("lease.not_renewed name=%s error=%s", self._name, error)
                    wait_s = self._ttl_s / 9

        thread = threading.Thread(target=beat, name=f"blobflow-lease-{self._name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def complete(self, cursor: JsonValue) -> None:
        """Record the cursor of the finished round and release the lease.

        Raises:
            LeaseLost: another process has taken it.
        """
        with self._lock:
            self._update(lambda: self._machine.release(cursor=cursor))

    def release(self) -> None:
        """Release the lease after its work is done; `record_completion` records the result later.

        Raises:
            LeaseLost: another process has taken it.
        """
        with self._lock:
            self._update(self._machine.release)

    def abandon(self) -> None:
        """Release the lease without a completed round. Best effort; otherwise the lease expires."""
        with self._lock:
            if self._machine.held is not None:
                try:
                    self._update(self._machine.release)
                except BlobflowError as error:
                    log.info("lease.abandon_failed name=%s error=%s", self._name, error)
                self._machine.held = None

    def _now(self) -> Now:
        shared = self._clock() if self._clock else self._leases.time_s()
        return Now(time.time() if shared is None else shared, self._ticks(), shared is not None)

    def _held(self) -> Found:
        held = self._machine.held
        if held is None:
            raise LeaseLost(f"lease {self._name!r} is not held", name=self._name)
        return held

    def _update(self, begin: Callable[[], Action]) -> None:
        state = self._held().state
        if not self._perform(begin()):
            raise LeaseLost(
                f"lease {self._name!r} was taken over after generation {state.generation}",
                hint="another process does this round now; leave it to that one",
                name=self._name,
                generation=state.generation,
            )

    def _perform(self, action: Action) -> bool:
        """Perform the machine's actions until it ends; False if another process has the lease."""
        unanswered: TemporaryError | None = None
        while True:
            if isinstance(action, Look):
                found = self._leases.read(self._name)
                gone = found is not None and owner_is_gone(found.state.owner)
                action = self._machine.seen(found, self._now(), owner_is_gone=gone)
            elif isinstance(action, Write):
                try:
                    version = self._leases.swap(self._name, action.state, action.version)
                except (StoreUnavailable, TimedOut) as error:
                    unanswered = error
                    action = self._machine.doubtful(refused=False)
                else:
                    action = self._machine.written(version) if version else self._machine.doubtful(refused=True)
            elif isinstance(action, End):
                return action.done
            else:
                raise unanswered or TransferBusy(f"lease {self._name!r} cannot be written", key=self._name)


def record_completion(leases: LeaseStore, name: str, generation: int, cursor: JsonValue) -> bool:
    """Record the cursor of a round whose lease was released before its artifact was published.

    May be called again after a crash.

    Args:
        generation: Generation of the lease when it was held for the round.

    Returns:
        False if a later round has begun; then its completion is the newer one.
    """
    for _ in range(_WRITE_ATTEMPTS):
        found = leases.read(name)
        if found is None or found.state.generation != generation:
            return False
        if not found.state.owner and found.state.cursor == cursor:
            return True
        done = {"owner": "", "expires_at": 0.0, "cursor": cursor, "write_id": uuid.uuid4().hex}
        if leases.swap(name, found.state.model_copy(update=done), found.version) is not None:
            return True
    raise TransferBusy(f"lease {name!r} cannot be written", key=name)
