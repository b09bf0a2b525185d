"""Refs: names such as `orders/latest` that point to an artifact and are moved in one step.

A ref refuses the artifact of a round before the newest one; see `blobflow.coordination.lease`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict

from blobflow.artifact.manifest import Sha256Digest
from blobflow.coordination.records import next_count, read_record, write_record
from blobflow.errors import (
    ArtifactNotFound,
    InvalidKey,
    LeaseLost,
    StoreUnavailable,
    TemporaryError,
    TimedOut,
    TransferBusy,
)
from blobflow.stores.base import Reader, Store, check_key
from blobflow.transport.catalog import REF_SUFFIX, read_manifest_bytes
from blobflow.untrusted import Counter, UtcTime

MAX_HISTORY: Final = 20
"""Earlier entries that a ref keeps: two nights of hourly rounds, and far below the size limit
of a record even with the longest keys."""

_REF_ATTEMPTS: Final = 20
_NO_DIGEST: Final = "sha256:" + "0" * 64
"""Digest of a fenced ref that has never named an artifact; its key is empty."""


def _named(key: str) -> str:
    """A valid key that a ref names; any writer of the bucket can write refs, and their keys are printed."""
    try:
        return check_key(key) if key else key
    except InvalidKey as error:
        raise ValueError("it is not a key") from error


RefKey: TypeAlias = Annotated[str, AfterValidator(_named)]


class RefEntry(BaseModel):
    """One entry of a ref's history."""

    model_config = ConfigDict(frozen=True)

    key: RefKey
    manifest_sha256: Sha256Digest
    generation: Counter
    write_id: str
    updated_at: UtcTime
    round_number: Counter = 0
    """Round that made the artifact; 0 if moved by hand or by an older blobflow."""


class RefState(BaseModel):
    """The present state of a ref."""

    model_config = ConfigDict(frozen=True)

    key: RefKey
    manifest_sha256: Sha256Digest
    generation: Counter
    write_id: str
    """Id of the write that moved it here."""
    updated_at: UtcTime
    round_number: Counter = 0
    """Earlier rounds can no longer move it; 0 if moved by hand only, or by an older blobflow."""
    made_by_round: Counter = 0
    """Round that moved it here; 0 if moved by hand or by an older blobflow."""
    fence_id: str = ""
    """Id of the write that raised `round_number` without a move."""
    history: tuple[RefEntry, ...] = ()
    """Earlier entries, the latest first; at most `MAX_HISTORY`."""

    def entries(self) -> list[RefEntry]:
        """The present and the earlier entries, the latest first."""
        here = RefEntry(
            key=self.key,
            manifest_sha256=self.manifest_sha256,
            generation=self.generation,
            write_id=self.write_id,
            updated_at=self.updated_at,
            round_number=self.made_by_round,
        )
        return [here, *self.history] if self.key else []


def read_ref(store: Reader, name: str) -> RefState | None:
    """The state of the ref `name`; None if there is no such ref."""
    found = read_record(store, name + REF_SUFFIX, RefState)
    return found[0] if found and found[0].key else None


def newest_round(store: Reader, name: str) -> int:
    """The number of the latest round that has moved or fenced the ref `name`; 0 if there is none."""
    found = read_record(store, name + REF_SUFFIX, RefState)
    return found[0].round_number if found else 0


def move_ref(store: Store, name: str, key: str, digest: str, *, round_number: int | None = None) -> RefState:
    """Point the ref `name` at an artifact, in one step; a ref that points there already is not moved.

    Args:
        round_number: Round that made the artifact. A ref that a later round has moved or fenced is not moved back,
            however late a process wakes up. None: moved by hand, without this check.

    Raises:
        LeaseLost: a later round has moved or fenced it; its artifact is the newer one.
        TransferBusy: other processes moved it again and again meanwhile.
    """
    write_id = uuid.uuid4().hex

    def moved(found: RefState | None) -> RefState:
        if found is not None:
            check_round(name, found, round_number)
            reached = max(found.round_number, round_number or 0)
            if (found.key, found.manifest_sha256) == (key, digest):
                if reached == found.round_number:
                    return found
                # It stays where it is, but earlier rounds must not move it any more.
                return found.model_copy(update={"round_number": reached, "fence_id": write_id})
        return RefState(
            key=key,
            manifest_sha256=digest,
            generation=next_count(found.generation, name) if found else 1,
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

    The number is the lease's generation. It is higher if the ref has already seen that generation, because the lease's
    record was removed and its count began again.

    Args:
        still_ours: Called before the number is written; it raises if the lease was lost. A process that was suspended
            since it won the lease must not shut out its successor, whose number may be lower if the lease's record was
            removed.

    Raises:
        TransferBusy: other processes moved it again and again meanwhile.
    """
    fence_id = uuid.uuid4().hex

    def fenced(found: RefState | None) -> RefState:
        # Between the read of the ref and the write that names its version: a process that was succeeded before learns
        # it here, and one that is succeeded now finds another version.
        still_ours()
        number = max(generation, next_count(found.round_number, name) if found else 1)
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


def check_round(name: str, found: RefState, round_number: int | None) -> None:
    """Return if the artifact of round `round_number` may still be published under the ref `name`.

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
    """Replace a ref by the result of `change`; if `change` returns it unchanged, nothing is written."""
    check_key(name)
    tried: RefState | None = None
    unanswered: TemporaryError | None = None
    for _ in range(_REF_ATTEMPTS):
        found = read_record(store, name + REF_SUFFIX, RefState)
        if tried is not None and found is not None:
            now = found[0]
            if write_id in {now.write_id, now.fence_id, *(entry.write_id for entry in now.history)}:
                return tried  # it was written, whatever the response was
        if unanswered is not None:
            raise unanswered
        state = change(found[0] if found else None)
        if found and state == found[0]:
            return state
        try:
            if write_record(store, name + REF_SUFFIX, state, found[1] if found else None):
                return state
        except (StoreUnavailable, TimedOut) as error:
            unanswered = error
        tried = state
    raise TransferBusy(f"other processes are moving the ref {name!r}", key=name)


def name_artifact(store: Store, ref: str, key: str, digest: str, *, round_number: int | None = None) -> RefState:
    """Point a ref at an artifact, as `move_ref` does, safely next to a `prune` that may remove the artifact.

    Raises:
        TransferBusy: it is being removed; verify it again.
        LeaseLost: as `move_ref`.
    """
    before = read_ref(store, ref)
    moved = move_ref(store, ref, key, digest, round_number=round_number)
    try:
        read_manifest_bytes(store, key)
    except ArtifactNotFound as error:
        if before is not None:
            move_ref(store, ref, before.key, before.manifest_sha256, round_number=round_number)
        raise TransferBusy(f"{key!r} is being removed at this moment", hint="try again", key=key) from error
    return moved
