"""Retention: what has been kept long enough goes, and never what a ref names, whoever moves it meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blobflow import Artifact, upload, verify
from blobflow.cli import run
from blobflow.coordination.refs import move_ref, name_artifact, read_ref
from blobflow.errors import StoreUnavailable, TransferBusy, UsageError
from blobflow.maintenance.retention import prune
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailBefore, Fault, FaultyStore, Hook, Request
from blobflow.transport import list_artifacts
from tests.clock import Clock
from tests.kit import SERIAL, Killed, artifact_of, dies_at, keys, noise

DAY_S = 24 * 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())  # intents are written by the real one


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> LocalStore:
    return LocalStore(tmp_path / "store", now_ns=clock.ns)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path)


def days(store: Store, artifact: Artifact, clock: Clock, *names: str) -> list[str]:
    """One artifact a day, the last one today; their keys."""
    made: list[str] = []
    for name in names:
        clock.now += DAY_S if made else 0
        upload(store, name, artifact, profile=SERIAL)
        made.append(name)
    return made


def left(store: Store) -> list[str]:
    return [entry.key for entry in list_artifacts(store)]


def test_the_last_ones_are_kept(artifact: Artifact, store: LocalStore, clock: Clock):
    """By the time of their publication, not by their keys; payload and manifest go together, and once."""
    days(store, artifact, clock, "c.tar", "a.tar", "b.tar", "d.tar")
    report = prune(store, keep_last=2, clock=clock)
    assert (report.removed, report.kept, report.named) == (["a.tar", "c.tar"], 2, [])
    assert keys(store) == ["b.tar", "b.tar.manifest.json", "d.tar", "d.tar.manifest.json"]
    assert prune(store, keep_last=2, clock=clock).removed == []


def test_each_directory_has_its_last_ones(artifact: Artifact, store: LocalStore, clock: Clock):
    """The artifacts of one partition do not push out those of another."""
    days(store, artifact, clock, "o/eu/1.tar", "o/eu/2.tar", "o/us/1.tar", "o/0.tar", "other/0.tar", "other/1.tar")
    assert prune(store, "o/", keep_last=1, clock=clock).removed == ["o/eu/1.tar"]
    assert left(store) == ["o/0.tar", "o/eu/2.tar", "o/us/1.tar", "other/0.tar", "other/1.tar"]


def test_the_young_ones_are_kept(artifact: Artifact, store: LocalStore, clock: Clock):
    """Either rule keeps an artifact: the last one stays however old, the young ones however many."""
    days(store, artifact, clock, "1.tar", "2.tar", "3.tar", "4.tar")
    assert prune(store, keep_within_s=1.5 * DAY_S, keep_last=1, clock=clock).removed == ["1.tar", "2.tar"]
    clock.now += 30 * DAY_S
    assert prune(store, keep_within_s=1.5 * DAY_S, keep_last=1, clock=clock).removed == ["3.tar"]
    assert prune(store, keep_within_s=1.5 * DAY_S, clock=clock).removed == ["4.tar"]
    assert keys(store) == []


def test_what_a_ref_names_is_kept(artifact: Artifact, store: LocalStore, clock: Clock):
    """Wherever the ref is, also outside of the prefix; when it is moved on, the artifact goes."""
    days(store, artifact, clock, "o/1.tar", "o/2.tar", "o/3.tar", "o/4.tar")
    move_ref(store, "o/latest", "o/1.tar", "sha256:" + "1" * 64)
    move_ref(store, "elsewhere/good", "o/2.tar", "sha256:" + "2" * 64)
    report = prune(store, "o/", keep_last=1, clock=clock)
    assert (report.removed, report.named, report.kept) == (["o/3.tar"], ["o/1.tar", "o/2.tar"], 1)
    move_ref(store, "o/latest", "o/4.tar", "sha256:" + "4" * 64)
    assert prune(store, "o/", keep_last=1, clock=clock).removed == ["o/1.tar"]


def test_a_dry_run_changes_nothing(artifact: Artifact, store: LocalStore, clock: Clock):
    """It tells what would go."""
    days(store, artifact, clock, "1.tar", "2.tar")
    before = keys(store)
    report = prune(store, keep_last=1, dry_run=True, clock=clock)
    assert (report.removed, report.dry_run) == (["1.tar"], True)
    assert keys(store) == before


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({}, "no rule says what to keep"),
        ({"keep_last": 0}, "keeps nothing"),
        ({"keep_within_s": 0.0}, "keeps nothing"),
        ({"keep_within_s": float("nan")}, "keeps nothing"),
    ],
)
def test_rules_that_keep_nothing_are_refused(store: LocalStore, rules: dict[str, Any], told: str):
    """A slip must not empty a store."""
    with pytest.raises(UsageError, match=told):
        prune(store, **rules)


def test_a_key_that_is_uploaded_anew_is_left_alone(tmp_path: Path, store: LocalStore, clock: Clock):
    """An intent that is alive says that somebody is at work under the key."""
    first, second = artifact_of(tmp_path / "1"), artifact_of(tmp_path / "2", {"big": noise(50_000, 7)})
    days(store, first, clock, "1.tar", "2.tar")
    clock.now -= DAY_S  # the intent is written by the real time
    with pytest.raises(Killed):
        upload(FaultyStore(store, dies_at(9)), "1.tar", second, profile=SERIAL, overwrite=True)
    report = prune(store, keep_last=1, clock=clock)
    assert (report.removed, report.busy) == ([], ["1.tar"])


@pytest.mark.parametrize("step", [("delete", 1), ("get", 4), ("delete", 2), ("head", 2)], ids=str)
def test_killed_anywhere_it_leaves_nothing_that_looks_whole(
    artifact: Artifact, store: LocalStore, clock: Clock, step: tuple[str, int]
):
    """Whatever is listed is whole; what is left is found by the garbage collection."""
    days(store, artifact, clock, "o/1.tar", "o/2.tar")
    move_ref(store, "o/latest", "o/2.tar", artifact.digest)

    def faults(request: Request) -> None:
        if (request.operation, request.number) == step:
            raise Killed

    with pytest.raises(Killed):
        prune(FaultyStore(store, faults), keep_last=1, clock=clock)
    for key in left(store):
        verify(store, key, mode="deep")
    assert "o/2.tar" in left(store)
    prune(store, keep_last=1, clock=clock)
    assert left(store) == ["o/2.tar"]


def moves_the_ref(store: Store, artifact: Artifact, told: list[BaseException]) -> Callable[[Request], None]:
    def move(_: Request) -> None:
        try:
            name_artifact(store, "o/latest", "o/1.tar", artifact.digest)
        except TransferBusy as busy:
            told.append(busy)

    return move


@pytest.mark.parametrize("operation", ["list", "head", "get", "delete", "exists", "put"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_ref_that_is_moved_meanwhile_names_a_whole_artifact(
    artifact: Artifact, store: LocalStore, clock: Clock, operation: str, number: int
):
    """At whatever request it is moved to an old artifact: that stays, or the move is undone and to be tried again."""
    days(store, artifact, clock, "o/1.tar", "o/2.tar")
    move_ref(store, "o/latest", "o/2.tar", artifact.digest)
    told: list[BaseException] = []
    moved: list[Request] = []

    def faults(request: Request) -> Fault | None:
        if moved or (request.operation, request.number) != (operation, number):
            return None
        moved.append(request)
        return Hook(moves_the_ref(store, artifact, told))

    prune(FaultyStore(store, faults), keep_last=1, clock=clock)
    named = read_ref(store, "o/latest")
    assert named is not None
    assert named.key == ("o/1.tar" if moved and not told else "o/2.tar")
    verify(store, named.key, mode="deep", expected_digest=named.manifest_sha256)


def test_a_failing_key_does_not_keep_the_others(artifact: Artifact, store: LocalStore, clock: Clock):
    """It is named, and the next run tries again."""
    days(store, artifact, clock, "1.tar", "2.tar", "3.tar")

    def faults(request: Request) -> Fault | None:
        down = request.operation == "delete" and request.key.startswith("1.tar")
        return FailBefore(StoreUnavailable("the store is down", operation="delete")) if down else None

    report = prune(FaultyStore(store, faults), keep_last=1, clock=clock)
    assert (report.removed, report.failed) == (["2.tar"], ["1.tar"])
    assert prune(store, keep_last=1, clock=clock).removed == ["1.tar"]


def test_a_ref_that_cannot_be_read_later_costs_no_artifact(artifact: Artifact, store: LocalStore, clock: Clock):
    """The store fails between the removal of the manifest and the second look at the ref: the manifest comes back."""
    days(store, artifact, clock, "o/1.tar", "o/2.tar")
    move_ref(store, "o/latest", "o/2.tar", artifact.digest)
    deleted: list[Request] = []

    def faults(request: Request) -> Fault | None:
        if request.operation == "delete":
            deleted.append(request)
        return (
            FailBefore(StoreUnavailable("down", operation="get"))
            if deleted and request.key.endswith(".ref.json")
            else None
        )

    report = prune(FaultyStore(store, faults), keep_last=1, clock=clock)
    assert (report.removed, report.failed, len(deleted)) == ([], ["o/1.tar"], 1)
    verify(store, "o/1.tar", mode="deep")


def test_a_ref_that_cannot_be_read_costs_no_artifact(artifact: Artifact, store: LocalStore, clock: Clock):
    """What it names is not known, so nothing is removed at all."""
    days(store, artifact, clock, "1.tar", "2.tar")
    move_ref(store, "latest", "1.tar", artifact.digest)

    def faults(request: Request) -> Fault | None:
        return FailBefore(StoreUnavailable("down", operation="get")) if request.key.endswith(".ref.json") else None

    with pytest.raises(StoreUnavailable):
        prune(FaultyStore(store, faults), keep_last=1, clock=clock)
    assert left(store) == ["1.tar", "2.tar"]


def test_the_command_says_what_it_removed(artifact: Artifact, store: LocalStore, clock: Clock, capsys):
    """A line for each, and one JSON document under --json; without a rule it is a mistake."""
    days(store, artifact, clock, "o/1.tar", "o/2.tar", "o/3.tar")
    move_ref(store, "o/latest", "o/1.tar", artifact.digest)
    command = ["--store", str(store.root), "prune", "o/", "--keep-last", "1"]
    assert run([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "would remove  o/2.tar",
        "kept  o/1.tar: a ref names it",
        "1 to remove, 2 kept",
    ]
    assert run(["--json", *command]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["removed"], told["named"], told["kept"]) == ("pruned", ["o/2.tar"], ["o/1.tar"], 1)
    assert run(command[:-2]) == 2
    assert "no rule says what to keep" in capsys.readouterr().err
