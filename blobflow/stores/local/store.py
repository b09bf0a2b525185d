"""The local store: a directory in which every object is a plain file, so that `tar`, `cp` and `ls` work on it.

| path | what |
|---|---|
| `<root>/<key>` | an object, whole and durable from the moment its name appears |
| `<root>/.blobflow/tmp/` | files and directories that have no name yet; swept after a day |
| `<root>/.blobflow/locks/00..ff` | lock files; a key's CRC32C selects its lock; each has its holder's note |
| `<root>/.blobflow/locks/breaking` | held by a process that replaces the lock file of a stopped process |
| `<root>/.blobflow/uploads/<upload_id>/upload.json` | key, part size, time; its flock guards `payload` |
| `.../payload` | the future object: part n begins at (n - 1) * part_size |
| `.../parts.jsonl` | journal of acknowledged parts; the last record of a number wins |

Three rules make it safe between processes and through crashes:

1. Bytes are on disk before a name or a journal record refers to them.
2. A process that replaces or removes an object holds the key's flock. A reader needs no lock, because files are
   replaced and never written in place.
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
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from typing import Any, Literal

from typing_extensions import override

from blobflow.checksum import Buffer, crc32c
from blobflow.durable import copy_bytes, free_bytes, lock, unlock_and_close, write_all
from blobflow.errors import (
    ArtifactInvalid,
    ChecksumMismatch,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    RefusedError,
    StoreUnavailable,
    UsageError,
    expanded,
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
    is_key,
    plain,
)
from blobflow.stores.local.files import (
    changed,
    check_pin,
    conflict,
    create_file,
    e_tag_of,
    lost,
    make_directory,
    no_such_upload,
    object_meta,
    object_mode,
    part_meta,
    read_into,
    size_mismatch,
    translated,
    utc_of,
)
from blobflow.stores.local.locks import KeyLocks
from blobflow.stores.local.uploads import JournalState, OpenUpload, check_parts, is_upload_id, read_upload_intent
from blobflow.stores.optional import HasClock, HasRoom

_log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: opening a FIFO that is in the directory must not hang. The flag has no effect on files."""
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_MAX_INTENT_BYTES = 64 * 1024
_MKDIR_ATTEMPTS = 32
"""An attempt fails only if another process deletes the last neighbour at the same instant."""
_SWEEP_AFTER_S = 24 * 3600.0
"""Far longer than the slowest writer needs between two writes to the same temporary file."""
_STRAGGLER_PATIENCE_S = 30.0
"""Seconds that complete waits for a part that another process is still writing."""

_NO_OBJECT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO})


class LocalStore(Store, HasClock, HasRoom):
    """Objects as plain files below `root`; the embedded default.

    Threads and processes of one machine may use the same root at the same time, through any number of store
    objects. The first write makes `root`.

    Entity tags are inode, modification time and size, so a file that is replaced or edited by hand counts as another
    object. `ObjectMeta.crc32c` stays None, because files may change without the store.

    Args:
        root: The directory; relative paths and `~` are resolved now.
        now_ns: Nanoseconds since the epoch; used for entity tags and for the age of leftovers.
        straggler_patience_s: Seconds that `complete_multipart` waits for a part that another process is still writing,
            before it raises `TransferBusy`.
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
        self._journals: dict[str, JournalState] = {}
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
        with self._temporary("put", key, object_mode(private)) as (name, fd):
            self._write("put", key, fd, 0, content)
            return self._finish("put", key, fd, name, mode, e_tag)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        with translated("get", key), self._opened(key) as fd:
            meta = object_meta(key, os.fstat(fd))
            if meta.size > max_bytes:
                raise ObjectTooLarge(f"{key!r} has {meta.size} bytes, more than {max_bytes}", key=key, limit=max_bytes)
            data = bytearray(meta.size)
            read_into(key, fd, 0, memoryview(data))
        return StoredObject(bytes(data), meta)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        check_key(key)
        with translated("get_range", key, offset), self._opened(key) as fd:
            try:
                check_pin(key, fd, e_tag)
                read_into(key, fd, offset, buffer.cast("B"))
                # Again, for a file that was edited in place while it was read.
                check_pin(key, fd, e_tag)
            except OSError as error:
                # NFS: the file was replaced on the server and the handle died.
                if error.errno == errno.ESTALE and e_tag is not None:
                    raise changed(key, e_tag, None) from error
                raise

    @override
    def head(self, key: str) -> ObjectMeta:
        check_key(key)
        with translated("head", key), self._opened(key) as fd:
            return object_meta(key, os.fstat(fd))

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        above, slash, start = prefix.rpartition("/")
        if slash and not is_key(above):
            return
        after = (start_after or "").encode("utf-8", "surrogateescape")
        with translated("list", prefix):
            yield from self._walk(above.split("/") if above else [], start, after)

    @override
    def delete(self, key: str) -> None:
        check_key(key)
        segments = key.split("/")
        with translated("delete", key):
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
        with translated("copy", source):
            source_fd = self._open_object(source)
        try:
            with translated("copy", source):  # the copy must not be readable by more users than the source
                mode = os.fstat(source_fd).st_mode & object_mode(private=False)
            with self._temporary("copy", target, mode) as (name, fd):
                with translated("copy", target):
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
        created = utc_of(self._now_ns()) or datetime.now(timezone.utc)
        intent = {"key": key, "part_size": part_size, "created": created.isoformat()}
        with translated("create_multipart", key), self._own("tmp") as tmp, self._own("uploads") as uploads:
            with tmp.below(upload_id, make=True) as fresh:
                create_file(fresh, "upload.json", json.dumps(intent).encode())
                create_file(fresh, "payload", b"", object_mode(private))
                create_file(fresh, "parts.jsonl", b"")
                fresh.below("part-locks", make=True).close()
                fresh.sync()
            # From this rename on, the upload exists with all of its files.
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
                    part = part_meta(part_number, body.size, self._write("put_part", key, payload, offset, body))
                else:
                    part = self._replace_part(upload, held, payload, journal, offset, body)
                with translated("put_part", key, offset):
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
        with translated("list_uploads", prefix):
            for upload_id in self._upload_ids():
                intent = self._read_intent(upload_id)
                if intent is not None and intent["key"].startswith(prefix):
                    found.append(UploadMeta(intent["key"], upload_id, intent["created"]))
        return sorted(found, key=lambda upload: (upload.key.encode(), upload.initiated, upload.upload_id))

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        # The order keeps everything intact after a crash at any point. Until the rename, the upload has its journal and
        # every byte that the journal records. After it the object is finished, and a directory without payload is not
        # an upload any more.
        with self._upload("complete_multipart", key, upload_id, "alone") as upload:
            held = upload.parts()
            size = check_parts(key, parts, held, upload.part_size)
            with translated("complete_multipart", key), upload.open_for_writing() as (payload, journal):
                for part_number in sorted(held.keys() - {part.part_number for part in parts}):
                    upload.append(journal, part_number, None, None)
                os.ftruncate(payload, size)
                self._stamp(payload)
                os.fsync(payload)
                meta = object_meta(key, os.fstat(payload))
                try:
                    self._publish(key, upload.directory.descriptor, "payload", PutMode.OVERWRITE, None)
                except FileNotFoundError:
                    raise no_such_upload(key, upload_id) from None  # aborted meanwhile
        try:
            self._drop_upload(upload_id)
        except OSError as error:
            # The object is complete all the same; the rest of the upload is swept later.
            _log.warning("store.upload_stays key=%s upload_id=%s error=%s", key, upload_id, error)
        return meta

    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        # Without the upload's lock: a process that still writes a part writes to files without a name.
        with translated("abort_multipart", key):
            intent = self._read_intent(upload_id)
            if intent is not None and intent["key"] == key:
                self._drop_upload(upload_id)

    # Finding

    def _open_directory(self, segments: Sequence[str], *, make: bool = False) -> int:
        """A descriptor of the directory, opened from the root without following symbolic links.

        With `make`, missing directories are made, and all their names are durable on return.
        """
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for segment in segments:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(segment, dir_fd=fd)
                    # Even if it existed: the process that made it may not have reached this line yet.
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
            ObjectNotFound: there is nothing, or something other than a regular file.
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

    @contextmanager
    def _opened(self, key: str) -> Generator[int]:
        """A descriptor of the object's file; see `_open_object`."""
        fd = self._open_object(key)
        try:
            yield fd
        finally:
            os.close(fd)

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
                    if (directory or entry.is_file(follow_symlinks=False)) and is_key(path):
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
                    yield object_meta(above + name, status)
        finally:
            os.close(fd)

    # Writing

    @contextmanager
    def _temporary(self, operation: str, key: str, mode: int = 0o600) -> Generator[tuple[str, int]]:
        """A new file without a name in the store; it is removed at the end unless it was renamed.

        Args:
            mode: Mode of the file, before the umask.
        """
        name = uuid.uuid4().hex
        with ExitStack() as stack:
            with translated(operation, key):
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

        Errors of the body's iterator are not translated: they belong to the source, not to the store.
        """
        end = offset + body.size
        position = offset
        checksum = 0
        for buffer in body:
            view = memoryview(buffer).cast("B")
            if position + len(view) > end:
                raise size_mismatch(key, body.size, position + len(view) - offset)
            checksum = crc32c(view, checksum)
            with translated(operation, key, position):
                write_all(fd, view, position)
            position += len(view)
        if position != end:
            raise size_mismatch(key, body.size, position - offset)
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
        with translated(operation, key):
            self._stamp(fd)
            os.fsync(fd)
            meta = object_meta(key, os.fstat(fd))
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

        The kernel's time stands still for a tick (up to 10 ms). Within one tick, a file can be replaced twice and get
        the first inode back: same inode, same size, same time, other bytes. The clock's nanoseconds distinguish them.
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
                    continue  # a delete removed a directory that was still empty
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP):
                        raise conflict(key, "a part of its path is no directory") from None
                    raise
                try:
                    self._admit(key, parent, segments[-1], mode, e_tag)
                    if mode is PutMode.CREATE:
                        os.link(name, segments[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
                    else:
                        os.rename(name, segments[-1], src_dir_fd=source, dst_dir_fd=parent)
                    # Within the lock: a process that is refused because of this object may rely on it.
                    os.fsync(parent)
                    return
                except FileNotFoundError:
                    os.stat(name, dir_fd=source, follow_symlinks=False)  # raises if it is the source that is gone
                except FileExistsError:
                    # Another program, without the lock, made the file.
                    raise lost(key, None, None) from None
                finally:
                    os.close(parent)
            raise StoreUnavailable(
                f"the directory of {key!r} is removed as fast as it is made", operation="put", key=key
            )

    def _admit(self, key: str, parent: int, leaf: str, mode: PutMode, e_tag: str | None) -> None:
        """Return if the mode allows the write over the existing object. The caller holds the key's lock."""
        try:
            status = os.stat(leaf, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            if mode is PutMode.UPDATE:
                raise lost(key, e_tag, None) from None
            return
        if stat.S_ISDIR(status.st_mode):
            # A writer that died between mkdir and link leaves an empty directory, which is not an object.
            try:
                os.rmdir(leaf, dir_fd=parent)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise conflict(key, "there are objects below it") from None
            if mode is PutMode.UPDATE:
                raise lost(key, e_tag, None)
            return
        if not stat.S_ISREG(status.st_mode):
            raise conflict(key, "the file of this name is not a regular one")
        if mode is PutMode.CREATE or (mode is PutMode.UPDATE and e_tag_of(status) != e_tag):
            raise lost(key, e_tag, e_tag_of(status))

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
        """One of the store's private directories: `tmp`, `locks` or `uploads`.

        Args:
            make: Make missing directories, including the store's, and sweep once per store object.

        Raises:
            RefusedError: in its place is a link or another user's directory.
            FileNotFoundError: the directory is missing, and `make` is false.
        """
        if make:
            make_directory(self.root)
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
                    # Leftovers that cannot be removed must not fail the operation.
                    _log.warning("store.not_swept url=%s error=%s", self.url, error)
            yield own

    def _sweep(self) -> None:
        """Remove leftovers of dead processes: old temporary files, and uploads without payload."""
        oldest = self._now_ns() / 1e9 - _SWEEP_AFTER_S
        with self._own("tmp") as tmp, self._own("uploads") as uploads:
            for name, status in tmp.entries():
                if status.st_mtime <= oldest:
                    with suppress(OSError):  # another process was faster, or a file in it cannot be removed
                        tmp.remove(name)
                        _log.info("store.swept name=%s", name)
            for upload_id in filter(is_upload_id, uploads.names()):
                # A payload never comes back, so a directory without one is dead even if a process has it open.
                with suppress(FileNotFoundError, RefusedError):
                    with uploads.below(upload_id) as upload:
                        dead = not upload.has("payload")
                    if dead:
                        self._drop_upload(upload_id)

    # Uploads

    def _upload_ids(self) -> list[str]:
        try:
            with self._own("uploads", make=False) as uploads:
                return list(filter(is_upload_id, uploads.names()))
        except FileNotFoundError:
            return []

    def _read_intent(self, upload_id: str) -> dict[str, Any] | None:
        """The contents of `upload.json`, or None if there is no such upload."""
        if not is_upload_id(upload_id):
            return None
        try:
            with self._own("uploads", make=False) as uploads, uploads.below(upload_id) as upload:
                return (
                    read_upload_intent(upload.read("upload.json", _MAX_INTENT_BYTES)) if upload.has("payload") else None
                )
        except FileNotFoundError:
            return None
        except ArtifactInvalid as error:
            # The file was complete when the upload began, so it was damaged later; the upload cannot be continued.
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
        # The rename comes first, so that the upload disappears at once and not file by file.
        doomed = f"{upload_id}-{uuid.uuid4().hex}"
        with self._own("uploads") as uploads, self._own("tmp") as tmp, suppress(FileNotFoundError):
            uploads.rename(upload_id, doomed, tmp)
            uploads.sync()
            with suppress(OSError):  # what stays is swept later
                tmp.remove(doomed)

    def _replace_part(
        self, upload: OpenUpload, held: PartMeta, payload: int, journal: int, offset: int, body: Body
    ) -> PartMeta:
        """Write a part that was acknowledged before; the earlier bytes stay until all of `body` has arrived.

        A process that was believed dead may send parts that its successor has already sent. Usually these are the same
        bytes, and the record stays valid. If they differ, the record is revoked first, because it must not cover a
        mixture.
        """
        with self._temporary("put_part", upload.key) as (_, fd):
            part = part_meta(held.part_number, body.size, self._write("put_part", upload.key, fd, 0, body))
            with translated("put_part", upload.key, offset):
                if part != held:
                    upload.append(journal, held.part_number, None, None)
                copy_bytes(fd, payload, offset)
        return part

    @contextmanager
    def _upload(
        self, operation: str, key: str, upload_id: str, held: Literal["shared", "alone"] | None = None
    ) -> Generator[OpenUpload]:
        """The upload, under its shared or exclusive lock.

        Part writers share the lock, and complete excludes them. Otherwise a late writer could write into the finished
        object.
        """
        check_key(key)
        if not is_upload_id(upload_id):
            raise no_such_upload(key, upload_id)
        with ExitStack() as stack:
            with translated(operation, key):
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
                    raise no_such_upload(key, upload_id) from None
                try:
                    intent = read_upload_intent(os.pread(guard, _MAX_INTENT_BYTES, 0))
                except ArtifactInvalid as error:
                    raise no_such_upload(key, upload_id) from error
            if intent["key"] != key:
                raise no_such_upload(key, upload_id)
            yield OpenUpload(key, upload_id, upload, intent["part_size"], self._journals)
