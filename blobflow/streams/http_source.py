"""A file on a web server as the source of a transfer: one version of it, from any offset, over broken connections.

Rules: RFC 9110, sections 13 (conditional requests), 14 (ranges), 15.4 (redirects) and 10.2.3 (Retry-After).
"""

from __future__ import annotations

import base64
import logging
import re
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple, NoReturn, TypedDict
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from typing_extensions import override

from blobflow.activity import Activity, doing
from blobflow.backoff import DEFAULT_PATIENCE_S, Backoff
from blobflow.checksum import crc32c
from blobflow.errors import (
    BlobflowError,
    NotFoundError,
    SlowDown,
    SourceChanged,
    StoreConfigurationError,
    StoreUnavailable,
    TemporaryError,
    TimedOut,
    Unsupported,
    UsageError,
    Value,
)
from blobflow.http.client import HttpClient, HttpError, Response
from blobflow.streams.ends import BEGIN_AGAIN, Pin, PinnedSource
from blobflow.version import __version__

log = logging.getLogger(__name__)

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 10
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_SLOW_DOWN: Final = frozenset({429, 503})
_SKIP_BYTES: Final = 256 * 1024
_SAFE: Final = "/%:@!$&'()*+,;=~-._"


class HttpSource(PinnedSource):
    """The file at an HTTP(S) URL, pinned to its strong ETag or, without one, to its Last-Modified date.

    If a connection breaks, falls silent or ends early, a new one continues at the next byte (`Range` with `If-Range`).
    If the server has no ranges, or sends nothing that pins the file, the body is read again from its beginning; the
    CRC32C of the bytes read before proves that they are the same. If a server sends neither a length nor chunks, the
    end of the file cannot be distinguished from a broken connection. Then give `total_size` in the checkpoint, or a
    digest.

    Redirects are followed again for each request, so a signed target may expire meanwhile. They are never followed from
    HTTPS to HTTP. Certificates are checked. Neither credentials nor the query, which may be a signature, are ever
    shown.

    Args:
        url: `http://` or `https://`. A user name and password in it become the Authorization header.
        headers: Sent to the origin of the URL, and not to the targets of redirects.
        tls: Context for another CA, or a client certificate; default: Python's.
        proxy: URL of an HTTP proxy; default: that of the environment (`HTTPS_PROXY`, `NO_PROXY` ...); "" for none.
        connect_timeout_s: Limit for making a connection.
        idle_timeout_s: Limit for a single byte to arrive.
        patience_s: Seconds without a byte, over all attempts, before the source fails. A longer Retry-After ends it
            at once.

    Raises, from a transfer:
        SourceChanged: the file was replaced.
        NotFoundError, StoreConfigurationError: the server has no such file, or refuses access to it.
        StoreUnavailable, TimedOut: the server failed for longer than `patience_s`.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        proxy: str | None = None,
        connect_timeout_s: float = 10.0,
        idle_timeout_s: float = 120.0,
        patience_s: float = DEFAULT_PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, credentials = _place_of(url)
        self._headers = credentials | dict(headers or {})
        self._tls = tls
        self._proxy = proxy
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._patience_s = patience_s
        self._sleep = sleep
        self._clock = clock
        self._pin: Pin | None = None

    def __repr__(self) -> str:
        return f"<HttpSource {self}>"

    def __str__(self) -> str:
        """The URL without parts that may be secret."""
        return str(self._place)

    @override
    def pin(self) -> Pin:
        backoff = self.backoff()
        with doing(f"look at {self}") as activity:
            while True:
                try:
                    self._pin = self._look()
                    return self._pin
                except TemporaryError as error:
                    self.wait(backoff, error, activity)

    @override
    def open(self, offset: int) -> OpenedUrl:
        return OpenedUrl(self, self._pin or self.pin(), offset)

    def _look(self) -> Pin:
        """Request the first byte: signed URLs allow GET, and its response has the size and the version."""
        with self.request({"Range": "bytes=0-0"}) as got:
            size = got.first_and_size()[1] if got.answer.status != 200 else got.answer.length
            return Pin(got.version, size)

    def request(self, headers: Mapping[str, str], offset: int = 0) -> _Got:
        """GET the file, redirects followed; 200, 206, or 416 for a file that is shorter. One attempt."""
        place = self._place
        for _ in range(_MAX_REDIRECTS):
            own = self._headers if place.origin == self._place.origin else {}
            # The body as it is: a Content-Encoding would change its offsets.
            sent = {
                "Host": place.host,
                "User-Agent": f"blobflow/{__version__}",
                "Accept-Encoding": "identity",
                **own,
                **headers,
            }
            client = self._client(place)
            try:
                answer = client.send("GET", place.target, lambda sent=sent: sent)
            except HttpError as error:
                client.close()
                raise self.failed(error, offset) from error
            got = _Got(answer, client, self)
            try:
                if answer.status not in _REDIRECTS:
                    got.check()
                    return got
                place = place.redirected(answer.headers.get("location", ""))
            except BaseException:
                got.close()
                raise
            got.close()
        raise StoreConfigurationError(f"{self} redirects more than {_MAX_REDIRECTS} times", operation="read")

    def _client(self, place: _Place) -> HttpClient:
        return HttpClient(
            place.origin,
            connect_timeout_s=self._connect_timeout_s,
            idle_timeout_s=self._idle_timeout_s,
            max_idle=0,
            tls=self._tls,
            proxy=_environment_proxy(place) if self._proxy is None else self._proxy or None,
        )

    def backoff(self) -> Backoff:
        """The waits of an attempt to read on, with the whole patience left."""
        return Backoff(self._patience_s, self._clock)

    def wait(self, backoff: Backoff, error: TemporaryError, activity: Activity) -> None:
        """Wait before the next attempt; raises `error` if there is no next attempt."""
        wait_s = backoff.wait_s(error)
        activity.blocked_by(f"{error.message}; next attempt in {wait_s:.0f} s")
        self._sleep(wait_s)

    def failed(self, error: HttpError, offset: int) -> BlobflowError:
        """The error for a broken exchange."""
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            return StoreConfigurationError(
                f"the certificate of {self} is not trusted: {error.__cause__.verify_message}",
                hint="give an SSL context that trusts the CA that signed it",
                operation="read",
            )
        if error.timeout_s is not None:
            if error.connecting:
                message = f"{self}: no connection to {error.connecting} within {error.timeout_s:g} s"
                return TimedOut(message, operation="read", offset=offset, timeout_s=error.timeout_s)
            message = f"{self}: no byte for {error.timeout_s:g} s at offset {offset}"
            return TimedOut(message, operation="read", offset=offset, timeout_s=error.timeout_s)
        return StoreUnavailable(f"{self} failed at offset {offset}: {error}", operation="read", offset=offset)


class OpenedUrl:
    """The body from an offset on, over as many connections as it takes."""

    def __init__(self, source: HttpSource, pin: Pin, offset: int) -> None:
        self._source = source
        self._pin = pin
        self._begun_at = self._offset = offset
        self._crc = 0
        """CRC32C of the bytes from `_begun_at` to `_offset`."""
        self._got: _Got | None = None
        self._ended = False

    def readinto(self, view: memoryview) -> int:
        """Some of the next bytes; 0 at the end."""
        with doing(f"read of {self._source}") as activity:
            return self._readinto(view, activity)

    def _readinto(self, view: memoryview, activity: Activity) -> int:
        backoff = self._source.backoff()
        while not self._ended and self._offset != self._pin.size:
            try:
                if self._got is None:
                    self._got = self._connected()
                count = self._receive(self._got, view)
            except TemporaryError as error:
                self.close()
                log.info("http.broken source=%s offset=%d error=%s", self._source, self._offset, type(error).__name__)
                self._source.wait(backoff, error, activity)
                continue
            except BaseException:
                self.close()
                raise
            if count:
                self._crc = crc32c(view[:count], self._crc)
                self._offset += count
                return count
            self._ended = True
        self.close()
        return 0

    def close(self) -> None:
        """Close the connection."""
        got, self._got = self._got, None
        if got is not None:
            got.close()

    def _receive(self, got: _Got, view: memoryview) -> int:
        size = self._pin.size
        try:
            count = got.answer.read_into(view if size is None else view[: size - self._offset])
        except HttpError as error:
            if not error.moved:
                raise self._source.failed(error, self._offset) from error
            self.close()  # the bytes before the break are valid
            return error.moved
        if count < len(view) and got.answer.length:
            self.close()
            if not count:
                raise StoreUnavailable(
                    f"{self._source} ended early, at offset {self._offset}", operation="read", offset=self._offset
                )
        return count

    def _connected(self) -> _Got:
        """The response at the present offset, of the pinned version."""
        offset, version = self._offset, self._pin.version
        if not offset:
            return self._checked(self._source.request({}), 0)
        if version is None:
            return self._read_again(self._source.request({}, offset))
        got = self._source.request({"Range": f"bytes={offset}-", "If-Range": version}, offset)
        return self._checked(got, offset) if got.answer.status == 206 else self._read_again(got)

    def _checked(self, got: _Got, offset: int) -> _Got:
        """`got`, if it is the pinned version from `offset` on."""
        first, size = got.first_and_size()
        try:
            # A response to If-Range need not repeat the date.
            if got.version != self._pin.version and not (got.version is None and got.answer.status == 206):
                self._changed("version", self._pin.version, got.version)
            if None not in (size, self._pin.size) and size != self._pin.size:
                self._changed("size", self._pin.size, size)
            if first != offset:
                raise StoreUnavailable(
                    f"{self._source} answered from offset {first}, not {offset}", operation="read", offset=offset
                )
        except BaseException:
            got.close()
            raise
        return got

    def _read_again(self, got: _Got) -> _Got:
        """Skip to the offset in a whole body, and prove that the bytes before it are the same as before."""
        self._checked(got, 0)
        position = crc = 0
        buffer = memoryview(bytearray(_SKIP_BYTES))
        try:
            while position < self._offset:
                end = self._begun_at if position < self._begun_at else self._offset
                view = buffer[: end - position]
                count = got.answer.read_into(view)
                if position >= self._begun_at:
                    crc = crc32c(view[:count], crc)
                position += count
                if count < len(view):
                    if got.answer.length:
                        raise StoreUnavailable(f"{self._source} ended early, at offset {position}", operation="read")
                    self._changed("size", self._offset, position)
            if crc != self._crc:
                self._changed("crc32c", self._crc, crc)
        except HttpError as error:
            got.close()
            raise self._source.failed(error, position + error.moved) from error
        except BaseException:
            got.close()
            raise
        return got

    def _changed(self, what: str, expected: Value | None, actual: Value | None) -> NoReturn:
        raise SourceChanged(
            f"{self._source} changed while it was read: {what} was {expected}, is {actual}",
            hint=BEGIN_AGAIN,
            what=what,
            expected=expected,
            actual=actual,
        )


class _Place(NamedTuple):
    """The target of a request."""

    origin: str
    host: str
    path: str
    query: str

    @property
    def target(self) -> str:
        return self.path + (f"?{self.query}" if self.query else "")

    def __str__(self) -> str:
        return self.origin + self.path + ("?..." if self.query else "")

    def redirected(self, location: str) -> _Place:
        """The target of a redirect.

        Raises:
            StoreConfigurationError: it is not a URL, or leads from HTTPS to HTTP.
        """
        try:
            place, credentials = _place_of(urljoin(self.origin + self.target, location))
        except (UsageError, ValueError):
            # Not `from`: urllib's message may show the whole URL.
            raise StoreConfigurationError(f"{self} redirects to no HTTP URL", operation="read") from None
        if not location or credentials or (self.origin.startswith("https:") and place.origin.startswith("http:")):
            raise StoreConfigurationError(
                f"{self} redirects to {place}, which is not followed",
                hint="no redirect leads from https to http, or to a URL with credentials",
                operation="read",
            )
        return place


def _place_of(url: str) -> tuple[_Place, dict[str, str]]:
    """The target that a URL names, and the header from its user name and password."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError("an HTTP source needs a URL: http://host/path or https://host/path")
    shown = f"[{host}]" if ":" in host else quote(host, safe="")
    authority = shown if port is None else f"{shown}:{port}"
    credentials: dict[str, str] = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    path, query = quote(parts.path or "/", safe=_SAFE), quote(parts.query, safe=_SAFE + "?")
    return _Place(f"{parts.scheme}://{authority}", authority, path, query), credentials


def _environment_proxy(place: _Place) -> str | None:
    proxy = getproxies().get(place.origin.partition(":")[0])
    return None if not proxy or proxy_bypass(place.host) else proxy


class _Answered(TypedDict):
    operation: str
    status: int


class _Got:
    """A response with its connection."""

    def __init__(self, answer: Response, client: HttpClient, source: HttpSource) -> None:
        self.answer = answer
        self._client = client
        self._source = source

    def __enter__(self) -> _Got:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; it is not reused, because the rest of the body may be long."""
        self.answer.__exit__(GeneratorExit, None, None)
        self._client.close()

    @property
    def version(self) -> str | None:
        """The validator that pins the file; not a weak ETag, because different bytes may have the same one."""
        headers = self.answer.headers
        e_tag = headers.get("etag", "")
        return e_tag if e_tag.startswith('"') else headers.get("last-modified")

    def first_and_size(self) -> tuple[int | None, int | None]:
        """The offset of the body's first byte, and the size of the whole file, as far as they are known."""
        if self.answer.status == 200:
            return 0, self.answer.length
        told = self.answer.headers.get("content-range", "").strip()
        found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", told)
        if found is None:
            raise StoreUnavailable(f"{self._source} answered with the range {told!r}", operation="read")
        return int(found[1]) if found[1] else None, int(found[2]) if found[2] != "*" else None

    def check(self) -> None:
        """Raise the error for the status, unless there is a body to read."""
        status, source = self.answer.status, self._source
        about: _Answered = {"operation": "read", "status": status}
        if status in (200, 206):
            if (encoding := self.answer.headers.get("content-encoding", "identity")) != "identity":
                raise Unsupported(f"{source} comes encoded with {encoding!r}", capability="identity encoding")
            return
        if status == 416:
            return
        if status in _SLOW_DOWN:
            raise SlowDown(f"{source} answered {status}", retry_after_s=self._retry_after_s(), **about)
        if status in _PASSING:
            raise StoreUnavailable(f"{source} answered {status}", retry_after_s=self._retry_after_s(), **about)
        if status in (404, 410):
            raise NotFoundError(f"{source} answered {status}: there is nothing", **about)
        hint = "give credentials in the headers" if status in (401, 403, 407) else ""
        raise StoreConfigurationError(f"{source} answered {status}", hint=hint, **about)

    def _retry_after_s(self) -> float | None:
        """Seconds to wait, from a number or a date; a date is compared with the server's own clock."""
        asked = self.answer.headers.get("retry-after", "").strip()
        if asked.isdecimal():
            return float(asked)
        then, now = _date(asked), _date(self.answer.headers.get("date", ""))
        return max(0.0, (then - now).total_seconds()) if then is not None and now is not None else None


def _date(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text)
    except ValueError:
        return None
