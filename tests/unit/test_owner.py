"""Owners: processes that others can find to be gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from blobflow.owner import owner_is_gone, process_owner

_TELL = "from blobflow.owner import process_owner; print(process_owner())"


def test_a_living_process_is_not_gone():
    """Neither this one nor its parent."""
    machine, _, pid = process_owner().rpartition("/")
    assert pid == str(os.getpid())
    assert not owner_is_gone(process_owner())
    assert not owner_is_gone(f"{machine}/{os.getppid()}")


def test_a_process_that_ended_is_gone():
    """A process of this machine tells its name and ends."""
    owner = subprocess.run([sys.executable, "-c", _TELL], check=True, capture_output=True, text=True).stdout.strip()
    assert owner.rpartition("/")[0] == process_owner().rpartition("/")[0]
    assert owner_is_gone(owner)


@pytest.mark.parametrize("owner", ["", "x", "other-host/-/-/1", "a/b/c/not a pid", "///", "host/1"])
def test_of_others_nothing_is_known(owner: str):
    """Another machine, another container, nonsense: only the expiry counts."""
    assert not owner_is_gone(owner)


def test_a_pid_that_cannot_exist_is_gone():
    """A damaged owner of this machine is an answer, not a crash."""
    machine = process_owner().rpartition("/")[0]
    assert owner_is_gone(f"{machine}/{10**30}")
