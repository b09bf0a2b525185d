"""The ends of a transfer that are more than streams: sources that are pinned, targets that appear as a whole.

A `PinnedSource` reports its version and opens at any offset, so that a resumed transfer need not read from the
beginning. A `SessionTarget` keeps what it was given in a session that another process can continue, and shows it in
one step at the end.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Protocol
from urllib.parse import parse_qs, quote

from typing_extensions import override

from blobflow.durable import check_room, fsync_directory, names_file, try_lock
from blobflow.engine.plan import TransferPlan
from blobflow.errors import (
    ChecksumMismatch,
    DestinationNotEmpty,
    DiskTooSmall,
    KeyConflict,
    NoSuchUpload,
    ObjectChanged,
    SourceChanged,
    TransferBusy,
    Unsupported,
    UploadIncomplete,
    UsageError,
    setting,
    writing,
)
from blobflow.private import open_own
from blobflow.stores.base import Body, ObjectMeta, Reader, Store, check_key, check_object_size, check_readable
from blobflow.streams.checkpoint import TransferCheckpoint
from blobflow.uploads.session import UploadSession, upload_part_size

log = logging.getLogger(__name__)

BEGIN_AGAIN: Final = "begin again without the checkpoint"


class Pin(NamedTuple):
    """What a source reports about itself."""

    version: str | None
    """Changes when its bytes change; None if it is unknown."""
    size: int | None
    """Size in bytes; None if it is unknown."""


class OpenedSource(Protocol):
    """A pinned source, opened at some offset."""

    def readinto(self, view: memoryview, /) -> int:
        """Fill some of `view`; returns the bytes read, 0 at the end."""
        ...

    def close(self) -> None: ...


class PinnedSource(ABC):
    """A source of one version, readable from any offset. Its reads time out on silence and retry where that is safe."""

    @abstractmethod
    def pin(self) -> Pin:
        """The present version and size of the source; `open` returns only bytes of this version from now on."""

    @abstractmethod
    def open(self, offset: int) -> OpenedSource:
        """The bytes of the pinned version from `offset`.

        Raises, as do the reads:
            SourceChanged: the source has another version now.
        """


class SessionTarget(ABC):
    """A target that is written in sessions and shows its content at the end. It serves one transfer at a time."""

    takes_chunks: ClassVar[bool]
    """Whether one write is one chunk, durable on return, with a timeout on silence in the target."""

    @abstractmethod
    def begin(self, checkpoint: TransferCheckpoint, chunk_size: int) -> int:
        """Prepare for writes from `checkpoint.offset`, which is reset to 0 if the earlier bytes are gone.

        Returns:
            Bytes per chunk; if the target takes chunks, every write except the last must have this length.
        """

    def prefix(self) -> OpenedSource | None:
        """The bytes before the offset that `begin` found, if the target can read them."""
        return None

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> int:
        """Write some of `data`, at least one byte; returns the number of bytes."""

    def flush(self) -> None:
        """Make the written bytes durable; may be called while another thread writes."""

    @abstractmethod
    def finish(self, checkpoint: TransferCheckpoint) -> None:
        """Prove the written bytes and show them."""

    @abstractmethod
    def leave(self, *, keep: bool) -> None:
        """After a failed transfer: keep the session so that it can be resumed, or remove it."""


class ObjectSource(PinnedSource):
    """An object in a store, pinned to its e_tag.

    Args:
        e_tag: The expected version; by default the one that is there when the transfer begins.
    """

    def __init__(self, store: Reader, key: str, *, e_tag: str | None = None) -> None:
        self._store = store
        self._key = check_key(key)
        self._expected = e_tag
        self._meta: ObjectMeta | None = None

    def __repr__(self) -> str:
        return f"<ObjectSource {self._key!r} in {self._store.url}>"

    @override
    def pin(self) -> Pin:
        self._meta = meta = self._store.head(self._key)
        if self._expected not in (None, meta.e_tag):
            raise SourceChanged(
                f"{self._key!r} was replaced: it has e_tag {meta.e_tag}, not {self._expected}",
                hint=BEGIN_AGAIN,
                what="e_tag",
                expected=self._expected,
                actual=meta.e_tag,
            )
        return Pin(meta.e_tag, meta.size)

    @override
    def open(self, offset: int) -> OpenedSource:
        meta = self._meta or self._store.head(self._key)
        return _OpenedObject(self._store, meta, offset)


class _OpenedObject:
    def __init__(self, store: Reader, meta: ObjectMeta, offset: int) -> None:
        self._store = store
        self._meta = meta
        self._offset = offset

    def readinto(self, view: memoryview) -> int:
        meta = self._meta
        view = view[: max(0, meta.size - self._offset)]
        try:
            self._store.get_range_into(meta.key, self._offset, view, e_tag=meta.e_tag)
        except ObjectChanged as error:
            raise SourceChanged(
                f"{meta.key!r} was replaced while it was read", hint=BEGIN_AGAIN, what="e_tag", expected=meta.e_tag
            ) from error
        self._offset += len(view)
        return len(view)

    def close(self) -> None:
        """Nothing is open."""


class FileTarget(SessionTarget):
    """A local file that appears as a whole, under its name, when the transfer has succeeded.

    Until then its bytes are in `.<name>.blobflow-partial` beside it. If a transfer fails and can be resumed, they stay
    there. The next transfer reads them back instead of the source, to hash them. They are removed if the transfer
    failed for good (its bytes are wrong, or there is no checkpoint).

    Args:
        path: The file; its directory must exist.
        overwrite: Replace an existing file.

    Raises, from a transfer:
        DestinationNotEmpty: the file exists already.
        RefusedError: the partial file does not belong to this user, so another one could change it.
        TransferBusy: another process writes the same file.
        DiskTooSmall: there is less room than the source has bytes, if its size is known.
        DiskFull: there is no room.
    """

    takes_chunks = False

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path).absolute()
        self._overwrite = overwrite
        self._partial = self.path.with_name(f".{self.path.name}.blobflow-partial")
        self._descriptor = -1
        self._begun_at = 0

    def __repr__(self) -> str:
        return f"<FileTarget {self.path}>"

    @override
    def begin(self, checkpoint: TransferCheckpoint, chunk_size: int) -> int:
        self._refuse_existing()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self._partial), os.lstat(self.path)):
                os.unlink(self._partial)  # a process was killed after linking the final name to its finished file
        with writing(self.path):
            descriptor = open_own(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # The previous holder of the lock may have given the file its final name, or removed it.
            if not try_lock(descriptor) or not names_file(self._partial, descriptor):
                raise TransferBusy(f"another process writes {self.path}", path=str(self.path))
            size = os.fstat(descriptor).st_size
            if size < checkpoint.offset:
                checkpoint.restart()
            try:
                check_room(self.path.parent, (checkpoint.total_size or 0) - checkpoint.offset)
            except DiskTooSmall:
                if not size:
                    self._partial.unlink()
                raise
            with writing(self.path):
                os.ftruncate(descriptor, checkpoint.offset)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._begun_at = descriptor, checkpoint.offset
        return chunk_size

    @override
    def prefix(self) -> OpenedSource:
        return _OpenedPrefix(self._descriptor, self._begun_at)

    @override
    def write(self, offset: int, data: memoryview) -> int:
        with writing(self.path):
            return os.pwrite(self._descriptor, data, offset)

    @override
    def flush(self) -> None:
        with writing(self.path):
            os.fsync(self._descriptor)

    @override
    def finish(self, checkpoint: TransferCheckpoint) -> None:
        self.flush()
        with writing(self.path):
            self._publish()
        self._close()

    def _publish(self) -> None:
        if self._overwrite:
            os.rename(self._partial, self.path)
        else:
            try:
                os.link(self._partial, self.path)  # a rename would replace a file that appeared meanwhile
            except FileExistsError:
                self._refuse_existing()
                raise
            os.unlink(self._partial)
        fsync_directory(self.path.parent)

    @override
    def leave(self, *, keep: bool) -> None:
        if not keep:
            with suppress(FileNotFoundError):
                os.unlink(self._partial)
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _refuse_existing(self) -> None:
        if not self._overwrite and os.path.lexists(self.path):
            raise DestinationNotEmpty(f"{self.path} exists already", path=str(self.path))


class _OpenedPrefix:
    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor = descriptor
        self._position = 0
        self._end = end

    def readinto(self, view: memoryview) -> int:
        count = os.preadv(self._descriptor, [view[: self._end - self._position]], self._position)
        self._position += count
        return count

    def close(self) -> None:
        """The target closes the descriptor."""


class ObjectTarget(SessionTarget):
    """An object in a store, made by a multipart upload; the length need not be known beforehand.

    A chunk is a part, and memory is two parts. The upload id is in the checkpoint, so any process can resume the
    transfer. It continues after the last part that the checkpoint counts if the store still holds all of them, and from
    the beginning otherwise.

    The object appears when everything was sent and the digest is right. Before that, the parts that the store lists are
    compared with those that were sent. Their combined CRC32C is compared with the CRC32C of the whole; a part that was
    sent before the transfer was resumed is included if the store reports its CRC32C. The upload is completed with that
    checksum, and the object is checked once more.

    A transfer that fails leaves the upload for resumption. It is aborted if the bytes are wrong, or if there was
    neither a checkpoint nor a callback to save one. `blobflow gc` removes uploads that nobody resumes.

    Args:
        overwrite: Replace an existing object. Without it, two simultaneous transfers to one key may still collide: the
            last one that completes wins.
        part_size: Bytes per part. By default the profile's chunk size, enlarged if the known size needs more than the
            store's maximum number of parts; 10,000 parts of 8 MiB are 78 GiB.
        content_type: Content type of the object.

    Attributes:
        meta: The store's metadata of the object, once it is there.

    Raises, from a transfer:
        KeyConflict: an object with this key exists.
        Unsupported: the store has no multipart uploads (open the file with fsspec, and give the stream), or there
            are too many parts.
        UploadIncomplete, ChecksumMismatch: the store does not hold what was sent.
    """

    takes_chunks = True

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        overwrite: bool = False,
        part_size: int | None = None,
        content_type: str = "application/octet-stream",
    ) -> None:
        self._store = store
        self._key = check_key(key)
        self._overwrite = overwrite
        self._asked_part_size = part_size
        self._session = UploadSession(store, key, content_type=content_type)
        self.meta: ObjectMeta | None = None

    def __repr__(self) -> str:
        return f"<ObjectTarget {self._key!r} in {self._store.url}>"

    @override
    def begin(self, checkpoint: TransferCheckpoint, chunk_size: int) -> int:
        if not self._store.capabilities().multipart:
            raise Unsupported(
                f"{self._store.url} has no multipart uploads",
                hint="open the file with fsspec and give the stream as the target",
                store=self._store.url,
                capability="multipart",
            )
        check_readable(self._store)
        self.meta = None
        session = self._session
        if checkpoint.upload_session_url is not None:
            session.take_up(*_parse_url(checkpoint.upload_session_url, self._place))
            if self._take_up(checkpoint):
                return session.part_size
            log.info("transfer.restarted session=%s key=%s", checkpoint.session_id, self._key)
            session.abandon()
        checkpoint.restart()
        self._refuse_existing()
        size = checkpoint.total_size or 0
        check_object_size(self._store, self._key, size)
        session.create(upload_part_size(self._store, size, self._asked_part_size or chunk_size))
        checkpoint.upload_session_url = _url_of(session, self._place)
        return session.part_size

    @override
    def write(self, offset: int, data: memoryview) -> int:
        before, rest = divmod(offset, self._session.part_size)
        if rest or self.meta is not None:
            message = f"the source continues after {offset} bytes, where it had ended"
            raise SourceChanged(message, hint=BEGIN_AGAIN, what="size", offset=offset)
        if before >= self._store.capabilities().max_parts:
            raise Unsupported(
                f"more than {before} parts of {self._session.part_size} bytes",
                hint=f"begin again with a larger {setting('part_size')}",
                store=self._store.url,
                capability="max_parts",
            )
        self._session.crcs[before + 1] = self._session.put(before + 1, Body.of(data))
        return len(data)

    @override
    def finish(self, checkpoint: TransferCheckpoint) -> None:
        if self.meta is not None:
            return  # an earlier process completed it
        session, plan = self._session, TransferPlan(checkpoint.offset, self._session.part_size)
        if not checkpoint.offset:
            session.crcs[1] = session.put(1, Body.of(b""))
        try:
            parts = session.prove(plan)
            self._check_parts(plan, checkpoint)
            self._refuse_existing()
            self.meta = made = session.complete(parts)
        except NoSuchUpload:
            # The response to a successful attempt may have been lost.
            if not self._is_there(checkpoint):
                raise
            return
        attested = session.attested(made)
        if made.size != checkpoint.offset or attested not in (None, checkpoint.prefix_crc32c):
            raise UploadIncomplete(
                f"{self._key!r} differs from what was sent right after it was completed: it has {made.size} bytes",
                hint="find out who else writes to this key",
                key=self._key,
                expected=checkpoint.offset,
                actual=made.size,
            )

    @override
    def leave(self, *, keep: bool) -> None:
        if not keep and self.meta is None:
            self._session.abandon()

    @property
    def _place(self) -> str:
        return f"{self._store.url}/{quote(self._key)}"

    def _refuse_existing(self) -> None:
        if not self._overwrite and self._store.exists(self._key):
            raise KeyConflict(f"an object with the key {self._key!r} exists", key=self._key)

    def _take_up(self, checkpoint: TransferCheckpoint) -> bool:
        """Whether the store holds every part that the checkpoint counts, or the whole object."""
        session = self._session
        plan = list(TransferPlan(checkpoint.offset, session.part_size)) if checkpoint.offset else []
        try:
            held = session.held()
        except NoSuchUpload:
            return self._is_there(checkpoint)
        session.crcs = held.proven(plan)
        is_known = len(session.crcs) == len(plan)
        if is_known:
            return session.crc32c(plan) == checkpoint.prefix_crc32c
        return all(held.has(part) for part in plan)

    def _is_there(self, checkpoint: TransferCheckpoint) -> bool:
        """Whether the object under the key has all the bytes of the checkpoint."""
        if checkpoint.is_complete:
            self.meta = self._session.settle(checkpoint.offset, crc=checkpoint.prefix_crc32c)
        return self.meta is not None

    def _check_parts(self, plan: TransferPlan, checkpoint: TransferCheckpoint) -> None:
        """Compare the parts with the bytes that were read, unless the checksum of an earlier part is unknown."""
        session = self._session
        if session.crcs.keys() >= set(plan.numbers) and session.crc32c(plan) != checkpoint.prefix_crc32c:
            raise ChecksumMismatch(
                f"the parts of {self._key!r} are not the bytes of the source",
                what=self._key,
                expected=checkpoint.prefix_crc32c,
                actual=session.crc32c(plan),
            )


def _url_of(session: UploadSession, place: str) -> str:
    """The URL by which a checkpoint records a multipart upload."""
    return f"{place}?uploadId={quote(session.upload_id, safe='')}&partSize={session.part_size}"


def _parse_url(url: str, place: str) -> tuple[str, int]:
    """Upload id and part size; the inverse of `_url_of`.

    Raises:
        UsageError: it is not the URL of an upload to `place`.
    """
    where, _, query = url.rpartition("?")
    fields = parse_qs(query)
    try:
        upload_id, part_size = fields["uploadId"][0], int(fields["partSize"][0])
    except (KeyError, ValueError) as error:
        raise UsageError(f"{url!r} is not the session of an object") from error
    if where != place or part_size <= 0:
        raise UsageError(f"the checkpoint belongs to {where}, not to {place}", hint=BEGIN_AGAIN)
    return upload_id, part_size
