"""Servers that nobody here wrote: how to start them, and how blobflow is told where they are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.loopback import LoopbackServer
from tests.servers import S3Endpoint, free_port

START = Path(__file__).parents[1] / "tools" / "start-foreign.sh"

S3 = ("nanio", "rclone", "s3rver")
FSSPEC = ("sftp", "ftp", "webdav", "azurite", "fake-gcs")
KINDS = (*S3, *FSSPEC)
RESUMES_UPLOADS = ("nanio", "rclone")
"""They tell the parts of an upload, so that another machine can go on with it."""

USER = "tester"
PASSWORD = "test secret"
"""Of the servers that take one; with a space, because passwords are no words."""

_AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The one that Azurite's documentation publishes."""


_PLAIN_GCS = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
"""Otherwise gcsfs 2026.10 asks another API for the kind of a bucket, over TLS, which no emulator has."""
os.environ.update(_PLAIN_GCS)  # here as well, before it is imported


class Missing(Exception):
    """The server is not to be had on this machine."""


class Relay(LoopbackServer):
    """Passes connections on, counts what clients send, and stops passing that on after a given number of bytes."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._sent = 0
        self._most: int | None = None
        self._changed = threading.Condition()
        super().__init__()

    def hold_after(self, count: int | None) -> None:
        """From now on pass on that many bytes of clients, in all; None: whatever comes."""
        with self._changed:
            self._sent = 0
            self._most = count
            self._changed.notify_all()

    @property
    def holds(self) -> bool:
        """Whether the bytes are passed on that may be."""
        return self._most is not None and self._sent >= self._most

    def serve(self, connection: socket.socket) -> None:
        with self.connected_to(("127.0.0.1", self._to)) as server:
            back = threading.Thread(target=_pass_on, args=(server, connection), daemon=True)
            back.start()
            while (data := connection.recv(65536)) and self._may_pass(len(data)):
                server.sendall(data)
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR if self.holds else socket.SHUT_WR)
            back.join()

    def _may_pass(self, count: int) -> bool:
        with self._changed:
            self._sent += count
            self._changed.wait_for(lambda: not self.holds or self._closing.is_set())
            return not self._closing.is_set()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@dataclass
class Place:
    """An empty place on a server, and what a machine has in its environment to get there."""

    url: str
    environment: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """The same for `open_store`."""


@dataclass
class ForeignServer:
    """A running server.

    Attributes:
        relay: In front of it, where one port is all there is to it.
        directory: Its files.
    """

    kind: str
    port: int
    directory: Path
    relay: Relay | None = None

    @property
    def data(self) -> Path:
        """Where it keeps what it was sent, as far as it uses files."""
        return self.directory / "data"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.relay.port if self.relay else self.port}"

    @property
    def s3(self) -> S3Endpoint:
        """Of those that speak S3."""
        name, secret = ("S3RVER", "S3RVER") if self.kind == "s3rver" else ("testkeytestkey", "testsecrettestsecret")
        return S3Endpoint(self.kind, f"http://{self.address}", name, secret)

    def new_place(self) -> Place:
        """An empty place."""
        name = f"place-{uuid.uuid4().hex[:12]}"
        if self.kind in S3:
            endpoint = self.s3
            bucket = endpoint.new_bucket()
            environment = {
                "AWS_ENDPOINT_URL": endpoint.endpoint_url,
                "AWS_ACCESS_KEY_ID": endpoint.access_key_id,
                "AWS_SECRET_ACCESS_KEY": endpoint.secret_access_key,
                "AWS_DEFAULT_REGION": endpoint.region,
            }
            options = {
                "endpoint_url": endpoint.endpoint_url,
                "access_key_id": endpoint.access_key_id,
                "secret_access_key": endpoint.secret_access_key,
                "region": endpoint.region,
            }
            return Place(f"s3://{bucket}", environment, options)
        return getattr(self, f"_{self.kind.replace('-', '_')}")(name)

    def _sftp(self, name: str) -> Place:
        options = {
            "username": os.environ.get("USER", "root"),
            "key_filename": str(self.directory / "key"),
            "look_for_keys": False,
            "allow_agent": False,
        }
        return _by_options(f"sftp://{self.address}{self.data}/{name}", "SFTP", options)

    def _ftp(self, name: str) -> Place:
        return _by_options(f"ftp://{self.address}/{name}", "FTP", {"username": USER, "password": PASSWORD})

    def _webdav(self, name: str) -> Place:
        options = {"base_url": f"http://{self.address}/dav", "auth": [USER, PASSWORD]}
        return _by_options(f"webdav://{name}", "WEBDAV", options)

    def _azurite(self, name: str) -> Place:
        told = (
            f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={_AZURITE_KEY};"
            f"BlobEndpoint=http://{self.address}/devstoreaccount1;"
        )
        from azure.storage.blob import BlobServiceClient

        with BlobServiceClient.from_connection_string(told) as client:
            client.create_container(name)
        return Place(f"az://{name}/some/prefix", {"AZURE_STORAGE_CONNECTION_STRING": told}, {"connection_string": told})

    def _fake_gcs(self, name: str) -> Place:
        import requests

        requests.post(f"http://{self.address}/storage/v1/b", json={"name": name}, timeout=30).raise_for_status()
        options = {"endpoint_url": f"http://{self.address}", "token": "anon", "project": "test"}
        place = _by_options(f"gs://{name}/some/prefix", "GS", options)
        return Place(place.url, _PLAIN_GCS | place.environment, options)


def _by_options(url: str, protocol: str, options: dict[str, Any]) -> Place:
    return Place(url, {f"FSSPEC_{protocol}": json.dumps(options)}, options)


@contextmanager
def foreign_server(kind: str) -> Generator[ForeignServer]:
    """A running server of this kind, installed first where it is not.

    Raises:
        Missing: it is not to be had here.
    """
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{kind}-", ignore_cleanup_errors=True))
        )
        port = free_port()
        process = stack.enter_context(
            subprocess.Popen(
                ["bash", START, kind, directory, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert process.stdin is not None
        assert process.stdout is not None
        stack.callback(process.stdin.close)
        if process.stdout.readline() != "ready\n":
            _, told = process.communicate(timeout=30)
            raise (Missing if process.returncode == 3 else RuntimeError)(told.strip())
        # FTP opens a port for each transfer.
        relay = None if kind == "ftp" else stack.enter_context(Relay(port))
        yield ForeignServer(kind, port, directory, relay)
