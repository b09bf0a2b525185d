"""The demo's code location and what Dagster's own tools say about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("botocore", "boto3", "dagster_aws", "fsspec", "pyarrow", "s3fs")


def tool(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment as an activated shell would."""
    binaries = Path(sys.executable).parent
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(binaries / command[0]), *command[1:]],
        env={**os.environ, "VIRTUAL_ENV": str(binaries.parent), "PATH": path, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_loading_the_code_location_is_quick_and_silent():
    """No warning of ours or about us, and no client library is imported before it is used."""
    code = (
        "import sys, definitions; definitions.defs.get_repository_def();"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = tool("python", "-W", "error", "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_dg_lists_the_definitions(tmp_path: Path):
    """`dg list defs` shows assets, job, check and resource, without a word on standard error."""
    # Where telemetry is on, Dagster says so to whoever uses it for the first time.
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
    done = tool("dg", "list", "defs", "--json", DAGSTER_HOME=str(tmp_path))
    listed = json.loads(done.stdout)
    assert [asset["asset_key"] for asset in listed["assets"]] == ["demo/mirror", "demo/remote", "demo/snapshot"]
    assert [check["name"] for check in listed["asset_checks"]] == ["verified"]
    assert "demo_job" in [job["name"] for job in listed["jobs"]]
    assert [resource["name"] for resource in listed["resources"]] == ["blobflow"]
    assert done.stderr == ""


def test_dg_checks_the_definitions():
    """`dg check defs` finds nothing to complain about."""
    assert "All definitions loaded successfully" in tool("dg", "check", "defs", "--no-check-yaml").stdout


def test_another_source_and_store_by_environment(tmp_path):
    """`BLOBFLOW_SOURCE` and `BLOBFLOW_STORE` name what travels and where to; of an own source nothing is excluded."""
    code = "import definitions as d; print(d.source().path, d.source().exclude, d.blobflow.store)"
    shown = tool("python", "-c", code, BLOBFLOW_SOURCE=str(tmp_path / "src"), BLOBFLOW_STORE="s3://bucket/prefix")
    assert shown.stdout.split() == [str(tmp_path / "src"), "()", "s3://bucket/prefix"]
