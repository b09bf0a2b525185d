"""Leases and refs: small records that are moved by compare-and-swap.

A lease makes a round at-most-once: its generation is the fencing token, and a ref ("latest"), which names an artifact,
refuses what a round before the newest one brings. Every write carries a write id, so that a writer whose answer was
lost recognises its own success when it reads the record back.

`LeaseMachine` decides and does no I/O: it is told what was read and what came of a write, and answers with what is to
be done next. `Lease` drives it on whatever keeps records and can compare-and-swap (`Leases`): a store with conditional
writes here, a SQL database in `blobflow.lease_sql`.

| state | event | action |
|---|---|---|
| not held | `acquire` | `Look` |
| looking | `seen`: somebody holds it | `End(False)` |
| looking | `seen`: free, expired, or its holder is gone | `Write` the next generation |
| held | `renew`, `release` | `Write` the same generation |
| writing | `written` | `End(True)` |
| writing | `doubtful`: refused, or no answer | `Look` |
| settling | `seen`: what was written | `End(True)` |
| settling | `seen`: an earlier write of ours; or refused, and nothing has changed | `Write` again |
| settling | `seen`: no answer, and nothing has changed | `Unsettled`: held or not as before |
| settling | `seen`: anything else | `End(False)`: not held |

Clocks decide only how long others wait. That a holder who slept publishes nothing does not depend on them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue
from typing_extensions import override

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import Sha256Digest
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    InvalidKey,
    LeaseLost,
    ObjectNotFound,
    PreconditionFailed,
    StoreUnavailable,
    TemporaryError,
    TimedOut,
    TransferBusy,
    Unsupported,
    setting,
)
from blobflow.owner import owner_is_gone, process_owner
from blobflow.stores.base import PutMode, Store, check_key
from blobflow.untrusted import MAX_COUNT, Counter, Seconds, Timestamp, UtcTime, read_model

log = logging.getLogger(__name__)

REF_SUFFIX: Final = ".ref.json"
LEASE_SUFFIX: Final = ".lease.json"

MAX_HISTORY: Final = 20
"""Earlier places a ref remembers: two nights of hourly rounds, and far below `_MAX_BYTES` with the longest keys."""

_MAX_BYTES: Final = MAX_MANIFEST_BYTES + 64 * 1024
"""A lease remembers the cursor of its last round, which may be as long as a manifest has room for."""
_REF_ATTEMPTS: Final = 20
_WRITE_ATTEMPTS: Final = 5
"""Of one change of a lease that is refused although nobody has changed it, as S3 does with a 409."""
_NO_DIGEST: Final = "sha256:" + "0" * 64
"""Of a ref that is fenced and has never named anything; its key is empty."""


# Refs


def _named(key: str) -> str:
    """The key that a ref names; anybody who writes to the bucket writes refs, and what they name is printed."""
    try:
        return check_key(key) if key else key
    except InvalidKey as error:
        raise ValueError("it is not a key") from error


RefKey: TypeAlias = Annotated[str, AfterValidator(_named)]


class RefEntry(BaseModel):
    """Where a ref pointed once."""

    model_config = ConfigDict(frozen=True)

    key: RefKey
    manifest_sha256: Sha256Digest
    generation: Counter
    write_id: str
    updated_at: UtcTime
    round_number: Counter = 0
    """Of the round that made what it names; 0: moved by hand, or by an older blobflow."""


class RefState(BaseModel):
    """Where a ref points."""

    model_config = ConfigDict(frozen=True)

    key: RefKey
    manifest_sha256: Sha256Digest
    generation: Counter
    write_id: str
    """Of the move to here."""
    updated_at: UtcTime
    round_number: Counter = 0
    """Rounds before this one move it no more; 0: moved by hand only, or by an older blobflow."""
    made_by_round: Counter = 0
    """Of the round that moved it here; 0: moved by hand, or by an older blobflow."""
    fence_id: str = ""
    """Of the write that raised `round_number` without a move."""
    history: tuple[RefEntry, ...] = ()
    """Where it pointed before, the latest first; at most `MAX_HISTORY`."""

    def entries(self) -> list[RefEntry]:
        """Where it points and where it pointed before, the latest first."""
        here = RefEntry(
            key=self.key,
            manifest_sha256=self.manifest_sha256,
            generation=self.generation,
            write_id=self.write_id,
            updated_at=self.updated_at,
            round_number=self.made_by_round,
        )
        return [here, *self.history] if self.key else []


def read_ref(store: Store, name: str) -> RefState | None:
    """Where the ref `name` points, or None if there is no such ref."""
    found = _read(store, name + REF_SUFFIX, RefState)
    return found[0] if found and found[0].key else None


def newest_round(store: Store, name: str) -> int:
    """The number of the latest round that has moved or fenced the ref `name`; 0 if none has."""
    found = _read(store, name + REF_SUFFIX, RefState)
    return found[0].round_number if found else 0


def move_ref(store: Store, name: str, key: str, digest: str, *, round_number: int | None = None) -> RefState:
    """Point the ref `name` at an artifact, in one step; a ref that points there already is not moved.

    Args:
        round_number: Of the round that made the artifact: a ref that a later round has moved or fenced is not moved
            back, however late a process wakes up. None: moved by hand, whatever it names.

    Raises:
        LeaseLost: a later round has moved or fenced it; its artifact is the newer one.
        TransferBusy: others moved it again and again meanwhile.
    """
    write_id = uuid.uuid4().hex

    def moved(found: RefState | None) -> RefState:
        if found is not None:
            check_round(name, found, round_number)
            reached = max(found.round_number, round_number or 0)
            if (found.key, found.manifest_sha256) == (key, digest):
                if reached == found.round_number:
                    return found
                # It stays where it is, but rounds before this one must not move it any more.
                return found.model_copy(update={"round_number": reached, "fence_id": write_id})
        return RefState(
            key=key,
            manifest_sha256=digest,
            generation=_after(found.generation, name) if found else 1,
            write_id=write_id,
            updated_at=datetime.now(timezone.utc),
            round_number=max(found.round_number if found else 0, round_number or 0),
            made_by_round=round_number or 0,
            fence_id=found.fence_id if found else "",
            history=tuple(found.entries()[:MAX_HISTORY]) if found else (),
        )

    return _change_ref(store, name, write_id, moved)


def fence_ref(store: Store, name: str, generation: int, *, still_ours: Callable[[], None] = lambda: None) -> int:
    """Keep all earlier rounds from moving the ref `name` from now on; returns the number of this round.

    It is the lease's generation, unless the ref has seen that number, because somebody removed the lease's record and
    its count began again.

    Args:
        still_ours: Asked before the number is written, and raises if the lease was lost: a process that stood still
            since it won the lease must not shut its successor out, whose number may be the lower one if somebody
            removed the lease's record.

    Raises:
        TransferBusy: others moved it again and again meanwhile.
    """
    fence_id = uuid.uuid4().hex

    def fenced(found: RefState | None) -> RefState:
        # Between the look at the ref and the write that names its version: who was succeeded before is told here, and
        # who is succeeded now finds another version.
        still_ours()
        number = max(generation, _after(found.round_number, name) if found else 1)
        if found is not None:
            return found.model_copy(update={"round_number": number, "fence_id": fence_id})
        return RefState(
            key="",
            manifest_sha256=_NO_DIGEST,
            generation=0,
            write_id="",
            updated_at=datetime.now(timezone.utc),
            round_number=number,
            fence_id=fence_id,
        )

    return _change_ref(store, name, fence_id, fenced).round_number


def _after(count: int, name: str) -> int:
    """The next generation or round.

    Raises:
        ArtifactInvalid: there is none: nobody has come that far, so somebody else wrote the record.
    """
    if count >= MAX_COUNT:
        raise ArtifactInvalid(f"the record of {name!r} is at the end of its count", hint="remove it", key=name)
    return count + 1


def check_round(name: str, found: RefState, round_number: int | None) -> None:
    """Return if what round `round_number` made may still be published under the ref `name`.

    Raises:
        LeaseLost: a later round has moved or fenced the ref.
    """
    if round_number is not None and round_number < found.round_number:
        raise LeaseLost(
            f"ref {name!r} belongs to round {found.round_number}, and this is round {round_number}",
            hint="a newer snapshot is published, or about to be; leave it to that one",
            name=name,
            generation=round_number,
        )


def _change_ref(store: Store, name: str, write_id: str, change: Callable[[RefState | None], RefState]) -> RefState:
    """Replace a ref by what `change` makes of it; one that it gives back as it is stays untouched."""
    check_key(name)
    tried: RefState | None = None
    unanswered: TemporaryError | None = None
    for _ in range(_REF_ATTEMPTS):
        found = _read(store, name + REF_SUFFIX, RefState)
        if tried is not None and found is not None:
            now = found[0]
            if write_id in {now.write_id, now.fence_id, *(entry.write_id for entry in now.history)}:
                return tried  # it arrived, whatever its answer was, or would have been
        if unanswered is not None:
            raise unanswered
        state = change(found[0] if found else None)
        if found and state == found[0]:
            return state
        try:
            if _write(store, name + REF_SUFFIX, state, found[1] if found else None):
                return state
        except (StoreUnavailable, TimedOut) as error:
            unanswered = error
        tried = state
    raise TransferBusy(f"ref {name!r} is being moved by others", key=name)


# The lease: what is kept, and where


class LeaseState(BaseModel):
    """What the record of a lease says."""

    model_config = ConfigDict(frozen=True)

    generation: Counter
    owner: str
    """Empty: nobody holds it."""
    expires_at: Timestamp
    """Seconds since the epoch, by the clock of who keeps the record where that one tells the time."""
    write_id: str
    cursor: JsonValue = None
    """Of the last completed round."""
    ttl_s: Seconds = 60.0
    """A holder that lives writes a new record at least that often."""


class Found(NamedTuple):
    """A record, and the version that a swap has to name."""

    state: LeaseState
    version: str


class Leases(ABC):
    """Keeps the records of leases by name, and replaces them by compare-and-swap between processes."""

    url: str
    """For people; never with credentials."""

    @abstractmethod
    def read(self, name: str) -> Found | None:
        """The record, or None if there is none."""

    @abstractmethod
    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        """Write `state` in the place of the record `version` (None: of nothing).

        Returns:
            The version of what was written; None if something else was there.

        Raises:
            StoreUnavailable, TimedOut: it may have been written or not.
        """

    @abstractmethod
    def time_s(self) -> float | None:
        """Seconds since the epoch by the keeper's own clock, which all holders share; None if it does not tell."""

    def close(self) -> None:
        """Release connections."""


class StoreLeases(Leases):
    """Leases as objects `<name>.lease.json` of a store with conditional writes.

    Raises:
        Unsupported: the store has no conditional writes.
    """

    def __init__(self, store: Store) -> None:
        if not store.abilities.conditional:
            raise Unsupported(
                f"{store!r} has no conditional writes, so it cannot hold a lease",
                hint=f"`blobflow probe` shows what it can do; keep the leases in a SQL database ({setting('leases')}),"
                " or the rounds in a store that has them",
                store=store.url,
                ability="conditional writes",
            )
        self.url = store.url
        self._store = store

    @override
    def read(self, name: str) -> Found | None:
        found = _read(self._store, name + LEASE_SUFFIX, LeaseState)
        return Found(*found) if found else None

    @override
    def swap(self, name: str, state: LeaseState, version: str | None) -> str | None:
        return _write(self._store, name + LEASE_SUFFIX, state, version)

    @override
    def time_s(self) -> float | None:
        return self._store.server_time_s()


# The machine


class Now(NamedTuple):
    """What time it is."""

    time_s: float
    """Seconds since the epoch."""
    ticks_s: float
    """Seconds that never jump, of this process alone."""
    shared: bool = True
    """`time_s` is the keeper's, or a clock that agrees with it; otherwise it may be wrong by one time to live."""


@dataclass(frozen=True)
class Look:
    """Read the record."""


@dataclass(frozen=True)
class Write:
    """Swap the record `version` (None: nothing) for `state`."""

    state: LeaseState
    version: str | None


@dataclass(frozen=True)
class End:
    """Nothing more to do: it was done, or somebody else has the lease."""

    done: bool


@dataclass(frozen=True)
class Unsettled:
    """It was not done, and nobody has the lease instead; trying again later may help."""


Action: TypeAlias = Look | Write | End | Unsettled


class LeaseMachine:
    """What the holder of a lease, or who wants to be it, does next; see the table above.

    Attributes:
        held: The record that it holds the lease by.
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
        """Write ids that may be there already, or still arrive."""
        self._watched: tuple[str, float] | None = None
        """Somebody else's record, and when it was first seen, in ticks."""

    def __repr__(self) -> str:
        if self._pending is not None:
            return f"<LeaseMachine writing generation {self._pending.state.generation}>"
        return f"<LeaseMachine holding generation {self.held.state.generation}>" if self.held else "<LeaseMachine>"

    def acquire(self, now: Now) -> Action:
        """Take the lease if it can be had; who has it already renews it."""
        self._pending = None
        return self.renew(now) if self.held else Look()

    def renew(self, now: Now) -> Action:
        """Hold it for another time to live."""
        return self._begin(self._changed(expires_at=now.time_s + self._ttl_s))

    def release(self, **changes: JsonValue) -> Action:
        """Give it back; `changes` is empty, or a new cursor."""
        return self._begin(self._changed(owner="", expires_at=0.0, **changes), releasing=True)

    def seen(self, found: Found | None, now: Now, *, owner_is_gone: bool = False) -> Action:
        """The record was read."""
        if self._pending is None:
            return self._claim(found, now, owner_is_gone)
        pending, version = self._pending, found.version if found else None
        if found and found.state.write_id == pending.state.write_id:
            return self.written(found.version)
        if found and found.state.write_id in self._in_doubt and (found.state.owner or self._releasing):
            return self._again(found.version)  # but what was released late stays released
        if version == pending.version:
            return self._again(version) if self._refused else self._unsettled()
        self.held = self._pending = None
        self._in_doubt.clear()
        return End(done=False)

    def written(self, version: str) -> Action:
        """The write was acknowledged."""
        assert self._pending is not None, "nothing was to be written"
        self.held = None if self._releasing else Found(self._pending.state, version)
        self._pending = None
        # Writes that were sent earlier name versions that are gone for good: none of them can arrive any more.
        self._in_doubt.clear()
        return End(done=True)

    def doubtful(self, *, refused: bool) -> Action:
        """The write was refused, or got no answer."""
        assert self._pending is not None, "nothing was to be written"
        self._refused = refused
        self._in_doubt.add(self._pending.state.write_id)
        return Look()

    def _claim(self, found: Found | None, now: Now, owner_is_gone: bool) -> Action:
        if found and found.state.owner and not owner_is_gone and not self._is_expired(found, now):
            if found.state.write_id not in self._in_doubt:
                return End(done=False)
            self.held = found  # our own, whose answer was lost
            return self.renew(now)
        return self._begin(
            Write(
                LeaseState(
                    generation=_after(found.state.generation, "lease") if found else 1,
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
        """By the shared clock, or because it was not renewed while this process watched, whatever any clock says."""
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

    Threads may use it at the same time; their requests go one after the other, because each names the version that
    the one before has written.

    Args:
        leases: A store with conditional writes, or whatever else keeps leases.
        ttl_s: Seconds without a renewal after which others may take it over.
        clock: Seconds since the epoch, instead of the keeper's own clock; all holders' clocks must then agree to well
            within `ttl_s`.

    Raises:
        Unsupported: the store has no conditional writes.
    """

    def __init__(
        self,
        leases: Store | Leases,
        name: str,
        *,
        ttl_s: float = 60.0,
        clock: Callable[[], float] | None = None,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = StoreLeases(leases) if isinstance(leases, Store) else leases
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
        """Take the lease if it is free, expired, or its holder is known to be gone. False: somebody holds it.

        A lease counts as expired by the keeper's clock. Where that is unknown, it does one more time to live later by
        this machine's clock; and always once this object has seen it unchanged for its time to live, so who waits
        should ask the same object again.
        """
        with self._lock:
            return self._perform(self._machine.acquire(self._now()))

    def renewal_due(self) -> bool:
        """Whether a third of the time to live is over."""
        return self._held().state.expires_at - self._now().time_s < self._ttl_s * 2 / 3

    def renew(self) -> None:
        """Hold it for another `ttl_s` seconds.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        with self._lock:
            self._update(lambda: self._machine.renew(self._now()))

    def check(self) -> None:
        """Return if, for all that is known without asking, the lease is held.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        self._held()

    @contextmanager
    def heartbeat(self, is_alive: Callable[[], bool] = lambda: True) -> Generator[None]:
        """Renew in a thread of its own, every third of the time to live, until the block ends.

        A renewal that fails for a passing reason is tried again; one that finds the lease taken is the last, and then
        `check` and `renew` raise.

        Args:
            is_alive: Asked before each renewal; whoever hangs for good should say no, so that others may take over.
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
            LeaseLost: somebody else has taken it.
        """
        with self._lock:
            self._update(lambda: self._machine.release(cursor=cursor))

    def release(self) -> None:
        """Give the lease back: the work that it is for is done, and `record_completion` tells what came of it.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        with self._lock:
            self._update(self._machine.release)

    def abandon(self) -> None:
        """Release the lease without a completed round, as well as it can be done: at the latest, it expires."""
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
        """Do what the machine says until it is at its end; False: somebody else has the lease."""
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


def record_completion(leases: Leases, name: str, generation: int, cursor: JsonValue) -> bool:
    """Record the cursor of a round whose lease was released before what it made was published.

    May be called again after a crash.

    Args:
        generation: Of the lease when it was held for the round.

    Returns:
        False: a later round has begun, and its completion is the newer one.
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


# Objects


def _read(store: Store, key: str, kind: type[Any]) -> tuple[Any, str] | None:
    try:
        data, meta = store.get(key, max_bytes=_MAX_BYTES)
    except ObjectNotFound:
        return None
    try:
        return read_model(kind, data, kind.__name__), meta.e_tag
    except ArtifactInvalid as error:
        raise ArtifactInvalid(
            f"object {key!r} is not a {kind.__name__}: {error.message}",
            hint="somebody else wrote it; look at it, then remove it",
            key=key,
        ) from error


def _write(store: Store, key: str, state: BaseModel, e_tag: str | None) -> str | None:
    """Write `state` in the place of the object `e_tag` (None: of nothing); its e_tag, or None if the race is lost."""
    mode = PutMode.OVERWRITE
    if store.abilities.conditional:
        mode = PutMode.UPDATE if e_tag else PutMode.CREATE
    data = json.dumps(state.model_dump(mode="json"), ensure_ascii=False).encode()
    try:
        return store.put(
            key, data, mode=mode, e_tag=e_tag if mode is PutMode.UPDATE else None, content_type="application/json"
        ).e_tag
    except PreconditionFailed:
        return None
