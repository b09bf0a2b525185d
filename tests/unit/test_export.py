"""Exporting a directory: what goes in, what is refused, what is left behind when it fails."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blobflow import DirectoryExporter, ExportResult, durable, export_artifact
from blobflow.artifact import hashing
from blobflow.artifact.hashing import FileHash, hash_files
from blobflow.artifact.members import verify_members
from blobflow.backends import files
from blobflow.checksum import crc32c, sha256
from blobflow.errors import (
    DestinationNotEmpty,
    NotFoundError,
    RefusedError,
    SourceBusy,
    SourceChanged,
    UnsupportedSource,
    UsageError,
)
from blobflow.testing import Executable, Fifo, Symlink, Tree, read_tree, write_tree
from blobflow.trees import Opened
from tests.kit import TREE, noise


def export(path: Path, tree: Tree, **options: Any) -> ExportResult:
    write_tree(path / "source", tree)
    return export_artifact(path / "source", path / "artifact", **options)


def test_members_are_files_and_empty_directories_in_order(tmp_path: Path):
    """Sorted by UTF-8 path; a directory appears only if nothing is in it; the counts say so."""
    result = export(tmp_path, TREE)
    assert result.artifact.index.paths == [
        "big.bin",
        "empty",
        "empty dir/",
        "nested/deep/file.txt",
        "nested/deep/other",
        "ünïcode/日本語.txt",
    ]
    assert (result.members, result.bytes) == (6, 20_000 + 6 + 5_000 + 4)
    assert (result.excluded, result.symlinks_skipped) == (0, 0)


@pytest.mark.parametrize("mode", ["reference", "link", "copy"])
def test_the_three_modes_make_the_same_content(mode: str, tmp_path: Path):
    """Reference copies nothing, link shares inodes, copy is on its own."""
    tree: Tree = {**TREE, "run": Executable("x")}
    artifact = export(tmp_path, tree, mode=mode).artifact
    verify_members(artifact)
    assert read_tree(artifact.data) == tree
    assert artifact.is_reference == (mode == "reference")
    same_inode = (artifact.data / "big.bin").stat().st_ino == (tmp_path / "source" / "big.bin").stat().st_ino
    assert same_inode == (mode != "copy")
    assert [member.mode for member in artifact.index if member.path == "run"] == [0o755]


def test_an_empty_directory_is_an_artifact(tmp_path: Path):
    """Nothing to move is something to move."""
    result = export(tmp_path, {})
    assert (result.members, result.bytes) == (0, 0)
    assert result.artifact.layout.size > 0


def test_excluded_entries_are_counted(tmp_path: Path):
    """Patterns without a slash see names, those with one see paths; a directory counts once."""
    tree: Tree = {"keep": "1", "__pycache__": {"a": "", "b": ""}, "d": {"x.pyc": "", "y": {"z": "2"}}, "z.pyc": ""}
    result = export(tmp_path, tree, exclude=["__pycache__", "*.pyc", "d/y"])
    assert result.artifact.index.paths == ["d/", "keep"]
    assert result.excluded == 4


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("secret", ["a/b/keep", "keep"]),
        ("secret/", ["a/b/keep", "keep", "a/secret"]),
        ("/secret", ["a/b/keep", "keep", "a/b/secret/x", "a/secret"]),
        ("./secret", ["a/b/keep", "keep", "a/b/secret/x", "a/secret"]),
        ("/secret/", ["a/b/keep", "keep", "a/b/secret/x", "a/secret"]),
        ("a/secret", ["a/b/keep", "keep", "a/b/secret/x", "secret/y"]),
        ("**/secret", ["a/b/keep", "keep"]),
        ("secret/**", ["a/b/keep", "keep", "a/b/secret/x", "a/secret", "secret/"]),
        ("a/**/secret", ["a/b/keep", "keep", "secret/y"]),
        ("a/*/secret", ["a/b/keep", "keep", "a/secret", "secret/y"]),
        ("s[a-f]cret", ["a/b/keep", "keep"]),
        ("s?cret/[!x]", ["a/b/keep", "keep", "a/b/secret/x", "a/secret", "secret/"]),
    ],
)
def test_exclude_patterns_mean_what_they_mean_in_a_gitignore_file(pattern: str, left: list[str], tmp_path: Path):
    """Slashes at either end, `./` and `**` are understood, so that no secret leaves the house by a misunderstanding."""
    tree: Tree = {"keep": "", "a": {"b": {"keep": "", "secret": {"x": ""}}, "secret": ""}, "secret": {"y": ""}}
    result = export(tmp_path, tree, exclude=[pattern])
    assert sorted(result.artifact.index.paths) == sorted(left)
    assert (result.unmatched, result.excluded > 0) == ((), True)


def test_a_later_pattern_may_take_back(tmp_path: Path):
    """The last pattern that matches decides; what lies in an excluded directory stays there."""
    tree: Tree = {"a.log": "", "keep.log": "", "old": {"keep.log": ""}, "src": {"main.py": "", "x.o": ""}}
    logs = export(tmp_path / "1", tree, exclude=["*.log", "!keep.log", "old/"])
    assert logs.artifact.index.paths == ["keep.log", "src/main.py", "src/x.o"]
    only = export(tmp_path / "2", tree, exclude=["*", "!*/", "!*.py"])
    assert only.artifact.index.paths == ["old/", "src/main.py"]


def test_a_pattern_that_matched_nothing_is_reported(tmp_path: Path):
    """A misspelt pattern shows, by name; one that only an earlier pattern's match would have met counts as well."""
    result = export(tmp_path, {"a.tmp": "", "cache": {"b.tmp": ""}}, exclude=["*.tmp", "a.tmp", "*.tpm", "/b.tmp"])
    assert result.unmatched == ("*.tpm", "/b.tmp")


@pytest.mark.parametrize("pattern", ["[[:alpha:]]", "x[![:digit:]]", "[\\]a]", "a/[^\\]]"])
def test_a_pattern_that_would_be_misunderstood_is_refused(pattern: str, tmp_path: Path):
    """Rather than that it leaves out something else than git would."""
    with pytest.raises(UsageError, match="in brackets") as refusal:
        DirectoryExporter(path=tmp_path, exclude=(pattern,))
    assert "write the characters out" in refusal.value.hint


@pytest.mark.parametrize("pattern", ["", " ", "/", "./", "!", "# a comment", "[a", "a/[z-a]", "../up", "a//b", "a\\"])
def test_a_pattern_that_can_never_match_is_refused(pattern: str, tmp_path: Path):
    """Naming it, before anything is read."""
    with pytest.raises(UsageError, match="can never match") as refusal:
        DirectoryExporter(path=tmp_path, exclude=("*.tmp", pattern))
    assert repr(pattern) in refusal.value.message
    assert refusal.value.hint


@pytest.mark.seed("W1.2")
@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"link": Symlink("target")}, "symbolic link"),
        ({"pipe": Fifo()}, "device, socket or pipe"),
        ({"new\nline": ""}, "control character"),
        ({"tab\there": {}}, "control character"),
        ({"bad\udcff": ""}, "not valid UTF-8"),
    ],
)
def test_what_an_artifact_cannot_hold_is_refused_by_name(tree: Tree, reason: str, tmp_path: Path):
    """The message names the path and the remedy; nothing is left behind."""
    with pytest.raises(UnsupportedSource, match=reason) as refusal:
        export(tmp_path, {"fine": "", **tree})
    assert refusal.value.exit_code == 5
    assert refusal.value.hint
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("late", ["", {}])
def test_a_time_that_no_index_holds_is_refused(late: str | Tree, tmp_path: Path):
    """File systems and broken clocks know years that 64 bits of nanoseconds do not."""
    write_tree(tmp_path / "source", {"late": late})
    os.utime(tmp_path / "source" / "late", ns=(2**63 + 10**18, 2**63 + 10**18))
    with pytest.raises(UnsupportedSource, match=r"'late/?' cannot be exported: its modification time"):
        export_artifact(tmp_path / "source", tmp_path / "artifact")


def test_a_socket_is_refused(tmp_path: Path):
    """Unless it is excluded."""
    write_tree(tmp_path / "source", {"a": ""})
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "source" / "s.sock"))
        with pytest.raises(UnsupportedSource, match=r"'s\.sock' cannot be exported"):
            export_artifact(tmp_path / "source", tmp_path / "artifact")
        assert export_artifact(tmp_path / "source", tmp_path / "artifact", exclude=["*.sock"]).members == 1


def test_links_can_be_skipped_or_followed(tmp_path: Path):
    """Skipped ones are counted; followed ones become what they point to, inside the root only."""
    tree: Tree = {"real": "x", "dir": {"f": "y"}, "link": Symlink("real"), "dirlink": Symlink("dir")}
    skipped = export(tmp_path / "1", tree, symlinks="skip")
    assert (skipped.artifact.index.paths, skipped.symlinks_skipped) == (["dir/f", "real"], 2)
    followed = export(tmp_path / "2", tree, symlinks="follow", mode="copy")
    assert followed.artifact.index.paths == ["dir/f", "dirlink/f", "link", "real"]
    assert read_tree(followed.artifact.data) == {"dir": {"f": "y"}, "dirlink": {"f": "y"}, "link": "x", "real": "x"}


@pytest.mark.parametrize(
    ("target", "reason"),
    [("/etc/passwd", "outside of the source"), ("../../outside", "outside"), ("nowhere", "nothing"), (".", "above it")],
)
def test_links_that_lead_astray_are_refused(target: str, reason: str, tmp_path: Path):
    """Out of the root, to nothing, or to a directory above."""
    (tmp_path / "outside").mkdir()
    with pytest.raises(UnsupportedSource, match=reason):
        export(
            tmp_path, {"d": {"link": Symlink(target if target != "../outside" else "../../outside")}}, symlinks="follow"
        )


def test_directories_that_link_to_each_other_end(tmp_path: Path):
    """A cycle over two links is found."""
    with pytest.raises(UnsupportedSource, match="above it"):
        export(tmp_path, {"a": {"l": Symlink("../b")}, "b": {"l": Symlink("../a")}}, symlinks="follow")


def test_source_and_destination_are_checked_first(tmp_path: Path):
    """Absent source, file as source, full destination, destination inside the source."""
    write_tree(tmp_path, {"source": {"a": "x"}, "full": {"b": "y"}, "file": ""})
    with pytest.raises(NotFoundError, match="does not exist"):
        export_artifact(tmp_path / "absent", tmp_path / "artifact")
    with pytest.raises(NotFoundError, match="not a directory"):
        export_artifact(tmp_path / "file", tmp_path / "artifact")
    with pytest.raises(DestinationNotEmpty):
        export_artifact(tmp_path / "source", tmp_path / "full")
    with pytest.raises(RefusedError, match="inside its own source"):
        export_artifact(tmp_path / "source", tmp_path / "source" / "artifact")
    assert read_tree(tmp_path) == {"source": {"a": "x"}, "full": {"b": "y"}, "file": ""}


def test_a_file_that_is_written_to_is_refused(tmp_path: Path):
    """Progress is told between batches: a change there is a change between scan and reading."""
    write_tree(tmp_path / "source", {f"{i:04}": f"{i}" for i in range(2000)})

    def write(_done: int, _total: int) -> None:
        (tmp_path / "source" / "1999").write_text("longer than before")

    with pytest.raises(SourceBusy, match="'1999' changed while it was exported") as busy:
        export_artifact(tmp_path / "source", tmp_path / "artifact", on_progress=write)
    assert not (tmp_path / "artifact").exists()
    assert busy.value.exit_code == 75  # nobody damaged anything


def while_copied(monkeypatch: pytest.MonkeyPatch, write: Callable[[int], None]) -> None:
    """Let `write(number)` happen after the bytes of each copy, counted from 1, and before anybody looks again."""
    monkeypatch.setattr(files, "_PAUSES_S", (0.03, 0.03, 0.03))
    copies = 0

    def copy_bytes(source: int, target: int) -> int:
        nonlocal copies
        copies += 1
        copied = durable.copy_bytes(source, target)
        write(copies)
        return copied

    monkeypatch.setattr(files, "copy_bytes", copy_bytes)


def test_mode_copy_waits_for_a_moment_without_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is written to while it is copied is copied again; the artifact holds one state of it, the last."""
    source = write_tree(tmp_path / "source", {"a": noise(5000)})

    def write(number: int) -> None:
        if number < 3:
            with open(source / "a", "ab") as file:
                file.write(b"more")

    while_copied(monkeypatch, write)
    result = export_artifact(source, tmp_path / "artifact", mode="copy")
    assert read_tree(result.artifact.data) == read_tree(source) == {"a": noise(5000) + b"moremore"}
    assert [member.size for member in result.artifact.index] == [5008]
    verify_members(result.artifact)


def test_mode_copy_takes_what_was_written_since_the_scan(tmp_path: Path):
    """A source may be written to all the time, as long as each file rests for a moment."""
    source = write_tree(tmp_path / "source", {"a": "old", "b": "old"})
    exporter = DirectoryExporter(path=source, mode="copy")
    found = exporter.scan()
    write_tree(source, {"a": "longer than before", "c": "too late"})
    result = exporter.export(tmp_path / "artifact", found=found)
    assert read_tree(result.artifact.data) == {"a": "longer than before", "b": "old"}
    verify_members(result.artifact)


def test_a_write_in_the_same_tick_of_the_clock_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two writes within milliseconds can leave the same time: a file that has just been written to is copied later."""
    source = write_tree(tmp_path / "source", {"a": "first"})
    status = (source / "a").stat()

    def write(number: int) -> None:
        if number == 1:
            (source / "a").write_text("other")

    def same_times(descriptor: int) -> os.stat_result:
        found = list(fstat(descriptor))
        return os.stat_result(
            found, {"st_mtime_ns": status.st_mtime_ns, "st_ctime_ns": status.st_ctime_ns, "st_atime_ns": 0}
        )

    fstat = os.fstat
    while_copied(monkeypatch, write)
    monkeypatch.setattr(files.os, "fstat", same_times)
    monkeypatch.setattr(files.time, "time_ns", iter((status.st_ctime_ns + 1, status.st_ctime_ns + 10**9)).__next__)
    with Opened(source) as root, Opened(tmp_path) as directory:
        files.copy_still(root, "a", directory, "copy", private=False)
    assert (tmp_path / "copy").read_text() == "other"


def test_a_file_without_a_quiet_moment_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not damaged (exit code 75); the hint names what helps, and does not name the mode that has just failed."""
    source = write_tree(tmp_path / "source", {"log": "line\n"})

    def write(_: int) -> None:
        with open(source / "log", "a") as file:
            file.write("line\n")

    while_copied(monkeypatch, write)
    with pytest.raises(SourceBusy, match=r"log' was written to during each of 3 attempts") as busy:
        export_artifact(source, tmp_path / "artifact", mode="copy")
    assert busy.value.exit_code == 75
    assert "copy" not in busy.value.hint
    assert not (tmp_path / "artifact").exists()


def test_a_file_that_vanishes_is_a_busy_source(tmp_path: Path):
    """Named, and nothing is left behind; an empty destination stays an empty directory."""
    write_tree(tmp_path / "source", {f"{i:04}": f"{i}" for i in range(2000)})
    (tmp_path / "artifact").mkdir()
    with pytest.raises(SourceBusy, match="'1999' cannot be read"):
        export_artifact(
            tmp_path / "source",
            tmp_path / "artifact",
            on_progress=lambda *_: (tmp_path / "source" / "1999").unlink(missing_ok=True),
        )
    assert list((tmp_path / "artifact").iterdir()) == []


def test_without_times_the_same_content_is_the_same_payload(tmp_path: Path):
    """A tree that was written anew continues the upload of the old one; a file that changes is refused all the same."""
    first = export(tmp_path / "first", TREE, mtimes="drop").artifact
    second = export(tmp_path / "second", TREE, mtimes="drop").artifact
    kept = export(tmp_path / "third", TREE).artifact
    assert set(first.index.mtimes_ns) == {0}
    assert first.manifest.same_body(second.manifest)
    assert not first.manifest.same_body(kept.manifest)
    os.utime(tmp_path / "first" / "source" / "big.bin", ns=(0, 0))
    with pytest.raises(SourceChanged, match="mtime_ns was"):
        first.source().read_into(0, memoryview(bytearray(first.payload_size)))


def test_raising_from_progress_leaves_nothing(tmp_path: Path):
    """The exception comes out as it is."""

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    write_tree(tmp_path / "source", TREE)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(tmp_path / "source", tmp_path / "artifact", on_progress=stop)
    assert not (tmp_path / "artifact").exists()


def test_one_long_file_still_gives_signs_of_life():
    """Progress is told while a batch takes long: a lease is renewed there."""
    told = threading.Event()

    def long_file(_: int, __: memoryview) -> FileHash:
        assert told.wait(30)
        return FileHash(0, b"", 0)

    assert list(hash_files(1, lambda _: 0, long_file, on_batch=lambda *_: told.set())) == [FileHash(0, b"", 0)]


def test_a_large_file_is_hashed_with_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second thread changes the time it takes, not the result: size, SHA-256 and CRC32C of every byte in order."""
    monkeypatch.setattr(hashing, "_READ_AHEAD_FROM", 1)
    content = noise(10_000)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb", buffering=0) as file:
        found = hashing.hash_descriptor(file.fileno(), memoryview(bytearray(999)))
    assert found == FileHash(len(content), sha256(content), crc32c(content))


def test_hard_links_are_plain_files(tmp_path: Path):
    """Both names have the content."""
    write_tree(tmp_path / "source", {"a": noise(1000)})
    os.link(tmp_path / "source" / "a", tmp_path / "source" / "b")
    result = export_artifact(tmp_path / "source", tmp_path / "artifact", mode="copy")
    assert read_tree(result.artifact.data) == {"a": noise(1000), "b": noise(1000)}


def test_a_deep_tree_is_exported(tmp_path: Path):
    """Paths of more than 255 bytes, and names of 255."""
    tree: Tree = {"n" * 255: {"m" * 255: {"f": "deep"}}}
    assert export(tmp_path, tree).artifact.index.paths == [f"{'n' * 255}/{'m' * 255}/f"]


def test_misspelt_options_are_refused():
    """An unknown option is an error, and an exporter cannot be changed."""
    with pytest.raises(UsageError):
        DirectoryExporter(path=Path(), colour="red")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValidationError):
        DirectoryExporter(path=Path()).path = Path("x")
