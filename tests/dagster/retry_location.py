"""A code location whose steps are killed at half of a transfer: ops, plain assets and graph assets.

`job` makes one of nine: of a shape (`ops`, `asset`, `graph`), the transfer in a `body`, in `handle_output` or in
`load_input`. `RETRY_S3`, `RETRY_BUCKET`: the store; `RETRY_POLICY`: attempts after the first one of a step;
`RETRY_PROCESSES`: a process for each step. The first process that comes to the middle of the transfer is killed there.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from blobflow import export_artifact, upload
from blobflow.dagster import ArtifactIOManager, ProfileConfig
from blobflow.dagster.checkpoints import transfer_journal
from blobflow.testing import Fault, Request
from tests.dagster.kit import FaultyResource
from tests.kit import noise, sized
from tests.strict_s3 import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

PART = sized(8 << 20, 5 << 20)
"""S3 takes none below 5 MiB."""
PARTS = sized(128, 8)
WORKERS = 2
ROOT = Path(__file__).resolve().parents[2]


def write_original(home: Path) -> None:
    """What all attempts hand on: 1 GiB, as a rule less."""
    (home / "original").mkdir()
    with open(home / "original" / "large.bin", "wb") as file:
        file.writelines(noise(PART, number) for number in range(PARTS))


def _made(home: Path) -> Path:
    """A directory that every attempt writes anew."""
    return shutil.copytree(home / "original", home / f"attempt-{len(list(home.glob('attempt-*')))}")


def _read(home: Path, path: Path) -> None:
    assert filecmp.cmpfiles(home / "original", path, ["large.bin"], shallow=False) == (["large.bin"], [], [])
    (home / "read").touch()


def _faults(home: Path, operation: str, request: Request) -> Fault | None:
    # A download asks for manifest and index before it asks for parts.
    half = PARTS // 2 + (3 if operation == "get_range" else 0)
    reached = request.operation == operation and request.key.endswith(".tar") and request.number == half
    if reached and not (home / "killed").exists():
        (home / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def _move(context: dg.OpExecutionContext | dg.AssetExecutionContext, home: Path) -> str:
    """An upload in the body of a step."""
    blobflow = context.resources.blobflow
    journal = transfer_journal(context)
    directory = _made(home)
    artifact = export_artifact(directory, directory.with_suffix(".artifact"), mtimes="drop").artifact
    result = upload(
        blobflow.get_store(),
        "moved.tar",
        artifact,
        profile=blobflow.get_profile(),
        on_progress=journal.progress,
        on_checkpoint=journal.save,
    )
    context.add_output_metadata(journal.metadata())
    return result.artifact_digest


def job(directory: str, shape: str, where: str) -> dg.JobDefinition:
    """The job `retried`."""
    home = Path(directory)
    attempts = int(os.environ.get("RETRY_POLICY", "0"))
    policy = dg.RetryPolicy(max_retries=attempts) if attempts else None
    keys = {"blobflow"}

    if shape == "asset":

        @dg.asset(required_resource_keys=keys, retry_policy=policy)
        def moved(context) -> str:
            return _move(context, home)

        @dg.asset(io_manager_key="artifacts", retry_policy=policy)
        def model() -> Path:
            return _made(home)

        @dg.asset(retry_policy=policy)
        def scores(model: Path) -> None:
            _read(home, model)

        assets: list[dg.AssetsDefinition] = [moved] if where == "body" else [model, scores]
    else:

        @dg.op(required_resource_keys=keys, retry_policy=policy)
        def move(context) -> str:
            return _move(context, home)

        begin: Any = move

        @dg.op(out=dg.Out(Path, io_manager_key="artifacts"), retry_policy=policy)
        def train() -> Path:
            return _made(home)

        @dg.op(retry_policy=policy)
        def score(model: Path) -> str:
            _read(home, model)
            return "read"

        def steps() -> Any:
            return begin() if where == "body" else score(train())

        if shape == "ops":

            @dg.graph
            def retried() -> None:
                steps()

            return retried.to_job(resource_defs=_resources(home, where), executor_def=_executor())
        assets = [dg.graph_asset(name="made")(steps)]
    defs = dg.Definitions(
        assets=assets,
        jobs=[dg.define_asset_job("retried", selection=assets)],
        resources=_resources(home, where),
        executor=_executor(),
    )
    return defs.resolve_job_def("retried")


def _resources(home: Path, where: str) -> dict[str, Any]:
    FaultyResource.script(partial(_faults, home, "get_range" if where == "load_input" else "put_part"))
    blobflow = FaultyResource(
        store=f"s3://{os.environ['RETRY_BUCKET']}",
        scratch_dir=str(home / "scratch"),
        custom_profile=ProfileConfig(chunk_size=PART, checkpoint_interval=1, workers=WORKERS),
        endpoint_url=os.environ["RETRY_S3"],
        region=REGION,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
    )
    return {"blobflow": blobflow, "artifacts": ArtifactIOManager(blobflow=blobflow)}


def _executor() -> dg.ExecutorDefinition:
    return dg.multiprocess_executor if os.environ.get("RETRY_PROCESSES") else dg.in_process_executor


def run(
    instance: dg.DagsterInstance, home: Path, shape: str, where: str, *, retry_of: str | None = None
) -> dg.JobExecutionResult:
    """A new run, or the retry of a failed one from its failed step, with this process as its worker."""
    arguments: Any = (str(home), shape, where)  # declared as a tuple of one
    target = dg.build_reconstructable_job(__name__, job.__name__, arguments)
    retry = dg.ReexecutionOptions.from_failure(retry_of, instance) if retry_of else None
    return dg.execute_job(target, instance, reexecution_options=retry, raise_on_error=False)


def run_elsewhere(home: Path, shape: str, where: str) -> int:
    """A new run with a worker of its own; how that process ended."""
    code = "from tests.dagster import retry_location; retry_location.main()"
    command = [sys.executable, "-c", code, str(home), shape, where]
    return subprocess.run(command, cwd=ROOT, check=False, start_new_session=True).returncode


def main() -> None:
    home, shape, where = sys.argv[1:]
    with dg.DagsterInstance.from_config(str(Path(home) / "instance")) as instance:
        run(instance, Path(home), shape, where)
