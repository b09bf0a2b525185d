"""What Dagster adds: one pipeline run against the same work by the command line.

`python -m benchmarks.overhead [--files 200] [--size 64] [--runs 5]` moves the same directory, alternately, with
`blobflow push` and `blobflow pull` (two fresh processes) and with `dg launch` of a pipeline whose steps run in its own
process (one fresh process, a Dagster instance on disk), each time into an empty store, and prints the medians.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

_BINARIES: Final = Path(sys.executable).parent
_DEFINITIONS: Final = """
import os

import dagster as dg

from blobflow.dagster import BlobflowResource, DirectoryExporter, DirectoryImporter, artifact_pipeline

home = os.environ["OVERHEAD_HOME"]
work = artifact_pipeline(
    "work",
    exporter=DirectoryExporter(path=f"{home}/source"),
    importer=DirectoryImporter(path=f"{home}/here/mirror"),
)
blobflow = BlobflowResource(store=f"{home}/here/store", scratch_dir=f"{home}/here/scratch")
defs = dg.Definitions.merge(
    work.definitions, dg.Definitions(resources={"blobflow": blobflow}, executor=dg.in_process_executor)
)
"""
_PROJECT: Final = '[tool.dg]\ndirectory_type = "project"\n\n[tool.dg.project]\nroot_module = "work"\n'


class Took(NamedTuple):
    """Of all processes of one way together."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What Dagster adds to the command line's work.")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--size", type=int, default=64, help="MiB, of all files together")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="blobflow-overhead-") as home:
        place = Path(home)
        _write_source(place / "source", options.files, (options.size << 20) // options.files)
        (place / "work").mkdir()
        (place / "work" / "__init__.py").touch()
        (place / "work" / "definitions.py").write_text(_DEFINITIONS)
        (place / "pyproject.toml").write_text(_PROJECT)
        (place / "dagster").mkdir()
        (place / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        ways = {"command line": _by_command_line, "dg launch": _by_dagster}
        took: dict[str, list[Took]] = {name: [] for name in ways}
        for number in range(options.runs + 1):
            for name, way in ways.items():
                shutil.rmtree(place / "here", ignore_errors=True)
                (place / "here").mkdir()
                measured = _measure(way(place), place)
                if number:  # the first round fills the caches
                    took[name].append(measured)
    median = {
        name: Took(*(statistics.median(column) for column in zip(*rows, strict=True))) for name, rows in took.items()
    }
    for name, (wall_s, cpu_s) in median.items():
        print(f"{name:13} {wall_s:6.2f} s {cpu_s:6.2f} CPU s")
    shell, dagster = median.values()
    print(f"{'Dagster adds':13} {dagster.wall_s - shell.wall_s:6.2f} s {dagster.cpu_s - shell.cpu_s:6.2f} CPU s")


def _by_command_line(place: Path) -> list[list[str]]:
    blobflow = [str(_BINARIES / "blobflow"), "--store", str(place / "here" / "store")]
    return [
        [*blobflow, "push", str(place / "source"), "work/one"],
        [*blobflow, "verify", "work/one"],
        [*blobflow, "pull", "work/one", str(place / "here" / "mirror")],
    ]


def _by_dagster(_: Path) -> list[list[str]]:
    return [[str(_BINARIES / "dg"), "launch", "--assets", '+key:"work/mirror"']]


def _measure(commands: list[list[str]], place: Path) -> Took:
    environment = {
        **os.environ,
        "OVERHEAD_HOME": str(place),
        "DAGSTER_HOME": str(place / "dagster"),
        "VIRTUAL_ENV": str(_BINARIES.parent),
        "PATH": f"{_BINARIES}{os.pathsep}{os.environ['PATH']}",
    }
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        done = subprocess.run(
            command,
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _write_source(directory: Path, files: int, size: int) -> None:
    directory.mkdir()
    for number in range(files):
        (directory / f"{number:05}.bin").write_bytes(random.Random(number).randbytes(size))


if __name__ == "__main__":
    main()
