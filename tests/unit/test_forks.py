"""A forked child begins with fresh locks, and with nothing of what other threads of its parent held."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow import forks
from blobflow.activity import doing, longest_wait
from blobflow.forks import reset_after_fork_of
from blobflow.stores.s3.store import S3Options, S3Store

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def holds_in_a_child(check: Callable[[], bool]) -> bool:
    """Whether a check holds in a forked child; one that hangs there does not."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


class Shared:
    def __init__(self) -> None:
        self.resets = 0
        reset_after_fork_of(self)

    def reset_after_fork(self) -> None:
        self.resets += 1


def test_what_is_shared_is_reset_in_the_child_alone():
    """Once for each fork on the way to a process; the parent goes on as it was."""
    shared = Shared()
    assert holds_in_a_child(lambda: shared.resets == 1 and holds_in_a_child(lambda: shared.resets == 2))
    assert shared.resets == 0


def test_what_is_not_used_any_more_is_not_kept():
    """Else every store of a long-lived process would stay in memory for the sake of its forks."""
    gc.collect()
    before = len(forks._shared)
    kept = [Shared() for _ in range(3)]
    assert len(forks._shared) >= before + 3
    del kept
    gc.collect()
    assert len(forks._shared) <= before


def test_a_child_reports_no_waits_of_threads_that_it_does_not_have():
    """What its own thread waits for is still reported."""
    began, ended = threading.Event(), threading.Event()

    def wait() -> None:
        with doing("the wait of another thread"):
            began.set()
            ended.wait(20)

    def own_wait_only() -> bool:
        wait = longest_wait(at_least_s=0.0)
        return wait is not None and (wait.what, wait.others) == ("the wait of this thread", 0)

    thread = threading.Thread(target=wait)
    thread.start()
    began.wait(20)
    with doing("the wait of this thread"):
        assert holds_in_a_child(own_wait_only)
        found = longest_wait(at_least_s=0.0)
    ended.set()
    thread.join()
    assert found is not None
    assert found.others >= 1


def test_a_child_connects_to_its_bucket_while_a_thread_of_its_parent_does():
    """The lock that the thread holds is not the child's."""
    keys = {"access_key_id": "key", "secret_access_key": "secret"}
    store = S3Store(S3Options.model_validate({"bucket": "bucket", "endpoint_url": "http://127.0.0.1:9"} | keys))
    with store._connecting:
        assert holds_in_a_child(lambda: store.connected().region == "us-east-1")
    store.close()


def test_there_is_one_way_of_fork_safety():
    """No other module registers a hook, or compares process ids to find out that it was forked."""
    package = Path(forks.__file__).parent
    hooks = [module.name for module in package.rglob("*.py") if "register_at_fork(" in module.read_text()]
    assert hooks == ["forks.py"]
    compared = re.compile(r"[!=]= os\.getpid\(\)|os\.getpid\(\) [!=]=")
    assert not [module for module in package.rglob("*.py") if compared.search(module.read_text())]
