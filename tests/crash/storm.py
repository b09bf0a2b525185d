"""A storm over a store: many commands at once, killed at seeded moments, on a network that spoils what passes.

One seed makes one plan: who runs what, and when it is to die. How the plan meets the machine differs from run to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import blobflow.errors
from tests.crash.machines import LocalPlace, Machine, Place
from tests.fault_proxy import Corrupt, Fault, FaultProxy, Message, Reset, Stall, Truncate, no_faults
from tests.fault_rules import Slow

KEYS: Final = ("orders/a", "orders/b")
"""Where everybody overwrites what the others put."""
SHARED_KEY: Final = "orders/shared"
"""Where everybody pushes the same trees, and so joins the uploads of the others."""

WORKERS: Final = 2
KILLED_SHARE: Final = 0.75
ATTEMPTS: Final = 6
"""After so many kills and errors somebody turns to something else."""
FAULT_RATE: Final = 0.03
PATIENCE_S: Final = 3.0
"""A command that stalls for longer than this, and than several times the usual, is killed."""
LOOK_S: Final = 0.002
"""Between two looks of the watcher, so that it leaves some of the machine to the others."""

DYING_AT: Final = {
    "push": (("*", 60), ("UploadPart", 8), ("UploadPart", 8), ("CompleteMultipartUpload", 2), ("PutObject", 8)),
    "pull": (("*", 60), ("GetObject", 30)),
    "gc": (("*", 12),),
}
"""Requests and answers at which a command is killed: which ones, and how many of them at most have to come before."""

ON_ANSWERS: Final = (
    Truncate(),
    Truncate(100),
    Truncate(70_000),
    Reset(),
    Reset(100),
    Stall(),
    Stall(70_000),
    Slow(8e6),
)
ON_REQUESTS: Final = (Truncate(), Truncate(70_000), Reset(70_000), Stall(70_000), Slow(8e6))
DAMAGE: Final = (Corrupt(0), Corrupt(70_000), Corrupt(-1), Corrupt(-700))

TEMPORARY: Final = {"StoreUnavailable", "TimedOut", "TransferBusy"}
EXPECTED: Final = {
    "push": TEMPORARY | {"KeyConflict", "UploadIncomplete"},
    "pull": TEMPORARY | {"ObjectChanged", "ReplacementInProgress", "ArtifactNotFound", "DestinationNotEmpty"},
    "gc": TEMPORARY,
}
"""What a command may say besides damage, which only a spoiled byte excuses."""


@dataclass(frozen=True)
class Cargo:
    """A tree to push."""

    source: Path
    fingerprint: str

    @classmethod
    def of(cls, source: Path) -> Cargo:
        return cls(source, fingerprint(source))


def fingerprint(tree: Path) -> str:
    """Equal for equal trees: paths, and the contents of files."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        digest.update(f"{path.relative_to(tree)}\0".encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass
class Figures:
    """What came of a storm."""

    seed: int
    runs: Counter[str] = field(default_factory=Counter[str])
    """Of each command, the killed ones included."""
    kills: Counter[str] = field(default_factory=Counter[str])
    errors: Counter[str] = field(default_factory=Counter[str])
    """`command: type`."""
    faults: Counter[str] = field(default_factory=Counter[str])
    looks: int = 0
    """Of the watcher, at one key each."""
    parts_sent_again: int = 0
    """Parts that were sent more than once under one upload id, counted each time but the first."""
    parts_spoiled: int = 0
    """Of all that were sent."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"seed={self.seed} seconds={self.seconds:.0f} runs={sum(self.runs.values())} {dict(self.runs)} "
            f"kills={sum(self.kills.values())} {dict(self.kills)} errors={dict(self.errors)} "
            f"faults={sum(self.faults.values())} {dict(self.faults)} looks={self.looks} "
            f"parts_sent_again={self.parts_sent_again} parts_spoiled={self.parts_spoiled}"
        )


class Network:
    """What a proxy asks for every message: it counts for those who are to die at one, and spoils some.

    Args:
        damaged_requests: Whether bytes on the way up are damaged, too.
    """

    def __init__(self, seed: int, *, damaged_requests: bool) -> None:
        self._random = random.Random(f"network {seed}")
        self._kinds: dict[str, tuple[Fault, ...]] = {
            "answer": ON_ANSWERS + DAMAGE,
            "request": ON_REQUESTS + (DAMAGE if damaged_requests else ()),
        }
        self._lock = threading.Lock()
        self._dying: dict[subprocess.Popen[str], tuple[str, int]] = {}

    def __call__(self, message: Message) -> Fault | None:
        with self._lock:
            for process, (operation, left) in list(self._dying.items()):
                if fnmatchcase(message.operation, operation):
                    self._dying[process] = operation, left - 1
                    if left == 1:
                        process.kill()
        spoiled, kind = self._random.random() < FAULT_RATE, self._random.choice(self._kinds[message.side])
        return kind if spoiled else None

    @contextlib.contextmanager
    def dying_at(self, process: subprocess.Popen[str], operation: str, number: int) -> Iterator[None]:
        """Kill the process when so many messages more have come for such operations, whosever they are."""
        with self._lock:
            self._dying[process] = operation, number
        try:
            yield
        finally:
            with self._lock:
                del self._dying[process]


class Storm:
    """Writers and readers on one store, until enough of them were killed.

    Args:
        proxy: What stands between the machines and the store, if there is a network.
        damaged_requests: See `Network`.
        options: Of the command line, for every machine.
    """

    def __init__(
        self,
        seed: int,
        kills: int,
        place: Place,
        cargos: list[Cargo],
        directory: Path,
        *options: str,
        proxy: FaultProxy | None = None,
        damaged_requests: bool = False,
    ) -> None:
        self.figures = Figures(seed)
        self.place = place
        self._wanted = kills
        self._cargos = cargos
        self._known = {cargo.fingerprint for cargo in cargos}
        self._directory = directory
        self._landing = directory / "landing"
        self._landing.mkdir()
        self._options = (*options, "--workers", str(WORKERS), *(("--endpoint-url", proxy.url) if proxy else ()))
        self._proxy = proxy
        self._network = Network(seed, damaged_requests=damaged_requests)
        self._usual_s: dict[str, float] = {}
        """How long commands take that nobody kills: kills are spread over that."""
        self._machines = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._failures: list[BaseException] = []
        self._awaited: dict[Path, threading.Lock] = {}
        """Destinations that the watcher looks at, while it may."""
        self._journals: dict[str, int] = {}

    def run(self) -> Figures:
        """Let it rage, let the air clear, and prove that all is well."""
        started = time.monotonic()
        calm = self._machine()
        for key, cargo in zip((*KEYS, SHARED_KEY), self._cargos, strict=False):
            calm.run("push", cargo.source, key)
        self._usual_s = dict.fromkeys(DYING_AT, (time.monotonic() - started) / 3)
        lanes = [
            *(threading.Thread(target=self._guarded, args=(self._write, n)) for n in range(2)),
            *(threading.Thread(target=self._guarded, args=(self._read, n)) for n in range(2)),
            threading.Thread(target=self._guarded, args=(self._watch, 0)),
        ]
        if self._proxy:
            self._proxy.faults = self._network
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        if self._proxy:
            self._proxy.faults = no_faults
        self._count_parts()
        self.figures.seconds = time.monotonic() - started
        print(self.figures)
        if self._failures:
            raise self._failures[0]
        self._settle()
        return self.figures

    def _guarded(self, lane: Any, number: int) -> None:
        try:
            lane(number, random.Random(f"{lane.__name__} {number} {self.figures.seed}"))
        except BaseException as error:  # noqa: BLE001  # raised again in the test's own thread
            self._failures.append(error)
        finally:
            if self._failures:
                self._over.set()

    def _machine(self) -> Machine:
        with self._lock:
            self._machines += 1
            return Machine(self._directory / f"machine-{self._machines}", self.place, *self._options)

    # Writers and readers

    def _write(self, number: int, dice: random.Random) -> None:
        # Those who put other trees under one key are told apart by what they put: nobody joins there.
        own = self._cargos[number::2]
        machine = self._machine()
        while not self._over.is_set():
            if dice.random() < 0.1:
                self._run(machine, dice, "gc")
                continue
            shared = dice.random() < 0.2
            key = SHARED_KEY if shared else dice.choice(KEYS)
            cargo = dice.choice(self._cargos[:2] if shared else own)
            for _ in range(ATTEMPTS):
                if self._run(machine, dice, "push", cargo.source, key, "--overwrite") or self._over.is_set():
                    break
                if dice.random() < 0.3:
                    machine = self._machine()

    def _read(self, number: int, dice: random.Random) -> None:
        machine = self._machine()
        count = 0
        while not self._over.is_set():
            count += 1
            dest = self._landing / f"reader-{number}-{count}"
            key = dice.choice((*KEYS, SHARED_KEY))
            with self._watched(dest):
                for _ in range(ATTEMPTS):
                    # Whoever is killed after the landing finds it there, with another artifact under the key meanwhile.
                    if self._run(machine, dice, "pull", key, dest) or dest.exists() or self._over.is_set():
                        break
                if dest.exists():
                    assert fingerprint(dest / "data") in self._known, f"{dest} is none of the trees"

    def _run(self, machine: Machine, dice: random.Random, *command: object) -> bool:
        """Run a command that may be killed; whether it came to its good end."""
        name = str(command[0])
        usual_s = self._usual_s[name]
        killed, at_message = dice.random() < KILLED_SHARE, self._proxy is not None and dice.random() < 0.6
        operation, most = dice.choice(DYING_AT[name])
        number, share = dice.randint(1, most), dice.uniform(0.3, 1.1)
        limit_s = usual_s * share if killed and not at_message else max(PATIENCE_S, 4 * usual_s)
        damaged = self._damaged()
        started = time.monotonic()
        with machine.start(*command) as process, contextlib.ExitStack() as stack:
            if killed and at_message:
                stack.enter_context(self._network.dying_at(process, operation, number))
            try:
                out, err = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
        with self._lock:
            self.figures.runs[name] += 1
            if process.returncode < 0:
                self.figures.kills[name] += 1
                if sum(self.figures.kills.values()) >= self._wanted:
                    self._over.set()
                return False
            if process.returncode == 0:
                self._usual_s[name] = 0.7 * usual_s + 0.3 * (time.monotonic() - started)
                return True
            error = json.loads(out)["error"]
            self.figures.errors[f"{name}: {error['type']}"] += 1
        kind = getattr(blobflow.errors, error["type"], None)
        assert kind is not None, f"an error without a type: {out}{err}"
        assert kind.exit_code == process.returncode, out
        # An answer with a spoiled byte cannot be understood, which is final: the next run begins from what is there.
        by_damage = issubclass(kind, blobflow.errors.IntegrityError | blobflow.errors.Unsupported)
        excused = by_damage and self._damaged() > damaged
        assert excused or error["type"] in EXPECTED[name], f"{command} failed: {out}{err}"
        return False

    def _damaged(self) -> int:
        """How many bytes were damaged so far."""
        struck = self._proxy.messages if self._proxy else []
        return sum(isinstance(fault, Corrupt) for _, fault in struck)

    # The watcher

    @contextlib.contextmanager
    def _watched(self, dest: Path) -> Iterator[None]:
        """Let the watcher look at a destination inside the block, and remove it at its end."""
        lock = threading.Lock()
        self._awaited[dest] = lock
        try:
            yield
        finally:
            with lock:
                del self._awaited[dest]
            shutil.rmtree(dest, ignore_errors=True)

    def _watch(self, _: int, dice: random.Random) -> None:
        """Whatever can be seen is whole: payloads that have a manifest, and destinations that exist."""
        seen: set[Path] = set()
        while not self._over.wait(LOOK_S):
            for key in (*KEYS, SHARED_KEY):
                self._look_at(key)
                self.figures.looks += 1
            for dest, lock in list(self._awaited.items()):
                with lock:
                    if dest in self._awaited and dest not in seen and dest.exists():
                        assert fingerprint(dest / "data") in self._known, f"{dest} appeared before it was whole"
                        seen.add(dest)
            if isinstance(self.place, LocalPlace):
                self._read_journals(self.place.root)

    def _look_at(self, key: str) -> None:
        manifest = self.place.beginning(f"{key}.manifest.json", 1 << 20)
        if manifest is None:
            return
        size, head = self.place.size(key), self.place.beginning(key, 512 + len(manifest))
        # Between two looks somebody may overwrite it: then the manifest is gone first, and comes back another one.
        if self.place.beginning(f"{key}.manifest.json", 1 << 20) == manifest:
            expected = 512 + -(-len(manifest) // 512) * 512 + json.loads(manifest)["body"]["size"]
            assert size == expected, f"{key} has a manifest, and {size} bytes instead of {expected}"
            assert head is not None
            assert head[512:] == manifest, f"{key} has the manifest of another payload"

    def _read_journals(self, root: Path) -> None:
        """Remember how many parts the journals of a local store have twice."""
        for upload in (root / ".blobflow" / "uploads").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if json.loads((upload / "upload.json").read_bytes())["key"] != SHARED_KEY:
                    numbers = re.findall(rb'"part": (\d+), "size": \d', (upload / "parts.jsonl").read_bytes())
                    self._journals[upload.name] = len(numbers) - len(set(numbers))

    def _count_parts(self) -> None:
        figures, proxy = self.figures, self._proxy
        figures.parts_sent_again = sum(self._journals.values())
        if proxy is None:
            return
        figures.faults.update(f"{m.side} {type(fault).__name__}" for m, fault in proxy.messages if fault)
        parts = [(m, fault) for m, fault in proxy.messages if m.operation == "UploadPart" and m.path.endswith(KEYS)]
        sent = Counter((m.path, m.query) for m, _ in parts if m.side == "request")
        figures.parts_sent_again = sum(sent.values()) - len(sent)
        figures.parts_spoiled = sum(fault is not None for _, fault in parts)

    # Afterwards

    def _settle(self) -> None:
        """What is published is whole, the next push of anything succeeds, and `gc` leaves nothing behind."""
        calm = self._machine()
        for artifact in calm.run("ls")["artifacts"]:
            calm.run("verify", artifact["key"], "--deep")
        for key, cargo in zip((*KEYS, SHARED_KEY), reversed(self._cargos), strict=False):
            calm.run("push", cargo.source, key, "--overwrite")
            landed = self._directory / "settled" / key
            calm.run("pull", key, landed)
            assert fingerprint(landed / "data") == cargo.fingerprint
        calm.run("gc", "--older-than", "0s", "--stages", self._landing)
        assert self.place.leftovers() == []
        assert os.listdir(self._landing) == []
        expected = {name for key in (*KEYS, SHARED_KEY) for name in (key, f"{key}.manifest.json")}
        assert {key for key in self.place.all_keys() if not key.startswith("blobflow-")} == expected
