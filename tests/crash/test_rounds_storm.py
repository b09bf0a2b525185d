"""A storm of rounds: many workers want to do the same one, and are killed and frozen while they do it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blobflow import DirectoryExporter, RoundResult, download, open_store, read_ref, run_export_round, verify
from blobflow.coordination.lease_store import Found, LeaseStore, ObjectLeaseStore
from blobflow.coordination.refs import RefEntry, RefState, newest_round
from blobflow.coordination.sql_lease_store import SqlLeaseStore
from blobflow.stores.base import Store
from blobflow.testing import write_tree
from tests.crash.machines import LocalPlace, Place, S3Place
from tests.fault_proxy import FaultProxy, Truncate, no_faults, scripted_faults
from tests.fault_rules import Rule
from tests.faults.clients import Stores
from tests.kit import sized
from tests.servers import S3Endpoint
from tests.strict_s3 import Limits, StrictS3

WORKER = Path(__file__).with_name("round_worker.py")
LOOK_S = 0.01
FREEZE_SHARE = 0.08
"""Of the rounds whose holder is stopped until another has taken over."""
KILL_SHARE = 0.15
LIMIT_S = 1500.0


@dataclass
class Figures:
    """What came of a storm."""

    seed: int
    seconds: float = 0.0
    published: int = 0
    kills: int = 0
    frozen: int = 0
    """Holders that were stopped until another one had taken over."""
    frozen_late: int = 0
    """Of them, those that had moved the ref just before."""
    errors: Counter[str] = field(default_factory=Counter[str])
    longest_held_s: float = 0.0
    """That one record of the lease stood unchanged, with a holder."""

    def __str__(self) -> str:
        return (
            f"seed={self.seed} seconds={self.seconds:.0f} published={self.published} kills={self.kills} "
            f"frozen={self.frozen} (after their move: {self.frozen_late}) errors={dict(self.errors)} "
            f"longest_held_s={self.longest_held_s:.2f}"
        )


class Storm:
    """Workers in processes of their own, and this one, which watches the lease and the ref and does the harm."""

    def __init__(self, seed: int, place: Place, directory: Path, *, workers: int, ttl_s: float, leases_url: str = ""):
        self.figures = Figures(seed)
        self.chain: dict[int, RefEntry] = {}
        """Every place that the ref was seen at, by the generation of the move."""
        self._dice = random.Random(seed)
        self._place = place
        self._directory = directory
        self._count = workers
        self._ttl_s = ttl_s
        self._leases_url = leases_url
        self._journal = directory / "journal.jsonl"
        self._words = directory / "stderr"
        self._words.mkdir()
        self._scratch = directory / "scratch"
        self._scratch.mkdir()
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._said: dict[int, Path] = {}
        """Where each worker's standard error goes."""
        self._started = 0
        self._unchanged: tuple[str, float] = ("", 0.0)
        self._harmed: set[int] = set()
        """Rounds that the watcher has thought about."""
        self._frozen_rounds: dict[int, set[int]] = {}
        """Rounds of frozen holders, and the moves they had made before they went on."""
        given = place.environment
        self.store: Store = open_store(
            place.url,
            endpoint_url=given.get("AWS_ENDPOINT_URL"),
            region=given.get("AWS_DEFAULT_REGION"),
            access_key_id=given.get("AWS_ACCESS_KEY_ID"),
            secret_access_key=given.get("AWS_SECRET_ACCESS_KEY"),
        )
        self._leases: LeaseStore = SqlLeaseStore(leases_url) if leases_url else ObjectLeaseStore(self.store)

    def run(self, rounds: int) -> Figures:
        """Until so many rounds are published; then everybody is killed, and the books are balanced."""
        started = time.monotonic()
        with self._all_killed_at_the_end():
            for _ in range(self._count):
                self._start()
            while len(self.chain) < rounds:
                assert time.monotonic() - started < LIMIT_S, f"only {len(self.chain)} rounds: {self.figures}"
                self._look()
                time.sleep(LOOK_S)
        self.figures.seconds = time.monotonic() - started
        try:
            self._settle()
        finally:
            self._leases.close()
            self.store.close()
        return self.figures

    # The workers

    def _start(self) -> None:
        self._started += 1
        words = self._words / f"{self._started}"
        with open(words, "wb") as stderr:
            process = subprocess.Popen(
                [
                    sys.executable,
                    WORKER,
                    self._place.url,
                    str(self._ttl_s),
                    self._journal,
                    self._scratch,
                    self._leases_url,
                ],
                env={**os.environ, **self._place.environment},
                stderr=stderr,
            )
        self._workers[process.pid] = process
        self._said[process.pid] = words

    def _kill(self, pid: int) -> None:
        with self._workers.pop(pid) as process:
            process.kill()
        self.figures.kills += 1
        self._start()

    @contextmanager
    def _all_killed_at_the_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            for process in self._workers.values():
                process.kill()
            for process in self._workers.values():
                process.wait()

    # The watcher

    def _look(self) -> None:
        for pid, process in list(self._workers.items()):
            code = process.poll()
            assert code is None, f"worker {pid} ended by itself with {code}: {self._said[pid].read_text()[-5000:]}"
        self._see_ref()
        found = self._see_lease()
        if found is None or not found.state.owner:
            return
        pid = int(found.state.owner.rpartition("/")[2])
        if pid not in self._workers or found.state.generation in self._harmed:
            return
        self._harmed.add(found.state.generation)
        time.sleep(self._dice.uniform(0, 0.2))  # into any phase of the round
        draw = self._dice.random()
        # Who is stopped inside a statement of SQLite keeps the whole file locked (docs/leases.md).
        if draw < FREEZE_SHARE and not self._leases_url.startswith("sqlite:"):
            self._freeze(pid, found.state.generation)
        elif draw < FREEZE_SHARE + KILL_SHARE:
            self._kill(pid)
        if self._dice.random() < 0.05:
            self._kill(self._dice.choice(list(self._workers)))

    def _see_ref(self) -> RefState | None:
        """Note where the ref points and pointed; a whole artifact is there each time."""
        state = read_ref(self.store, "orders/latest")
        if state is not None:
            for entry in state.entries():
                known = self.chain.setdefault(entry.generation, entry)
                assert known == entry, f"history was rewritten: {known} -> {entry}"
        return state

    def _see_lease(self) -> Found | None:
        """Note for how long one record has stood there with a holder."""
        found, now = self._leases.read("orders/round"), time.monotonic()
        if found is None or not found.state.owner or found.version != self._unchanged[0]:
            self._unchanged = (found.version if found else "", now)
        self.figures.longest_held_s = max(self.figures.longest_held_s, now - self._unchanged[1])
        return found

    def _freeze(self, pid: int, generation: int) -> None:
        """Stop a holder, wait until its successor has begun, and let it go on: it must have learnt of it."""
        os.kill(pid, signal.SIGSTOP)
        try:
            while newest_round(self.store, "orders/latest") <= generation:
                found = self._see_lease()
                if found is None or not found.state.owner:
                    return  # it was just ready, or its last request was still under way
                time.sleep(LOOK_S)
            self._see_ref()
            before = {entry.generation for entry in self.chain.values() if entry.round_number == generation}
            self._frozen_rounds[generation] = before
            self.figures.frozen += 1
            self.figures.frozen_late += bool(before)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # The books

    def _settle(self) -> None:
        self._see_ref()
        figures, entries = self.figures, [self.chain[number] for number in sorted(self.chain)]
        figures.published = len(entries)
        reported: list[dict[str, Any]] = []
        for line in self._journal.read_bytes().splitlines():
            record = json.loads(line)
            if "error" in record:
                figures.errors[record["error"]] += 1
            else:
                reported.append(record)
        print(figures)
        assert sorted(self.chain) == list(range(1, len(entries) + 1)), "a move of the ref was lost"
        rounds = [entry.round_number for entry in entries]
        assert all(first < second for first, second in pairwise(rounds)), "a round came twice, or late"
        for generation, before in self._frozen_rounds.items():
            after = {entry.generation for entry in entries if entry.round_number == generation}
            assert after == before, f"the frozen holder of round {generation} has published"
        numbers = [record["round"] for record in reported]
        assert len(set(numbers)) == len(numbers), "a round was reported twice"
        for record in reported:
            entry = self.chain[record["ref"]]
            assert (entry.round_number, entry.key) == (record["round"], record["key"]), "a report without its move"
        assert set(figures.errors) <= {"LeaseLost"}, figures.errors
        assert figures.longest_held_s < 2 * self._ttl_s, f"stuck for {figures.longest_held_s:.1f} s"
        for entry in entries[-3:]:
            verify(self.store, entry.key, mode="deep", expected_digest=entry.manifest_sha256)
        lease = self._leases.read("orders/round")
        assert lease is not None
        assert lease.state.generation >= len(entries)


def seed() -> int:
    """Fresh, or the one to repeat."""
    number = int(os.environ.get("BLOBFLOW_STORM_SEED", str(random.randrange(10**6))))
    print(f"BLOBFLOW_STORM_SEED={number}")
    return number


def rounds(usual: int) -> int:
    return int(os.environ.get("BLOBFLOW_STORM_ROUNDS", str(usual)))


@pytest.mark.seed("1.20", "W1.7")
def test_a_small_storm_of_rounds(tmp_path: Path):
    """Four workers that are killed and frozen: each round at most once, none stuck, and no sleeper publishes."""
    figures = Storm(seed(), LocalPlace(tmp_path / "store"), tmp_path, workers=4, ttl_s=3.0).run(12)
    assert figures.published >= 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.seed("1.20", "W1.7")
def test_a_storm_of_rounds_on_a_local_store(tmp_path: Path):
    """Sixteen workers, and at full size 500 rounds."""
    figures = Storm(seed(), LocalPlace(tmp_path / "store"), tmp_path, workers=16, ttl_s=5.0).run(
        rounds(sized(500, 100))
    )
    assert figures.kills
    assert figures.frozen


@pytest.mark.slow
@pytest.mark.rgw
@pytest.mark.timeout(1800)
@pytest.mark.seed("1.20", "W1.7")
def test_a_storm_of_rounds_on_ceph(tmp_path: Path, rgw_s3: S3Endpoint):
    """Sixteen workers, and at full size 500 rounds."""
    figures = Storm(seed(), S3Place(rgw_s3), tmp_path, workers=16, ttl_s=5.0).run(rounds(sized(500, 40)))
    assert figures.kills
    assert figures.frozen


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.seed("1.20", "W1.7")
def test_a_storm_of_rounds_with_leases_in_sqlite(tmp_path: Path):
    """The lease in a database, the artifacts in a store; workers are killed, not stopped."""
    leases = f"sqlite:///{tmp_path}/leases.db"
    Storm(seed(), LocalPlace(tmp_path / "store"), tmp_path, workers=8, ttl_s=5.0, leases_url=leases).run(
        rounds(sized(100, 30))
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.seed("1.20", "W1.7")
def test_a_storm_of_rounds_with_leases_in_postgres(tmp_path: Path, postgres_url: str):
    """The server's clock and rows; who is stopped while it writes one keeps nobody else from it."""
    figures = Storm(
        seed(), LocalPlace(tmp_path / "store"), tmp_path, workers=16, ttl_s=5.0, leases_url=postgres_url
    ).run(rounds(sized(500, 40)))
    assert figures.kills
    assert figures.frozen


def publish(store: Store, directory: Path, content: str) -> RoundResult | None:
    """One round whose artifact holds `content` in two files."""
    source = write_tree(directory / uuid.uuid4().hex, {"one": content, "two": content})
    return run_export_round(store, "orders", DirectoryExporter(path=source), scratch_dir=directory)


@pytest.mark.seed("1.20", "W1.7")
def test_lost_answers_cost_no_round_and_publish_none_twice(tmp_path: Path):
    """Four workers in a network that loses every third good answer: nobody loses to himself, every result is a move."""
    with StrictS3(Limits(min_part_size=1)) as server, FaultProxy(server.url) as proxy:
        stores = Stores()
        try:
            lanes = [stores(server, proxy) for _ in range(4)]
            plain = stores(server)
            proxy.faults = scripted_faults(Rule(Truncate(), side="answer", success=True, nth=3, every=True))
            results: list[RoundResult] = []

            def work(store: Store) -> None:
                while len(results) < 12:
                    done = publish(store, tmp_path, uuid.uuid4().hex)
                    if done is not None:
                        results.append(done)

            with ThreadPoolExecutor(4) as pool:
                for future in [pool.submit(work, store) for store in lanes]:
                    future.result()
            struck = len(proxy.struck("answer"))
            proxy.faults = no_faults
            found = read_ref(plain, "orders/latest")
        finally:
            stores.close()
    assert found is not None
    entries = found.entries()[::-1]
    assert struck > 50
    assert [entry.generation for entry in entries] == list(range(1, len(results) + 1))
    assert [entry.round_number for entry in entries] == sorted(done.generation for done in results)
    assert {entry.key for entry in entries} == {done.upload.key for done in results}
    # Each acquisition was used: no generation was lost to a lease that its own holder did not recognise.
    assert [entry.round_number for entry in entries] == list(range(1, len(results) + 1))


@pytest.mark.seed("W1.5")
@pytest.mark.parametrize(
    "moves", [20, pytest.param(sized(1000, 200), marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_readers_of_a_moving_ref_get_whole_artifacts(moves: int, tmp_path: Path):
    """Two pull what it names again and again: always whole, as it was published, and never older than before."""
    store = open_store(tmp_path / "store")
    assert publish(store, tmp_path, "0") is not None
    over = threading.Event()
    pulled: list[list[int]] = [[], []]

    def read(lane: int) -> None:
        while not over.is_set() or not pulled[lane]:
            ref = read_ref(store, "orders/latest")
            assert ref is not None
            dest = tmp_path / f"reader-{lane}"
            download(store, ref.key, dest, expected_digest=ref.manifest_sha256)
            one, two = ((dest / "data" / name).read_text() for name in ("one", "two"))
            assert one == two
            assert int(one) + 1 == ref.generation
            pulled[lane].append(int(one))
            shutil.rmtree(dest)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read, lane) for lane in range(2)]
        try:
            for number in range(1, moves + 1):
                assert publish(store, tmp_path, str(number)) is not None
        finally:
            over.set()
        for reader in readers:
            reader.result()
    assert all(lane == sorted(lane) for lane in pulled)
    print(f"moves={moves} pulled={[len(lane) for lane in pulled]}")
