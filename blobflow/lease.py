"""Leases and refs: small objects that are moved by compare-and-swap.

A lease makes a round at-most-once: its generation is the fencing token, which is checked again before anything is
published. A ref ("latest") names an artifact. Every write carries a write id, so that a writer whose answer was lost
recognises its own success when it reads the object back.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from blobflow.artifact.manifest import Sha256Digest
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    LeaseLost,
    ObjectNotFound,
    PreconditionFailed,
    TransferBusy,
    Unsupported,
)
from blobflow.owner import owner_is_gone, process_owner
from blobflow.stores.base import PutMode, Store, check_key

log = logging.getLogger(__name__)

REF_SUFFIX: Final = ".ref.json"
LEASE_SUFFIX: Final = ".lease.json"

_MAX_BYTES: Final = 64 * 1024
_REF_ATTEMPTS: Final = 20


class RefState(BaseModel):
    """Where a ref points."""

    model_config = ConfigDict(frozen=True)

    key: str
    manifest_sha256: Sha256Digest
    generation: int
    write_id: str
    updated_at: datetime


class LeaseState(BaseModel):
    """What the lease object says."""

    model_config = ConfigDict(frozen=True)

    generation: int
    owner: str
    """Empty: nobody holds it."""
    expires_at: float
    write_id: str
    cursor: JsonValue = None
    """Of the last completed round."""


def read_ref(store: Store, name: str) -> RefState | None:
    """Where the ref `name` points, or None if there is no such ref."""
    found = _read(store, name + REF_SUFFIX, RefState)
    return found[0] if found else None


def move_ref(store: Store, name: str, key: str, digest: str) -> RefState:
    """Point the ref `name` at an artifact, in one step; a ref that points there already is left alone.

    Raises:
        TransferBusy: others moved it again and again meanwhile.
    """
    check_key(name)
    for _ in range(_REF_ATTEMPTS):
        found = _read(store, name + REF_SUFFIX, RefState)
        if found and (found[0].key, found[0].manifest_sha256) == (key, digest):
            return found[0]
        state = RefState(
            key=key,
            manifest_sha256=digest,
            generation=found[0].generation + 1 if found else 1,
            write_id=uuid.uuid4().hex,
            updated_at=datetime.now(timezone.utc),
        )
        if _write(store, name + REF_SUFFIX, state, found[1] if found else None):
            return state
    raise TransferBusy(f"ref {name!r} is being moved by others", key=name)


class Lease:
    """The right to do one thing at a time under a name, for `ttl_s` seconds from its last renewal.

    Args:
        store: Must have conditional writes.
        clock: Seconds since the epoch; all holders' clocks must agree to well within `ttl_s`.

    Raises:
        Unsupported: the store has no conditional writes.
    """

    def __init__(self, store: Store, name: str, *, ttl_s: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        if not store.abilities.conditional:
            raise Unsupported(
                f"{store!r} has no conditional writes, so it cannot hold the lease {name!r}",
                hint="`blobflow probe` shows what it can do; keep the rounds in a store that has them",
                store=store.url,
                ability="conditional writes",
            )
        self._store = store
        self._key = check_key(name) + LEASE_SUFFIX
        self._name = name
        self._ttl_s = ttl_s
        self._clock = clock
        self._state: LeaseState | None = None
        self._e_tag: str | None = None

    def __repr__(self) -> str:
        held = f"held, generation {self._state.generation}" if self._state else "not held"
        return f"<Lease {self._name} {held}>"

    @property
    def generation(self) -> int:
        """The fencing token of the held lease."""
        return self._held().generation

    def try_acquire(self) -> bool:
        """Take the lease if it is free, expired, or its holder is known to be gone. False: somebody holds it."""
        found = _read(self._store, self._key, LeaseState)
        now = self._clock()
        if found and found[0].owner and now < found[0].expires_at and not owner_is_gone(found[0].owner):
            return False
        state = LeaseState(
            generation=found[0].generation + 1 if found else 1,
            owner=process_owner(),
            expires_at=now + self._ttl_s,
            write_id=uuid.uuid4().hex,
            cursor=found[0].cursor if found else None,
        )
        return self._replace(state, found[1] if found else None)

    def renewal_due(self) -> bool:
        """Whether a third of the time to live is over."""
        return self._held().expires_at - self._clock() < self._ttl_s * 2 / 3

    def renew(self) -> None:
        """Hold it for another `ttl_s` seconds.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        self._update(expires_at=self._clock() + self._ttl_s)

    def complete(self, cursor: JsonValue) -> None:
        """Record the cursor of the finished round and release the lease.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        self._update(owner="", expires_at=0.0, cursor=cursor)
        self._state = None

    def abandon(self) -> None:
        """Release the lease without a completed round, as well as it can be done: at the latest, it expires."""
        if self._state is not None:
            try:
                self._update(owner="", expires_at=0.0)
            except BlobflowError as error:
                log.info("lease.abandon_failed name=%s error=%s", self._name, error)
            self._state = None

    def _held(self) -> LeaseState:
        if self._state is None:
            raise LeaseLost(f"lease {self._name!r} is not held", name=self._name)
        return self._state

    def _update(self, **changes: Any) -> None:
        state = self._held()
        if not self._replace(state.model_copy(update={**changes, "write_id": uuid.uuid4().hex}), self._e_tag):
            self._state = None
            raise LeaseLost(
                f"lease {self._name!r} was taken over after generation {state.generation}",
                hint="another process does this round now; leave it to that one",
                name=self._name,
                generation=state.generation,
            )

    def _replace(self, state: LeaseState, e_tag: str | None) -> bool:
        written = _write(self._store, self._key, state, e_tag)
        if written:
            self._state, self._e_tag = state, written
        return bool(written)


def _read(store: Store, key: str, kind: type[Any]) -> tuple[Any, str] | None:
    try:
        data, meta = store.get(key, max_bytes=_MAX_BYTES)
    except ObjectNotFound:
        return None
    try:
        return kind.model_validate_json(data), meta.e_tag
    except ValidationError as error:
        raise ArtifactInvalid(
            f"object {key!r} is not a {kind.__name__}: {error.errors(include_url=False)[0]['msg']}",
            hint="somebody else wrote it; look at it, then remove it",
            key=key,
        ) from error


def _write(store: Store, key: str, state: BaseModel, e_tag: str | None) -> str | None:
    """Write `state` in the place of the object `e_tag` (None: of nothing); its e_tag, or None if the race is lost."""
    mode = PutMode.OVERWRITE
    if store.abilities.conditional:
        mode = PutMode.UPDATE if e_tag else PutMode.CREATE
    data = json.dumps(state.model_dump(mode="json")).encode()
    try:
        return store.put(
            key, data, mode=mode, e_tag=e_tag if mode is PutMode.UPDATE else None, content_type="application/json"
        ).e_tag
    except PreconditionFailed:
        return None
