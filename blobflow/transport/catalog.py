"""The artifacts of a store: keys, listing, sibling manifests."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final, NamedTuple

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    InvalidKey,
    ObjectNotFound,
    ObjectTooLarge,
    ReplacementInProgress,
)
from blobflow.stores.base import Reader, check_key
from blobflow.uploads.intent import SUFFIX as INTENT_SUFFIX, read_intent

MANIFEST_SUFFIX: Final = ".manifest.json"
DAMAGED_SUFFIX: Final = ".damaged.json"
"""Suffix of the evidence about a damaged artifact; see `blobflow.transport.healing`."""
REF_SUFFIX: Final = ".ref.json"
LEASE_SUFFIX: Final = ".lease.json"
_RESERVED_SUFFIXES: Final = (MANIFEST_SUFFIX, DAMAGED_SUFFIX, INTENT_SUFFIX, REF_SUFFIX, LEASE_SUFFIX)


class ArtifactEntry(NamedTuple):
    """An artifact in a listing."""

    key: str
    last_modified: datetime | None


def check_artifact_key(key: str) -> str:
    """`key`, if it may be the key of an artifact.

    Raises:
        InvalidKey: it breaks a rule; the message names the rule.
    """
    for suffix in _RESERVED_SUFFIXES:
        if key.endswith(suffix):
            reason = f"the ending {suffix!r} is reserved"
            raise InvalidKey(f"invalid key {key!r}: {reason}", key=key, reason=reason)
    return check_key(key)


def list_artifacts(store: Reader, prefix: str = "", *, start_after: str | None = None) -> Iterator[ArtifactEntry]:
    """The complete artifacts whose keys start with `prefix`, in key order of their manifests.

    Args:
        start_after: Only artifacts after this one.
    """
    after = start_after + MANIFEST_SUFFIX if start_after else None
    for meta in store.list(prefix, start_after=after):
        key = meta.key.removesuffix(MANIFEST_SUFFIX)
        # Not `.manifest.json` alone: an object of that name belongs to another program.
        if key != meta.key and key and not key.endswith("/"):
            yield ArtifactEntry(key, meta.last_modified)


def read_manifest_bytes(store: Reader, key: str) -> bytes:
    """The bytes of the sibling manifest; no byte of the payload is fetched.

    Raises:
        ArtifactNotFound: there is no complete artifact.
        ReplacementInProgress: the artifact is being replaced now; try again.
        ArtifactInvalid: the object is larger than a manifest may be.
    """
    check_artifact_key(key)
    if (found := find_manifest_bytes(store, key)) is not None:
        return found
    intent = read_intent(store, key)[0]
    # Again, because an upload may have published and removed its intent between the two requests.
    if (found := find_manifest_bytes(store, key)) is not None:
        return found
    if intent is not None and intent.replaces:
        raise ReplacementInProgress(f"the artifact {key!r} is being replaced", key=key)
    raise ArtifactNotFound(
        f"no artifact {key!r} in {store.url}" + (": its upload is not finished" if intent else ""), key=key
    )


def find_manifest_bytes(store: Reader, key: str) -> bytes | None:
    """The bytes of the sibling manifest; None if there is none now.

    Raises:
        ArtifactInvalid: the object is larger than a manifest may be.
    """
    try:
        return store.get(key + MANIFEST_SUFFIX, max_bytes=MAX_MANIFEST_BYTES).data
    except ObjectNotFound:
        return None
    except ObjectTooLarge as error:
        raise ArtifactInvalid(
            f"the manifest of {key!r} exceeds {MAX_MANIFEST_BYTES} bytes", key=key, what="manifest"
        ) from error


def read_manifest_file(store: Reader, key: str) -> ManifestFile:
    """The sibling manifest, parsed; no byte of the payload is fetched.

    Raises:
        ArtifactNotFound, ReplacementInProgress: see `read_manifest_bytes`.
        ArtifactInvalid: it is not a manifest.
    """
    return ManifestFile.parse(read_manifest_bytes(store, key), key)


def read_manifest(store: Reader, key: str) -> Manifest:
    """The manifest of the artifact `key`; see `read_manifest_file`."""
    return read_manifest_file(store, key).manifest
