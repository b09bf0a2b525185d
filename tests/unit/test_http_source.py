"""A file on a web server as a source: one version of it, over broken connections."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blobflow import ChunkProfile
from blobflow.errors import (
    BlobflowError,
    NotFoundError,
    SlowDown,
    SourceChanged,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
    UsageError,
)
from blobflow.streams import FileTarget, HttpSource, TransferCheckpoint, TransferResult, transfer
from tests.clock import Clock
from tests.kit import noise
from tests.loopback import LoopbackServer
from tests.servers import Peer, scripted_server
from tests.unit import test_http_client

certificate = test_http_client.certificate
"""A fixture: for 127.0.0.1, of a CA that nobody trusts."""

DATA = noise(100_000, 7)
PROFILE = ChunkProfile.custom(16_384, 2)


class Site(LoopbackServer):
    """A web server with one file, which breaks as often as it is told to."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.validators = {"ETag": '"v1"'}
        self.ranges = True
        self.framing = "length"
        self.cuts: list[int | None] = []
        """Of the next answers: after how many bytes of the body they break off; None: not at all."""
        self.answers: list[bytes] = []
        """Heads that are sent instead of the next answers."""
        self.before_answer: Callable[[], None] = lambda: None
        self.requests: list[tuple[str, dict[str, str]]] = []
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        peer = Peer(connection)
        try:
            line, headers = peer.head()
            self.requests.append((line, headers))
            self.before_answer()
            if self.answers and (answer := self.answers.pop(0)):
                peer.send(answer)
                return
            cut = self.cuts.pop(0) if self.cuts else None
            head, body = self._answer(headers)
            if self.framing == "chunked":
                chunks = b"".join(
                    b"%x\r\n%b\r\n" % (len(body[i : i + 9999]), body[i : i + 9999]) for i in range(0, len(body), 9999)
                )
                peer.send(head + (chunks + b"0\r\n\r\n")[:cut])
            else:
                peer.send(head + body[:cut])
        finally:
            peer.close()

    def _answer(self, headers: dict[str, str]) -> tuple[bytes, bytes]:
        status, body, fields = 200, self.data, dict(self.validators)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        fits = headers.get("if-range") in (None, *self.validators.values())
        if asked and self.ranges and fits:
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            if first >= len(body):
                status, body, fields = 416, b"", {"Content-Range": f"bytes */{len(body)}"}
            else:
                status, fields["Content-Range"] = 206, f"bytes {first}-{last}/{len(body)}"
                body = body[first : last + 1]
        framing = {"length": f"Content-Length: {len(body)}", "chunked": "Transfer-Encoding: chunked", "none": "X: y"}
        lines = [f"HTTP/1.1 {status} -", framing[self.framing], "Connection: close"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode(), body

    @property
    def ranges_asked(self) -> list[str | None]:
        """Of all requests but the first, which looks at the file."""
        return [headers.get("range") for _, headers in self.requests[1:]]


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        yield server


def source_of(site: Site, path: str = "/file", clock: Clock | None = None, **options: object) -> HttpSource:
    clock = clock or Clock()
    return HttpSource(site.url + path, sleep=clock.sleep, clock=clock, **options)  # pyright: ignore[reportArgumentType]


def fetch(source: HttpSource, checkpoint: TransferCheckpoint | None = None) -> tuple[bytes, TransferResult]:
    target = io.BytesIO()
    result = transfer(source, target, PROFILE, checkpoint)
    return target.getvalue(), result


def test_a_file_arrives(site: Site):
    """Its bytes, its size and its digest; the checkpoint knows the version."""
    checkpoint = TransferCheckpoint.new("s")
    data, result = fetch(source_of(site), checkpoint)
    assert data == DATA
    assert result.computed_digest == "sha256:" + hashlib.sha256(DATA).hexdigest()
    assert (checkpoint.total_size, checkpoint.source_version) == (len(DATA), '"v1"')


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_broken_body_goes_on_at_the_next_byte(site: Site, framing: str):
    """Three answers break off; the next request asks for the rest, of the same version only."""
    site.framing = framing
    site.cuts = [None, 30_000, 20_001, 0]
    data, _ = fetch(source_of(site))
    assert data == DATA
    assert len(site.requests) == 5
    for _, headers in site.requests[2:]:
        assert headers["if-range"] == '"v1"'
    if framing == "length":
        assert site.ranges_asked == [None, "bytes=30000-", "bytes=50001-", "bytes=50001-"]


def test_without_ranges_the_body_is_read_again(site: Site):
    """From its beginning, and the bytes that were given already are not given twice."""
    site.ranges = False
    site.cuts = [None, 30_000, 70_000]
    assert fetch(source_of(site))[0] == DATA
    assert len(site.requests) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_replaced_meanwhile_is_refused(site: Site, ranges: bool):
    """With or without ranges: the rest of another version is not taken for the rest of this one."""
    site.ranges = ranges
    site.cuts = [None, 30_000]

    def replace() -> None:
        if len(site.requests) == 3:
            site.data, site.validators = noise(100_000, 8), {"ETag": '"v2"'}

    site.before_answer = replace
    with pytest.raises(SourceChanged, match='version was "v1", is "v2"'):
        fetch(source_of(site))


def test_without_validators_the_bytes_themselves_are_compared(site: Site):
    """Nothing pins the file: after a break it is read from its beginning, and it must begin with the same bytes."""
    site.validators = {"ETag": 'W/"weak"'}
    site.cuts = [None, 30_000, None]
    assert fetch(source_of(site))[0] == DATA
    assert site.ranges_asked == [None, None]
    site.cuts = [None, 30_000, None]
    looks = len(site.requests)

    def replace() -> None:
        if len(site.requests) == looks + 3:
            site.data = b"x" + DATA[1:]

    site.before_answer = replace
    with pytest.raises(SourceChanged, match="crc32c"):
        fetch(source_of(site))


def test_a_date_pins_where_there_is_no_tag(site: Site):
    """If-Range carries Last-Modified, as the server wrote it; a range need not repeat it."""
    date = "Sat, 21 Nov 2026 01:00:00 GMT"
    site.validators = {"Last-Modified": date}
    site.cuts = [None, 30_000]
    assert fetch(source_of(site))[0] == DATA
    assert site.requests[-1][1]["if-range"] == date


@pytest.mark.parametrize("validators", [{"ETag": '"v1"'}, {}])
def test_an_empty_file_is_no_error(validators: dict[str, str]):
    """Its first byte cannot be had, which is how its size is found out."""
    with Site(b"") as site:
        site.validators = validators
        data, result = fetch(source_of(site))
    assert (data, result.total_size) == (b"", 0)


def test_a_resumed_transfer_fetches_only_the_rest(site: Site, tmp_path: Path):
    """Into a file the digest is still that of the whole; without one to verify, no byte is read again either."""
    saved: list[TransferCheckpoint] = []
    two_chunks = threading.Event()

    def save(checkpoint: TransferCheckpoint) -> None:
        saved.append(checkpoint.model_copy())
        if checkpoint.chunks_completed == 2:
            two_chunks.set()

    def wait() -> None:
        assert len(site.requests) < 3 or two_chunks.wait(20)

    site.cuts = [None, 40_000]
    site.answers = [b"", b"", refusal(404)]
    site.before_answer = wait
    target = FileTarget(tmp_path / "file")
    with pytest.raises(NotFoundError):
        transfer(source_of(site), target, PROFILE, on_checkpoint=save)
    assert saved[-1].offset == 2 * 16_384
    site.requests.clear()
    at_two_chunks = saved[-1].model_copy()
    result = transfer(source_of(site), target, PROFILE, saved[-1])
    assert site.ranges_asked == ["bytes=32768-"]
    assert result.computed_digest == "sha256:" + hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "file").read_bytes() == DATA

    site.requests.clear()
    stream = io.BytesIO()
    unverified = PROFILE.model_copy(update={"verify_digest": False})
    result = transfer(source_of(site), stream, unverified, at_two_chunks)
    assert site.ranges_asked == ["bytes=32768-"]
    assert (stream.getvalue(), result.computed_digest) == (DATA[32_768:], "")


def test_a_checkpoint_of_another_version_is_refused(site: Site):
    """Before a byte is fetched, with the advice to begin again."""
    checkpoint = TransferCheckpoint(session_id="s", offset=100, source_version='"v0"')
    with pytest.raises(SourceChanged) as refusal:
        fetch(source_of(site), checkpoint)
    assert "begin again" in refusal.value.hint
    assert len(site.requests) == 1


# Servers that are busy, slow, or refuse


def refusal(status: int, *fields: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} -", "Content-Length: 0", *fields, "", ""]).encode()


@pytest.mark.parametrize(
    ("fields", "waits"),
    [
        (["Retry-After: 17"], 17),
        (["Date: Sat, 21 Nov 2026 01:00:00 GMT", "Retry-After: Sat, 21 Nov 2026 01:00:30 GMT"], 30),
    ],
)
def test_a_busy_server_is_given_the_time_it_asks_for(site: Site, fields: list[str], waits: int):
    """In seconds, or until a moment by its own clock."""
    site.answers = [refusal(503, *fields), refusal(429, *fields)]
    clock = Clock()
    assert fetch(source_of(site, clock=clock))[0] == DATA
    assert clock.slept == [waits, waits]


def test_a_wait_beyond_all_patience_is_not_begun(site: Site):
    """The server asks for an hour: that is said at once."""
    site.answers = [refusal(503, "Retry-After: 3600")]
    clock = Clock()
    with pytest.raises(SlowDown) as answer:
        fetch(source_of(site, clock=clock))
    assert (answer.value.retry_after_s, clock.slept) == (3600, [])


def test_patience_ends_and_is_renewed_by_progress(site: Site):
    """A server that gives a byte now and then is waited for; one that gives none is not."""
    clock = Clock()
    site.cuts = [None, *[1_000] * 99]
    source = source_of(site, clock=clock, patience_s=5.0)
    assert fetch(source)[0] == DATA
    site.answers = [b"", *[refusal(500)] * 10_000]
    clock = Clock()
    with pytest.raises(StoreUnavailable, match="answered 500"):
        fetch(source_of(site, clock=clock, patience_s=5.0))
    assert 4.9 <= sum(clock.slept) <= 5.1


def test_silence_is_an_error_that_names_the_offset():
    """The body stops in the middle and the connection stays open."""

    def look(peer: Peer) -> None:
        peer.head()
        peer.answer(206, b"x", content_range="bytes 0-0/1000", etag='"v1"')

    def stall(peer: Peer) -> None:
        peer.head()
        peer.send(b'HTTP/1.1 200 -\r\nContent-Length: 1000\r\nETag: "v1"\r\n\r\n' + bytes(300))
        peer.wait_until_closed()

    def stall_at_once(peer: Peer) -> None:
        peer.head()
        peer.wait_until_closed()

    with (
        scripted_server(look, stall, stall_at_once) as url,
        pytest.raises(TimedOut, match=r"no byte for 0\.2 s at offset 300"),
    ):
        fetch(HttpSource(f"{url}/file", idle_timeout_s=0.2, patience_s=0.0))


@pytest.mark.parametrize(
    ("status", "kind"), [(404, NotFoundError), (410, NotFoundError), (403, StoreConfigurationError)]
)
def test_a_refusal_is_not_repeated(site: Site, status: int, kind: type[BlobflowError]):
    """What waiting does not help is said at once, with the status."""
    site.answers = [refusal(status)]
    with pytest.raises(kind, match=str(status)) as error:
        fetch(source_of(site))
    assert (error.value.fields["status"], error.value.retryable, len(site.requests)) == (status, False, 1)


def test_an_encoded_body_is_refused(site: Site):
    """Identity is asked for; a server that compresses all the same would break every offset."""
    site.validators["Content-Encoding"] = "gzip"
    with pytest.raises(Unsupported, match="gzip"):
        fetch(source_of(site))
    assert site.requests[0][1]["accept-encoding"] == "identity"


# Redirects and secrets


def test_credentials_go_to_their_own_server_only(site: Site):
    """They follow a redirect on the same origin, not to another one."""
    with Site() as other:
        site.answers = [refusal(302, "Location: /here"), refusal(307, f"Location: {other.url}/there?sig=1")]
        source = HttpSource(
            site.url.replace("//", "//user:pass%20word@") + "/file", headers={"X-Api-Key": "key"}, patience_s=0.0
        )
        source.pin()
        assert [line for line, _ in site.requests] == ["GET /file HTTP/1.1", "GET /here HTTP/1.1"]
        for _, headers in site.requests:
            assert base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"user:pass word"
            assert headers["x-api-key"] == "key"
        [(line, headers)] = other.requests
        assert line == "GET /there?sig=1 HTTP/1.1"
        assert {"authorization", "x-api-key"}.isdisjoint(headers)


@pytest.mark.parametrize(
    "location", ["", "ftp://elsewhere/x", "http://user:secret@elsewhere/x", "http://[broken", "/file"]
)
def test_a_redirect_that_leads_nowhere_is_refused(site: Site, location: str):
    """None, to another protocol, to credentials, or to itself for ever."""
    site.answers = [refusal(301, f"Location: {location}")] * 20
    with pytest.raises(StoreConfigurationError, match="redirects") as error:
        fetch(source_of(site))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("status", [404, 500])
def test_nothing_secret_is_ever_shown(site: Site, status: int, caplog: pytest.LogCaptureFixture):
    """Neither the password nor the query, in repr, message, fields or log."""
    site.answers = [refusal(status)] * 3
    source = HttpSource(
        site.url.replace("//", "//user:hush1@") + "/file?X-Amz-Signature=hush2",
        headers={"Authorization": "Bearer hush3"},
        patience_s=0.0,
    )
    with caplog.at_level("DEBUG"), pytest.raises(BlobflowError) as error:
        fetch(source)
    shown = repr(source) + str(error.value) + repr(error.value.to_dict()) + caplog.text
    assert "/file?..." in shown
    assert "hush" not in shown


@pytest.mark.parametrize("url", ["ftp://host/x", "/path", "http://", "http://host:port/", "https://[::1", ""])
def test_what_is_no_http_url_is_refused(url: str):
    """Before anything is sent, and without showing it."""
    with pytest.raises(UsageError, match="needs a URL") as refused:
        HttpSource(url)
    assert "host" not in str(refused.value).replace("http://host/path or https://host/path", "")


def test_odd_characters_in_a_url_are_encoded_once(site: Site):
    """Spaces and letters beyond ASCII go out encoded; what is encoded already stays as it is."""
    source_of(site, "/a b/ü%20?q=ä b").pin()
    assert site.requests[0][0] == "GET /a%20b/%C3%BC%20?q=%C3%A4%20b HTTP/1.1"


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, site: Site):
    """Except where NO_PROXY says so, or the caller."""
    with Site() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        source_of(site).pin()
        assert proxy.requests[0][0] == f"GET {site.url}/file HTTP/1.1"
        source_of(site, proxy="").pin()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        source_of(site).pin()
        assert (len(proxy.requests), len(site.requests)) == (1, 2)


def test_certificates_are_checked(certificate: Path):
    """A stranger's is a configuration error at once; with its CA in the context the file arrives."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)

    def look(peer: Peer) -> None:
        peer.head()
        peer.answer(206, b"x", content_range="bytes 0-0/3", etag='"v1"')

    def give(peer: Peer) -> None:
        peer.head()
        peer.answer(200, b"abc", etag='"v1"')

    with scripted_server(Peer.head, tls=server) as url, pytest.raises(StoreConfigurationError, match="not trusted"):
        fetch(HttpSource(f"{url}/file"))
    with scripted_server(look, give, tls=server) as url:
        assert fetch(HttpSource(f"{url}/file", tls=ssl.create_default_context(cafile=certificate)))[0] == b"abc"


def test_no_redirect_leads_out_of_tls(certificate: Path, site: Site):
    """What was asked for over HTTPS is not fetched over HTTP."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)

    def redirect(peer: Peer) -> None:
        peer.head()
        peer.answer(302, location=f"{site.url}/file")

    with scripted_server(redirect, tls=server) as url, pytest.raises(StoreConfigurationError, match="not followed"):
        fetch(HttpSource(f"{url}/file", tls=ssl.create_default_context(cafile=certificate)))
    assert site.requests == []
