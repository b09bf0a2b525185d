"""Any other fsspec file system as a store: whole objects, without resume.

It promises no more than fsspec can: there are no multipart uploads, and only `memory://` has conditional writes,
because it serves one process. Durability is that of the file system.

An object appears at once and whole. On object stores fsspec does that when the file is closed; elsewhere the bytes go
to `<root>/.blobflow/tmp/` first and are moved from there.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from functools import partial
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

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
    Unsupported,
    UsageError,
)
from blobflow.stores.base import (
    RESERVED_SEGMENT,
    Body,
    Capabilities,
    ObjectMeta,
    PutMode,
    Store,
    StoredObject,
    check_key,
    is_key,
    plain,
)
from blobflow.stores.fsspec.clients import Client, ClientPool
from blobflow.stores.fsspec.errors import (
    PACKAGES,
    check_options,
    missing_package,
    taken,
    translate,
    translate_connecting,
)
from blobflow.untrusted import bounded_time, utc_time

_log = logging.getLogger(__name__)

_fsspec: Any = fsspec  # it has no annotations

_APPEAR_ON_CLOSE = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "ocilake", "oss", "obs", "swift", "tos"}
)
"""Object stores: closing the file publishes it, discarding it leaves nothing."""

_ANSWERS = (BlobflowError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""After these a connection is as good as before."""

_E_TAG_FIELDS = ("ETag", "etag", "e_tag")
_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "modified", "modify", "created")
_FACT_FIELDS = ("ino", "unique")
"""Fields that distinguish a file from the one that it replaced, if there is no entity tag."""


def _aiohttp_timeout(seconds: float) -> Any:
    import aiohttp  # installed with the stores that need it, and slow to import

    return aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


_PIECE = 4 * 1024 * 1024
"""Bytes that a copy through this process holds."""

_IDLE_OPTIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    **dict.fromkeys(
        ("sftp", "ssh"), lambda s: dict.fromkeys(("timeout", "banner_timeout", "auth_timeout", "channel_timeout"), s)
    ),
    "ftp": lambda s: {"timeout": s},
    **dict.fromkeys(("webdav", "dav"), lambda s: {"timeout": s}),
    **dict.fromkeys(("gs", "gcs"), lambda s: {"requests_timeout": _aiohttp_timeout(s)}),
    **dict.fromkeys(
        ("az", "abfs", "abfss", "adl"), lambda s: {"connection_timeout": int(s) or 1, "read_timeout": int(s) or 1}
    ),
}
"""Options that make a library give up on silence. In any case, `Client.run` gives its calls up."""

_T = TypeVar("_T")

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
        idle_timeout: Seconds without an answer before a call fails.
        storage_options: For the file system, credentials among them.

    Raises:
        InvalidStoreUrl: fsspec does not know the scheme.
        UsageError: the package that the scheme needs is not installed, or an option is misspelt.
    """

    def __init__(self, url: str, *, idle_timeout: float = 120.0, **storage_options: Any) -> None:
        scheme = url.partition("://")[0]
        try:
            implementation: Any = _fsspec.get_filesystem_class(scheme)
        except ValueError:
            if scheme in PACKAGES:
                raise missing_package(scheme) from None
            raise InvalidStoreUrl(
                f"invalid store url: unknown scheme {scheme!r}",
                hint="use s3://, file://, or a scheme that fsspec knows",
                url=f"{scheme}://...",
                reason="unknown scheme",
            ) from None
        except ImportError as error:
            raise missing_package(scheme, error) from error
        protocol: str | tuple[str, ...] = implementation.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        given = {**self._configured(protocols), **storage_options}
        check_options(scheme, implementation, given)
        if isinstance(given.get("auth"), list):  # JSON of the environment has no tuples, and httpx takes nothing else
            given["auth"] = tuple(given["auth"])
        self.url = url.rstrip("/")
        self._implementation = implementation
        self._memory = "memory" in protocols
        self._webdav = "webdav" in protocols
        self._sftp = "sftp" in protocols
        self._azure = "az" in protocols  # where a backslash is a slash
        self._appears_on_close = bool(protocols & _APPEAR_ON_CLOSE)
        self._bears_threads = self._memory or bool(getattr(implementation, "async_impl", False))
        self._capabilities = Capabilities(multipart=False, conditional=self._memory)
        idle_options = _IDLE_OPTIONS.get(scheme)
        self._storage_options = {**(idle_options(idle_timeout) if idle_options else {}), **given}
        self._idle_timeout = idle_timeout
        self._root: str | None = None
        self._container_seen = False
        self._local = self._memory or "file" in protocols
        self._clients = ClientPool(self._connect, idle_timeout_s=idle_timeout, threaded=not self._local)

    @override
    def capabilities(self) -> Capabilities:
        return self._capabilities

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
        if mode is not PutMode.OVERWRITE and not self.capabilities().conditional:
            raise self._unsupported("conditional writes")
        content = plain(body, self)
        if self._memory:
            return self._put_in_memory(key, content, mode, e_tag)
        with self._container_named("put", key), self._client("put", key) as client:
            with self._target(client, key) as path:
                self._write(client, "put", key, path, content)
            return self._verified(client, "put", key, content.size)

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        check_key(key)

        def read(client: Client) -> StoredObject:
            meta = self._meta(client, key)
            if meta.size > max_bytes:
                raise ObjectTooLarge(f"{key!r} has {meta.size} bytes, more than {max_bytes}", key=key, limit=max_bytes)
            data: bytes = client.run(client.connection.cat_file, self._path(key), moves=meta.size) if meta.size else b""
            self._check_pin(client, key, meta.e_tag)
            return StoredObject(data, meta)

        return self._look("get", key, read)

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        check_key(key)
        target = buffer.cast("B")
        end = offset + len(target)

        def read(client: Client) -> bytes:
            size = self._check_pin(client, key, e_tag).size
            if end > size:
                raise SizeMismatch(
                    f"{key!r} ends at byte {size}, wanted {end}", what="object", key=key, expected=end, actual=size
                )
            if not target:
                return b""
            fs = client.connection
            own = _webdav_range if self._webdav else _sftp_range if self._sftp else None
            cat = partial(own, fs) if own else fs.cat_file
            data: bytes = client.run(cat, self._path(key), start=offset, end=end, moves=len(target))
            if e_tag is not None:
                self._check_pin(client, key, e_tag)
            return data

        data = self._look("get_range", key, read, offset)
        if len(data) != len(target):
            raise StoreUnavailable(
                f"get_range {key!r} at {offset} in {self.url}: {len(data)} of {len(target)} bytes arrived",
                operation="get_range",
                key=key,
                offset=offset,
            )
        target[:] = data

    @override
    def head(self, key: str) -> ObjectMeta:
        check_key(key)
        return self._look("head", key, lambda client: self._meta(client, key))

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        above, slash, start = prefix.rpartition("/")
        if slash and not is_key(above):
            return
        yield from self._walk(above + slash, start, (start_after or "").encode("utf-8", "surrogateescape"), at_top=True)

    def _walk(self, above: str, start: str, after: bytes, *, at_top: bool = False) -> Iterator[ObjectMeta]:
        """Objects below the directory `above` (empty, or with a `/` at its end), one listing per directory."""

        def ls(client: Client) -> tuple[str, list[dict[str, Any]]]:
            fs = client.connection
            client.run(fs.invalidate_cache)
            inside = f"{self._root_of(client)}/{above}"
            if at_top and above and not self._bears_threads and not client.run(fs.isdir, self._path(above.rstrip("/"))):
                raise NotADirectoryError(above)  # FTP lists a file as if it were a directory with itself in it
            return inside, client.run(fs.ls, inside.rstrip("/") or "/", detail=True)

        try:
            inside, found = self._look("list", above, ls)
        except ObjectNotFound:
            return
        entries: list[tuple[bytes, str, dict[str, Any]]] = []
        inside = inside.lstrip("/")  # some file systems begin their names with it, others do not
        for info in found:
            name: str = info["name"].rstrip("/").lstrip("/")
            if not name.startswith(inside):
                continue  # some file systems list a directory's own marker
            name = name[len(inside) :]
            is_directory = info["type"] == "directory"
            if name.startswith(start) and "/" not in name and is_key(above + name) and not info.get("islink"):
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

        def remove(client: Client) -> None:
            if self._is_file(client, key):  # where a removal would take a directory as well
                client.run(client.connection.rm_file, self._path(key))

        with suppress(ObjectNotFound):
            self._look("delete", key, remove)

    @override
    def copy(self, source: str, target: str) -> ObjectMeta:
        check_key(source)
        check_key(target)
        meta = self.head(source)
        if self._in_place(target):
            return self.put(target, Body(meta.size, lambda: self._pieces(meta)))
        try:
            with self._client("copy", target) as client:
                with self._target(client, target) as path:
                    client.run(client.connection.cp_file, self._path(source), path, moves=meta.size)
                return self._verified(client, "copy", target, meta.size)
        except Unsupported:  # the protocol has no such thing
            return self.put(target, Body(meta.size, lambda: self._pieces(meta)))

    def _pieces(self, meta: ObjectMeta) -> Iterator[bytes]:
        for offset in range(0, meta.size, _PIECE):
            yield self.get_range(meta.key, offset, min(_PIECE, meta.size - offset), e_tag=meta.e_tag)

    @override
    def close(self) -> None:
        self._clients.close()

    def _no_multipart(self, *_: object, **__: object) -> NoReturn:
        raise self._unsupported("multipart uploads")

    create_multipart = put_part = list_parts = list_uploads = _no_multipart
    complete_multipart = abort_multipart = _no_multipart

    @staticmethod
    def _configured(protocols: set[str]) -> dict[str, Any]:
        """The options of fsspec's own configuration: its files, and FSSPEC_... in the environment."""
        configured: dict[str, dict[str, Any]] = _fsspec.config.conf
        return {name: value for protocol in sorted(protocols) for name, value in configured.get(protocol, {}).items()}

    # Writing

    def _put_in_memory(self, key: str, body: Body, mode: PutMode, e_tag: str | None) -> ObjectMeta:
        data = bytearray()
        _stream("put", key, body, data.extend)
        with self._client("put", key) as client:
            try:
                found = self._meta(client, key).e_tag
            except ObjectNotFound:
                found = None
            if (mode is PutMode.CREATE and found) or (mode is PutMode.UPDATE and found != e_tag):
                raise PreconditionFailed(
                    f"{key!r} {'is another one' if found else 'does not exist'}", key=key, expected=e_tag, actual=found
                )
            client.run(client.connection.pipe_file, self._path(key), bytes(data))
            return self._meta(client, key)

    @contextmanager
    def _target(self, client: Client, key: str) -> Generator[str]:
        """A path to write to; the file appears under the key when the block ends without an error."""
        final = self._path(key)
        if self._appears_on_close or self._memory:
            yield final
            return
        if self._in_place(key):
            self._make_parent(client, final)
            if client.run(client.connection.isdir, final):
                raise taken(key, self.url)
            yield final
            return
        temporary = self._temporary()
        self._make_parent(client, temporary)
        fs = client.connection
        try:
            yield temporary
            self._make_parent(client, final)
            if client.run(fs.isdir, final):
                raise taken(key, self.url)
            self._publish(client, temporary, final)
        except BaseException:
            if not client.broken:
                with suppress(Exception):  # the first error counts; what is left is a temporary file
                    client.run(fs.rm_file, temporary)
            raise

    def _in_place(self, key: str) -> bool:
        """Whether an object is put under its name at once: WebDAV servers misread these in the name of a move's target.

        Most of them make a file visible when it is whole all the same.
        """
        return self._webdav and (";" in key or "?" in key)

    def _publish(self, client: Client, temporary: str, final: str) -> None:
        """Rename, and replace an existing file."""
        fs = client.connection
        if self._webdav:
            # Its own move copies and deletes, and does not replace an existing file.
            client.run(fs.client.move, temporary, final, overwrite=True)
            return
        try:
            client.run(fs.mv, temporary, final)
        except FileExistsError:
            # A file system without replacing renames: the old file is moved away, and comes back on failure.
            aside = self._temporary()
            client.run(fs.mv, final, aside)
            try:
                client.run(fs.mv, temporary, final)
            except BaseException:
                client.run(fs.mv, aside, final)
                raise
            client.run(fs.rm_file, aside)

    def _temporary(self) -> str:
        return self._path(f"{RESERVED_SEGMENT}/tmp/{uuid.uuid4().hex}")

    def _make_parent(self, client: Client, path: str) -> None:
        fs = client.connection
        parent = path.rpartition("/")[0]
        for level in range(parent.count("/") + 1, -1, -1):
            try:
                client.run(fs.makedirs, parent, exist_ok=True)
                return
            except Exception:
                # Somebody else may have made it, or one above it, between two looks; each time there is one more.
                client.run(fs.invalidate_cache)
                if client.run(fs.isdir, parent):
                    return
                if client.broken or level == 0:
                    raise

    def _write(self, client: Client, operation: str, key: str, path: str, body: Body) -> None:
        handle: Any = client.run(client.connection.open, path, "wb")
        if self._sftp:
            handle.set_pipelined(True)  # or each 32 KiB wait for their acknowledgement; close waits for all of them
        buffered = getattr(handle, "blocksize", 0) or 0  # sent by the write that fills it

        def write(buffer: Buffer) -> None:
            client.run(handle.write, buffer, moves=len(buffer) + buffered)

        try:
            _stream(operation, key, body, write)
            client.run(handle.close, moves=body.size if self._webdav else buffered)
        except BaseException:
            if not client.broken:
                self._discard(client, key, handle)
            raise

    def _discard(self, client: Client, key: str, handle: Any) -> None:
        """Drop a half-written file. Closing it would publish its incomplete content."""
        try:
            if self._appears_on_close or self._webdav:
                client.run(handle.discard)
            else:
                client.run(handle.close)  # a temporary file, which is removed next
        except Exception as error:  # noqa: BLE001  # that of the write counts
            _log.warning("store.discard_failed key=%s error=%s", key, type(error).__name__)
        finally:
            if self._appears_on_close:
                handle.closed = True  # or the garbage collector closes it

    def _verified(self, client: Client, operation: str, key: str, size: int) -> ObjectMeta:
        meta = self._meta(client, key)
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

    def _look(self, operation: str, key: str, action: Callable[[Client], _T], offset: int | None = None) -> _T:
        """The result of `action`. "Not found" counts only if a fresh connection confirms it.

        A connection that mixes up its responses reports existing objects as "not found".

        Raises:
            ObjectNotFound: nothing was found, twice.
            StoreConfigurationError: the container does not exist either.
        """
        try:
            return self._act(operation, key, action, offset)
        except ObjectNotFound:
            if self._bears_threads or self._local:
                self._require_container(operation, key)
                raise
        try:
            return self._act(operation, key, action, offset, fresh=True)
        except ObjectNotFound:
            self._require_container(operation, key)
            raise

    def _act(
        self, operation: str, key: str, action: Callable[[Client], _T], offset: int | None, *, fresh: bool = False
    ) -> _T:
        with self._client(operation, key, offset, fresh=fresh) as client:
            try:
                return action(client)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key) from None

    def _require_container(self, operation: str, key: str) -> None:
        """Refuse to call a store empty whose bucket, container or server directory is not there."""
        if self._container_seen or not (self._appears_on_close or self._webdav):
            return
        with self._client(operation, key) as client:
            container = "" if self._webdav else self._root_of(client).lstrip("/").partition("/")[0]
            try:
                client.run(client.connection.info, container)
            except FileNotFoundError:
                what = "its base_url" if self._webdav else f"{container!r}"
                raise StoreConfigurationError(
                    f"{self.url}: {what} does not exist there",
                    hint="create it first, or correct the URL",
                    operation=operation,
                    key=key or None,
                ) from None
        self._container_seen = True

    @contextmanager
    def _container_named(self, operation: str, key: str) -> Generator[None]:
        """Name the missing container if that is why something cannot be written."""
        try:
            yield
        except BlobflowError as error:
            if isinstance(error, ObjectNotFound) or isinstance(error.__cause__, FileNotFoundError):
                self._require_container(operation, key)
            raise

    def _connect(self) -> Any:
        """The file system; runs in the thread of its client."""
        options = self._storage_options
        if not self._bears_threads:
            options = {**options, "skip_instance_cache": True}
        try:
            fs, path = _fsspec.url_to_fs(self.url, **options)
        except Exception as error:
            raise translate_connecting(
                error, url=self.url, implementation=self._implementation, options=self._storage_options
            ) from error
        if not self._bears_threads and (channel := getattr(getattr(fs, "ftp", None), "get_channel", None)):
            channel().settimeout(self._idle_timeout)  # paramiko takes timeouts for connecting alone
        if self._webdav:
            _quote_paths(fs.client)
        self._root = path.rstrip("/")
        return fs

    def _root_of(self, client: Client) -> str:
        """The path of this store in the file system, without a `/` at its end; known once there was a client."""
        del client
        assert self._root is not None
        return self._root

    def _path(self, key: str) -> str:
        """The path of `key`.

        Raises:
            InvalidKey: the file system would make another name of it.
        """
        assert self._root is not None
        path = f"{self._root}/{key}"
        stripped: str = self._implementation._strip_protocol(path)  # noqa: SLF001  # a method that fsspec documents
        if stripped.strip("/") != path.strip("/") or (self._azure and re.search(r"\\|\?versionid=", key)):
            raise InvalidKey(
                f"{key!r} cannot be stored in {self.url}: it would get another name there",
                hint="use a key without '?', '#' and backslashes",
                key=key,
                reason="another name there",
            )
        return path

    @contextmanager
    def _client(self, operation: str, key: str, offset: int | None = None, *, fresh: bool = False) -> Generator[Client]:
        """A client for one call; its library's errors are raised as this package's errors.

        Other errors, such as those of a body's own iterator, pass through.
        """
        with _memory_lock if self._memory else nullcontext(), self._clients.client(fresh=fresh, keep=_ANSWERS) as it:
            try:
                yield it
            except BlobflowError:
                raise
            except Exception as error:
                if all(raised is not error for raised in it.raised):
                    raise
                it.broken = it.broken or not isinstance(error, _ANSWERS)
                raise translate(error, url=self.url, operation=operation, key=key, offset=offset) from error

    def _is_file(self, client: Client, key: str) -> bool:
        fs = client.connection
        client.run(fs.invalidate_cache)  # others write too
        info: dict[str, Any] = client.run(fs.info, self._path(key))
        return info["type"] == "file"

    def _meta(self, client: Client, key: str) -> ObjectMeta:
        fs = client.connection
        client.run(fs.invalidate_cache)  # others write too
        try:
            info: dict[str, Any] = client.run(fs.info, self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            info = {"type": None}
        if info["type"] != "file" or info.get("islink"):
            raise ObjectNotFound(f"no object {key!r} in {self.url}", key=key)
        return _meta(key, info)

    def _check_pin(self, client: Client, key: str, e_tag: str | None) -> ObjectMeta:
        meta = self._meta(client, key)
        if e_tag is not None and meta.e_tag != e_tag:
            raise ObjectChanged(f"{key!r} was replaced while it was read", key=key, expected=e_tag, actual=meta.e_tag)
        return meta

    def _unsupported(self, capability: str) -> Unsupported:
        return Unsupported(
            f"{self.url} has no {capability}", hint="use s3:// or file://", store=self.url, capability=capability
        )


def _stream(operation: str, key: str, body: Body, write: Callable[[Buffer], object]) -> None:
    """Pass all of `body` to `write`, and check its size and checksum.

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


def _quote_paths(client: Any) -> None:
    """Make WebDAV's client use paths in URLs unchanged.

    Without this it treats `#`, `?` and `%` as parts of the URL. Some servers also cut paths at a `;`.
    """
    join: Callable[..., Any] = client.join_url

    def join_url(path: str, add_trailing_slash: bool = False) -> Any:
        return join(quote(path), add_trailing_slash=add_trailing_slash)

    client.join_url = join_url


def _sftp_range(fs: Any, path: str, *, start: int, end: int) -> bytes:
    """Bytes of a file, asked for all at once; fsspec's way waits for each 32 KiB before it asks for the next ones."""
    with fs.open(path, "rb") as file:
        return b"".join(file.readv([(start, end - start)]))


def _webdav_range(fs: Any, path: str, *, start: int, end: int) -> bytes:
    """Bytes of a file by one request; fsspec makes three, and asks the root of the server whether it has ranges."""
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with fs.client.http.stream("GET", fs.client.join_url(path), headers=headers) as response:
        if response.status_code == 404:
            raise FileNotFoundError(path)
        response.raise_for_status()
        if response.status_code != 206 and start > 0:
            raise NotImplementedError("ranges")
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= end - start:
                break
    return bytes(data[: end - start])


def _meta(key: str, info: dict[str, Any]) -> ObjectMeta:
    modified = next((time for name in _TIME_FIELDS if (time := _time(info.get(name))) is not None), None)
    e_tag = next((str(info[name]) for name in _E_TAG_FIELDS if info.get(name)), None)
    if e_tag is None:
        facts = [info["size"], *(info.get(name) for name in _FACT_FIELDS), *(_time(info.get(n)) for n in _TIME_FIELDS)]
        e_tag = f'"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"'
    return ObjectMeta(key, info["size"], e_tag, modified)


def _time(value: Any) -> datetime | None:
    """A time as fsspec's file systems report it: aware datetimes, naive ones in UTC, seconds, or FTP's digits."""
    if isinstance(value, datetime):
        return bounded_time(value)
    if isinstance(value, int | float):
        return utc_time(value)
    if isinstance(value, str) and re.fullmatch(r"\d{14}(\.\d+)?", value):
        with suppress(ValueError):
            return bounded_time(datetime.strptime(value[:14], "%Y%m%d%H%M%S").replace(tzinfo=timezone.utc))
    return None
