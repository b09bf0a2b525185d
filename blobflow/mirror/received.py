"""A receiver's directory as a store, so that everything that reads artifacts can read pushed snapshots.

| key | is |
|---|---|
| `<database>/<stem>` | the payload of a complete snapshot that is an artifact |
| `<database>/<stem>.manifest.json` | its manifest, which is the beginning of the payload |
| `<database>/latest.ref.json` | a ref to the artifact with the greatest position |
| `<database>/<source>/latest.ref.json` | a ref to the artifact of one source with the greatest position |

The stem is that of the receiver's files, so keys sort by position. The store is trusted no more than any other: a
reader compares each member with its digest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any, Final, NamedTuple

from pydantic import JsonValue
from typing_extensions import override

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import FILE_MODE, MANIFEST_NAME, artifact_digest
from blobflow.artifact.tarmap import header
from blobflow.coordination.refs import MAX_HISTORY, RefEntry, RefState
from blobflow.errors import NotFoundError, ObjectNotFound, ObjectTooLarge
from blobflow.mirror.envelope import SnapshotId
from blobflow.mirror.machine import Following
from blobflow.mirror.receiver import Received, follow_received, read_received, remove_received
from blobflow.stores.base import Capabilities, ObjectMeta, Reader, StoredObject, check_key
from blobflow.stores.local.store import LocalStore
from blobflow.transport.catalog import MANIFEST_SUFFIX, REF_SUFFIX

LATEST: Final = "latest"

_HEADER: Final = 512
_SIZE_FIELD: Final = slice(124, 135)
"""Size field of a tar header (docs/format.md): eleven octal digits."""


class _Offered(NamedTuple):
    """A received artifact as the store shows it."""

    key: str
    received: Received
    payload: ObjectMeta
    manifest_bytes: bytes


class ReceivedStore(Reader):
    """The complete artifacts in a receiver's directory, for reading only. The receiver may be running.

    Args:
        data_dir: The receiver's directory.
        database: Show only the snapshots of this database.
        shown_as: The name that stands for `database` in keys.

    Raises:
        NotFoundError: there is no such directory.
    """

    def __init__(
        self, data_dir: str | os.PathLike[str], *, database: str | None = None, shown_as: str | None = None
    ) -> None:
        if not os.path.isdir(data_dir):
            raise NotFoundError(f"there is no directory {data_dir}", path=str(data_dir))
        self._data_dir = os.path.abspath(data_dir)
        self._database = database
        self._shown_as = shown_as if database else None
        self._files = LocalStore(os.path.join(self._data_dir, "recv_snapshots"))
        self._paths: dict[str, str] = {}
        """Where the payloads are, by key; a complete snapshot never changes, it may only be gone."""
        self.url = f"received:{self._data_dir}"

    def snapshot(self, key: str) -> SnapshotId:
        """The id of the snapshot under `key`.

        Raises:
            ObjectNotFound: there is no such artifact.
        """
        return self._offered(key).received.id

    def follow(self, key: str, cursor: JsonValue) -> JsonValue:
        """Record durably that the artifact under `key` was imported: the snapshot is `Following` from now on.

        Args:
            cursor: Position of the mirror; by default that of the snapshot.

        Returns:
            The recorded cursor.
        """
        received = self._offered(key).received
        status = Following(received.id.position if cursor is None else cursor)
        if received.status != status:
            follow_received(self._data_dir, received.id, status.cursor)
        return status.cursor

    def prune(self, key: str, keep: int) -> list[SnapshotId]:
        """Remove artifacts of the same source and database that are older than the one under `key`.

        Args:
            keep: How many stay, including the one under `key`.
        """
        named = self._offered(key).received.id
        older = [
            each.received.id
            for each in self._all()
            if each.received.id[:2] == named[:2] and each.received.id.position < named.position
        ]
        gone = older[: max(0, len(older) + 1 - keep)]
        for snapshot in gone:
            remove_received(self._data_dir, snapshot)
        return gone

    # Reading

    @override
    def capabilities(self) -> Capabilities:
        return Capabilities(multipart=False, conditional=False)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        data, meta = self._small(check_key(key))
        if len(data) > max_bytes:
            raise ObjectTooLarge(f"object {key!r} exceeds {max_bytes} bytes", key=key, limit=max_bytes)
        return StoredObject(data, meta)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        path = self._paths.get(key) or self._path(self._offered(check_key(key)))
        self._files.get_range_into(path, offset, buffer, e_tag=e_tag)

    @override
    def head(self, key: str) -> ObjectMeta:
        if key.endswith((MANIFEST_SUFFIX, REF_SUFFIX)):
            return self._small(check_key(key)).meta
        return self._offered(check_key(key)).payload

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        found = [meta for each in self._all() for meta in (each.payload, _manifest(each).meta)]
        for meta in sorted(found, key=lambda meta: meta.key.encode()):
            if meta.key.startswith(prefix) and (start_after is None or meta.key.encode() > start_after.encode()):
                yield meta

    def _small(self, key: str) -> StoredObject:
        if key.endswith(MANIFEST_SUFFIX):
            return _manifest(self._offered(key.removesuffix(MANIFEST_SUFFIX)))
        name, slash, last = key.removesuffix(REF_SUFFIX).rpartition("/")
        if key.endswith(REF_SUFFIX) and slash and last == LATEST:
            database, _, source = name.partition("/")
            entries = [each for each in self._all(database) if source in ("", each.received.id.source)]
            if entries:
                return _latest(key, sorted(entries, key=lambda each: each.received.id.position))
        raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key)

    def _offered(self, key: str) -> _Offered:
        name = key.partition("/")[0]
        for each in self._all(name):
            if each.key == key:
                self._paths[key] = self._path(each)
                return each
        raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key)

    def _all(self, name: str | None = None) -> Iterator[_Offered]:
        """The complete artifacts, by database and position; those whose keys begin with `name`, if it is given."""
        for received in read_received(self._data_dir):
            database = received.id.database
            shown = self._shown_as or database
            if self._database not in (None, database) or name not in (None, shown):
                continue
            try:
                offered = self._look(f"{shown}/{received.path.stem}", received)
            except ObjectNotFound:  # it was removed at this moment
                continue
            if offered is not None:
                yield offered

    def _look(self, key: str, received: Received) -> _Offered | None:
        """The artifact in a snapshot, or None: it is one if it begins with the manifest that has its digest."""
        path = f"{received.id.database}/{received.path.name}"
        meta = self._files.head(path)
        if meta.size < _HEADER:
            return None
        head = self._files.get_range(path, 0, _HEADER)
        try:
            size = int(head[_SIZE_FIELD], 8)
        except ValueError:
            return None
        if not 0 < size <= min(MAX_MANIFEST_BYTES, meta.size - _HEADER) or head != header(
            MANIFEST_NAME, size, FILE_MODE
        ):
            return None
        data = self._files.get_range(path, _HEADER, size)
        if artifact_digest(data) != received.id.digest:
            return None
        return _Offered(key, received, meta._replace(key=key), data)

    def _path(self, offered: _Offered) -> str:
        return f"{offered.received.id.database}/{offered.received.path.name}"


def _manifest(offered: _Offered) -> StoredObject:
    data = offered.manifest_bytes
    meta = offered.payload
    return StoredObject(data, meta._replace(key=meta.key + MANIFEST_SUFFIX, size=len(data)))


def _latest(key: str, entries: Sequence[_Offered]) -> StoredObject:
    """A ref to the last entry. Positions stand for generations and rounds: greater is newer."""

    def known(offered: _Offered) -> dict[str, Any]:
        return {
            "key": offered.key,
            "manifest_sha256": offered.received.id.digest,
            "generation": offered.received.id.position,
            "write_id": "",
            "updated_at": offered.payload.last_modified or datetime.fromtimestamp(0, timezone.utc),
            "round_number": offered.received.id.position,
        }

    *before, newest = entries
    history = tuple(RefEntry(**known(each)) for each in reversed(before[-MAX_HISTORY:]))
    state = RefState(**known(newest), made_by_round=newest.received.id.position, history=history)
    data = state.model_dump_json().encode()
    return StoredObject(data, newest.payload._replace(key=key, size=len(data)))
