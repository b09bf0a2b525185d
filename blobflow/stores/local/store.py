"""The local store: a directory in which every object is a plain file, so that `tar`, `cp` and `ls` work on it.

| path | what |
|---|---|
| `<root>/<key>` | an object, whole and durable from the moment its name appears |
| `<root>/.blobflow/tmp/` | files and directories that have no name yet; swept after a day |
| `<root>/.blobflow/locks/00..ff` | lock files; a key's lock is the one its CRC32C selects; a holder's note is in it |
| `<root>/.blobflow/locks/breaking` | held by whoever replaces the lock file of a process that was stopped |
| `<root>/.blobflow/uploads/<upload_id>/upload.json` | key, part size, time; its flock guards `payload` |
| `.../payload` | the object to be: part n lies at (n - 1) * part_size |
| `.../parts.jsonl` | journal of acknowledged parts, the last record of a number wins |

Three rules make it safe between processes and through crashes:

1. Bytes are on disk before a name or a journal record speaks of them.
2. Whoever replaces or removes an object holds the key's flock; a reader needs no lock, because files are replaced
   and never written in place.
3. Locks are taken in one order: upload, part, key.

Paths are walked directory by directory through descriptors without following symbolic links, so a key never leads
out of the root. The store's own directories are private (`blobflow.private`): a link in their place, or a directory of
another user's, is refused.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from blobflow.checksum import Buffer, crc32c
from blobflow.durable import (
    append_lines,
    copy_bytes,
    free_bytes,
    fsync_directory,
    lock,
    unlock_and_close,
    whole_lines,
    write_all,
)
from blobflow.errors import (
    ArtifactInvalid,
    ChecksumMismatch,
    InvalidKey,
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    OsFault,
    PreconditionFailed,
    RefusedError,
    SizeMismatch,
    StoreConfigurationError,
    StoreUnavailable,
    UploadIncomplete,
    UsageError,
    expanded,
    os_fault,
    storing,
)
from blobflow.private import PrivateDirectory
from blobflow.stores.base import (
    RESERVED_SEGMENT,
    Body,
    Capabilities,
    ObjectMeta,
    PartMeta,
    PutMode,
    Store,
    StoredObject,
    UploadMeta,
    check_key,
    plain,
)
from blobflow.stores.local.locks import KeyLocks
from blobflow.stores.optional import HasClock, HasRoom
from blobflow.untrusted import bounded_time, read_object, utc_time

_log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: to open a FIFO that somebody left in the directory must not hang; it means nothing for files."""
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_READ_BYTES = 1024 * 1024
_MAX_INTENT_BYTES = 64 * 1024
_MAX_PARTS = 10_000
_PART_LOCKS = 64
_MKDIR_ATTEMPTS = 32
"""Each one lost means that another process deleted the last neighbour in the same instant."""
_SWEEP_AFTER_S = 24 * 3600.0
"""Far above what the slowest writer needs between two writes to the same temporary file."""
_STRAGGLER_PATIENCE_S = 30.0
"""How long complete waits for a part that another process is still writing."""

_NO_OBJECT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO})


class LocalStore(Store, HasClock, HasRoom):
    """Objects as plain files below `root`; the embedded default.

    Threads and processes of one machine may use the same root at the same time, through any number of store
    objects. `root` is made by the first write.

    Entity tags are inode, modification time and size: a file that somebody replaces or edits by hand counts as
    another object. `ObjectMeta.crc32c` stays None, because nobody watches over the files.

    Args:
        root: The directory; relative paths and `~` are resolved now.
        now_ns: Nanoseconds since the epoch; entity tags and the age of leftovers come from it.
        straggler_patience_s: How long `complete_multipart` waits for a part that is still being written by another
            process before it raises `TransferBusy`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        now_ns: Callable[[], int] = time.time_ns,
        straggler_patience_s: float = _STRAGGLER_PATIENCE_S,
    ) -> None:
        self.root = expanded(root).absolute()
        self.url = self.root.as_uri()
        self._now_ns = now_ns
        self._locks = KeyLocks(self._own, url=self.url, patience_s=straggler_patience_s)
        self._journals: dict[str, _JournalState] = {}
        self._swept = False

    @override
    def capabilities(self) -> Capabilities:
        return Capabilities()

    @override
    def server_time_s(self) -> float:
        return self._now_ns() / 1e9

    @override
    def free_bytes(self) -> int | None:
        return free_bytes(self.root)

    # Objects

    @override
    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> ObjectMeta:
        check_key(key)
        if (mode is PutMode.UPDATE) != (e_tag is not None):
            raise UsageError("an e_tag belongs to PutMode.UPDATE, and to it alone", key=key)
        content = plain(body, self)
        with self._temporary("put", key, _mode(private)) as (name, fd):
            self._write("put", key, fd, 0, content)
            return self._finish("put", key, fd, name, mode, e_tag)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        with _translated("get", key):
            fd = self._open_object(key)
            try:
                meta = _meta(key, os.fstat(fd))
                if meta.size > max_bytes:
                    raise ObjectTooLarge(
                        f"{key!r} has {meta.size} bytes, more than {max_bytes}", key=key, limit=max_bytes
                    )
                data = bytearray(meta.size)
                _read_into(key, fd, 0, memoryview(data))
            finally:
                os.close(fd)
        return StoredObject(bytes(data), meta)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        check_key(key)
        with _translated("get_range", key, offset):
            fd = self._open_object(key)
            try:
                try:
                    _check_pin(key, fd, e_tag)
                    _read_into(key, fd, offset, buffer.cast("B"))
                    # Again, for a file that was edited in place while it was read.
                    _check_pin(key, fd, e_tag)
                except OSError as error:
                    # NFS: the file was replaced on the server and the handle died.
                    if error.errno == errno.ESTALE and e_tag is not None:
                        raise _changed(key, e_tag, None) from error
                    raise
            finally:
                os.close(fd)

    @override
    def head(self, key: str) -> ObjectMeta:
        check_key(key)
        with _translated("head", key):
            fd = self._open_object(key)
            try:
                return _meta(key, os.fstat(fd))
            finally:
                os.close(fd)

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        above, slash, start = prefix.rpartition("/")
        if slash:
            try:
                check_key(above)
            except InvalidKey:
                return
        after = (start_after or "").encode("utf-8", "surrogateescape")
        with _translated("list", prefix):
            yield from self._walk(above.split("/") if above else [], start, after)

    @override
    def delete(self, key: str) -> None:
        check_key(key)
        segments = key.split("/")
        with _translated("delete", key):
            try:
                os.close(self._open_object(key))
            except ObjectNotFound:
                return
            with self._locks.held(key):
                try:
                    parent = self._open_directory(segments[:-1])
                except OSError as error:
                    if error.errno in _NO_OBJECT_ERRNOS:
                        return
                    raise
                try:
                    with suppress(FileNotFoundError):
                        os.unlink(segments[-1], dir_fd=parent)
                    os.fsync(parent)
                finally:
                    os.close(parent)
                self._prune(segments[:-1])

    @override
    def copy(self, source: str, target: str) -> ObjectMeta:
        check_key(source)
        check_key(target)
        with _translated("copy", source):
            source_fd = self._open_object(source)
        try:
            with _translated("copy", source):  # not readable by more people than the source is
                mode = os.fstat(source_fd).st_mode & _mode(private=False)
            with self._temporary("copy", target, mode) as (name, fd):
                with _translated("copy", target):
                    size = os.fstat(source_fd).st_size
                    if copy_bytes(source_fd, fd) != size:
                        raise ObjectChanged(f"{source!r} was changed while it was copied", key=source)
                return self._finish("copy", target, fd, name, PutMode.OVERWRITE, None)
        finally:
            os.close(source_fd)

    # Multipart uploads

    @override
    def create_multipart(
        self,
        key: str,
        *,
        part_size: int,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> str:
        check_key(key)
        if part_size < 1:
            raise UsageError(f"part_size {part_size} is not positive", key=key)
        upload_id = uuid.uuid4().hex
        created = _datetime(self._now_ns()) or datetime.now(timezone.utc)
        intent = {"key": key, "part_size": part_size, "created": created.isoformat()}
        with _translated("create_multipart", key), self._own("tmp") as tmp, self._own("uploads") as uploads:
            with tmp.below(upload_id, make=True) as fresh:
                _create(fresh, "upload.json", json.dumps(intent).encode())
                _create(fresh, "payload", b"", _mode(private))
                _create(fresh, "parts.jsonl", b"")
                fresh.below("part-locks", make=True).close()
                fresh.sync()
            # The upload exists from this rename on, with everything that belongs to it.
            tmp.rename(upload_id, upload_id, uploads)
            uploads.sync()
        return upload_id

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        with self._upload("put_part", key, upload_id, "shared") as upload:
            if not 1 <= part_number <= self.capabilities().max_parts:
                raise UsageError(f"part number {part_number} is not in 1..{self.capabilities().max_parts}", key=key)
            if body.size > upload.part_size:
                raise UsageError(
                    f"part {part_number} of {key!r} has {body.size} bytes, more than the part size {upload.part_size}",
                    key=key,
                    expected=upload.part_size,
                    actual=body.size,
                )
            offset = (part_number - 1) * upload.part_size
            with upload.part_lock(part_number), upload.open_for_writing() as (payload, journal):
                held = upload.parts().get(part_number)
                if held is None:
                    part = _part(part_number, body.size, self._write("put_part", key, payload, offset, body))
                else:
                    part = self._replace_part(upload, held, payload, journal, offset, body)
                with _translated("put_part", key, offset):
                    os.fdatasync(payload)
                    upload.append(journal, part_number, part.size, part.crc32c)
        return part

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        with self._upload("list_parts", key, upload_id) as upload:
            return [part for _, part in sorted(upload.parts().items())]

    @override
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        found: list[UploadMeta] = []
        with _translated("list_uploads", prefix):
            for upload_id in self._upload_ids():
                intent = self._read_intent(upload_id)
                if intent is not None and intent["key"].startswith(prefix):
                    found.append(UploadMeta(intent["key"], upload_id, intent["created"]))
        return sorted(found, key=lambda upload: (upload.key.encode(), upload.initiated, upload.upload_id))

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        # The order is what a crash at any point leaves whole: until the rename the upload still has its journal and
        # every byte the journal vouches for; after it the object is finished, and a directory without payload is no
        # upload any more.
        with self._upload("complete_multipart", key, upload_id, "alone") as upload:
            held = upload.parts()
            size = _check_parts(key, parts, held, upload.part_size)
            with _translated("complete_multipart", key), upload.open_for_writing() as (payload, journal):
                for part_number in sorted(held.keys() - {part.part_number for part in parts}):
                    upload.append(journal, part_number, None, None)
                os.ftruncate(payload, size)
                self._stamp(payload)
                os.fsync(payload)
                meta = _meta(key, os.fstat(payload))
                try:
                    self._publish(key, upload.directory.descriptor, "payload", PutMode.OVERWRITE, None)
                except FileNotFoundError:
                    raise _no_such_upload(key, upload_id) from None  # aborted meanwhile
        try:
            self._drop_upload(upload_id)
        except OSError as error:
            # The object is there all the same; what stays of the upload is swept later.
            _log.warning("store.upload_stays key=%s upload_id=%s error=%s", key, upload_id, error)
        return meta

    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        # Without the upload's lock: who still writes a part writes into files that have no name any more.
        with _translated("abort_multipart", key):
            intent = self._read_intent(upload_id)
            if intent is not None and intent["key"] == key:
                self._drop_upload(upload_id)

    # Finding

    def _open_directory(self, segments: Sequence[str], *, make: bool = False) -> int:
        """A descriptor of the directory, walked from the root without following symbolic links.

        With `make`, missing directories are made, and the names of all of them are durable on return.
        """
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for segment in segments:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(segment, dir_fd=fd)
                    # Also if it was there: the process that made it may not have got to this line yet.
                    os.fsync(fd)
                child = os.open(segment, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = child
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open_object(self, key: str) -> int:
        """A descriptor of the object's file.

        Raises:
            ObjectNotFound: nothing there, or something that is no regular file.
        """
        segments = key.split("/")
        try:
            parent = self._open_directory(segments[:-1])
            try:
                fd = os.open(segments[-1], _READ, dir_fd=parent)
            finally:
                os.close(parent)
        except OSError as error:
            if error.errno in _NO_OBJECT_ERRNOS:
                raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key) from None
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key)
        return fd

    def _walk(self, segments: list[str], start: str, after: bytes) -> Iterator[ObjectMeta]:
        """Objects below a directory whose first name begins with `start`, in key order.

        Directories sort as `name/`, because their keys continue that way: `a-b` < `a/b` < `a0`, although `a` < `a-b`.
        """
        try:
            fd = self._open_directory(segments)
        except OSError as error:
            if error.errno in _NO_OBJECT_ERRNOS:
                return
            raise
        try:
            above = "".join(f"{segment}/" for segment in segments)
            entries: list[tuple[bytes, str, bool]] = []
            with os.scandir(fd) as found:
                for entry in found:
                    if not entry.name.startswith(start):
                        continue
                    directory = entry.is_dir(follow_symlinks=False)
                    path = above + entry.name
                    if (directory or entry.is_file(follow_symlinks=False)) and _is_key(path):
                        sort_key = path.encode() + (b"/" if directory else b"")
                        if sort_key > after or (directory and after.startswith(sort_key)):
                            entries.append((sort_key, entry.name, directory))
            entries.sort()
            for _, name, directory in entries:
                if directory:
                    yield from self._walk([*segments, name], "", after)
                    continue
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield _meta(above + name, status)
        finally:
            os.close(fd)

    # Writing

    @contextmanager
    def _temporary(self, operation: str, key: str, mode: int = 0o600) -> Generator[tuple[str, int]]:
        """A new file without a name in the store, gone at the end unless it was renamed.

        Args:
            mode: Of the file, before the umask.
        """
        name = uuid.uuid4().hex
        with ExitStack() as stack:
            with _translated(operation, key):
                tmp = stack.enter_context(self._own("tmp"))
                fd = tmp.open(name, _CREATE, mode)
            try:
                yield name, fd
            finally:
                os.close(fd)
                with suppress(OSError):  # what stays is swept later
                    tmp.unlink(name)

    def _write(self, operation: str, key: str, fd: int, offset: int, body: Body) -> int:
        """Write all of `body` at `offset` and return its CRC32C.

        Errors of the body's own iterator pass through untranslated: they are the source's, not the store's.
        """
        end = offset + body.size
        position = offset
        checksum = 0
        for buffer in body:
            view = memoryview(buffer).cast("B")
            if position + len(view) > end:
                raise _size_mismatch(key, body.size, position + len(view) - offset)
            checksum = crc32c(view, checksum)
            with _translated(operation, key, position):
                write_all(fd, view, position)
            position += len(view)
        if position != end:
            raise _size_mismatch(key, body.size, position - offset)
        if body.crc32c is not None and checksum != body.crc32c:
            raise ChecksumMismatch(
                f"the bytes for {key!r} at {offset} have CRC32C {checksum:08x} instead of {body.crc32c:08x}",
                hint="the source changed, or was damaged on the way here; nothing was stored",
                what="body",
                key=key,
                expected=body.crc32c,
                actual=checksum,
            )
        return checksum

    def _finish(self, operation: str, key: str, fd: int, name: str, mode: PutMode, e_tag: str | None) -> ObjectMeta:
        with _translated(operation, key):
            self._stamp(fd)
            os.fsync(fd)
            meta = _meta(key, os.fstat(fd))
            try:
                with self._own("tmp") as tmp:
                    self._publish(key, tmp.descriptor, name, mode, e_tag)
            except FileNotFoundError as error:
                raise StoreUnavailable(
                    f"put of {key!r}: this process stood still for so long that another broke its lock",
                    operation="put",
                    key=key,
                ) from error
        return meta

    def _stamp(self, fd: int) -> None:
        """Set the modification time that goes into the entity tag.

        The kernel's own time stands still for a tick (up to 10 ms). Within one tick a file can be replaced twice and
        get the first inode back: same inode, same size, same time, other bytes. The clock's nanoseconds tell them
        apart.
        """
        now = self._now_ns()
        os.utime(fd, ns=(now, now))

    def _publish(self, key: str, source: int, name: str, mode: PutMode, e_tag: str | None) -> None:
        """Give the durable file `name` of the directory `source` its name in the store, durably.

        Raises:
            FileNotFoundError: the source is gone.
        """
        segments = key.split("/")
        with self._locks.held(key, "" if name == "payload" else name):
            for _ in range(_MKDIR_ATTEMPTS):
                try:
                    parent = self._open_directory(segments[:-1], make=True)
                except FileNotFoundError:
                    continue  # a delete took away a directory that was empty still
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP):
                        raise _conflict(key, "a part of its path is no directory") from None
                    raise
                try:
                    self._admit(key, parent, segments[-1], mode, e_tag)
                    if mode is PutMode.CREATE:
                        os.link(name, segments[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
                    else:
                        os.rename(name, segments[-1], src_dir_fd=source, dst_dir_fd=parent)
                    # Within the lock: who is refused by this object may rely on it.
                    os.fsync(parent)
                    return
                except FileNotFoundError:
                    os.stat(name, dir_fd=source, follow_symlinks=False)  # raises if it is the source that is gone
                except FileExistsError:
                    # Somebody who holds no lock of ours made the file.
                    raise _lost(key, None, None) from None
                finally:
                    os.close(parent)
            raise StoreUnavailable(
                f"the directory of {key!r} is removed as fast as it is made", operation="put", key=key
            )

    def _admit(self, key: str, parent: int, leaf: str, mode: PutMode, e_tag: str | None) -> None:
        """Whether the mode allows the write, given what is there now. The caller holds the key's lock."""
        try:
            status = os.stat(leaf, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            if mode is PutMode.UPDATE:
                raise _lost(key, e_tag, None) from None
            return
        if stat.S_ISDIR(status.st_mode):
            # A writer that died between mkdir and link leaves an empty directory, and that is no object.
            try:
                os.rmdir(leaf, dir_fd=parent)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise _conflict(key, "there are objects below it") from None
            if mode is PutMode.UPDATE:
                raise _lost(key, e_tag, None)
            return
        if not stat.S_ISREG(status.st_mode):
            raise _conflict(key, "the file of this name is not a regular one")
        if mode is PutMode.CREATE or (mode is PutMode.UPDATE and _e_tag(status) != e_tag):
            raise _lost(key, e_tag, _e_tag(status))

    def _prune(self, segments: list[str]) -> None:
        """Remove directories that have become empty, so that their names are free for objects again."""
        while segments:
            *segments, last = segments
            try:
                parent = self._open_directory(segments)
            except OSError:
                return
            try:
                os.rmdir(last, dir_fd=parent)
            except OSError:
                return  # not empty, or gone
            finally:
                os.close(parent)

    @contextmanager
    def _own(self, name: str, *, make: bool = True) -> Generator[PrivateDirectory]:
        """One of the store's own directories: `tmp`, `locks` or `uploads`.

        Args:
            make: Make what is missing, the store included, and sweep once per store object.

        Raises:
            RefusedError: a link or another user's directory lies in its place.
            FileNotFoundError: it is missing and was not to be made.
        """
        if make:
            _make_directory(self.root)
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            internal = PrivateDirectory.within(root, RESERVED_SEGMENT, self.root / RESERVED_SEGMENT, make=make)
        finally:
            os.close(root)
        with internal, internal.below(name, make=make) as own:
            if make and not self._swept:
                self._swept = True
                try:
                    self._sweep()
                except OSError as error:
                    # Leftovers that stay are no reason to refuse what was asked for.
                    _log.warning("store.not_swept url=%s error=%s", self.url, error)
            yield own

    def _sweep(self) -> None:
        """Remove what dead processes left: old temporary files, and uploads without payload."""
        oldest = self._now_ns() / 1e9 - _SWEEP_AFTER_S
        with self._own("tmp") as tmp, self._own("uploads") as uploads:
            for name, status in tmp.entries():
                if status.st_mtime <= oldest:
                    with suppress(OSError):  # another process is quicker, or something in it is not ours to remove
                        tmp.remove(name)
                        _log.info("store.swept name=%s", name)
            for upload_id in filter(_is_upload_id, uploads.names()):
                # Nothing puts a payload back, so a directory without one is dead whoever may still have it open.
                with suppress(FileNotFoundError, RefusedError):
                    with uploads.below(upload_id) as upload:
                        dead = not upload.has("payload")
                    if dead:
                        self._drop_upload(upload_id)

    # Uploads

    def _upload_ids(self) -> list[str]:
        try:
            with self._own("uploads", make=False) as uploads:
                return list(filter(_is_upload_id, uploads.names()))
        except FileNotFoundError:
            return []

    def _read_intent(self, upload_id: str) -> dict[str, Any] | None:
        """The contents of `upload.json`, or None if there is no such upload."""
        if not _is_upload_id(upload_id):
            return None
        try:
            with self._own("uploads", make=False) as uploads, uploads.below(upload_id) as upload:
                return _upload_intent(upload.read("upload.json", _MAX_INTENT_BYTES)) if upload.has("payload") else None
        except FileNotFoundError:
            return None
        except ArtifactInvalid as error:
            # It was whole when the upload began, so it was damaged since; nobody can take the upload up any more.
            _log.warning("store.upload_damaged upload_id=%s error=%s", upload_id, error)
            self._drop_upload(upload_id)
            return None
        except RefusedError as error:
            if upload_id not in str(error.path):
                raise
            _log.warning("store.upload_refused upload_id=%s error=%s", upload_id, error)
            return None

    def _drop_upload(self, upload_id: str) -> None:
        self._journals.pop(upload_id, None)
        # Renamed first, so that the upload goes at once and not file by file.
        doomed = f"{upload_id}-{uuid.uuid4().hex}"
        with self._own("uploads") as uploads, self._own("tmp") as tmp, suppress(FileNotFoundError):
            uploads.rename(upload_id, doomed, tmp)
            uploads.sync()
            with suppress(OSError):  # what stays is swept later
                tmp.remove(doomed)

    def _replace_part(
        self, upload: _Upload, held: PartMeta, payload: int, journal: int, offset: int, body: Body
    ) -> PartMeta:
        """Write a part that was acknowledged before; until all of `body` has arrived the earlier bytes stay.

        A process that was given up for dead sends parts again that its successor has sent: the same bytes, for which
        the record may stand all the time. Other bytes take the record back first, because it must not vouch for a
        mixture.
        """
        with self._temporary("put_part", upload.key) as (_, fd):
            part = _part(held.part_number, body.size, self._write("put_part", upload.key, fd, 0, body))
            with _translated("put_part", upload.key, offset):
                if part != held:
                    upload.append(journal, held.part_number, None, None)
                copy_bytes(fd, payload, offset)
        return part

    @contextmanager
    def _upload(
        self, operation: str, key: str, upload_id: str, held: Literal["shared", "alone"] | None = None
    ) -> Generator[_Upload]:
        """The upload, under its shared or exclusive lock.

        Part writers share the lock and complete excludes them: else a straggler could write into the finished object.
        """
        check_key(key)
        if not _is_upload_id(upload_id):
            raise _no_such_upload(key, upload_id)
        with ExitStack() as stack:
            with _translated(operation, key):
                try:
                    uploads = stack.enter_context(self._own("uploads", make=False))
                    upload = stack.enter_context(uploads.below(upload_id))
                    guard = upload.open("upload.json", os.O_RDONLY)
                    stack.callback(unlock_and_close, guard)
                    if held == "shared":
                        lock(guard, shared=True)
                    elif held == "alone":
                        self._locks.wait_for(guard, key)
                    # After the lock: complete may have finished while this call waited.
                    upload.stat("payload")
                except FileNotFoundError:
                    self._journals.pop(upload_id, None)
                    raise _no_such_upload(key, upload_id) from None
                try:
                    intent = _upload_intent(os.pread(guard, _MAX_INTENT_BYTES, 0))
                except ArtifactInvalid as error:
                    raise _no_such_upload(key, upload_id) from error
            if intent["key"] != key:
                raise _no_such_upload(key, upload_id)
            yield _Upload(key, upload_id, upload, intent["part_size"], self._journals)


class _JournalState(NamedTuple):
    """What a journal said up to byte `read_to`; replaced as a whole, because threads share it."""

    parts: dict[int, PartMeta]
    read_to: int


@dataclass
class _Upload:
    """An open upload directory."""

    key: str
    upload_id: str
    directory: PrivateDirectory
    part_size: int
    journals: dict[str, _JournalState]

    def parts(self) -> dict[int, PartMeta]:
        """The acknowledged parts by number, those of other processes included."""
        with _translated("list_parts", self.key):
            try:
                journal = os.fdopen(self.directory.open("parts.jsonl", os.O_RDONLY), "rb")
            except FileNotFoundError:
                raise _no_such_upload(self.key, self.upload_id) from None
            with journal:
                # Every reading appends to a copy of what an earlier one left, from where that one ended.
                state = self.journals.get(self.upload_id, _JournalState({}, 0))
                parts, read_to = dict(state.parts), state.read_to
                for end, line in whole_lines(journal, state.read_to, longest=_READ_BYTES):
                    _replay(parts, line)
                    read_to = end
                self.journals[self.upload_id] = _JournalState(parts, read_to)
                return parts

    @contextmanager
    def part_lock(self, part_number: int) -> Generator[None]:
        """Hold off other writers of the same part, so that its bytes are those of one of them."""
        with _translated("put_part", self.key):
            try:
                with self.directory.below("part-locks") as locks:
                    fd = locks.open(str(part_number % _PART_LOCKS), os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                raise _no_such_upload(self.key, self.upload_id) from None
        try:
            lock(fd)
            yield
        finally:
            unlock_and_close(fd)

    @contextmanager
    def open_for_writing(self) -> Generator[tuple[int, int]]:
        """Descriptors of payload and journal."""
        fds: list[int] = []
        try:
            with _translated("open_upload", self.key):
                try:
                    for name, flags in (("payload", os.O_WRONLY), ("parts.jsonl", os.O_WRONLY | os.O_APPEND)):
                        fds.append(self.directory.open(name, flags))
                except FileNotFoundError:
                    raise _no_such_upload(self.key, self.upload_id) from None
            yield fds[0], fds[1]
        finally:
            for fd in fds:
                os.close(fd)

    @staticmethod
    def append(journal: int, part_number: int, size: int | None, checksum: int | None) -> None:
        """Record a part durably; `size` None takes an earlier record back."""
        append_lines(journal, [json.dumps({"part": part_number, "size": size, "crc32c": checksum})])
        os.fdatasync(journal)


def _upload_intent(data: bytes) -> dict[str, Any]:
    """The contents of `upload.json`, of which `created` is a time.

    Raises:
        ArtifactInvalid: it is damaged.
    """
    intent: dict[str, Any] = read_object(data, "upload.json")
    key, part_size = intent.get("key"), intent.get("part_size")
    try:
        created = bounded_time(datetime.fromisoformat(str(intent.get("created"))))
    except ValueError:
        created = None
    if not isinstance(key, str) or not _is_key(key) or not isinstance(part_size, int) or created is None:
        raise ArtifactInvalid("upload.json is damaged", what="upload.json")
    if not 1 <= part_size < 1 << 50:
        raise ArtifactInvalid("upload.json has an impossible part size", what="upload.json")
    return {**intent, "created": created}


def _replay(parts: dict[int, PartMeta], line: bytes) -> None:
    try:
        record = read_object(line, "journal")
    except ArtifactInvalid:
        return  # empty, or the torn record of a process that died: that part was not acknowledged
    number, size, checksum = (record.get(name) for name in ("part", "size", "crc32c"))
    if not isinstance(number, int) or not 1 <= number <= _MAX_PARTS:
        return  # damaged, as everything that does not fit: that part is sent again
    if size is None or not (isinstance(size, int) and isinstance(checksum, int)):
        parts.pop(number, None)
    else:
        parts[number] = _part(number, size, checksum)


def _check_parts(key: str, parts: Sequence[PartMeta], held: dict[int, PartMeta], part_size: int) -> int:
    """The size of the object that `parts` make.

    Raises:
        UploadIncomplete: they are not dense from 1, not what the journal says, or leave holes in the payload.
    """

    def incomplete(reason: str) -> UploadIncomplete:
        return UploadIncomplete(
            f"{key!r} cannot be completed: {reason}", key=key, expected=len(parts), actual=len(held)
        )

    if not parts:
        raise incomplete("no parts were named")
    for number, part in enumerate(sorted(parts), start=1):
        if part.part_number != number:
            raise incomplete(f"part {number} was not named")
        if number not in held:
            raise incomplete(f"the store does not hold part {number}")
        if (part.size, part.e_tag) != (held[number].size, held[number].e_tag):
            raise incomplete(f"the store holds another part {number}")
        if part.size != part_size and number != len(parts):
            raise incomplete(f"part {number} has {part.size} bytes instead of {part_size}, and is not the last")
    return sum(part.size for part in parts)


def _mode(private: bool) -> int:
    """The mode of an object, before the umask."""
    return 0o600 if private else 0o666


def _e_tag(status: os.stat_result) -> str:
    return f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'


def _part(part_number: int, size: int, checksum: int) -> PartMeta:
    return PartMeta(part_number, size, f'"{checksum:08x}-{size:x}"', checksum)


def _meta(key: str, status: os.stat_result) -> ObjectMeta:
    return ObjectMeta(key, status.st_size, _e_tag(status), _datetime(status.st_mtime_ns))


def _datetime(nanoseconds: int) -> datetime | None:
    return utc_time(nanoseconds / 1e9)


def _is_key(path: str) -> bool:
    """Whether a path may be listed: what `check_key` refuses cannot be read either (names that are not UTF-8 too)."""
    try:
        check_key(path)
    except InvalidKey:
        return False
    return True


def _create(directory: PrivateDirectory, name: str, content: bytes, mode: int | None = None) -> None:
    """Make a file, durable but for its name."""
    fd = directory.open(name, _CREATE, mode)
    try:
        write_all(fd, content, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_upload_id(upload_id: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", upload_id) is not None


def _check_pin(key: str, fd: int, e_tag: str | None) -> None:
    if e_tag is not None and (actual := _e_tag(os.fstat(fd))) != e_tag:
        raise _changed(key, e_tag, actual)


def _read_into(key: str, fd: int, offset: int, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        count = os.preadv(fd, [buffer[filled:]], offset + filled)
        if not count:
            raise SizeMismatch(
                f"{key!r} ends at byte {offset + filled}, wanted {offset + len(buffer)}",
                key=key,
                what="object",
                expected=offset + len(buffer),
                actual=os.fstat(fd).st_size,
            )
        filled += count


def _make_directory(path: Path) -> None:
    """`mkdir -p` whose names are durable.

    Raises:
        StoreConfigurationError: no directory can be made there, now or later.
    """
    if path.is_dir():
        return
    _make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        if os_fault(error) not in (OsFault.GONE, OsFault.OTHER):
            raise
        raise StoreConfigurationError(
            f"{path} is no directory, and none can be made there: {error.strerror}",
            hint="name a directory for the store, or a path where one can be made",
            path=str(path),
        ) from error
    fsync_directory(path.parent)


def _conflict(key: str, reason: str) -> InvalidKey:
    return InvalidKey(
        f"{key!r} cannot be stored: {reason}",
        hint="in a local store a key cannot be an object and the directory of others at once",
        key=key,
        reason=reason,
    )


def _lost(key: str, expected: str | None, actual: str | None) -> PreconditionFailed:
    what = "exists already" if expected is None else "was replaced" if actual else "does not exist"
    return PreconditionFailed(f"{key!r} {what}", key=key, expected=expected, actual=actual)


def _changed(key: str, expected: str, actual: str | None) -> ObjectChanged:
    return ObjectChanged(f"{key!r} was replaced while it was read", key=key, expected=expected, actual=actual)


def _no_such_upload(key: str, upload_id: str) -> NoSuchUpload:
    return NoSuchUpload(
        f"no upload {upload_id!r} of {key!r}: completed, aborted or expired", key=key, upload_id=upload_id
    )


def _size_mismatch(key: str, expected: int, actual: int) -> SizeMismatch:
    return SizeMismatch(
        f"the body for {key!r} has {actual} bytes or more instead of {expected}"
        if actual > expected
        else f"the body for {key!r} ended after {actual} of {expected} bytes",
        what="body",
        key=key,
        expected=expected,
        actual=actual,
    )


def _translated(operation: str, key: str, offset: int | None = None) -> AbstractContextManager[None]:
    """Turn the operating system's errors into the store's, naming operation, key and offset."""
    where = f"{key!r}" if offset is None else f"{key!r} at {offset}"
    return storing(f"{operation} {where}", operation=operation, key=key, offset=offset)
