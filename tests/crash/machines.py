"""Machines to be killed, and the places they send to, looked at from outside of blobflow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from botocore.exceptions import ClientError

from tests.servers import S3Endpoint

KIB = 1024
MIB = 1024 * KIB

INTERVAL = 64
"""Chunks between two checkpoints of the default profile."""

PROGRAM = Path(sys.executable).with_name("blobflow")


class Machine:
    """Somebody's machine: a home and temporary files of its own, and nothing of any other one's environment."""

    def __init__(self, path: Path, place: Reachable, *options: str) -> None:
        self.home = path / "home"
        self.tmp = path / "tmp"
        for directory in (self.home, self.tmp):
            directory.mkdir(parents=True)
        self._options = ("--json", "--store", place.url, *options)
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "AWS_EC2_METADATA_DISABLED": "true",
            **place.environment,
        }

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Begin a command."""
        return subprocess.Popen(
            [PROGRAM, *self._options, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            text=True,
        )

    def run(self, *arguments: object, watch: Callable[[], None] | None = None) -> dict[str, Any]:
        """Run a command to its good end and return its document; `watch` is called all the while."""
        with self.start(*arguments) as process:
            while watch is not None and process.poll() is None:
                watch()
            out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
        return json.loads(out)

    @property
    def scratch(self) -> list[str]:
        """What pushes have left among the temporary files."""
        return [name for name in os.listdir(self.tmp) if name.startswith(".blobflow-push-")]


def kill_when(
    reached: Callable[[], bool], process: subprocess.Popen[str], watch: Callable[[], None] = lambda: None
) -> bool:
    """Kill the process at once when `reached` says so, without warning. False: it ended before."""
    with process:
        while process.poll() is None:
            watch()
            if reached():
                process.kill()
                break
        out, err = process.communicate()
    assert process.returncode <= 0, out + err
    return process.returncode < 0


def committed(below: Path) -> int:
    """Parts that the journal of a landing in this directory vouches for."""
    return sum(journal.read_bytes().count(b'"part":') for journal in below.glob(".blobflow-download-*/journal"))


class Reachable(Protocol):
    """A store, and what a machine needs in its environment to get there."""

    environment: dict[str, str]

    @property
    def url(self) -> str: ...


class Place(Reachable, Protocol):
    """Where artifacts are sent to, seen from outside."""

    def parts(self, key: str) -> dict[int, int]:
        """The sizes of the parts that are acknowledged, by number, of the upload under way to `key`."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None."""
        ...

    def read(self, key: str) -> bytes:
        """The object."""
        ...

    def beginning(self, key: str, length: int) -> bytes | None:
        """The first bytes of the object, or None."""
        ...

    def all_keys(self) -> list[str]:
        """The names of all objects."""
        ...

    def leftovers(self) -> list[str]:
        """Uploads under way, and the notes about them."""
        ...


@dataclass
class LocalPlace:
    """A local store, read with nothing but the table in the head of blobflow/stores/local/store.py."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def url(self) -> str:
        return str(self.root)

    def parts(self, key: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for upload in self._uploads():
            with contextlib.suppress(FileNotFoundError):
                for line in (upload / "parts.jsonl").read_bytes().split(b"\n")[:-1]:
                    with contextlib.suppress(ValueError):  # blank, or torn
                        record = json.loads(line)
                        found[record["part"]] = record["size"]
        return found

    def size(self, key: str) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def beginning(self, key: str, length: int) -> bytes | None:
        try:
            with open(self.root / key, "rb") as file:
                return file.read(length)
        except FileNotFoundError:
            return None

    def all_keys(self) -> list[str]:
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if path.parts[0] != ".blobflow")

    def leftovers(self) -> list[str]:
        return [path.name for path in (*self._uploads(), *self.root.rglob("*.upload.json"))]

    def _uploads(self) -> list[Path]:
        try:
            return list((self.root / ".blobflow" / "uploads").iterdir())
        except FileNotFoundError:
            return []


class S3Place:
    """A bucket, seen with a plain client."""

    def __init__(self, endpoint: S3Endpoint) -> None:
        self.bucket = endpoint.new_bucket()
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint.endpoint_url,
            "AWS_ACCESS_KEY_ID": endpoint.access_key_id,
            "AWS_SECRET_ACCESS_KEY": endpoint.secret_access_key,
            "AWS_DEFAULT_REGION": endpoint.region,
        }
        self._client = endpoint.client

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def parts(self, key: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for upload in self._uploads():
            if upload["Key"] != key:
                continue  # of the capability probe
            with contextlib.suppress(ClientError):  # completed at this moment
                listed = self._client.list_parts(Bucket=self.bucket, Key=key, UploadId=upload["UploadId"])
                found |= {part["PartNumber"]: part["Size"] for part in listed.get("Parts", ())}
        return found

    def size(self, key: str) -> int | None:
        try:
            return self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
        except ClientError:
            return None

    def read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def beginning(self, key: str, length: int) -> bytes | None:
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes=0-{length - 1}")
        except ClientError:
            return None
        return answer["Body"].read()

    def all_keys(self) -> list[str]:
        return [entry["Key"] for entry in self._client.list_objects_v2(Bucket=self.bucket).get("Contents", ())]

    def leftovers(self) -> list[str]:
        notes = [key for key in self.all_keys() if key.endswith(".upload.json")]
        return notes + [upload["UploadId"] for upload in self._uploads()]

    def _uploads(self) -> list[dict[str, Any]]:
        return self._client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
