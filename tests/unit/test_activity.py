"""Waits are reported where the user looks: what is waited for, where, for how long, and why."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from blobflow import activity
from blobflow.activity import Wait, doing, longest_wait, moved, reporting_waits
from blobflow.cli import run, settings
from blobflow.errors import ObjectNotFound, StoreUnavailable
from blobflow.stores import open_store
from blobflow.stores.base import StoredObject
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from tests.clock import Clock
from tests.servers import Peer, scripted_server

SOON: Final = {"silence_s": 0.02, "look_s": 0.01}


class Reports:
    """Waits as they are reported; tests wait for them."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self._changed = threading.Condition()

    def __call__(self, wait: Wait) -> None:
        with self._changed:
            self.waits.append(wait)
            self._changed.notify_all()

    def first(self, wanted: Callable[[Wait], bool]) -> Wait:
        """The first report that is `wanted`, which may come later."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.waits)), timeout=20), self.waits
            return next(filter(wanted, self.waits))


def in_thread(block: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=block)
    thread.start()
    return thread


@contextmanager
def a_thread_that(block: Callable[[], object]) -> Generator[None]:
    thread = in_thread(block)
    try:
        yield
    finally:
        thread.join()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """`time.monotonic` of the module."""
    clock = Clock()
    monkeypatch.setattr(activity.time, "monotonic", clock)
    return clock


def test_what_gets_no_answer_is_a_wait(clock: Clock):
    """From nearly ten seconds on it has a name, a place and a length; blocks within it do not hide it."""
    with doing("get of 'k'", where=lambda: "s3://bucket at http://host:9000"):
        clock.now += 8
        assert longest_wait() is None
        with doing("moving 5 bytes"):
            clock.now += 4
            found = longest_wait()
    assert str(found) == "no progress for 12 s: get of 'k' in s3://bucket at http://host:9000"
    assert longest_wait() is None


def test_bytes_that_move_are_no_wait(clock: Clock):
    """A slow transfer is not silent."""
    with doing("put of 'k'"):
        for _ in range(10):
            clock.now += 8
            moved()
            assert longest_wait() is None
        clock.now += 10
        assert longest_wait() == Wait("put of 'k'", 10)


def test_attempts_that_fail_are_one_wait(clock: Clock):
    """What a failed attempt moved is not progress: the wait goes on, and says how the last attempt failed."""
    with doing("put of 'k'") as put:
        for _ in range(3):
            clock.now += 4
            moved()
            put.blocked_by("503 SlowDown; next attempt in 2 s")
        clock.now += 2
        assert longest_wait() == Wait("put of 'k'", 10, "503 SlowDown; next attempt in 2 s")
        put.went_on()
        assert longest_wait(at_least_s=0) == Wait("put of 'k'", 0)


def test_a_wait_that_was_asked_for_is_not_reported(clock: Clock):
    """A limit on bandwidth makes everybody wait, as it should."""
    with doing("put of 'k'"), doing("waiting for bandwidth", quiet=True):
        clock.now += 100
        assert longest_wait() is None


def test_many_waits_are_one_report(clock: Clock):
    """The longest is reported, and how many more there are: one line, however many workers stand still."""
    tasks = [object() for _ in range(4)]
    with doing("get of 'a'", task=tasks[0]):
        clock.now += 5
        with doing("get of 'b'", task=tasks[1]), doing("get of 'c'", task=tasks[2]), doing("get of 'd'", task=tasks[3]):
            clock.now += 20
            assert str(longest_wait()) == "no progress for 25 s: get of 'a'; 3 more wait"


def test_reports_come_while_something_waits():
    """From another thread than the one that waits, again and again, until the block ends."""
    reports, enough = Reports(), threading.Event()

    def waits() -> None:
        with doing("get of 'k'"):
            assert enough.wait(20)

    with reporting_waits(reports, **SOON), a_thread_that(waits):
        reports.first(lambda wait: wait.what == "get of 'k'")
        reports.first(lambda wait: wait.seconds > reports.waits[0].seconds)
        enough.set()


def test_an_observer_that_fails_ends_nothing():
    """The next wait is reported all the same."""
    enough = threading.Event()
    calls = 0

    def report(_: Wait) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            enough.set()
        raise RuntimeError("no room in the log")

    with reporting_waits(report, **SOON), doing("get of 'k'"):
        assert enough.wait(20)


def test_a_retried_call_says_why_it_waits(tmp_path: Path):
    """Who watches sees the store, the key, the error of the last attempt, and when the next one is."""
    reports, reported = Reports(), threading.Event()

    class Failing(LocalStore):
        def get(self, key: str, *, max_bytes: int) -> StoredObject:
            if not reported.is_set():
                raise StoreUnavailable("get 'k': 503 SlowDown", operation="get", key=key)
            return super().get(key, max_bytes=max_bytes)

    inner = Failing(tmp_path)
    inner.put("k", b"x")

    def sleep(_: float) -> None:
        found = reports.first(lambda wait: bool(wait.reason))
        assert f"get of 'k' in {inner.url}" in found.what
        assert "503 SlowDown" in found.reason
        assert "next attempt in" in found.reason
        reported.set()

    with reporting_waits(reports, **SOON):
        assert RetryingStore(inner, sleep=sleep).get("k", max_bytes=1).data == b"x"
    assert reported.is_set()


def test_an_attempt_under_way_is_not_announced_as_the_next_one(tmp_path: Path):
    """After the pause a report says that it is being tried again, however long the attempt takes."""
    said: list[str] = []

    class Failing(LocalStore):
        def get(self, key: str, *, max_bytes: int) -> StoredObject:
            wait = longest_wait(at_least_s=0)
            said.append(wait.reason if wait else "")
            if len(said) == 1:
                raise StoreUnavailable("get 'k': 503 SlowDown", operation="get", key=key)
            return super().get(key, max_bytes=max_bytes)

    Failing(tmp_path).put("k", b"x")
    assert RetryingStore(Failing(tmp_path), sleep=lambda _: None).get("k", max_bytes=1).data == b"x"
    assert said[0] == ""
    assert "503 SlowDown" in said[1]
    assert "next attempt in" not in said[1]


def test_an_error_of_a_store_names_the_store(tmp_path: Path):
    """Whatever the call: the message says where, once, and the field `store` does."""
    store = open_store(tmp_path / "store")
    for call in (lambda: store.get("k", max_bytes=1), lambda: store.head("k")):
        with pytest.raises(ObjectNotFound) as refusal:
            call()
        assert refusal.value.message.count(store.url) == 1
        assert refusal.value.fields["store"] == store.url


def test_a_server_that_never_answers_is_not_silence_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It accepts and says nothing: standard error says what is waited for, at which server; standard output nothing."""
    reported = threading.Event()
    shown = settings.show_wait

    def show(wait: Wait) -> None:
        shown(wait)
        reported.set()

    monkeypatch.setattr(settings, "show_wait", show)
    monkeypatch.setattr(settings, "reporting_waits", functools.partial(reporting_waits, **SOON))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")

    def silent(peer: Peer) -> None:
        peer.request()
        assert reported.wait(20)
        peer.answer(
            200,
            b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>",
            connection="close",
        )

    with scripted_server(silent) as url:
        assert run(["--store", "s3://bucket/below", "--endpoint-url", url, "ls", "--json"]) == 0
    captured = capsys.readouterr()
    assert f"in s3://bucket/below at {url}" in captured.err
    assert captured.err.startswith("Waiting: no progress for")
    json.loads(captured.out)
