"""A pipeline over a strict S3 that can hold a transfer in its middle, for tests that kill processes."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from tests.dagster import location_s3
from tests.dagster.location_s3 import PART, PARTS, WORKERS
from tests.fault_rules import Rule
from tests.kit import noise
from tests.processes import PATIENCE_S
from tests.strict_s3 import Exchange, Hook, Limits, StrictS3

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "telemetry: {enabled: false}\n"


class S3Pipeline:
    """One pipeline, its server, and what the server saw."""

    def __init__(self, home: Path, server: StrictS3, instance: dg.DagsterInstance) -> None:
        self.home = home
        self.instance = instance
        self.server = server
        self.bucket = server.new_bucket()
        self.environment = {
            "ORDERS_HOME": str(home),
            "ORDERS_S3": server.url,
            "ORDERS_BUCKET": self.bucket,
            "ORDERS_FENCE_S": "0.5",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        source = home / "source"
        (source / "b").mkdir(parents=True)
        for path, first, last in (
            (source / "a.bin", 0, PARTS * 3 // 4),
            (source / "b" / "c.bin", PARTS * 3 // 4, PARTS),
        ):
            with open(path, "wb") as file:
                file.writelines(noise(PART, number) for number in range(first, last))

    # Runs

    def in_process(self, *stages: str) -> dg.ExecuteInProcessResult:
        """A brand-new run in this process, of some assets."""
        keys = [dg.AssetKey(["orders", stage]) for stage in stages] or None
        return location_s3.orders().execute_in_process(
            instance=self.instance, asset_selection=keys, raise_on_error=False
        )

    def worker(self, *stages: str) -> subprocess.Popen[bytes]:
        """A run worker in a process of its own."""
        code = "from tests.dagster import location_s3; location_s3.main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *stages],
            env=dict(os.environ),
            cwd=ROOT,
            start_new_session=True,
        )

    def step_pid(self) -> int:
        """The process of the step that runs, or ran last."""
        return int((self.home / "pid").read_text())

    # The server

    @contextmanager
    def held(self, kind: str, at: int = PARTS // 2) -> Generator[Hold]:
        """Hold the transfer when half of its parts are through."""
        hold = Hold()
        self.server.script(
            Rule(
                Hook(hold),
                operation={"upload": "UploadPart", "download": "GetObject"}[kind],
                nth=at,
                times=None,
                key="*.tar",
            )
        )
        try:
            yield hold
        finally:
            hold.release()
            self.server.script()

    def moved(self, kind: str) -> list[Exchange]:
        """The requests that moved a part, over all attempts."""
        if kind == "upload":
            return self.server.requests("UploadPart", "orders/*.tar")
        return [each for each in self.server.requests("GetObject", "orders/*.tar") if each.bytes_out == PART]

    def check_whole(self) -> None:
        """One payload, one manifest, nothing under way."""
        names = sorted(self.server.objects(self.bucket))
        payloads = [name for name in names if name.endswith(".tar")]
        assert len(payloads) == 1
        assert [name for name in names if name.endswith((".manifest.json", ".upload.json"))] == [
            f"{payloads[0]}.manifest.json"
        ]
        assert self.server.uploads(self.bucket) == {}

    def check_mirror(self) -> None:
        source, mirror = self.home / "source", self.home / "mirror" / "current"
        names = [path.relative_to(source) for path in source.rglob("*")]
        assert sorted(path.relative_to(mirror) for path in mirror.rglob("*")) == sorted(names)
        files = [str(name) for name in names if (source / name).is_file()]
        assert filecmp.cmpfiles(source, mirror, files, shallow=False) == (files, [], [])

    def check_sent_once(self, kind: str) -> None:
        """At the server: what moved more than once is no more than was in flight when the process died."""
        numbers = [str(each.part_number) if kind == "upload" else each.headers["range"] for each in self.moved(kind)]
        assert len(set(numbers)) >= PARTS
        twice = sorted(number for number in set(numbers) if numbers.count(number) > 1)
        assert len(numbers) - len(set(numbers)) <= WORKERS, twice
        print(f"{kind} of {PARTS} parts of {PART} bytes: {len(twice)} moved twice")


class Hold:
    """Blocks the requests that come to it until it is released."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._released = threading.Event()

    def __call__(self, _: Exchange) -> None:
        self._reached.set()
        assert self._released.wait(PATIENCE_S)

    def wait(self) -> None:
        """Until a request is held."""
        assert self._reached.wait(PATIENCE_S)

    def release(self) -> None:
        self._released.set()


@contextmanager
def s3_pipeline(home: Path, monkeypatch: pytest.MonkeyPatch, settings: str = SETTINGS) -> Generator[S3Pipeline]:
    """A place whose server ends with the block; `settings` are the instance's dagster.yaml."""
    (home / "instance").mkdir()
    (home / "instance" / "dagster.yaml").write_text(settings)
    with (
        StrictS3(Limits(min_part_size=PART)) as server,
        dg.DagsterInstance.from_config(str(home / "instance")) as instance,
    ):
        made = S3Pipeline(home, server, instance)
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        for target, tuned in location_s3.TUNED.items():
            monkeypatch.setattr(target, tuned)
        try:
            yield made
        finally:
            while location_s3.Marking.opened:
                location_s3.Marking.opened.pop().close()
