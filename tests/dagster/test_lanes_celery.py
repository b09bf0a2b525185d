"""Lanes on Celery workers, with redis between them and Postgres behind Dagster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import create_engine, make_url

from blobflow.dagster import metadata as md
from blobflow.testing import Tree, read_tree, write_tree
from tests.dagster.celery_location import BEFORE_HELD, LANES, PART, WORKERS
from tests.dagster.kit import REMOTE
from tests.dagster.s3_pipeline import ROOT
from tests.kit import noise
from tests.processes import wait_for
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
            end(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            end(process, signal.SIGKILL)


def end(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to a process that leads a session, and to all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def new_database(server_url: str) -> str:
    """URL of an empty database of the server."""
    url = make_url(server_url).set(database=f"dagster_{uuid.uuid4().hex}")
    with create_engine(server_url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {url.database}")
    return url.render_as_string(hide_password=False)


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
            f"telemetry: {{enabled: false}}\nstorage: {{postgres: {{postgres_url: '{new_database(postgres_url)}'}}}}\n"
        )
        # Workers and a run that make Dagster's tables at the same time get into each other's way.
        dg.DagsterInstance.from_config(str(tmp_path / "instance")).dispose()
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


def run(environment: dict[str, str], *failed_run: str) -> AbstractContextManager[subprocess.Popen[Any]]:
    """A run, or the re-execution of one from its failure; its executor waits in this process for the workers."""
    command = [sys.executable, "-m", "tests.dagster.celery_location", *failed_run]
    return running(command, Path(environment["LANES_HOME"], "run.log"), env=environment, cwd=ROOT)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """What the pipeline exports."""
    made: Tree = {f"{number}": noise(10 * PART, number) for number in range(5)}
    write_tree(tmp_path / "source", made)
    return made


def test_celery_workers_share_the_lanes(environment: dict[str, str], tree: Tree, tmp_path: Path):
    """Every lane is a task of some worker; they find the handles of the steps before in the store."""
    with workers(environment, 2), run(environment) as process:
        assert process.wait(300) == 0
    assert read_tree(tmp_path / "mirror" / "current") == tree
    handed = {path.parent.name for path in (tmp_path / "store" / "handoff" / "runs").rglob("result.json")}
    assert handed >= {f"orders__remote.upload.lane_{lane}" for lane in range(LANES)}
    logs = "".join((tmp_path / f"worker-{number}.log").read_text() for number in range(2))
    assert logs.count("succeeded") >= 2 * LANES + 6
    with dg.DagsterInstance.from_config(str(tmp_path / "instance")) as instance:
        (found,) = instance.get_runs()
        assert found.status is dg.DagsterRunStatus.SUCCESS


def test_killed_celery_workers_lose_no_part(environment: dict[str, str], tree: Tree, tmp_path: Path):
    """All workers die with every lane in flight, and the run as well; new ones send only what is missing."""
    held = tmp_path / "held"
    held.mkdir()
    with workers(environment, 2) as killed, run(environment) as process:
        wait_for(lambda: process.poll() is not None or len(list(held.iterdir())) == LANES * WORKERS)
        assert process.poll() is None
        for each in (*killed, process):
            end(each, signal.SIGKILL)
    shutil.rmtree(held)
    with dg.DagsterInstance.from_config(str(tmp_path / "instance")) as instance:
        (failed,) = instance.get_runs()
        instance.report_run_failed(failed, "the run worker is gone")  # as the daemon does
        with workers(environment, 2), run(environment, failed.run_id) as process:
            assert process.wait(300) == 0
        (retried,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS]))
        done = instance.all_logs(retried.run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
        made = instance.get_latest_materialization_event(REMOTE)

    assert read_tree(tmp_path / "mirror" / "current") == tree
    steps = {entry.dagster_event.step_key for entry in done if entry.dagster_event}
    assert {step for step in steps if step and ".upload.lane_" in step} == {
        f"orders__remote.upload.lane_{lane}" for lane in range(LANES)
    }
    assert "orders__snapshot.export" not in steps
    assert made is not None
    assert made.asset_materialization is not None
    facts: dict[str, Any] = {label: value.value for label, value in made.asset_materialization.metadata.items()}
    assert facts[md.BYTES_RESUMED] == LANES * BEFORE_HELD * PART
    assert facts[md.BYTES_SENT] == facts[md.SIZE] - facts[md.BYTES_RESUMED]
