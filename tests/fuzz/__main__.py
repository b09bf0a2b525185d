"""The fuzzer: `python -m tests.fuzz --seconds 600`, which `make fuzz` calls.

Each target runs in its own process with a memory limit, under atheris (libFuzzer with Python's coverage). It begins
with the seeds and with `tests/fuzz/corpus/<target>`. Inputs that reach new code are kept in `.fuzz/corpus/<target>` for
the next run. What breaks the rule goes to `.fuzz/crashes/<target>`: mend the parser, then move the file to the tests'
corpus, under a name that says what was wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    atheris = None

if atheris is not None and "--in-process" in sys.argv:
    with atheris.instrument_imports(include=["blobflow"]):
        importlib.import_module("tests.fuzz.targets")

from blobflow.errors import BlobflowError
from tests.fuzz.targets import CORPUS, SCRATCH_VARIABLE, Target, quotes_too_much, targets

KEPT = Path(".fuzz").absolute()
MEMORY_MIB = 2048
SLOWEST_S = 20


def hold(target: Target) -> Callable[[bytes], None]:
    """The rule: a value, or an error of ours that quotes little."""

    def run(data: bytes) -> None:
        said = None
        try:
            target.run(data)
        except BlobflowError as error:
            said = error
        assert said is None or not quotes_too_much(said, data), "the message quotes too much"

    return run


def fuzz_one(name: str, seconds: int) -> None:
    """One target, in this process; ends it."""
    resource.setrlimit(resource.RLIMIT_AS, ((MEMORY_MIB << 20) * 2, (MEMORY_MIB << 20) * 2))
    target, crashes = targets()[name], KEPT / "crashes" / name
    corpus, begin = KEPT / "corpus" / name, KEPT / "seeds" / name
    for directory in (corpus, crashes, begin):
        directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (begin / str(number)).write_bytes(seed)
    if atheris is None:
        mutate(hold(target), target.seeds, crashes, seconds)
        return
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={crashes}/",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-timeout={SLOWEST_S}",
        "-max_len=16384",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    known = [str(directory) for directory in (corpus, begin, CORPUS / name) if directory.is_dir()]
    atheris.Setup([sys.argv[0], *options, *known], hold(target))
    atheris.Fuzz()


def mutate(run: Callable[[bytes], None], seeds: tuple[bytes, ...], crashes: Path, seconds: int) -> None:
    """Without coverage: seeds with random changes, the same ones in each run."""
    dice = random.Random(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 6)):
            at, length = dice.randint(0, len(data)), dice.choice((0, 1, 1, 2, 8))
            inserts = (dice.randbytes(dice.randint(0, 4)), b"0" * 400, bytes(data[:at][-16:]))
            data[at : at + length] = dice.choice(inserts)
        try:
            run(bytes(data))
        except BaseException:
            (crashes / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise


def main() -> int:
    """All targets, as many at once as there are processors."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--target", action="append", choices=sorted(targets()), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names: list[str] = given.target or sorted(targets())
    if given.in_process:
        fuzz_one(names[0], given.seconds)
        return 0
    if atheris is None:
        print("blobflow: atheris is not installed here, so the inputs are mutated without coverage", flush=True)
    scratch = tempfile.TemporaryDirectory(
        prefix="blobflow-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    )
    os.environ[SCRATCH_VARIABLE] = scratch.name
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    waiting = list(names)
    while waiting or running:
        while waiting and len(running) < given.jobs:
            name = waiting.pop(0)
            print(f"fuzzing {name} for {given.seconds} s", flush=True)
            command = [sys.executable, "-m", "tests.fuzz", "--in-process", "--target", name]
            running[name] = subprocess.Popen([*command, "--seconds", str(given.seconds)], stderr=subprocess.PIPE)
        name, process = next(iter(running.items()))
        _, said = process.communicate()
        del running[name]
        if process.returncode:
            failed.append(name)
            lines = said.decode(errors="replace").splitlines()
            told = "\n".join(line for line in lines if not line.startswith(("INFO:", "WARNING:")))
            print(f"{name} broke the rule:\n{told[-6000:]}", flush=True)
    scratch.cleanup()
    if failed:
        print(f"what broke it is in {KEPT / 'crashes'}: {', '.join(failed)}", flush=True)
    else:
        print(f"{len(names)} targets hold: a value or a BlobflowError", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
