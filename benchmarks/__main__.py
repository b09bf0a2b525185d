"""The command line of the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import contestants as known, report
from benchmarks.contestants import BATCH, LAYERS, RESUMES, SCENARIOS, Contestant, Job, Layout, Tool, Way
from benchmarks.endpoints import BUCKET, CheapServer, Endpoint, RealServer, cheap_server, new_prefix
from benchmarks.measure import CommandFailed, Cost, run, run_until_killed
from benchmarks.native import HERE, peers_environment
from benchmarks.workload import (
    MIB,
    Workload,
    available_memory_bytes,
    batch_files,
    difference,
    files_below,
    layered_files,
    many_files,
    one_file,
    touch_memory,
    working_directory,
)

RESULTS = HERE / "results"
_ARTIFACT_FILES = {"MANIFEST.json", "INDEX.parquet"}
_RESUME_RUNS = 3
_SLOW_RUNS = 2
_TINY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    scenarios: tuple[str, ...]
    peers: tuple[str, ...] | None
    runs: int
    size: int
    files: int
    skip: tuple[tuple[str, str], ...]
    """Beginnings of the names of a peer and of a scenario."""
    patience: float
    endpoint: str | None
    tls: bool
    bucket: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for; returns the exit code."""
    arguments = _parse(argv)
    options: Options = arguments.options
    peers = peers_environment(install=not arguments.no_install and options.peers != ())
    tools = {
        name: tool
        for name, tool in known.installed(peers).items()
        if name == known.BLOBFLOW or options.peers is None or _matches(name, options.peers)
    }
    earlier = [report.load(path) for path in arguments.join]
    document = report.joined([*earlier, measure(options, tools)])
    path = report.store(document, arguments.results)
    print("\n" + report.markdown(document))
    print(f"stored: {path}.json and {path.name}.md")
    if arguments.publish:
        report.publish(document, HERE.parent / "docs")
        print("published: docs/benchmarks.md and docs/images/")
    return 1 if any("error" in entry for entry in document["runs"]) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="blobflow and its peers in one table.")
    parser.add_argument(
        "--scenario",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(SCENARIOS)}, or the beginning of several; may be repeated (default: all)",
    )
    parser.add_argument("--runs", type=int, default=5, help="measured runs of everything (5)")
    parser.add_argument("--size", type=_size, default="1GiB", help="of the large file (1GiB)")
    parser.add_argument("--files", type=int, default=10_000, help="of 32 KiB each, and objects of a batch (10000)")
    parser.add_argument("--quick", action="store_true", help="64 MiB, 500 files, one run: does it work at all?")
    parser.add_argument("--peers", help="comma-separated, by the beginning of their names; 'none' for blobflow alone")
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PEER@NAME",
        default=[],
        help="leave a peer out of the scenarios that begin so; may be repeated",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        help=f"who takes this many times as long as the fastest runs {_SLOW_RUNS} times only (10)",
    )
    parser.add_argument("--endpoint", metavar="URL", help="a real S3 server; credentials from the environment")
    parser.add_argument("--tls", action="store_true", help="the cheap server over https")
    parser.add_argument("--bucket", default=BUCKET, help="an existing bucket of that server")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes (benchmarks/results)")
    parser.add_argument(
        "--join",
        nargs="+",
        type=Path,
        default=[],
        metavar="JSON",
        help="results of earlier calls with the same sizes and other scenarios, for one table",
    )
    parser.add_argument("--publish", action="store_true", help="also into docs/benchmarks.md and docs/images/")
    parser.add_argument("--no-install", action="store_true", help="take the peers that are there")
    given = parser.parse_args(argv)
    if given.quick:
        given.size, given.files, given.runs = 64 * MIB, 500, 1
    asked = given.scenario or list(SCENARIOS)
    unknown = [name for name in asked if not any(scenario.startswith(name) for scenario in SCENARIOS)]
    if unknown:
        parser.error(f"no scenario begins with {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    if min(given.runs, given.size, given.files) < 1:
        parser.error("--runs, --size and --files are at least 1")
    given.options = Options(
        scenarios=tuple(name for name in SCENARIOS if any(name.startswith(prefix) for prefix in asked)),
        peers=None if given.peers is None else () if given.peers == "none" else tuple(given.peers.split(",")),
        runs=given.runs,
        size=given.size,
        files=given.files,
        skip=tuple((peer, scenario) for peer, _, scenario in (entry.partition("@") for entry in given.skip)),
        patience=given.patience,
        endpoint=given.endpoint,
        tls=given.tls,
        bucket=given.bucket,
    )
    return given


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT])iB", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 64MiB or 4GiB")
    return int(match[1]) * 1024 ** (" KMGT".index(match[2]))


def _matches(name: str, prefixes: Sequence[str]) -> bool:
    return any(name.startswith(prefix) for prefix in prefixes)


def measure(options: Options, tools: dict[str, Tool]) -> dict[str, Any]:
    """Everything that was asked for, as the document that `report` understands."""
    largest = max(
        options.size * any(name.startswith(("one", "resume", "mirror", "layers")) for name in options.scenarios),
        options.files * 32 * 1024 * any(name.startswith("many") for name in options.scenarios),
        MIB,
    )
    # In memory at the same time: the source, a download, and on the server one copy in each layout, or an upload with
    # what a killed one left.
    layouts = {
        contestant.layout
        for tool in tools.values()
        for contestant in tool.contestants
        if set(contestant.scenarios) & set(options.scenarios) - set(LAYERS)  # those need no server
    }
    needed = 2 * largest + 64 * MIB + options.size * ("mirror" in options.scenarios)
    server_bytes = 0 if options.endpoint else max(2, len(layouts)) * largest + 512 * MIB
    if available_memory_bytes() < needed + server_bytes:
        raise SystemExit(
            f"benchmarks: {(needed + server_bytes) / MIB:,.0f} MiB of memory are needed and"
            f" {available_memory_bytes() / MIB:,.0f} MiB available: choose a smaller --size or --files"
        )
    load_before = os.getloadavg()[0]
    started = time.time()
    with working_directory(needed) as directory, _endpoint(options, server_bytes) as endpoint:
        session = Session(options, tools, endpoint, directory)
        runs = session.run()
    return {
        "format": "blobflow.benchmarks/1",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "machine": _machine() | {"load_before": round(load_before, 2)},
        "server": endpoint.name,
        "options": {"runs": options.runs, "size": options.size, "files": options.files, "patience": options.patience},
        "scenarios": list(options.scenarios),
        "versions": {name: tool.version for name, tool in tools.items()},
        "commands": session.commands,
        "runs": runs,
    }


@contextmanager
def _endpoint(options: Options, server_bytes: int) -> Generator[Endpoint]:
    if options.endpoint:
        yield RealServer(options.endpoint, options.bucket)
        return
    with cheap_server(warm_bytes=server_bytes - 512 * MIB, limit_bytes=server_bytes, tls=options.tls) as server:
        yield server


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


class Session:
    """One run of the benchmarks: rounds, and in each round everybody once, in a new order."""

    def __init__(self, options: Options, tools: dict[str, Tool], endpoint: Endpoint, directory: Path) -> None:
        self.options = options
        self.endpoint = endpoint
        self.directory = directory
        self.everybody = [contestant for tool in tools.values() for contestant in tool.contestants]
        self.commands: dict[str, dict[str, str]] = {}
        self.runs: list[dict[str, Any]] = []
        self._prefix = new_prefix()
        self._count = 0
        self._workloads: dict[str, Workload] = {}
        self._seeds: dict[tuple[Layout, str], str] = {}

    def run(self) -> list[dict[str, Any]]:
        """All rounds; one entry per measured command."""
        order = random.Random(0)
        try:
            for scenario in self.options.scenarios:
                if scenario in RESUMES and not isinstance(self.endpoint, CheapServer):
                    print(f"{scenario}: not measured, a real server cannot be stopped at half")
                    continue
                self._rounds(scenario, order)
        finally:
            self.endpoint.drop(self._prefix)
        return self.runs

    def _rounds(self, scenario: str, order: random.Random) -> None:
        skipped = tuple(peer for peer, beginning in self.options.skip if scenario.startswith(beginning))
        taking_part = [
            contestant
            for contestant in self.everybody
            if scenario in contestant.scenarios and not contestant.tool.startswith(skipped)
        ]
        if scenario.endswith("up"):
            self._drop_seeds()
        rounds = min(self.options.runs, _RESUME_RUNS) if scenario in RESUMES else self.options.runs
        for number in range(rounds):
            order.shuffle(taking_part)
            for contestant in list(taking_part):
                if number >= _SLOW_RUNS and self._is_slow(scenario, contestant):
                    continue
                entry = self._measured(scenario, contestant, number)
                self.runs.append(entry)
                if "error" in entry:
                    taking_part.remove(contestant)
                print(report.line(entry), flush=True)

    def _walls(self, scenario: str, name: str) -> list[float]:
        found = (entry for entry in self.runs if (entry["scenario"], entry["contestant"]) == (scenario, name))
        return [entry["wall_s"] for entry in found if "wall_s" in entry]

    def _is_slow(self, scenario: str, contestant: Contestant) -> bool:
        medians = {
            one.name: statistics.median(walls) for one in self.everybody if (walls := self._walls(scenario, one.name))
        }
        return medians[contestant.name] > self.options.patience * min(medians.values())

    def _measured(self, scenario: str, contestant: Contestant, number: int) -> dict[str, Any]:
        entry = {"scenario": scenario, "tool": contestant.tool, "contestant": contestant.name, "round": number}
        place = self.directory / "place"
        place.mkdir()
        prefix = f"{self._prefix}/{self._count}"
        self._count += 1
        try:
            return entry | self._play(scenario)(contestant, scenario, prefix, place, number == 0)
        except CommandFailed as error:
            return entry | {"error": str(error)}
        finally:
            shutil.rmtree(place)
            self.endpoint.drop(prefix)

    def _play(self, scenario: str) -> Callable[[Contestant, str, str, Path, bool], dict[str, Any]]:
        if scenario == "start":
            return self._start
        if scenario == "mirror":
            return self._mirror
        if scenario == BATCH:
            return self._batch
        if scenario in RESUMES:
            return self._resume
        if scenario in LAYERS:
            return self._layers
        return self._up if scenario.endswith("up") else self._down

    # What is moved

    def _workload(self, scenario: str) -> Workload:
        name = {"many": "many", "layers": "layers", "start": "tiny", BATCH: "batch"}.get(
            scenario.partition("-")[0], "one"
        )
        if name not in self._workloads:
            source = self.directory / "source"
            for other in self._workloads.values():  # one of them at a time fits into the memory that was asked for
                shutil.rmtree(other.path)
                shutil.rmtree(self.directory / "scratch", ignore_errors=True)
            self._workloads.clear()
            self._drop_seeds()
            make = {
                "many": lambda: many_files(source, self.options.files),
                "one": lambda: one_file(source, self.options.size),
                "layers": lambda: layered_files(source, self.options.size),
                "batch": lambda: batch_files(source, self.options.files),
                "tiny": lambda: one_file(source / "tiny", _TINY_BYTES),
            }
            self._workloads[name] = make[name]()
        return self._workloads[name]

    def _job(self, way: Way, scenario: str, directory: Path, prefix: str, scratch: str = "scratch") -> Job:
        job = Job(way, self._workload(scenario), directory, self.endpoint, prefix, self.directory / scratch)
        job.scratch.mkdir(exist_ok=True)
        return job

    def _drop_seeds(self) -> None:
        for prefix in self._seeds.values():
            self.endpoint.drop(prefix)
        self._seeds.clear()

    def _seed(self, contestant: Contestant, scenario: str) -> str:
        """The prefix that this contestant's kind of download reads; the first one who can write it fills it."""
        workload = self._workload(scenario)
        place = (contestant.layout, workload.name)
        if place not in self._seeds:
            prefix = f"{self._prefix}/seed-{contestant.layout}-{workload.name}"
            job = self._job("up", scenario, workload.path, prefix)
            up = f"{workload.name}-up"
            writer = next(one for one in self.everybody if one.layout == contestant.layout and up in one.scenarios)
            writer.prepare(job)
            run(writer.command(job), log=job.scratch / "seed.log")
            self._seeds[place] = prefix
        return self._seeds[place]

    # The scenarios

    def _up(self, contestant: Contestant, scenario: str, prefix: str, place: Path, first: bool) -> dict[str, Any]:
        workload = self._workload(scenario)
        job = self._job("up", scenario, workload.path, prefix)
        contestant.prepare(job)
        self.endpoint.reset()
        command = self._announced(contestant, scenario, job)
        found = self._figures(run(command, log=place / "log"))
        self._check_upload(contestant, job, place, read_back=first)
        return found

    def _down(self, contestant: Contestant, scenario: str, _prefix: str, place: Path, first: bool) -> dict[str, Any]:
        job = self._job("down", scenario, place / "room" / "out", self._seed(contestant, scenario))
        job.directory.parent.mkdir()
        if contestant.layout != "artifact":
            job.directory.mkdir()
        touch_memory(place, job.workload.bytes)
        self.endpoint.reset()
        command = self._announced(contestant, scenario, job)
        found = self._figures(run(command, log=place / "log"))
        self._check_download(contestant, job, contents=first)
        return found

    def _resume(self, contestant: Contestant, scenario: str, prefix: str, place: Path, _first: bool) -> dict[str, Any]:
        server = self.endpoint
        assert isinstance(server, CheapServer)
        workload = self._workload(scenario)
        if scenario == "resume-up":
            job = self._job("up", scenario, workload.path, prefix)
            contestant.prepare(job)
        else:
            job = self._job("down", scenario, place / "room" / "out", self._seed(contestant, scenario))
            job.directory.parent.mkdir()
            if contestant.layout != "artifact":
                job.directory.mkdir()
        server.reset()
        server.stop_bodies_after(workload.bytes // 2)
        command = self._announced(contestant, scenario, job)
        try:
            run_until_killed(command, server.bodies_stand_still, log=place / "log")
        finally:
            server.stop_bodies_after(0)
        server.wait_until_left()
        before = server.traffic()
        if contestant.layout == "artifact":  # it claims to need nothing local: a new HOME, a new TMPDIR
            job = self._job(job.way, scenario, job.directory, job.prefix, scratch="scratch-of-another")
        server.reset()
        found = self._figures(run(contestant.command(job), log=place / "log"))
        after = server.traffic()
        if scenario == "resume-up":
            found["moved_again_bytes"] = before.bytes_in + after.bytes_in - workload.bytes
            found["left_over"] = server.holds(prefix).uploads
            self._check_upload(contestant, job, place, read_back=True)
        else:
            found["moved_again_bytes"] = before.bytes_out + after.bytes_out - workload.bytes
            found["left_over"] = self._left_over(contestant, job)
            self._check_download(contestant, job, contents=True)
        return found

    def _layers(self, contestant: Contestant, scenario: str, prefix: str, place: Path, first: bool) -> dict[str, Any]:
        """Without a server: what lies in a directory, and what comes of it."""
        workload = self._workload(scenario)
        up = replace(self._job("up", scenario, workload.path, prefix), local=place / "local")
        up.local.mkdir()
        down = replace(up, way="down", directory=place / "out")
        if scenario == "layers-codec":
            subprocess.run(["tar", "cf", up.local / "tar", "-C", workload.path, "."], check=True)
        elif scenario == "layers-down":
            contestant.prepare(up)
            run(contestant.command(up), log=place / "seed.log")
        contestant.prepare(up)
        job = down if scenario == "layers-down" else up
        touch_memory(place, workload.bytes)
        cost = run(self._announced(contestant, scenario, job), log=place / "log")
        found: dict[str, Any] = asdict(cost)
        if scenario == "layers-up":
            found["bytes_in"] = sum(files_below(up.local).values())
            if first:
                reader = next(
                    one for one in self.everybody if one.layout == contestant.layout and "layers-down" in one.scenarios
                )
                run(reader.command(down), log=place / "log")
        if down.directory.exists() and (differs := difference(workload.path, down.directory, contents=first)):
            raise CommandFailed(f"{contestant.name}: {differs}")
        return found

    def _start(self, contestant: Contestant, scenario: str, prefix: str, place: Path, _first: bool) -> dict[str, Any]:
        workload = self._workload(scenario)
        job = self._job("up", scenario, workload.path, prefix)
        contestant.prepare(job)
        self.endpoint.reset()
        return self._figures(run(self._announced(contestant, scenario, job), log=place / "log"))

    def _mirror(self, contestant: Contestant, scenario: str, prefix: str, place: Path, _first: bool) -> dict[str, Any]:
        workload = self._workload(scenario)
        job = self._job("up", scenario, workload.path, prefix)
        contestant.prepare(job)
        touch_memory(place, workload.bytes)
        command = self._announced(contestant, scenario, job)
        try:
            cost = run(command, log=place / "log")
            held = sum(path.stat().st_size for path in job.received.rglob("*.snapshot"))
            if held < workload.bytes:
                raise CommandFailed(f"{contestant.name}: {held} bytes were received of {workload}")
        finally:
            shutil.rmtree(job.received, ignore_errors=True)
        return asdict(cost) | {"cpu_s_per_gb": cost.cpu_s / workload.bytes * 1e9}

    def _batch(self, contestant: Contestant, scenario: str, prefix: str, place: Path, _first: bool) -> dict[str, Any]:
        """Inserts, gets and deletes; the drivers compare what they get."""
        workload = self._workload(scenario)
        job = self._job("up", scenario, workload.path, prefix)
        contestant.prepare(job)
        self.endpoint.reset()
        found = self._figures(run(self._announced(contestant, scenario, job), log=place / "log"))
        # Some delete by a document.
        moved = min(found.get(way, workload.bytes) for way in ("bytes_in", "bytes_out"))
        held = self.endpoint.holds(prefix + "/").objects
        if held or moved < workload.bytes:
            raise CommandFailed(f"{contestant.name}: {held} objects left, {moved} of {workload.bytes} bytes moved")
        return found | {"operations_per_s": 3 * workload.files / found["wall_s"]}

    # Their ends

    def _announced(self, contestant: Contestant, scenario: str, job: Job) -> Any:
        command = contestant.command(job)
        self.commands.setdefault(scenario, {})[contestant.name] = command.display
        return command

    def _figures(self, cost: Cost) -> dict[str, Any]:
        found: dict[str, Any] = {
            "wall_s": cost.wall_s,
            "cpu_s": cost.cpu_s,
            "peak_rss_bytes": cost.peak_rss_bytes,
        }
        if (seen := self.endpoint.traffic()) is not None:
            found |= asdict(seen)
        return found

    def _check_upload(self, contestant: Contestant, job: Job, place: Path, *, read_back: bool) -> None:
        """An upload that lost something is a failure, however fast it was."""
        if contestant.layout == "objects":
            held = self.endpoint.holds(job.prefix + "/")
            if (held.objects, held.bytes) != (job.workload.files, job.workload.bytes):
                raise CommandFailed(f"{contestant.name}: {held} instead of {job.workload}")
        if not read_back:
            return
        back = Job("down", job.workload, place / "back", job.endpoint, job.prefix, job.scratch)
        if contestant.layout != "artifact":
            back.directory.mkdir()
        reader = next(one for one in self.everybody if one.layout == contestant.layout and "one-down" in one.scenarios)
        run(reader.command(back), log=place / "log")
        self._check_download(reader, back, contents=True)
        shutil.rmtree(back.directory)

    def _check_download(self, contestant: Contestant, job: Job, *, contents: bool) -> None:
        root = job.directory / "data" if contestant.layout == "artifact" else job.directory
        if differs := difference(job.workload.path, root, contents=contents):
            raise CommandFailed(f"{contestant.name}: {differs}")

    def _left_over(self, contestant: Contestant, job: Job) -> int:
        """Files at the destination and beside it that nobody asked for."""
        wanted = {f"out/{'data/' * (contestant.layout == 'artifact')}{name}" for name in files_below(job.workload.path)}
        if contestant.layout == "artifact":
            wanted |= {f"out/{name}" for name in _ARTIFACT_FILES}
        extra = files_below(job.directory.parent).keys() - wanted
        for name in extra:
            if contestant.layout != "artifact" and name.startswith("out/"):
                (job.directory.parent / name).unlink()
        return len(extra)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that everything is cleaned up
        signal.signal(number, lambda *_: sys.exit(1))
    sys.exit(main())
