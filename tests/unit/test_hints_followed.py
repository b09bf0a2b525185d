"""Hints are followed literally: what they say, typed as it stands, makes the command or the call succeed."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blobflow import export_artifact, upload
from blobflow.backends import AppendLog
from blobflow.batch import BatchExecutor
from blobflow.batch.tables import run_batch_file
from blobflow.cli import run
from blobflow.errors import (
    BlobflowError,
    KeyConflict,
    ResultsConflict,
    Unsupported,
    UnsupportedSource,
    UsageError,
    as_argument,
    setting,
    worded,
)
from blobflow.maintenance.retention import prune
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Symlink, write_tree
from tests.kit import write_parquet

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command line against the test's own store; its exit code and its hint."""
    monkeypatch.setenv("BLOBFLOW_STORE", str(tmp_path / "store"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    package = logging.getLogger("blobflow")
    before = package.handlers, package.level

    def command(*arguments: object) -> tuple[int, str]:
        code = run([str(argument) for argument in arguments])
        hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Hint: ")]
        return code, hints[-1].removeprefix("Hint: ") if hints else ""

    yield command
    package.handlers, package.level = before


@pytest.fixture
def across_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard links cannot be made."""

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)


def follow(command: Command, *arguments: object, says: str, value: object = None) -> None:
    """The command fails, its hint contains `says`, and with `says` typed behind it the command succeeds.

    Args:
        value: What somebody types behind the option, where the hint leaves it open.
    """
    code, hint = command(*arguments)
    assert code not in (0, 1)
    assert says in hint
    code, hint = command(*arguments, *says.split(), *([] if value is None else [value]))
    assert code == 0, hint


def test_another_artifact_under_the_key(command: Command, tmp_path: Path):
    """`--overwrite`, as the hint of a conflict says."""
    for name in ("a", "b"):
        write_tree(tmp_path / name, {"file": name})
    assert command("push", tmp_path / "a", "key") == (0, "")
    follow(command, "push", tmp_path / "b", "key", says="--overwrite")


@pytest.mark.parametrize(("says", "value"), [("--symlinks skip", None), ("--exclude", "link")])
def test_a_symbolic_link_in_the_source(says: str, value: str | None, command: Command, tmp_path: Path):
    """Skipped or excluded, in the words of the hint."""
    source = write_tree(tmp_path / "source", {"file": "x", "link": Symlink("/etc/passwd")})
    follow(command, "push", source, "key", says=says, value=value)


def test_a_symbolic_link_that_may_be_followed(command: Command, tmp_path: Path):
    """A link inside the source: `--symlinks follow` helps as well."""
    source = write_tree(tmp_path / "source", {"file": "x", "link": Symlink("file")})
    follow(command, "push", source, "key", says="--symlinks follow")


@pytest.mark.usefixtures("across_file_systems")
@pytest.mark.parametrize("says", ["--mode copy", "--mode reference"])
def test_hard_links_that_cannot_be_made(says: str, command: Command, tmp_path: Path):
    """Both modes that the hint names work."""
    source = write_tree(tmp_path / "source", {"file": "x"})
    follow(command, "export", source, tmp_path / "artifact", "--mode", "link", says=says)


@pytest.mark.parametrize(("says", "value"), [("--keep-last", 1), ("--keep-within", "1d")])
def test_rules_of_retention(says: str, value: object, command: Command):
    """Flags, although the rule is checked where Python calls it `keep_last`."""
    follow(command, "prune", "orders/", says=says, value=value)


@pytest.mark.parametrize(("says", "value"), [("--schemas any", None), ("--exclude", "b.parquet")])
def test_parquet_files_of_different_columns(says: str, value: str | None, command: Command, tmp_path: Path):
    """Accepted or excluded."""
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "a.parquet", {"x": [1]})
    write_parquet(tmp_path / "data" / "b.parquet", {"y": ["1"]})
    follow(command, "push", tmp_path / "data", "key", "--from", "parquet", says=says, value=value)


def test_an_older_log_over_a_newer_one(command: Command, tmp_path: Path):
    """`--rewind` throws the later records away."""
    with AppendLog(tmp_path / "log") as log:
        log.append("a", 1)
    assert command("push", tmp_path / "log", "old", "--from", "append-log") == (0, "")
    with AppendLog(tmp_path / "log") as log:
        log.append("b", 2)
    assert command("push", tmp_path / "log", "new", "--from", "append-log") == (0, "")
    mirror = ("--import", "append-log", tmp_path / "mirror")
    assert command("pull", "new", *mirror) == (0, "")
    follow(command, "pull", "old", *mirror, says="--rewind")
    assert command("pull", "old", tmp_path / "elsewhere", "--rewind")[0] == 2  # for a log only


@pytest.mark.parametrize(("says", "value"), [("--fresh", None), ("--results", "other.parquet")])
def test_results_of_other_operations(says: str, value: str | None, command: Command, tmp_path: Path):
    """Forgotten, or kept beside the new ones."""
    operations = tmp_path / "operations.jsonl"
    for key in ("a", "b"):
        operations.write_text(json.dumps({"op": "insert", "key": key, "payload": "x"}) + "\n")
        if key == "a":
            assert command("batch", operations) == (0, "")
    follow(command, "batch", operations, says=says, value=tmp_path / value if value else None)


def test_a_layer_that_was_changed_where_it_was_restored(command: Command, tmp_path: Path):
    """`--overwrite` replaces it."""
    source = write_tree(tmp_path / "source", {"file": "x"})
    home = ("--home", tmp_path / "home")
    assert command("layer", "sync", source, "web", *home)[0] == 0
    assert command("layer", "restore", "web", tmp_path / "dest", *home)[0] == 0
    write_tree(tmp_path / "dest", {"file": "changed"})
    follow(command, "layer", "restore", "web", tmp_path / "dest", *home, says="--overwrite")


def test_a_directory_for_temporary_files_inside_of_the_source(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """TMPDIR, set as the hint says, is obeyed."""
    source = write_tree(tmp_path / "source", {"file": "x", "tmp": {}})
    monkeypatch.setattr(tempfile, "tempdir", str(source / "tmp"))
    code, hint = command("push", source, "key")
    assert (code, "TMPDIR" in hint) == (5, True)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    assert command("push", source, "key") == (0, "")


def test_python_reads_arguments(tmp_path: Path):
    """The hint of an exception, typed as the argument of the call that raised it."""
    store = LocalStore(tmp_path / "store")
    first, second = (
        export_artifact(write_tree(tmp_path / name, {"file": name}), tmp_path / f"artifact {name}") for name in "ab"
    )
    upload(store, "key", first.artifact)
    with pytest.raises(KeyConflict) as conflict:
        upload(store, "key", second.artifact)
    assert conflict.value.hint.endswith("replace what is there with overwrite")
    upload(store, "key", second.artifact, overwrite=True)

    source = write_tree(tmp_path / "links", {"link": Symlink("nowhere")})
    with pytest.raises(UnsupportedSource) as refusal:
        export_artifact(source, tmp_path / "artifact")
    assert 'symlinks="skip"' in refusal.value.hint
    export_artifact(source, tmp_path / "artifact", symlinks="skip")

    with pytest.raises(UsageError) as usage:
        prune(store, "orders/")
    assert "keep_last, keep_within_s" in usage.value.hint
    prune(store, "orders/", keep_last=1)
    prune(store, "orders/", keep_within_s=3600)

    operations = tmp_path / "operations.jsonl"
    operations.write_text('{"op": "delete", "key": "a"}\n')
    executor = BatchExecutor(store)
    run_batch_file(executor, operations)
    operations.write_text('{"op": "delete", "key": "b"}\n')
    with pytest.raises(ResultsConflict) as other:
        run_batch_file(executor, operations)
    assert "results, or forget these results with fresh" in other.value.hint
    run_batch_file(executor, operations, fresh=True)


@pytest.mark.usefixtures("across_file_systems")
def test_python_reads_values_of_arguments(tmp_path: Path):
    """`mode="copy"` can be pasted."""
    source = write_tree(tmp_path / "source", {"file": "x"})
    with pytest.raises(Unsupported) as refusal:
        export_artifact(source, tmp_path / "artifact", mode="link")
    assert 'mode="copy"' in refusal.value.hint
    export_artifact(source, tmp_path / "artifact", mode="copy")


def test_settings_are_worded_only_where_they_were_meant():
    """What a message quotes from elsewhere is never taken for a setting, and an error keeps its settings in transit."""
    strange = 'a \x02b={"c": [[[\x03 \x02D\x03 \x02e="f\ng"\x03'
    assert worded(strange, lambda name, value: "!") == strange
    error = UsageError(f"{setting('keep_last', 0)} of {strange}", hint=setting("symlinks", "skip"))
    assert error.message == f"keep_last=0 of {strange}"
    copied: BlobflowError = error.__reduce__()[0](*error.__reduce__()[1])
    assert copied.to_dict(lambda name, value: f"<{name}:{value}>")["hint"] == "<symlinks:skip>"
    assert copied.to_dict(as_argument) == error.to_dict()
