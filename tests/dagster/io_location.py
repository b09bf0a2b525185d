"""A code location that other processes load: two assets and two ops that hand directories to each other.

All of it lies in the directory `home`; `MODELS_STORE` is an S3 bucket on `MODELS_ENDPOINT` (without: a directory).
`MODELS_KILL_PUT=n`, `MODELS_KILL_GET=n`: the first process that comes to its n-th such request for a payload is
killed there, `MODELS_OUTAGE=n`: the store is down from the n-th part on.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import dagster as dg

from blobflow.dagster import ArtifactIOManager, ProfileConfig
from blobflow.errors import StoreUnavailable
from blobflow.testing import FailBefore, Fault, Request, read_tree, write_tree
from tests.dagster.kit import FaultyResource, Place
from tests.kit import TREE, noise

PART_BYTES = 5 << 20
"""S3 takes no smaller parts."""
LARGE = {**TREE, "large.bin": noise(PART_BYTES * 5, 3)}


_seen: Counter[str] = Counter()


def _faults(home: Path, request: Request) -> Fault | None:
    operation = {"put_part": "PUT", "get_range": "GET"}.get(request.operation)
    if operation is None or not request.key.endswith(".tar"):
        return None
    _seen[operation] += 1
    killed = home / f"killed-{operation}"
    if _seen[operation] == int(os.environ.get(f"MODELS_KILL_{operation}", "0")) and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if operation == "PUT" and request.number >= int(os.environ.get("MODELS_OUTAGE", "1000")):
        return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))
    return None


def manager(home: Path) -> ArtifactIOManager:
    FaultyResource.script(partial(_faults, home))
    endpoint = os.environ.get("MODELS_ENDPOINT")
    blobflow = FaultyResource(
        store=os.environ.get("MODELS_STORE") or str(home / "store"),
        scratch_dir=str(home / "scratch"),
        custom_profile=ProfileConfig(chunk_size=PART_BYTES if endpoint else 4096, checkpoint_interval=1, workers=1),
        endpoint_url=endpoint,
        region="us-east-1" if endpoint else None,
        access_key_id=os.environ.get("MODELS_KEY_ID"),
        secret_access_key=os.environ.get("MODELS_SECRET"),
    )
    return ArtifactIOManager(blobflow=blobflow)


def made(home: Path) -> Path:
    """A directory that every attempt writes anew."""
    path = home / f"attempt-{len(list(home.glob('attempt-*')))}"
    write_tree(path, LARGE if os.environ.get("MODELS_ENDPOINT") else TREE)
    return path


def read(home: Path, path: Path) -> None:
    """Say what was read."""
    assert read_tree(path) == (LARGE if os.environ.get("MODELS_ENDPOINT") else TREE)
    (home / "read").write_text(str(path))


def assets(directory: str) -> dg.JobDefinition:
    """One step process after the other."""
    home = Path(directory)

    @dg.asset(io_manager_key="artifacts", retry_policy=dg.RetryPolicy(max_retries=1))
    def model() -> Path:
        return made(home)

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
    def scores(model: Path) -> None:
        read(home, model)

    defs = dg.Definitions(
        assets=[model, scores],
        jobs=[dg.define_asset_job("models", selection=[model, scores])],
        resources={"artifacts": manager(home)},
        executor=dg.multiprocess_executor,
    )
    return defs.resolve_job_def("models")


def ops(directory: str) -> dg.JobDefinition:
    """All in this process."""
    home = Path(directory)

    @dg.op(out=dg.Out(Path))
    def train() -> Path:
        return made(home)

    @dg.op(out=dg.Out(dg.Nothing))
    def score(model: Path):
        if os.environ.get("MODELS_BROKEN"):
            raise ValueError("broken")
        read(home, model)

    @dg.job(resource_defs={"io_manager": manager(home)}, executor_def=dg.in_process_executor)
    def models() -> None:
        score(train())

    return models


def run(place: Place, job: str, *, retry_of: str | None = None) -> dg.JobExecutionResult:
    """A new run, or the retry of a failed one from its failed step."""
    retry = dg.ReexecutionOptions.from_failure(retry_of, place.instance) if retry_of else None
    target = dg.build_reconstructable_job(__name__, job, (str(place.home),))
    return dg.execute_job(target, place.instance, reexecution_options=retry, raise_on_error=False)
