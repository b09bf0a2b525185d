"""Servers for tests: moto (fast), a Ceph RADOS Gateway (a real S3), one that is scripted, and PostgreSQL.

They listen on free loopback ports, PostgreSQL on a unix socket. The first two end when their standard input closes, so
that not even a killed test run leaves one behind.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import botocore.config
import botocore.loaders
import botocore.session
import pytest

CEPH_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")

_MOTO = """
import logging, sys, threading
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.s3.exceptions import NoSuchUpload
from moto.s3.models import FakeKey, S3Backend
from moto.server import ThreadedMotoServer

upload_part = S3Backend.upload_part


def upload_part_like_s3(self, bucket_name, multipart_id, part_id, value):
    # moto itself answers 500 to a part of an upload it does not know
    if multipart_id not in self.get_bucket(bucket_name).multiparts:
        raise NoSuchUpload(upload_id=multipart_id)
    return upload_part(self, bucket_name, multipart_id, part_id, value)


S3Backend.upload_part = upload_part_like_s3

# moto computes an ETag when it is first asked for, by reading a file that all threads share: two that ask at once, such
# as a listing during an upload, seek in each other's way, and the wrong ETag stays
etag, one_at_a_time = FakeKey.etag.fget, threading.Lock()


def etag_of_the_bytes(self):
    with one_at_a_time:
        return etag(self)


FakeKey.etag = property(etag_of_the_bytes)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""

_START_RGW = Path(__file__).parent / "tools" / "start-rgw.sh"


@dataclass(frozen=True)
class S3Endpoint:
    """How to reach a running S3 server; the credentials may do everything."""

    name: str
    endpoint_url: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str = "us-east-1"

    @cached_property
    def client(self) -> Any:
        """A plain botocore client, to look at the server from outside."""
        session = botocore.session.Session(profile=None)
        return session.create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=botocore.config.Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def new_bucket(self) -> str:
        """The name of a fresh, empty bucket."""
        name = f"test-{uuid.uuid4().hex[:16]}"
        self.client.create_bucket(Bucket=name)
        return name


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def missing_ceph_programs() -> list[str]:
    """The programs `rgw_server` needs and this machine does not have."""
    return [name for name in CEPH_PROGRAMS if shutil.which(name) is None]


@contextmanager
def moto_server() -> Generator[S3Endpoint, None, None]:
    """A moto server in a process of its own."""
    with _serving([sys.executable, "-c", _MOTO]) as url:
        yield S3Endpoint("moto", url, "moto", "moto-secret")


@contextmanager
def rgw_server(*, min_part_size: int = 5 * 1024**2) -> Generator[S3Endpoint, None, None]:
    """A one-node Ceph cluster in memory with a RADOS Gateway in front; starts in about five seconds.

    Args:
        min_part_size: Bytes of the smallest part but the last. All that is stored takes memory, and thousands of parts
            need not take gigabytes of it.
    """
    with ExitStack() as stack:
        yield S3Endpoint("rgw", _start_rgw(stack, min_part_size), "test", "testtest")


def _start_rgw(stack: ExitStack, min_part_size: int, attempts: int = 4) -> str:
    """A port that was free may be taken before Ceph binds it, by the cluster of another pytest worker for one."""
    directory = tempfile.mkdtemp(prefix="rgw-")  # not below pytest's: the path of a unix socket is short
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    try:
        limits = [f"RGW_MIN_PART_BYTES={min_part_size}"]
        command = ["env", *limits, "bash", str(_START_RGW), directory, str(free_port()), str(free_port())]
        return stack.enter_context(_serving(command))
    except RuntimeError:
        if attempts == 1:
            raise
    return _start_rgw(stack, min_part_size, attempts - 1)


def find_postgres() -> tuple[Path, str] | None:
    """Where the newest PostgreSQL has its programs, and the Python driver at hand; None if either is missing."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    driver = next((name for name in ("psycopg2", "psycopg") if find_spec(name)), None)
    return (binaries[-1], driver) if binaries and driver else None


@contextmanager
def postgres_server(programs: Path, driver: str) -> Generator[str, None, None]:
    """SQLAlchemy's URL of a PostgreSQL cluster, on a unix socket alone; its server never runs as root."""
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    home = Path(tempfile.mkdtemp(prefix="pg-"))  # not below pytest's: the path of a unix socket is short
    os.chown(home, user.pw_uid, user.pw_gid)

    def run(program: str, *arguments: str) -> None:
        become = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        command = [programs / program, "-D", home / "data", *arguments]
        subprocess.run(command, check=True, cwd=home, stdout=subprocess.DEVNULL, **become)

    try:
        run("initdb", "-A", "trust", "-U", "tester", "--no-sync")
        run("pg_ctl", "-w", "-l", str(home / "log"), "-o", f"-c listen_addresses='' -k {home} -F", "start")
        try:
            yield f"postgresql+{driver}://tester:secret@/postgres?host={home}"
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)


@contextmanager
def _serving(command: list[str]) -> Generator[str, None, None]:
    """Run a server that prints its URL once it is ready and ends when its standard input closes."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url.startswith("http"):
                raise RuntimeError(f"{command} did not start: exit code {process.wait(timeout=30)}")
            yield url
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


class Peer:
    """The server's end of one connection, for tests that decide every byte of an answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._stream = connection.makefile("rb")

    def head(self) -> tuple[str, dict[str, str]]:
        """The request line and the headers (names in lower case) of the next request."""
        line = self._stream.readline().decode().rstrip("\r\n")
        headers: dict[str, str] = {}
        while (field := self._stream.readline().decode("latin-1").rstrip("\r\n")) != "":
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        return line, headers

    def request(self) -> tuple[str, dict[str, str], bytes]:
        """The next request, whole."""
        line, headers = self.head()
        return line, headers, self._stream.read(int(headers.get("content-length", 0)))

    def read(self, size: int) -> bytes:
        """The next `size` bytes of a body, fewer only at its end."""
        return self._stream.read(size)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A complete answer that keeps the connection open; `x_y` is header `x-y`."""
        fields = {"content-length": str(len(body))} | {n.replace("_", "-"): v for n, v in headers.items()}
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        self.send("\r\n".join(lines).encode() + body)

    def refuse(self, status: int, code: str, message: str = "", **headers: str) -> None:
        """An S3 error document."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.answer(status, body.encode(), **headers)

    def wait_until_closed(self) -> None:
        """Read and forget until the client hangs up."""
        with suppress(ConnectionError):
            while self._stream.read(65536):
                pass

    def close(self) -> None:
        self._stream.close()
        self.connection.close()


@contextmanager
def scripted_server(
    *scripts: Callable[[Peer], object], tls: ssl.SSLContext | None = None
) -> Generator[str, None, None]:
    """A server whose n-th connection is played by the n-th script and then closed.

    Fails at the end if a script failed or did not get its connection.
    """
    failures: list[BaseException] = []

    def serve() -> None:
        for number, script in enumerate(scripts):
            try:
                connection, _ = listener.accept()
            except OSError:
                failures.append(AssertionError(f"connection {number} never came"))
                return
            thread = threading.Thread(target=play, args=(connection, script))
            thread.start()
            players.append(thread)

    def play(connection: socket.socket, script: Callable[[Peer], object]) -> None:
        try:
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
        except OSError:  # the client did not like the certificate
            connection.close()
            return
        peer = Peer(connection)
        try:
            script(peer)
        except BaseException as error:  # noqa: BLE001  # raised again in the test's own thread
            failures.append(error)
        finally:
            peer.close()

    players: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        acceptor = threading.Thread(target=serve)
        acceptor.start()
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}"
        except BaseException:
            listener.settimeout(0.01)
            listener.shutdown(socket.SHUT_RDWR)
            raise
        finally:
            acceptor.join()
            for player in players:
                player.join(timeout=20)
    if failures:
        raise failures[0]


@contextmanager
def service_model_read_once() -> Generator[None, None, None]:
    """All botocore sessions of the block share one description of S3, which takes a tenth of a second to read."""
    read = cache(botocore.loaders.JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.loaders.JSONFileLoader, "load_file", lambda _, path: read(path))
        yield
