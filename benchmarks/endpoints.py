"""The server that is measured against: our own cheap one, or a real one that `--endpoint` names."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from benchmarks.native import compiled

BUCKET = "bench-bucket"
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Traffic:
    """What the server saw since the last reset; bytes are those of bodies."""

    requests: int
    bytes_in: int
    bytes_out: int
    by_operation: dict[str, int]


@dataclass(frozen=True)
class Holding:
    """What lies below a prefix."""

    objects: int
    bytes: int
    uploads: int
    """Multipart uploads that were begun and neither completed nor aborted."""


class Endpoint(ABC):
    """An S3 server and one bucket of it."""

    url: str
    bucket: str
    name: str
    environment: dict[str, str]
    """Credentials and region, as every client reads them from its environment."""

    @abstractmethod
    def holds(self, prefix: str) -> Holding: ...

    @abstractmethod
    def drop(self, prefix: str) -> None:
        """Remove the objects and uploads below a prefix."""

    def reset(self) -> None:
        """Begin to count anew."""

    def traffic(self) -> Traffic | None:
        """What was seen since `reset`; None where the server does not tell."""
        return None


class CheapServer(Endpoint):
    """server/cheap_s3.cpp; its page of control calls is there.

    Args:
        control_url: For the harness.
        url: For the clients, if it is another.
        certificate: Whom they have to trust there.
    """

    def __init__(self, control_url: str, url: str | None = None, certificate: Path | None = None) -> None:
        self.url = url or control_url
        self.bucket = BUCKET
        self.name = f"cheap_s3 (benchmarks/server), loopback{', TLS' if certificate else ''}, objects in memory"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark-secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        if certificate:
            # botocore's name for it, and that of OpenSSL, Go and Rust.
            self.environment |= {"AWS_CA_BUNDLE": str(certificate), "SSL_CERT_FILE": str(certificate)}
        parts = urlsplit(control_url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)

    def close(self) -> None:
        self._connection.close()

    def _control(self, call: str) -> dict[str, Any]:
        self._connection.request("GET", call)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{call}: status {answer.status}")
        return json.loads(body or b"{}")

    def holds(self, prefix: str) -> Holding:
        return Holding(**self._control(f"/-/holds?bucket={self.bucket}&prefix={quote(prefix)}"))

    def drop(self, prefix: str) -> None:
        self._control(f"/-/drop?bucket={self.bucket}&prefix={quote(prefix)}")

    def reset(self) -> None:
        self._control("/-/reset")

    def traffic(self) -> Traffic:
        seen = self._control("/-/stats")
        return Traffic(seen["requests"], seen["bytes_in"], seen["bytes_out"], seen["by_operation"])

    def stop_bodies_after(self, size: int) -> None:
        """Let no byte of a body move once `size` were moved since the reset; 0 lets everything go on."""
        self._control(f"/-/gate?at={size}")

    def bodies_stand_still(self) -> bool:
        """Whether that point was reached."""
        return self._control("/-/stats")["gated"]

    def wait_until_left(self) -> None:
        """Wait until no client is connected: what a killed one left in the kernel has arrived then.

        Raises:
            TimeoutError: somebody is still there.
        """
        deadline = time.monotonic() + _SETTLE_S
        while self._control("/-/stats")["open"]:
            if time.monotonic() > deadline:
                raise TimeoutError("a client is still connected")
            time.sleep(0.005)


@contextmanager
def cheap_server(*, warm_bytes: int, limit_bytes: int, tls: bool = False) -> Generator[CheapServer]:
    """The cheap server in a process of its own, which ends with this one.

    Args:
        warm_bytes: Memory that is mapped at once, so that no client pays for it.
        limit_bytes: What it may hold at all.
        tls: Clients use https; needs OpenSSL and its headers.
    """
    command = ["--bucket", BUCKET, "--warm", str(warm_bytes), "--limit", str(limit_bytes)]
    with ExitStack() as stack:
        certificate = None
        if tls:
            certificate = _certificate(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            command = [str(compiled("cheap_s3", "-DTLS", "-lssl", "-lcrypto")), *command, "--tls", str(certificate)]
        else:
            command = [str(compiled("cheap_s3")), *command]
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            urls = [process.stdout.readline().strip() for _ in range(1 + tls)]
            if not urls[-1]:
                raise RuntimeError("cheap_s3 did not start")
            server = CheapServer(urls[0], urls[-1], certificate)
            try:
                yield server
            finally:
                server.close()
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _certificate(directory: Path) -> Path:
    """A file with a certificate for the loopback address, and its key; it is its own authority."""
    key, certificate, both = (directory / name for name in ("key.pem", "certificate.pem", "both.pem"))
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    command = ["openssl", "req", "-x509", *kind, *subject, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    return both


class RealServer(Endpoint):
    """An S3 server somewhere, with the credentials of the environment; its traffic is not seen.

    Everything happens below one random prefix, which is removed at the end.
    """

    def __init__(self, url: str, bucket: str) -> None:
        import botocore.session

        self.url = url
        self.bucket = bucket
        self.name = urlsplit(url).scheme + " endpoint given on the command line"
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self._client: Any = botocore.session.Session().create_client("s3", endpoint_url=url)

    def _keys(self, prefix: str) -> list[tuple[str, int]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [(entry["Key"], entry["Size"]) for page in pages for entry in page.get("Contents", ())]

    def _uploads(self, prefix: str) -> list[tuple[str, str]]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
        return [(entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", ())]

    def holds(self, prefix: str) -> Holding:
        keys = self._keys(prefix)
        return Holding(len(keys), sum(size for _, size in keys), len(self._uploads(prefix)))

    def drop(self, prefix: str) -> None:
        keys = [{"Key": key} for key, _ in self._keys(prefix)]
        for at in range(0, len(keys), 1000):
            self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys[at : at + 1000], "Quiet": True})
        for key, upload_id in self._uploads(prefix):
            with suppress(self._client.exceptions.NoSuchUpload):
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)


def new_prefix() -> str:
    """A prefix that nothing else uses."""
    return f"bench-{uuid.uuid4().hex[:12]}"
