"""Lanes on Celery workers, with redis between them and Postgres behind Dagster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.testing import read_tree, write_tree
from tests.dagster.celery_location import LANES, PART
from tests.dagster.yard import ROOT
from tests.kit import noise
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Generator[subprocess.Popen[Any]]:
    """A process that is ended with the block, and all that it has started."""
    with (
        open(log, "wb") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options) as process,
    ):
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def environment(tmp_path: Path, postgres_url: str) -> Iterator[dict[str, str]]:
    """Of everybody who takes part: redis and Postgres are up."""
    redis = shutil.which("redis-server")
    if redis is None:
        pytest.skip("needs redis (Debian: redis-server)")
    port = free_port()
    with ExitStack() as stack:
        stack.enter_context(
            running([redis, "--port", str(port), "--bind", "127.0.0.1", "--save", ""], tmp_path / "redis.log")
        )
        broker = f"redis://127.0.0.1:{port}/0"
        (tmp_path / "instance").mkdir()
        (tmp_path / "instance" / "dagster.yaml").write_text(
            f"telemetry: {{enabled: false}}\nstorage: {{postgres: {{postgres_url: '{postgres_url}'}}}}\n"
        )
        (tmp_path / "worker.yaml").write_text(f"execution: {{config: {{broker: '{broker}', backend: '{broker}'}}}}\n")
        yield {
            **os.environ,
            "LANES_HOME": str(tmp_path),
            "DAGSTER_HOME": str(tmp_path / "instance"),
            "BROKER": broker,
            # The command starts another one, `celery`.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }


@contextmanager
def workers(environment: dict[str, str], count: int) -> Generator[list[subprocess.Popen[Any]]]:
    home = Path(environment["LANES_HOME"])
    app = ["worker", "start", "-A", "dagster_celery.app", "-y", str(home / "worker.yaml")]
    command = [sys.executable, "-c", "from dagster_celery.cli import main; main()", *app]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running(
                    [*command, "-n", f"w{number}", "--", "--concurrency", "2"],
                    home / f"worker-{number}.log",
                    env=environment,
                    cwd=home,
                )
            )
            for number in range(count)
        ]


def run(environment: dict[str, str], *arguments: str) -> int:
    command = [sys.executable, "-m", "tests.dagster.celery_location", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False, timeout=300).returncode


def test_celery_workers_share_the_lanes(environment: dict[str, str], tmp_path: Path):
    """Every lane is a task of some worker; they find the handles of the steps before in the store."""
    tree = {f"{number}": noise(10 * PART, number) for number in range(5)}
    write_tree(tmp_path / "source", tree)
    with workers(environment, 2):
        assert run(environment) == 0
    assert read_tree(tmp_path / "mirror" / "current") == tree
    handed = {path.parent.name for path in (tmp_path / "store" / "handoff" / "runs").rglob("result.json")}
    assert handed >= {f"orders__remote.upload.lane_{lane}" for lane in range(LANES)}
    logs = "".join((tmp_path / f"worker-{number}.log").read_text() for number in range(2))
    assert logs.count("succeeded") >= 2 * LANES + 6
    with dg.DagsterInstance.from_config(str(tmp_path / "instance")) as instance:
        (found,) = instance.get_runs()
        assert found.status is dg.DagsterRunStatus.SUCCESS
