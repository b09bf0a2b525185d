"""Any other fsspec file system as a store: whole objects, without resume.

What fsspec cannot promise is not promised here: there are no multipart uploads, and conditional writes exist for
`memory://` alone, where one process is all there is. Durability is the file system's own.

An object appears at once and whole. On object stores fsspec does that when the file is closed; elsewhere the bytes go
to `<root>/.blobflow/tmp/` first and are moved from there.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import cached_property
from typing import Any

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from blobflow.checksum import Buffer, crc32c
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    InvalidKey,
    InvalidStoreUrl,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    SizeMismatch,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
    UsageError,
)
from blobflow.stores.base import (
    RESERVED_SEGMENT,
    Abilities,
    Body,
    ObjectMeta,
    PartMeta,
    PutMode,
    Store,
    StoredObject,
    UploadMeta,
    check_key,
    plain,
)
from blobflow.untrusted import bounded_time, utc_time

_log = logging.getLogger(__name__)

_fsspec: Any = fsspec  # it has no annotations

_APPEAR_ON_CLOSE = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "ocilake", "oss", "obs", "swift", "tos"}
)
"""Object stores: closing the file publishes it, discarding it leaves nothing."""

_E_TAG_FIELDS = ("ETag", "etag", "e_tag")
_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "created")

_memory_lock = threading.RLock()
"""fsspec's memory looks twice, at whether a file is there and at what it is; between the two it may go. And the lock
makes conditional writes of it.
"""


class FsspecStore(Store):
    """Objects in an fsspec file system, below the path of a URL.

    Entity tags are the file system's own; where it has none they are made of size and times. A pinned read looks at
    them before and after, because fsspec cannot ask for "this version or nothing".

    The file system is connected to by the first call.

    Args:
        url: For example `gs://bucket/prefix` or `sftp://host/path`; without credentials.
        storage_options: For the file system, credentials among them.

    Raises:
        InvalidStoreUrl: fsspec does not know the scheme.
        UsageError: the package that the scheme needs is not installed.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        scheme = url.partition("://")[0]
        try:
            implementation: Any = _fsspec.get_filesystem_class(scheme)
        except ValueError:
            raise InvalidStoreUrl(
                f"invalid store url: unknown scheme {scheme!r}",
                hint="use s3://, file://, or a scheme that fsspec knows",
                url=f"{scheme}://...",
            ) from None
        except ImportError as error:
            raise UsageError(f"{scheme}:// needs a package that is not installed", hint=str(error)) from error
        protocol: str | tuple[str, ...] = implementation.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.url = url.rstrip("/")
        self._memory = "memory" in protocols
        self._appears_on_close = bool(protocols & _APPEAR_ON_CLOSE)
        self.abilities = Abilities(multipart=False, conditional=self._memory)
        self._storage_options = storage_options

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
        if mode is not PutMode.OVERWRITE and not self.abilities.conditional:
            raise self._unsupported("conditional writes")
        content = plain(body, self)
        if self._memory:
            return self._put_in_memory(key, content, mode, e_tag)
        with self._target("put", key) as path:
            self._write("put", key, path, content)
        return self._verified("put", key, content.size)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)
        with self._reading("get", key) as fs:
            meta = self._meta(fs, key)
            if meta.size > max_bytes:
                raise ObjectTooLarge(f"{key!r} has {meta.size} bytes, more than {max_bytes}", key=key, limit=max_bytes)
            data: bytes = fs.cat_file(self._path(key)) if meta.size else b""
            self._check_pin(fs, key, meta.e_tag)
        return StoredObject(data, meta)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        check_key(key)
        target = buffer.cast("B")
        with self._reading("get_range", key, offset) as fs:
            size = self._check_pin(fs, key, e_tag).size
            end = offset + len(target)
            if end > size:
                raise SizeMismatch(
                    f"{key!r} ends at byte {size}, wanted {end}", what="object", key=key, expected=end, actual=size
                )
            data: bytes = fs.cat_file(self._path(key), start=offset, end=end) if target else b""
            if e_tag is not None:
                self._check_pin(fs, key, e_tag)
            if len(data) != len(target):
                raise StoreUnavailable(
                    f"get_range {key!r} at {offset}: {len(data)} of {len(target)} bytes arrived",
                    operation="get_range",
                    key=key,
                    offset=offset,
                )
            target[:] = data

    @override
    def head(self, key: str) -> ObjectMeta:
        check_key(key)
        with self._reading("head", key) as fs:
            return self._meta(fs, key)

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        above, slash, start = prefix.rpartition("/")
        if slash and not _is_key(above):
            return
        yield from self._walk(above + slash, start, (start_after or "").encode("utf-8", "surrogateescape"))

    def _walk(self, above: str, start: str, after: bytes) -> Iterator[ObjectMeta]:
        """Objects below the directory `above` (empty, or with a `/` at its end), one listing per directory."""
        with self._translated("list", above), self._guard():
            inside = self._path(above)
            fs = self._filesystem()
            fs.invalidate_cache()
            try:
                found: list[dict[str, Any]] = fs.ls(inside.rstrip("/") or "/", detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return
        entries: list[tuple[bytes, str, dict[str, Any]]] = []
        for info in found:
            name: str = info["name"].rstrip("/")
            if not name.startswith(inside):
                continue  # some file systems list a directory's own marker
            name = name[len(inside) :]
            is_directory = info["type"] == "directory"
            if name.startswith(start) and "/" not in name and _is_key(above + name) and not info.get("islink"):
                sort_key = f"{above}{name}{'/' * is_directory}".encode()
                if sort_key > after or (is_directory and after.startswith(sort_key)):
                    entries.append((sort_key, name, info))
        for _, name, info in sorted(entries, key=lambda entry: entry[0]):
            if info["type"] == "directory":
                yield from self._walk(f"{above}{name}/", "", after)
            elif info["type"] == "file":
                yield _meta(above + name, info)

    @override
    def delete(self, key: str) -> None:
        check_key(key)
        with self._translated("delete", key), self._guard():
            fs = self._filesystem()
            try:
                fs.rm_file(self._path(key))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return

    @override
    def copy(self, source: str, target: str) -> ObjectMeta:
        check_key(source)
        check_key(target)
        size = self.head(source).size
        with self._target("copy", target) as path, self._reading("copy", source) as fs:
            fs.cp_file(self._path(source), path)
        return self._verified("copy", target, size)

    @override
    def create_multipart(
        self,
        key: str,
        *,
        part_size: int,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> str:
        raise self._unsupported("multipart uploads")

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        raise self._unsupported("multipart uploads")

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        raise self._unsupported("multipart uploads")

    @override
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        raise self._unsupported("multipart uploads")

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        raise self._unsupported("multipart uploads")

    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        raise self._unsupported("multipart uploads")

    # Writing

    def _put_in_memory(self, key: str, body: Body, mode: PutMode, e_tag: str | None) -> ObjectMeta:
        data = bytearray()
        _stream("put", key, body, data.extend)
        with self._translated("put", key), _memory_lock:
            fs = self._filesystem()
            try:
                found = self._meta(fs, key).e_tag
            except ObjectNotFound:
                found = None
            if (mode is PutMode.CREATE and found) or (mode is PutMode.UPDATE and found != e_tag):
                raise PreconditionFailed(
                    f"{key!r} {'is another one' if found else 'does not exist'}", key=key, expected=e_tag, actual=found
                )
            fs.pipe_file(self._path(key), bytes(data))
            return self._meta(fs, key)

    @contextmanager
    def _target(self, operation: str, key: str) -> Generator[str]:
        """A path to write to; what was written appears under the key when the block ends well."""
        if self._appears_on_close or self._memory:
            with self._guard():
                yield self._path(key)
            return
        with self._translated(operation, key):
            fs = self._filesystem()
            temporary = self._path(f"{RESERVED_SEGMENT}/tmp/{uuid.uuid4().hex}")
            final = self._path(key)
            fs.makedirs(temporary.rpartition("/")[0], exist_ok=True)
        try:
            yield temporary
            with self._translated(operation, key):
                fs.makedirs(final.rpartition("/")[0], exist_ok=True)
                if fs.isdir(final):
                    raise IsADirectoryError(final)
                fs.mv(temporary, final)
        except BaseException:
            if fs.exists(temporary):
                fs.rm_file(temporary)
            raise

    def _write(self, operation: str, key: str, path: str, body: Body) -> None:
        with self._translated(operation, key):
            handle: Any = self._filesystem().open(path, "wb")

        def write(buffer: Buffer) -> None:
            with self._translated(operation, key):
                handle.write(buffer)

        try:
            _stream(operation, key, body, write)
            with self._translated(operation, key):
                handle.close()
        except BaseException:
            self._discard(key, handle)
            raise

    def _discard(self, key: str, handle: Any) -> None:
        """Let go of a half-written file. Closing it would publish what is there so far."""
        if not self._appears_on_close:
            handle.close()  # a temporary file, which is removed next
            return
        try:
            handle.discard()
        except OSError as error:
            _log.warning("store.discard_failed key=%s error=%s", key, type(error).__name__)
        finally:
            handle.closed = True  # or the garbage collector closes it

    def _verified(self, operation: str, key: str, size: int) -> ObjectMeta:
        with self._reading(operation, key) as fs:
            meta = self._meta(fs, key)
        if meta.size != size:
            raise SizeMismatch(
                f"{key!r} has {meta.size} bytes after a {operation} of {size}",
                what="object",
                key=key,
                expected=size,
                actual=meta.size,
            )
        return meta

    # Reading

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        """The file system, and the path of this store in it without a `/` at its end."""
        fs, path = _fsspec.url_to_fs(self.url, **self._storage_options)
        return fs, path.rstrip("/")

    def _filesystem(self) -> Any:
        return self._connection[0]

    @property
    def _root(self) -> str:
        return self._connection[1]

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _guard(self) -> AbstractContextManager[Any]:
        return _memory_lock if self._memory else nullcontext()

    @contextmanager
    def _reading(self, operation: str, key: str, offset: int | None = None) -> Generator[Any]:
        with self._translated(operation, key, offset), self._guard():
            try:
                yield self._filesystem()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key) from None

    def _meta(self, fs: Any, key: str) -> ObjectMeta:
        fs.invalidate_cache()  # others write too
        try:
            info: dict[str, Any] = fs.info(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            info = {"type": None}
        if info["type"] != "file" or info.get("islink"):
            raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key)
        return _meta(key, info)

    def _check_pin(self, fs: Any, key: str, e_tag: str | None) -> ObjectMeta:
        meta = self._meta(fs, key)
        if e_tag is not None and meta.e_tag != e_tag:
            raise ObjectChanged(f"{key!r} was replaced while it was read", key=key, expected=e_tag, actual=meta.e_tag)
        return meta

    def _unsupported(self, ability: str) -> Unsupported:
        return Unsupported(f"{self.url} has no {ability}", hint="use s3:// or file://", store=self.url, ability=ability)

    @contextmanager
    def _translated(self, operation: str, key: str, offset: int | None = None) -> Generator[None]:
        try:
            yield
        except BlobflowError:
            raise
        except Exception as error:
            # File systems raise the errors of all kinds of clients; none of them may pass.
            raise self._translation(error, operation, key, offset) from error

    def _translation(self, error: Exception, operation: str, key: str, offset: int | None) -> BlobflowError:
        # Foreign messages may quote URLs and headers, so that only their type is shown; the rest is in __cause__.
        message = f"{operation} {key!r}: {type(error).__name__}"
        if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
            return InvalidKey(
                f"{key!r} cannot be stored: it, or a part of its path, is taken",
                hint="here a key cannot be an object and the directory of others at once",
                key=key,
                reason="object and directory of others",
            )
        if isinstance(error, NotImplementedError):
            return self._unsupported(operation)
        if isinstance(error, PermissionError):
            return StoreConfigurationError(message, operation=operation, key=key)
        if isinstance(error, TimeoutError):
            return TimedOut(message, operation=operation, key=key, offset=offset)
        return StoreUnavailable(message, operation=operation, key=key, offset=offset)


def _stream(operation: str, key: str, body: Body, write: Callable[[Buffer], object]) -> None:
    """Hand all of `body` to `write`, and prove that it was what it said.

    Errors of the body's own iterator pass through: they are the source's, not the store's.
    """
    size = 0
    checksum = 0
    for buffer in body:
        view = memoryview(buffer).cast("B")
        size += len(view)
        if size > body.size:
            break
        checksum = crc32c(view, checksum)
        write(view)
    if size != body.size:
        raise SizeMismatch(
            f"the body for {operation} {key!r} has another size than {body.size}",
            what="body",
            key=key,
            expected=body.size,
            actual=size,
        )
    if body.crc32c is not None and checksum != body.crc32c:
        raise ChecksumMismatch(
            f"the body for {operation} {key!r} has CRC32C {checksum:08x} instead of {body.crc32c:08x}",
            hint="the source changed, or was damaged on the way here; nothing was stored",
            what="body",
            key=key,
            expected=body.crc32c,
            actual=checksum,
        )


def _is_key(path: str) -> bool:
    try:
        check_key(path)
    except InvalidKey:
        return False
    return True


def _meta(key: str, info: dict[str, Any]) -> ObjectMeta:
    modified = next((time for name in _TIME_FIELDS if (time := _time(info.get(name))) is not None), None)
    e_tag = next((str(info[name]) for name in _E_TAG_FIELDS if info.get(name)), None)
    if e_tag is None:
        facts = [info["size"], info.get("ino"), *(_time(info.get(name)) for name in _TIME_FIELDS)]
        e_tag = f'"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"'
    return ObjectMeta(key, info["size"], e_tag, modified)


def _time(value: Any) -> datetime | None:
    """A moment as fsspec's file systems tell it: aware datetimes, naive ones in UTC, or seconds."""
    if isinstance(value, datetime):
        return bounded_time(value)
    if isinstance(value, int | float):
        return utc_time(value)
    return None
