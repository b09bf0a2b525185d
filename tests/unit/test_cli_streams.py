"""Standard streams that are closed, full or read by nobody: the exit code says what the command did."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from blobflow.stores.local.store import LocalStore
from blobflow.testing import write_tree
from tests.kit import TREE

PROGRAM: Final = Path(sys.executable).with_name("blobflow")


def in_shell(tmp_path: Path, ending: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command line with what the shell does to its streams."""
    command = shlex.join([str(PROGRAM), "--store", str(tmp_path / "store"), *arguments])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BLOBFLOW_")}
    return subprocess.run(  # the redirections are the point
        f"{command} {ending}", shell=True, text=True, capture_output=True, timeout=60, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("ending", "json"),
    [
        (">/dev/full", ()),
        (">/dev/full", ("--json",)),
        (">&-", ()),
        ("2>/dev/full", ()),
        ("<&- >&- 2>&-", ("--json",)),
        (">/dev/full 2>/dev/full", ()),
    ],
)
def test_a_command_that_did_its_work_says_so(ending: str, json: tuple[str, ...], tmp_path: Path):
    """An artifact that was published is a success, whatever happened to the report of it."""
    source = write_tree(tmp_path / "source", TREE)
    done = in_shell(tmp_path, ending, *json, "-v", "push", str(source), "k")
    assert done.returncode == 0, done
    assert LocalStore(tmp_path / "store").exists("k.manifest.json")
    assert "Traceback" not in done.stdout + done.stderr
    if ending == ">/dev/full":
        assert "done (uploaded), but standard output cannot be written: No space left on device" in done.stderr


def test_a_listing_that_cannot_be_shown_is_a_failure(tmp_path: Path):
    """Where the output is all that the command makes: exit code 1, and one line that says why."""
    in_shell(tmp_path, "", "push", str(write_tree(tmp_path / "source", TREE)), "k")
    for json in ((), ("--json",)):
        done = in_shell(tmp_path, ">/dev/full", *json, "ls")
        assert (done.returncode, done.stderr) == (
            1,
            "Error: standard output cannot be written: No space left on device\n",
        )


def test_a_reader_that_has_seen_enough_is_no_news(tmp_path: Path):
    """`| head`: nothing is said about it; a push through it is a success, a listing is not whole."""
    source = write_tree(tmp_path / "source", TREE)
    for arguments, code in ((("push", str(source), "k"), 0), (("ls",), 1)):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            run = subprocess.run(
                [PROGRAM, "--store", tmp_path / "store", *arguments],
                stdout=pipe,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert run.returncode == code
        assert "Traceback" not in run.stderr


def test_an_error_keeps_its_exit_code(tmp_path: Path):
    """A failure that cannot be told is still the failure that it is."""
    for ending, json in ((">/dev/full", ("--json",)), (">&- 2>&-", ()), ("2>/dev/full", ())):
        assert in_shell(tmp_path, ending, *json, "pull", "absent", str(tmp_path / "out")).returncode == 4


def test_limits_of_the_process_have_their_exit_code(tmp_path: Path):
    """`ulimit -f`: a matter of configuration (2), named with its remedy; nothing half is left under the key."""
    source = write_tree(tmp_path / "source", {"big": b"x" * 3_000_000})
    command = shlex.join([str(PROGRAM), "--store", str(tmp_path / "store"), "push", str(source), "k"])
    done = subprocess.run(
        f"ulimit -f 1000; {command}", shell=True, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2, done
    assert "File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert not LocalStore(tmp_path / "store").exists("k.manifest.json")


def test_a_user_without_home_is_told_to_set_one(tmp_path: Path):
    """No HOME and no passwd entry, as in a container: a path with `~` is refused with the remedy."""
    lines = (
        "import os, pwd, sys",
        "os.environ.pop('HOME', None)",
        "pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))",
        "from blobflow.cli import run",
        f"sys.exit(run(['--store', {str(tmp_path)!r}, 'layer', 'ls']))",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BLOBFLOW_", "XDG_"))}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, env=environment, check=False)
    assert done.returncode == 2, done
    assert "set HOME" in done.stderr
