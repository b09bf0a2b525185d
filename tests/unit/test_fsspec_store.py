"""fsspec stores: one call per connection, silence, "not found", and errors that say what to correct."""

from __future__ import annotations

import ftplib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from blobflow.errors import (
    BlobflowError,
    ObjectNotFound,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    UsageError,
)
from blobflow.stores import open_store
from blobflow.stores.fsspec.store import FsspecStore


class Fragile(MemoryFileSystem):
    """Files in memory behind a client that, like those of SFTP and FTP, bears one call at a time."""

    protocol = "fragile"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    pseudo_dirs: ClassVar[list[str]] = [""]

    connections: ClassVar[list[Fragile]] = []
    at_once: ClassVar[int] = 0
    rendezvous: ClassVar[threading.Barrier | None] = None
    liars: ClassVar[list[Fragile]] = []
    """Connections that say that nothing is there."""
    silent: ClassVar[threading.Event | None] = None
    refusal: ClassVar[BaseException | None] = None

    def __init__(self, host: str = "", password: str = "", **options: Any) -> None:
        super().__init__(**options)
        if password == "wrong":
            raise AuthenticationException("Authentication failed: password=wrong")
        self.busy = threading.Lock()
        Fragile.connections.append(self)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("fragile://", "memory://"))

    def _use(self) -> None:
        assert self.busy.acquire(blocking=False), "two calls on one connection"
        try:
            if Fragile.refusal is not None:
                raise Fragile.refusal
            if Fragile.silent is not None:
                Fragile.silent.wait()
            if Fragile.rendezvous is not None:
                Fragile.rendezvous.wait(10)
        finally:
            self.busy.release()

    def info(self, path: str, **options: Any) -> Any:
        self._use()
        if any(liar is self for liar in Fragile.liars):  # equal ones are all of one URL
            raise FileNotFoundError(path)
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._use()
        if any(liar is self for liar in Fragile.liars):  # equal ones are all of one URL
            raise FileNotFoundError(path)
        return super().ls(path, detail=detail, **options)


class AuthenticationException(Exception):
    """As paramiko calls it."""


@pytest.fixture(autouse=True)
def fragile() -> Iterator[type[Fragile]]:
    """The file system, fresh."""
    fsspec.register_implementation("fragile", Fragile, clobber=True)
    Fragile.store.clear()
    Fragile.pseudo_dirs[:] = [""]
    Fragile.connections.clear()
    yield Fragile
    if Fragile.silent is not None:
        Fragile.silent.set()
    Fragile.silent = Fragile.rendezvous = Fragile.refusal = None
    Fragile.liars = []


@pytest.fixture
def store() -> Iterator[FsspecStore]:
    store = FsspecStore("fragile://place")
    yield store
    store.close()


# Threads and silence


def test_each_call_has_a_connection_of_its_own(store: FsspecStore, fragile: type[Fragile]):
    """Calls of four threads, all in the middle at one moment, are on four connections, which are kept for later."""
    store.put("key", b"content")
    fragile.rendezvous = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        assert {meta.size for meta in pool.map(lambda _: store.head("key"), range(4))} == {7}
    fragile.rendezvous = None
    assert len(fragile.connections) == 4
    for _ in range(8):
        store.head("key")
    assert len(fragile.connections) == 4


def test_silence_ends_a_call(fragile: type[Fragile]):
    """A client that never answers is given up after the idle timeout, and the next call has another connection."""
    store = FsspecStore("fragile://place", idle_timeout=0.2)
    store.put("key", b"content")
    fragile.silent = threading.Event()
    with pytest.raises(TimedOut, match="fragile://place"):
        store.head("key")
    fragile.silent.set()
    fragile.silent = None
    before = len(fragile.connections)
    assert store.head("key").size == 7
    assert len(fragile.connections) == before + 1
    store.close()


def test_not_found_is_believed_of_a_fresh_connection_alone(store: FsspecStore, fragile: type[Fragile]):
    """A connection that mixes up its answers hides nothing: head, get, list and delete look twice."""
    store.put("key", b"content")
    looks: list[Callable[[], Any]] = [
        lambda: store.head("key"),
        lambda: store.get("key", max_bytes=10),
        lambda: store.get_range("key", 0, 7),
        lambda: list(store.list()),
        lambda: store.delete("key"),
    ]
    for look in looks:
        fragile.liars = list(fragile.connections)
        assert look() != []
    fragile.liars = list(fragile.connections)
    with pytest.raises(ObjectNotFound):
        store.head("key")


def test_a_connection_that_failed_is_not_used_again(store: FsspecStore, fragile: type[Fragile]):
    """What is still on its way in it would be the answer to the next call."""
    store.put("key", b"content")
    fragile.refusal = ConnectionResetError(104, "reset")
    with pytest.raises(StoreUnavailable, match="connection reset by peer"):
        store.head("key")
    fragile.refusal = None
    before = len(fragile.connections)
    assert store.head("key").size == 7
    assert len(fragile.connections) == before + 1


# Errors


class _Answer(Exception):
    """An error with a status, as most client libraries have it."""

    def __init__(self, status_code: int) -> None:
        super().__init__("https://user:SECRET@host/?sig=SECRET")
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (_Answer(401), StoreConfigurationError),
        (_Answer(403), StoreConfigurationError),
        (_Answer(400), StoreConfigurationError),
        (_Answer(404), ObjectNotFound),
        (_Answer(408), StoreUnavailable),
        (_Answer(423), StoreUnavailable),
        (_Answer(429), SlowDown),
        (_Answer(500), StoreUnavailable),
        (_Answer(503), SlowDown),
        (OSError("Forbidden: https://host/SECRET"), StoreConfigurationError),  # gcsfs
        (ftplib.error_perm("530 SECRET"), StoreConfigurationError),
        (ftplib.error_perm("550 SECRET"), StoreConfigurationError),
        (ftplib.error_temp("421 SECRET"), StoreUnavailable),
        (AuthenticationException("SECRET"), StoreConfigurationError),
        (AuthenticationException("transport shut down or saw EOF"), StoreUnavailable),
        (TypeError("SECRET"), StoreConfigurationError),
        (KeyError("SECRET"), StoreUnavailable),
        (EOFError(), StoreUnavailable),
    ],
)
def test_what_trying_again_cannot_help_is_final(
    store: FsspecStore, fragile: type[Fragile], error: Exception, kind: type[BlobflowError]
):
    """Refusals are final and at once, what may pass is temporary, and no text of the library is shown."""
    fragile.refusal = error
    with pytest.raises(kind) as refusal:
        store.head("key")
    assert type(refusal.value) is kind
    assert "SECRET" not in f"{refusal.value} {refusal.value.hint}"
    assert "fragile://place" in str(refusal.value)


def test_a_wrong_password_is_final(fragile: type[Fragile]):
    """It is refused at the first call, in the words of the configuration, and not repeated for two minutes."""
    store = open_store("fragile://place", password="wrong")
    began = time.monotonic()
    with pytest.raises(StoreConfigurationError, match=r"connect to fragile://place: refused") as refusal:
        store.head("key")
    assert time.monotonic() - began < 5
    assert "wrong" not in str(refusal.value)
    assert "credentials" in refusal.value.hint


@pytest.mark.parametrize(
    ("url", "options", "message", "hint"),
    [
        ("ftp://host/path", {"pasword": "x"}, "ftp:// has no option 'pasword'", "did you mean password?"),
        ("ftp://host/path", {"qwertz": 1}, "ftp:// has no option 'qwertz'", "it takes acct, "),
        ("sftp://host/path", {"key_file": "x"}, "sftp:// has no option 'key_file'", "did you mean key_filename?"),
        ("gs://bucket", {"tokn": "x"}, "gs:// has no option 'tokn'", "did you mean token?"),
        ("az://container", {"account": "x"}, "az:// has no option 'account'", "did you mean account_"),
        ("webdav://path", {"baseurl": "x"}, "webdav:// has no option 'baseurl'", "did you mean base_url?"),
    ],
)
def test_a_misspelt_option_is_named(url: str, options: dict[str, Any], message: str, hint: str):
    """Most file systems swallow options that they do not know; here the nearest that exists is named."""
    with pytest.raises(UsageError) as refusal:
        open_store(url, **options)
    assert message in str(refusal.value)
    assert refusal.value.hint.startswith(hint)


def test_a_missing_option_is_named(monkeypatch: pytest.MonkeyPatch):
    """With the variable of the environment that gives it."""
    store = open_store("webdav://path")
    with pytest.raises(UsageError, match="webdav:// needs the option base_url") as refusal:
        store.head("key")
    assert "FSSPEC_WEBDAV_BASE_URL" in refusal.value.hint


def test_a_key_file_that_is_absent_is_no_absent_object(fragile: type[Fragile], monkeypatch: pytest.MonkeyPatch):
    """What is not found while connecting is a wrong option, not an answer of the store."""

    def absent(self: Fragile, **options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/no/such/key")

    monkeypatch.setattr(Fragile, "__init__", absent)
    with pytest.raises(StoreConfigurationError, match="'/no/such/key'"):
        FsspecStore("fragile://place").head("key")


@pytest.mark.parametrize(("scheme", "package"), [("webdav", "webdav4[fsspec]"), ("sftp", "paramiko"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch):
    """Also for schemes that fsspec knows only once the package is there."""

    def missing(_: str) -> None:
        raise ImportError if scheme != "webdav" else ValueError

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UsageError) as refusal:
        FsspecStore(f"{scheme}://host")
    assert refusal.value.hint == f"pip install '{package}'"


def test_an_absent_container_is_not_an_empty_list(monkeypatch: pytest.MonkeyPatch):
    """A bucket or container that does not exist is a wrong URL; one that does, and holds nothing, is empty."""
    monkeypatch.setattr(Fragile, "protocol", ("fragile", "gs"))
    store = FsspecStore("fragile://bucket/prefix")
    calls: list[Callable[[], Any]] = [
        lambda: list(store.list()),
        lambda: store.head("key"),
        lambda: store.delete("key"),
    ]
    for call in calls:
        with pytest.raises(StoreConfigurationError, match="'bucket' does not exist"):
            call()
    Fragile.pseudo_dirs.append("/bucket")
    assert list(store.list()) == []
    store.close()
