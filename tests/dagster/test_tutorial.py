"""What we tell newcomers to type, typed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blobflow.testing import read_tree

ROOT = Path(__file__).resolve().parents[2]
BINARIES = Path(sys.executable).parent


def activated(**own: str) -> dict[str, str]:
    """The environment of a shell in which the virtual environment is activated, and nothing of Dagster's is set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "BLOBFLOW_"))}
    path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "VIRTUAL_ENV": str(BINARIES.parent), "PATH": path, **own}


def steps(page: str) -> tuple[dict[str, str], str]:
    """The files that the executed part of the tutorial shows, and its commands as one script."""
    executed = re.search(r"<!-- begin: .*?-->(.*)<!-- end -->", page, re.DOTALL)
    assert executed is not None
    blocks = re.findall(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", executed[1], re.DOTALL | re.MULTILINE)
    files = {title: text for _, title, text in blocks if title}
    lines = [line for language, _, text in blocks if language == "console" for line in text.splitlines()]
    assert all(line.startswith("$ ") for line in lines), lines
    return files, "\n".join(line.removeprefix("$ ") for line in lines)


def shell(script: str, directory: Path, **own: str) -> subprocess.CompletedProcess[str]:
    """Run commands as a person would who stops at the first that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env=activated(**own),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial_brings_an_empty_folder_to_a_mirror(tmp_path):
    """Its files and commands, as they are written, make a project whose mirror follows its source; nothing warns."""
    files, script = steps((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    done = shell(script, tmp_path)

    assert read_tree(tmp_path / "mirror" / "orders" / "current") == read_tree(tmp_path / "data" / "orders")
    assert len(list((tmp_path / "mirror" / "orders" / "versions").iterdir())) == 2
    shown = (tmp_path / "orders" / "defs" / "orders" / "defs.yaml").read_text(encoding="utf-8")
    assert shown.strip() in (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert "validated successfully" in done.stdout
    assert "orders/mirror" in done.stdout
    assert "warning" not in (done.stdout + done.stderr).lower()


@pytest.mark.timeout(300)
def test_the_example_project_runs_as_it_is(tmp_path):
    """Its definitions load without a word on standard error, and one launch brings one region to its mirror."""
    project = shutil.copytree(
        ROOT / "examples" / "regions",
        tmp_path / "regions",
        ignore=shutil.ignore_patterns("store", "mirror", "__pycache__"),
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")

    listed = shell("dg list defs --json", project)
    assert listed.stderr == ""
    defs = json.loads(listed.stdout)
    assert [asset["asset_key"] for asset in defs["assets"]] == ["orders/mirror", "orders/remote", "orders/snapshot"]
    assert [asset["owners"] for asset in defs["assets"]] == [[{"team": "orders"}]] * 3
    assert [resource["name"] for resource in defs["resources"]] == ["blobflow"]

    (launch,) = re.findall(r"^\$ (dg launch .*)$", (project / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    done = shell(launch, project, DAGSTER_HOME=str(tmp_path / "home"))
    assert "RUN_SUCCESS" in done.stderr + done.stdout
    assert [path.name for path in (project / "mirror").iterdir()] == ["eu"]
    assert read_tree(project / "mirror" / "eu" / "current") == read_tree(project / "data" / "eu")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_scaffolded_mirror_is_valid_as_it_is(tmp_path):
    """In a fresh project, too, `dg` has nothing to say about it."""
    files, _ = steps((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    (tmp_path / "orders" / "defs").mkdir(parents=True)
    for name in ("orders/__init__.py", "orders/defs/__init__.py"):
        (tmp_path / name).touch()
    for name in ("pyproject.toml", "orders/definitions.py"):
        (tmp_path / name).write_text(files[name], encoding="utf-8")

    done = shell(
        "dg scaffold defs blobflow.dagster.ArtifactMirrorComponent followed && dg check yaml && dg list defs", tmp_path
    )

    assert "validated successfully" in done.stdout
    assert "followed/mirror" in done.stdout
    assert "warning" not in (done.stdout + done.stderr).lower()


@pytest.mark.slow
def test_dg_knows_the_components():
    """The package's entry point makes both components known to every project, with a summary."""
    listed = shell("dg list components --json", ROOT)
    assert listed.stderr == ""
    ours = {
        entry["key"]: entry["summary"]
        for entry in json.loads(listed.stdout)["items"]
        if entry["key"].startswith("blobflow.")
    }
    assert set(ours) == {"blobflow.dagster.ArtifactMirrorComponent", "blobflow.dagster.ArtifactPipelineComponent"}
    assert all(ours.values())
