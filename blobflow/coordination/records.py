"""Small JSON objects that are replaced by compare-and-swap; leases and refs are kept in them."""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import BaseModel

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.errors import ArtifactInvalid, ObjectNotFound, PreconditionFailed
from blobflow.stores.base import PutMode, Reader, Store
from blobflow.untrusted import MAX_COUNT, read_model

_MAX_BYTES: Final = MAX_MANIFEST_BYTES + 64 * 1024
"""A lease records the cursor of its last round, which may be as long as a manifest has room for."""


def read_record(store: Reader, key: str, kind: type[Any]) -> tuple[Any, str] | None:
    """The record `key` and its entity tag; None if there is none.

    Raises:
        ArtifactInvalid: the object is not such a record.
    """
    try:
        data, meta = store.get(key, max_bytes=_MAX_BYTES)
    except ObjectNotFound:
        return None
    try:
        return read_model(kind, data, kind.__name__), meta.e_tag
    except ArtifactInvalid as error:
        raise ArtifactInvalid(
            f"object {key!r} is not a {kind.__name__}: {error.message}",
            hint="another program wrote it; look at it, then remove it",
            key=key,
            what="record",
        ) from error


def write_record(store: Store, key: str, state: BaseModel, e_tag: str | None) -> str | None:
    """Replace the object `e_tag` (None: no object) by `state`; returns the new e_tag, or None if the race is lost."""
    mode = PutMode.OVERWRITE
    if store.capabilities().conditional:
        mode = PutMode.UPDATE if e_tag else PutMode.CREATE
    data = json.dumps(state.model_dump(mode="json"), ensure_ascii=False).encode()
    try:
        return store.put(
            key, data, mode=mode, e_tag=e_tag if mode is PutMode.UPDATE else None, content_type="application/json"
        ).e_tag
    except PreconditionFailed:
        return None


def next_count(count: int, name: str) -> int:
    """The next generation or round.

    Raises:
        ArtifactInvalid: there is none. No real count comes that far, so another program wrote the record.
    """
    if count >= MAX_COUNT:
        raise ArtifactInvalid(
            f"the record of {name!r} is at the end of its count", hint="remove it", key=name, what="record"
        )
    return count + 1
