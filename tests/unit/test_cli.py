"""The command line, command by command: what it does, what it prints, and what it exits with."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import blobflow
from blobflow.artifact.landing import Stage
from blobflow.backends import AppendLog, AppendLogImporter
from blobflow.backends.registry import BACKENDS
from blobflow.cli import run
from blobflow.cli.commands import cli
from blobflow.cli.progress import LINE_EVERY_S, Lines
from blobflow.cli.settings import BACKENDS as CHOICES, Settings
from blobflow.scratch import scratch_directory
from blobflow.testing import Executable, Tree, read_tree, write_tree
from tests.clock import Clock
from tests.kit import flip_a_byte, noise

PROGRAM = Path(sys.executable).with_name("blobflow")

FACTS = {"status", "key", "artifact_digest", "bytes_total", "seconds"}
"""What the document of every transfer says at least; `bytes_sent` or `bytes_received` and `bytes_resumed` join it."""


@dataclass
class Outcome:
    """How one command line ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output, which must be exactly one JSON document."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return self.document["error"]


Call = Callable[..., Outcome]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the artifacts of the test live."""
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's own store and temporary files, and the log as it was."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "BLOBFLOW_STORE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BLOBFLOW_STORE", str(store))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    package = logging.getLogger("blobflow")
    before = package.handlers, package.level
    yield
    package.handlers, package.level = before


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line and returns how it ended."""

    def call(*arguments: object) -> Outcome:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


SOURCE: Tree = {
    "empty directory": {},
    "empty": "",
    "odd.bin": noise(70_001, 1),
    "round.bin": noise(512 * 5, 2),
    "dir with spaces": {"räksmörgås.txt": "hello\n"},
    "run.sh": Executable("#!/bin/sh\n"),
    "deep": {"x" * 150: {"y" * 200: {"z" * 100: "deep\n"}}},
}
"""Everything that is allowed and a little awkward."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory to push."""
    return write_tree(tmp_path / "source", SOURCE)


# The commands


@pytest.mark.seed("1.1", "1.2")
def test_a_pushed_directory_is_a_plain_tar_with_its_manifest_beside_it(
    call: Call, source: Path, store: Path, tmp_path: Path
):
    """Stock `tar` lists and unpacks the payload, and the sibling manifest is the embedded one byte for byte."""
    assert call("push", source, "orders/today").code == 0
    payload = store / "orders" / "today"
    listed = subprocess.run(["tar", "tf", payload], capture_output=True, text=True, check=True).stdout.splitlines()
    assert listed[:2] == ["MANIFEST.json", "INDEX.parquet"]
    assert listed[2:] == sorted(listed[2:])
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    done = subprocess.run(["tar", "xf", payload, "-C", unpacked], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert read_tree(unpacked / "data") == read_tree(source)
    assert (unpacked / "MANIFEST.json").read_bytes() == (store / "orders" / "today.manifest.json").read_bytes()


def test_what_is_pushed_comes_back_with_pull(call: Call, source: Path, tmp_path: Path):
    """push, verify and pull tell the same digest, and the tree that lands equals the source."""
    pushed = call("push", source, "orders/today", "--json").document
    verified = call("verify", "orders/today", "--deep", "--json").document
    pulled = call("pull", "orders/today", tmp_path / "new" / "here", "--json").document
    assert (pushed["status"], verified["status"], pulled["status"]) == ("uploaded", "verified", "downloaded")
    assert pushed["artifact_digest"] == verified["artifact_digest"] == pulled["artifact_digest"]
    assert read_tree(tmp_path / "new" / "here" / "data") == read_tree(source)
    assert pulled["path"] == str(tmp_path / "new" / "here")


def test_every_transfer_tells_the_same_facts(call: Call, source: Path, tmp_path: Path):
    """Under --json push, pull and verify print one document with the fields that scripts rely on."""
    pushed = call("--json", "push", source, "k").document
    assert FACTS | {"bytes_sent", "bytes_resumed", "members", "excluded", "symlinks_skipped"} <= pushed.keys()
    assert pushed["bytes_sent"] == pushed["bytes_total"] == (tmp_path / "store" / "k").stat().st_size
    pulled = call("--json", "pull", "k", tmp_path / "out").document
    assert FACTS | {"bytes_received", "bytes_resumed", "path"} <= pulled.keys()
    assert pulled["bytes_received"] == pulled["bytes_total"] == pushed["bytes_total"]
    for mode in ("--deep", "--shallow"):
        verified = call("--json", "verify", "k", mode).document
        assert FACTS | {"bytes_received", "bytes_resumed", "mode"} <= verified.keys()
        assert verified["mode"] == mode.removeprefix("--")
        assert (verified["bytes_received"] == verified["bytes_total"]) is (mode == "--deep")


def test_an_unchanged_directory_is_not_sent_again(call: Call, source: Path, store: Path):
    """The second push says `unchanged`, sends nothing and leaves the store as it was."""
    first = call("push", source, "k", "--json").document
    before = {path: path.stat().st_mtime_ns for path in store.rglob("k*")}
    os.utime(source / "empty")  # times are no content
    again = call("push", source, "k", "--json").document
    assert (again["status"], again["bytes_sent"], again["bytes_resumed"]) == ("unchanged", 0, 0)
    assert (again["artifact_digest"], again["bytes_total"]) == (first["artifact_digest"], first["bytes_total"])
    assert {path: path.stat().st_mtime_ns for path in store.rglob("k*")} == before


def test_what_is_left_out_is_counted(call: Call, source: Path, tmp_path: Path):
    """Excluded entries and skipped links do not travel, and the result says how many there were."""
    (source / "link").symlink_to("odd.bin")
    (source / "cache.tmp").write_text("x")
    refused = call("push", source, "k", "--json")
    assert (refused.code, refused.error["type"], refused.error["path"]) == (5, "UnsupportedSource", "link")
    options = ("--symlinks", "skip", "--exclude", "*.tmp", "--exclude", "dir with spaces/*")
    document = call("push", source, "k", "--json", *options).document
    assert (document["excluded"], document["symlinks_skipped"]) == (2, 1)
    said = call("push", source, "other", *options).out
    assert "left out: 2 excluded, 1 symbolic links" in said
    call("pull", "k", tmp_path / "out")
    assert read_tree(tmp_path / "out" / "data") == {**SOURCE, "dir with spaces": {}}


def test_a_pattern_that_matched_nothing_is_said(call: Call, source: Path, tmp_path: Path):
    """Whoever misspells a pattern reads so, whatever made the artifact."""
    (source / "cache.tmp").write_text("x")
    commands = (("push", source, "k"), ("export", source, tmp_path / "artifact"), ("layer", "sync", source, "web-1"))
    home = ("--home", tmp_path / "home")
    for command in commands:
        options = ("--exclude", "/*.tmp", "--exclude", "*.tpm", *home * (command[0] == "layer"))
        said = call(*command, *options).out
        assert ("--exclude '*.tpm' matched nothing\n" in said, "'/*.tmp'" in said) == (True, False)
        shutil.rmtree(tmp_path / "artifact", ignore_errors=True)
        assert call("--json", *command, *options).document["exclude_unmatched"] == ["*.tpm"]


def test_another_artifact_under_the_key_is_refused_unless_told_to_overwrite(call: Call, source: Path, tmp_path: Path):
    """A key keeps its artifact; --overwrite replaces it."""
    first = call("push", source, "k", "--json").document
    (source / "empty").write_text("no longer")
    refused = call("push", source, "k", "--json")
    assert (refused.code, refused.error["type"]) == (5, "KeyConflict")
    assert call("verify", "k", "--deep", "--json").document["artifact_digest"] == first["artifact_digest"]
    assert call("push", source, "k", "--overwrite", "--json").document["status"] == "uploaded"
    call("pull", "k", tmp_path / "out")
    assert read_tree(tmp_path / "out" / "data") == read_tree(source)


def test_export_makes_an_artifact_that_push_uploads_as_it_is(call: Call, source: Path, tmp_path: Path):
    """An exported artifact holds copies of the files, and pushing it sends that very artifact."""
    exported = call("export", source, tmp_path / "artifact", "--json").document
    assert (exported["status"], exported["path"]) == ("exported", str(tmp_path / "artifact"))
    assert not (tmp_path / "artifact" / "data").is_symlink()
    shutil.rmtree(source)
    pushed = call("push", tmp_path / "artifact", "k", "--json").document
    assert pushed["artifact_digest"] == exported["artifact_digest"]
    assert pushed["bytes_total"] == exported["bytes_total"]
    late = call("push", tmp_path / "artifact", "other", "--exclude", "*")
    assert (late.code, "is an artifact already" in late.err) == (2, True)


def test_pull_imports_into_a_mirror_and_skips_what_is_alive(call: Call, source: Path, tmp_path: Path):
    """--import shows the newest tree as TARGET/current; the same artifact again fetches nothing."""
    mirror = tmp_path / "mirror"
    call("push", source, "monday")
    first = call("pull", "monday", "--import", "directory", mirror, "--json").document
    assert (first["status"], first["path"]) == ("imported", str(mirror / "current"))
    assert read_tree(mirror / "current") == read_tree(source)
    again = call("pull", "monday", "--import", "directory", mirror, "--json").document
    assert (again["status"], again["bytes_received"]) == ("unchanged", 0)
    assert again["bytes_total"] == first["bytes_total"]
    (source / "empty").write_text("changed")
    call("push", source, "tuesday")
    assert call("pull", "tuesday", "--import", "directory", mirror).code == 0
    assert read_tree(mirror / "current") == read_tree(source)
    assert list((mirror / ".incoming").iterdir()) == []


def database(path: Path, rows: int) -> None:
    """An SQLite database with so many rows."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY)")
        connection.executemany("INSERT OR IGNORE INTO orders VALUES (?)", [(row,) for row in range(1, rows + 1)])


@pytest.mark.parametrize("exported_first", [True, False], ids=["export", "push"])
def test_a_database_is_pushed_and_brought_to_life(call: Call, tmp_path: Path, exported_first: bool):
    """--from sqlite, --import sqlite: the mirror shows the newest one and says where it stands."""
    query = ("--from", "sqlite", "--cursor-query", "SELECT max(id) FROM orders")
    for rows in (3, 5):
        database(tmp_path / "orders.db", rows)
        if exported_first:
            assert call("export", tmp_path / "orders.db", tmp_path / f"artifact-{rows}", *query).code == 0
            assert call("push", tmp_path / f"artifact-{rows}", f"orders/{rows}").code == 0
        else:
            assert call("push", tmp_path / "orders.db", f"orders/{rows}", *query).code == 0
        pulled = call("pull", f"orders/{rows}", "--import", "sqlite", tmp_path / "mirror", "--json").document
        assert pulled["status"] == "imported"
        with closing(sqlite3.connect(tmp_path / "mirror" / "current" / "database.sqlite")) as shown:
            assert shown.execute("SELECT max(id) FROM orders").fetchone() == (rows,)
        status = call("mirror", "status", tmp_path / "mirror", "--json").document
        assert (status["state"], status["cursor"], status["key"]) == ("following", rows, f"orders/{rows}")
    again = call("pull", "orders/5", "--import", "sqlite", tmp_path / "mirror", "--json").document
    assert (again["status"], again["bytes_received"]) == ("unchanged", 0)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_log_is_pushed_and_brought_to_life(call: Call, tmp_path: Path):
    """--from append-log, --import append-log; the imported log goes on where the snapshot ended."""
    with AppendLog(tmp_path / "log") as log:
        log.append("a", 1)
    assert call("push", tmp_path / "log", "log/1", "--from", "append-log").code == 0
    assert call("pull", "log/1", "--import", "append-log", tmp_path / "mirror").code == 0
    with AppendLogImporter(path=tmp_path / "mirror").open() as live:
        assert (live.cursor, live.append("b", 2)) == (1, 2)


def test_what_does_not_fit_a_backend_is_refused_before_a_byte_moves(call: Call, source: Path, tmp_path: Path):
    """Options of another backend, an artifact of another one, one that is an artifact already."""
    wrong = call("push", source, "k", "--cursor-query", "SELECT 1")
    assert (wrong.code, "--cursor-query does not apply to --from directory" in wrong.err) == (2, True)
    database(tmp_path / "db", 1)
    wrong = call("export", tmp_path / "db", tmp_path / "a", "--from", "sqlite", "--exclude", "x")
    assert (wrong.code, "--exclude does not apply to --from sqlite" in wrong.err) == (2, True)
    call("push", source, "k")
    other = call("pull", "k", "--import", "sqlite", tmp_path / "mirror")
    assert (other.code, "--import directory TARGET" in other.err) == (5, True)
    assert not (tmp_path / "mirror").exists()
    call("export", source, tmp_path / "artifact")
    late = call("push", tmp_path / "artifact", "other", "--from", "directory")
    assert (late.code, "--from comes too late" in late.err) == (2, True)
    missing = call("push", tmp_path / "absent.db", "k", "--from", "sqlite")
    assert (missing.code, "absent.db does not exist" in missing.err) == (4, True)


def test_the_command_line_knows_every_backend():
    """What Python has, `--from` and `--import` have."""
    assert list(CHOICES.choices) == sorted(BACKENDS)


@pytest.mark.seed("W1.9")
def test_a_digest_pins_the_artifact(call: Call, source: Path, tmp_path: Path):
    """Whoever replaces an artifact, its manifest and its ref: who gave the digest gets exit 3, and nothing lands."""
    digest = call("push", source, "orders/1", "--json").document["artifact_digest"]
    (source / "empty").write_text("forged")
    call("push", source, "orders/1", "--overwrite")
    call("ref", "set", "orders/latest", "orders/1")
    url = f"file://{tmp_path}/elsewhere"
    for command in (
        ("verify", "orders/1", "--shallow"),
        ("verify", "orders/1", "--deep"),
        ("pull", "orders/1", tmp_path / "dest"),
        ("pull", "orders/1", "--import", "directory", tmp_path / "mirror"),
        ("copy", str(tmp_path / "store"), "orders/1", url),
    ):
        assert call(*command, "--digest", digest).code == 3, command
    assert not (tmp_path / "dest").exists()
    assert not (tmp_path / "mirror" / "current").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_an_import_that_was_killed_after_its_download_fetches_nothing_again(call: Call, source: Path, tmp_path: Path):
    """What lies downloaded in the importer's staging is verified and imported by the next run."""
    digest = call("push", source, "k", "--json").document["artifact_digest"]
    staging = tmp_path / "mirror" / ".incoming" / digest.removeprefix("sha256:")[:16]
    call("pull", "k", staging)
    document = call("pull", "k", "--import", "directory", tmp_path / "mirror", "--json").document
    assert (document["status"], document["bytes_received"]) == ("imported", 0)
    assert read_tree(tmp_path / "mirror" / "current") == read_tree(source)


def test_ls_lists_the_complete_artifacts_below_a_prefix(call: Call, source: Path, store: Path):
    """Keys with a manifest are listed, in order; other objects are not."""
    for key in ("orders/b", "orders/a", "users/a"):
        call("push", source, key)
    (store / "orders" / "payload-alone").write_bytes(b"x")
    lines = call("ls", "orders/").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["orders/a", "orders/b"]
    document = call("ls", "--json").document
    assert [entry["key"] for entry in document["artifacts"]] == ["orders/a", "orders/b", "users/a"]
    assert call("ls", "nothing/", "--json").document["artifacts"] == []


def test_show_prints_the_manifest_without_the_payload(call: Call, source: Path, store: Path):
    """The manifest is shown, even while the payload is damaged beyond reading."""
    pushed = call("push", source, "k", "--json").document
    with open(store / "k", "r+b") as file:
        file.write(b"\xff" * 4096)
    document = call("show", "k", "--json").document
    assert document["manifest"] == json.loads((store / "k.manifest.json").read_bytes())
    assert (document["artifact_digest"], document["bytes_total"]) == (pushed["artifact_digest"], pushed["bytes_total"])
    rows = dict(line.split("\t") for line in call("show", "k").out.splitlines())
    assert (rows["key"], rows["artifact"], rows["backend"]) == ("k", pushed["artifact_digest"], "directory")


def test_a_ref_is_set_to_an_artifact_and_read_back(call: Call, source: Path):
    """`ref get` prints the bare key, for scripts; a ref is never set to a key that holds no artifact."""
    digest = call("push", source, "orders/1", "--json").document["artifact_digest"]
    document = call("ref", "set", "orders/latest", "orders/1", "--json").document
    assert (document["key"], document["artifact_digest"], document["generation"]) == ("orders/1", digest, 1)
    assert call("ref", "get", "orders/latest").out == "orders/1\n"
    assert call("ref", "set", "orders/latest", "orders/2").code == 4
    assert call("ref", "get", "orders/latest", "--json").document == document | {"status": "found"}


def test_the_log_of_a_ref_shows_where_it_was(call: Call, source: Path):
    """The latest move first, with times and digests."""
    for key in ("orders/1", "orders/2"):
        call("push", source, key)
        call("ref", "set", "orders/latest", key)
    document = call("ref", "log", "orders/latest", "--json").document
    assert [(move["key"], move["generation"]) for move in document["moves"]] == [("orders/2", 2), ("orders/1", 1)]
    lines = call("ref", "log", "orders/latest").out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["orders/2", "orders/1"]
    assert call("ref", "log", "orders/other").code == 4


def test_a_digest_given_by_the_caller_pins_the_artifact(call: Call, source: Path, tmp_path: Path):
    """With --digest the artifact that was named is accepted, and every other refused."""
    digest = call("push", source, "k", "--json").document["artifact_digest"]
    other = "sha256:" + "0" * 64
    for command in (("verify", "k"), ("pull", "k", tmp_path / "out")):
        refused = call(*command, "--digest", other, "--json")
        assert (refused.code, refused.error["type"], refused.error["expected"]) == (3, "DigestMismatch", other)
    assert not (tmp_path / "out").exists()
    for command in (("verify", "k"), ("pull", "k", tmp_path / "out")):
        assert call(*command, "--digest", digest).code == 0


# Damage


def classes_of(payload: bytes) -> dict[str, list[range]]:
    """Where in the payload which kind of byte lies, as Python's own tar reader sees it."""
    found: dict[str, list[range]] = {
        name: [] for name in ("headers", "embedded manifest", "index", "content", "padding")
    }
    with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
        for member in tar:
            kind = {"MANIFEST.json": "embedded manifest", "INDEX.parquet": "index"}.get(member.name, "content")
            end = member.offset_data + member.size
            found["headers"].append(range(member.offset, member.offset_data))
            found[kind].append(range(member.offset_data, end))
            found["padding"].append(range(end, end + -end % 512))
        last = max(padding.stop for padding in found["padding"])
    return found | {"end blocks": [range(last, len(payload))]}


@pytest.mark.seed("1.3", "1.18")
@pytest.mark.parametrize(
    "where", ["headers", "embedded manifest", "index", "content", "padding", "end blocks", "sibling manifest"]
)
def test_a_flipped_bit_anywhere_is_found_before_anything_lands(
    where: str, call: Call, source: Path, store: Path, tmp_path: Path
):
    """`verify --deep` and `pull` exit with 3 or 5 and nothing is at the destination, wherever the bit was."""
    call("push", source, "k")
    path = store / ("k.manifest.json" if where == "sibling manifest" else "k")
    good = path.read_bytes()
    ranges = [range(len(good))] if where == "sibling manifest" else classes_of(good)[where]
    positions = [position for run_of_bytes in ranges for position in run_of_bytes]
    chosen = random.Random(where).sample(positions, 6)
    for position in {positions[0], positions[-1], *chosen}:
        bad = bytearray(good)
        bad[position] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(bad)
        for command in (("verify", "k", "--deep"), ("pull", "k", tmp_path / "out")):
            outcome = call(*command, "--json")
            assert outcome.code in (3, 5), f"{command[0]} with byte {position} ({where}) exits {outcome.code}"
            assert outcome.error["message"]
        assert not (tmp_path / "out").exists()
    path.write_bytes(good)
    assert call("pull", "k", tmp_path / "out").code == 0
    assert read_tree(tmp_path / "out" / "data") == read_tree(source)


def test_samples_find_damage_in_their_turn(call: Call, source: Path, store: Path):
    """`verify --sample` reads a part of the files; the part with the damage exits with 3."""
    call("push", source, "k")
    documents = [call("verify", "k", "--sample", f"{n}/2", "--json").document for n in (1, 2)]
    assert [document["mode"] for document in documents] == ["sample", "sample"]
    assert all(document["bytes_received"] < document["bytes_total"] for document in documents)
    payload = bytearray((store / "k").read_bytes())
    payload[classes_of(bytes(payload))["content"][-1][0]] ^= 1
    (store / "k").write_bytes(payload)
    assert sorted(call("verify", "k", "--sample", f"{n}/2").code for n in (1, 2)) == [0, 3]


@pytest.mark.parametrize("sample", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b"])
def test_a_sample_that_is_none_is_a_usage_error(call: Call, sample: str):
    """The message says what a sample looks like."""
    outcome = call("verify", "k", "--sample", sample)
    assert outcome.code == 2
    assert "1/7" in outcome.err


def test_push_heals_what_verify_found_damaged(call: Call, source: Path, store: Path):
    """`verify` says how, `push --heal` does it, and what was whole is left alone."""
    pushed = call("--json", "push", source, "k").document
    flip_a_byte(store / "k")
    damaged = call("verify", "k", "--deep")
    assert damaged.code == 3
    assert "`blobflow push SRC k --heal`" in damaged.err
    assert call("--json", "push", source, "k").document["status"] == "unchanged"
    healed = call("--json", "push", source, "k", "--heal").document
    assert (healed["status"], healed["bytes_sent"]) == ("healed", pushed["bytes_total"])
    assert healed["artifact_digest"] == pushed["artifact_digest"]
    assert call("verify", "k", "--deep").code == 0
    assert call("--json", "push", source, "k", "--heal").document["status"] == "unchanged"


def test_a_truncated_payload_is_refused(call: Call, source: Path, store: Path, tmp_path: Path):
    """A payload that lost its end, or grew one, is no artifact."""
    call("push", source, "k")
    payload = (store / "k").read_bytes()
    for bad in (payload[:-512], payload + bytes(512)):
        (store / "k").write_bytes(bad)
        assert call("verify", "k", "--shallow").code == 3
        assert call("pull", "k", tmp_path / "out").code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.seed("1.10")
def test_a_destination_that_is_not_empty_is_refused_untouched(call: Call, source: Path, tmp_path: Path):
    """What is at the destination of a pull or an export stays as it is."""
    call("push", source, "k")
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "precious").write_text("keep me")
    for command in (("pull", "k", dest), ("export", source, dest)):
        refused = call(*command, "--json")
        assert (refused.code, refused.error["type"]) == (5, "DestinationNotEmpty")
        assert read_tree(dest) == {"precious": "keep me"}
        assert {path.name for path in tmp_path.iterdir()} == {"source", "store", "tmp", "dest"}


def test_a_name_with_a_newline_is_refused_with_the_remedy(call: Call, source: Path, store: Path):
    """The message shows the name on one line and says what to do; nothing reaches the store."""
    (source / "a\nb").write_text("x")
    refused = call("push", source, "k")
    assert refused.code == 5
    assert refused.err == (
        "Error: 'a\\nb' cannot be exported: it contains a control character\n"
        "Hint: rename it, or leave it out with --exclude\n"
    )
    assert refused.out == ""
    assert call("push", source, "k", "--json").error["path"] == "a\nb"
    assert not list(store.rglob("k*"))
    assert call("push", source, "k", "--exclude", "a?b").code == 0


# Exit codes and messages


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["ls"], 0, None),
        (["verify", "k"], 0, None),
        (["pull", "k", "{tmp}/out"], 0, None),
        (["frobnicate"], 2, "UsageError"),
        (["push", "--no-such-option"], 2, "UsageError"),
        (["push", "{source}"], 2, "UsageError"),
        (["push", "{source}", "a//b"], 2, "InvalidKey"),
        (["push", "{source}", "a.manifest.json"], 2, "InvalidKey"),
        (["pull", "k"], 2, "UsageError"),
        (["pull", "k", "{tmp}/out", "--import", "directory", "{tmp}/mirror"], 2, "UsageError"),
        (["pull", "k", "{tmp}/out", "--digest", "md5:1234"], 2, "UsageError"),
        (["ls", "--store", "https://example.com/x"], 2, "InvalidStoreUrl"),
        (["ls", "--store", ""], 2, "UsageError"),
        (["ls", "--endpoint-url", "http://127.0.0.1:9"], 2, "UsageError"),
        (["ls", "--profile", "lunar"], 2, "UsageError"),
        (["ls", "--chunk-size", "0"], 2, "UsageError"),
        (["ls", "--chunk-size", "8MB"], 2, "UsageError"),
        (["ls", "--workers", "0"], 2, "UsageError"),
        (["verify", "damaged"], 3, "ArtifactInvalid"),
        (["pull", "damaged", "{tmp}/out"], 3, "ArtifactInvalid"),
        (["verify", "nowhere"], 4, "ArtifactNotFound"),
        (["pull", "nowhere", "{tmp}/out"], 4, "ArtifactNotFound"),
        (["show", "nowhere"], 4, "ArtifactNotFound"),
        (["push", "{tmp}/nowhere", "k2"], 4, "NotFoundError"),
        (["export", "{tmp}/nowhere", "{tmp}/out"], 4, "NotFoundError"),
        (["ref", "get", "nowhere"], 4, "NotFoundError"),
        (["pull", "k", "{source}"], 5, "DestinationNotEmpty"),
        (["push", "{tmp}", "k2"], 5, "RefusedError"),
    ],
)
def test_the_exit_code_says_what_to_do(
    arguments: list[str], code: int, kind: str | None, call: Call, source: Path, store: Path, tmp_path: Path
):
    """Every kind of outcome has its exit code, with and without --json; errors name their type."""
    call("push", source, "k")
    call("push", source, "damaged")
    (store / "damaged.manifest.json").write_text("{}")
    given = [argument.format(source=source, tmp=tmp_path) for argument in arguments]
    outcome = call(*given, "--json")
    assert outcome.code == code
    assert outcome.err == ""
    if kind:
        assert outcome.error["type"] == kind
        assert outcome.error.keys() >= {"type", "message", "hint"}
        said = call(*given)
        assert (said.code, said.out) == (code, "")
        assert said.err.startswith("Error: ")
        assert said.err.count("\n") <= 2


def test_what_is_busy_is_temporary(call: Call, source: Path, tmp_path: Path):
    """While another process lands the same artifact at the same place, pull exits with 75: try again."""
    digest = call("push", source, "k", "--json").document["artifact_digest"]
    with Stage(tmp_path / "out", digest).held():
        busy = call("pull", "k", tmp_path / "out", "--json")
    assert (busy.code, busy.error["type"]) == (75, "TransferBusy")
    assert call("pull", "k", tmp_path / "out").code == 0


def test_an_unexpected_failure_is_one_line_and_a_traceback_only_with_verbose(
    call: Call, monkeypatch: pytest.MonkeyPatch
):
    """A bug exits with 1 and names the exception; -v adds where it happened."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of\ncheese")

    monkeypatch.setattr("blobflow.cli.core.list_artifacts", broken)
    short, long, document = call("ls"), call("ls", "-v"), call("ls", "--json")
    assert (short.code, short.out, short.err) == (1, "", "Error: RuntimeError: out of\\ncheese\n")
    assert (long.code, long.err.count("Traceback")) == (1, 1)
    assert (document.code, document.error["type"]) == (1, "RuntimeError")


def test_credentials_in_a_url_are_refused_and_never_printed(call: Call):
    """A URL that carries a secret is refused without being repeated."""
    for flags in ((), ("--json",), ("-vv",)):
        outcome = call("ls", "--store", "s3://AKIAEXAMPLE:s3cr3t@bucket/prefix", *flags)
        assert outcome.code == 2
        assert "s3cr3t" not in outcome.out + outcome.err
        assert "AKIAEXAMPLE" not in outcome.out + outcome.err


def test_what_a_stranger_wrote_cannot_steer_the_terminal(call: Call, source: Path, store: Path):
    """Control characters in a manifest are shown as escapes."""
    call("push", source, "k")
    manifest = store / "k.manifest.json"
    manifest.write_text(manifest.read_text().replace('"producer": "', '"producer": "\\u001b]0;owned\\u0007\\n'))
    out = call("show", "k").out
    assert "\\x1b]0;owned\\x07\\nblobflow" in out
    assert "\x1b" not in out


# Options


def test_a_shared_option_stands_before_or_after_the_command(call: Call, source: Path, tmp_path: Path):
    """The one after the command wins over the one before it, and both over the environment."""
    for place in ("one", "two"):
        call("push", source, place, "--store", tmp_path / place)
    keys = [
        [entry["key"] for entry in call(*arguments).document["artifacts"]]
        for arguments in (
            ("ls", "--json"),
            ("--json", "--store", tmp_path / "one", "ls"),
            ("--store", tmp_path / "one", "ls", "--store", tmp_path / "two", "--json"),
        )
    ]
    assert keys == [[], ["one"], ["two"]]
    assert call("ref", "get", "latest", "--store", tmp_path / "one").code == 4


def test_a_store_has_to_be_named(call: Call, monkeypatch: pytest.MonkeyPatch):
    """Without --store and BLOBFLOW_STORE the message says how to name one."""
    monkeypatch.delenv("BLOBFLOW_STORE")
    outcome = call("ls")
    assert (outcome.code, "--store" in outcome.err, "BLOBFLOW_STORE" in outcome.err) == (2, True, True)


def test_the_s3_server_of_the_environment_does_not_disturb_other_stores(call: Call, monkeypatch: pytest.MonkeyPatch):
    """AWS_ENDPOINT_URL speaks to S3 stores alone."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert call("ls").code == 0


def test_a_profile_is_named_and_its_parts_replaced():
    """--profile picks the preset, --chunk-size and --workers change it."""
    profile = Settings(profile="edge", workers=9).transfer_profile()
    assert (profile.chunk_size, profile.checkpoint_interval, profile.workers) == (1 << 20, 32, 9)
    assert Settings(chunk_size=5).transfer_profile().chunk_size == 5


@pytest.mark.parametrize(("text", "parts"), [("4096", 20), ("64KiB", 2), ("64K", 2), ("1MiB", 1), ("1G", 1)])
def test_a_chunk_size_is_a_number_or_has_a_binary_unit(text: str, parts: int, call: Call, source: Path):
    """The upload is cut into chunks of that size."""
    document = call("push", source, "k", "--chunk-size", text, "--json").document
    size = {"4096": 4096, "64KiB": 65536, "64K": 65536, "1MiB": 1 << 20, "1G": 1 << 30}[text]
    assert document["parts"] == -(-document["bytes_total"] // size)


def test_a_bandwidth_limit_holds_back_what_exceeds_a_second(call: Call, source: Path):
    """--bwlimit counts payload bytes: with chunks of half a second's worth, the upload takes its time."""
    began = time.monotonic()
    document = call("push", source, "k", "--chunk-size", "16KiB", "--bwlimit", "32KiB", "--json").document
    allowed = document["bytes_total"] / 32768 - 1 - 0.5  # a burst of a second, and the last part
    assert document["status"] == "uploaded"
    assert time.monotonic() - began > allowed > 0


def test_help_names_the_commands_and_the_exit_codes(call: Call):
    """`blobflow --help` is enough to begin."""
    said = call("--help").out
    for word in ("export", "push", "pull", "verify", "ls", "show", "ref", "BLOBFLOW_STORE", "temporary"):
        assert word in said


def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands below a group, by their full names."""
    for each, command in group.commands.items():
        yield f"{name} {each}".strip(), command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {each}".strip())


def test_summaries_are_whole_sentences(call: Call):
    """In lists of commands, no summary is cut off."""
    known = dict(commands(cli))
    assert {"push", "layer ls", "mirror import"} <= set(known)
    for name, command in known.items():
        summary = command.get_short_help_str(64)
        assert re.fullmatch(r"[A-Z].*\w\.", summary), f"{name}: {summary}"
    assert "..." not in call("--help").out.partition("Commands:")[2].partition("The options")[0]


@pytest.mark.parametrize(
    ("command", "shown", "hidden"),
    [
        ("ls", ["--store", "--json"], ["--workers", "--bwlimit", "--profile"]),
        ("push", ["--store", "--workers", "--bwlimit", "--profile", "--json"], []),
        ("export", ["--json"], ["--store", "--workers"]),
    ],
)
def test_help_shows_the_options_that_a_command_uses(call: Call, command: str, shown: list[str], hidden: list[str]):
    """The others are accepted, since they may stand before any command, but they are not shown."""
    said = call(command, "--help").out
    assert [option for option in (*shown, *hidden) if option in said] == shown


# Scratch


def test_push_leaves_no_scratch_behind(call: Call, source: Path, tmp_path: Path):
    """The temporary directory is empty after a push that worked and after one that failed."""
    call("push", source, "k")
    (source / "empty").write_text("changed")
    assert call("push", source, "k").code == 5
    assert list((tmp_path / "tmp").iterdir()) == []


def test_scratch_of_dead_processes_is_removed_and_that_of_the_living_is_not(source: Path, tmp_path: Path):
    """Whoever begins a push sweeps up after those that were killed, never after one that is at work."""
    dead = tmp_path / "tmp" / ".blobflow-push-dead"
    (dead / "artifact").mkdir(parents=True)
    (dead / "artifact" / "data").symlink_to(source)
    with scratch_directory(source) as mine, scratch_directory(source) as other:
        assert mine.exists()
        assert other.exists()
        assert not dead.exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert (source / "odd.bin").exists()


def test_scratch_inside_the_source_is_refused(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A push whose temporary files would lie in what it pushes says how to avoid that."""
    outcome = call("push", tmp_path, "k", "--json")
    assert (outcome.code, "TMPDIR" in outcome.error["hint"]) == (5, True)


# Terminals and pipes


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]):
    """The rate and the time left are those of the last ten seconds; what was there before does not count."""
    clock = Clock()
    lines = Lines(clock=clock)
    lines.show("upload", 600 << 20, 1000 << 20)
    for done in (650, 690):
        clock.now += LINE_EVERY_S / 2
        lines.show("upload", done << 20, 1000 << 20)
    clock.now += LINE_EVERY_S
    lines.show("upload", 690 << 20, 1000 << 20)
    assert capsys.readouterr().err.splitlines() == [
        "upload 690.0 MiB of 1000.0 MiB (69%), 9.0 MiB/s, 0:34 left",
        "upload 690.0 MiB of 1000.0 MiB (69%), 0 B/s",
    ]


def test_on_a_terminal_there_is_a_bar_and_standard_output_stays_clean(source: Path, store: Path):
    """The bar is drawn on standard error; standard output still is one JSON document."""
    master, slave = os.openpty()
    try:
        with subprocess.Popen(
            [PROGRAM, "--store", store, "--json", "push", source, "k"],
            stdout=subprocess.PIPE,
            stderr=slave,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        ) as process:
            os.close(slave)
            drawn = read_terminal(master)
            out, _ = process.communicate()
    finally:
        os.close(master)
    assert process.returncode == 0
    assert json.loads(out)["status"] == "uploaded"
    assert re.search(r"upload .*100\.|upload .*KiB", drawn)


def read_terminal(master: int) -> str:
    """What was drawn until the last writer left, which a terminal reports as an I/O error."""
    drawn = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:
            return drawn.decode()
        if not block:
            return drawn.decode()
        drawn += block


def test_on_a_terminal_ls_and_show_are_tables(
    call: Call, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Square brackets in a key are no markup."""
    call("push", source, "a[bold]b")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    heading, row = call("ls").out.splitlines()
    assert heading.split() == ["key", "published"]
    assert row.startswith("a[bold]b ")
    assert re.search(r"^backend +directory *$", call("show", "a[bold]b").out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["ls"], 1), (["ls", "--json"], 1), (["--help"], 1), (["show", "nowhere", "--json"], 4)]
)
def test_a_reader_that_has_gone_is_no_error_message(
    arguments: list[str], code: int, call: Call, source: Path, store: Path
):
    """`blobflow ... | head` ends quietly; an error keeps its exit code."""
    call("push", source, "k")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [PROGRAM, *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            env=os.environ | {"BLOBFLOW_STORE": str(store)},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (code, b"")


def test_the_version_is_printed_without_loading_what_it_does_not_need():
    """`blobflow --version` imports click and little else, which is what makes it quick."""
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"blobflow {blobflow.__version__}\n"
    heavy = ("rich", "pydantic", "asyncio", "pyarrow", "botocore", "blobflow.stores", "blobflow.transport")
    code = f"import sys, blobflow.cli; print(*(name for name in {heavy} if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
