"""Writing, journals and locks: what a crash may leave, and what the one rule for torn ends makes of it."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from blobflow import durable
from blobflow.durable import (
    append_at,
    append_lines,
    names_file,
    replace_file,
    take_lock_file,
    try_lock,
    unlock_and_close,
    whole_lines,
    write_all,
)
from blobflow.errors import RefusedError, TransferBusy

RECORDS = [b'{"n":1}\n', b'{"n":22}\n', b'{"n":333}\n']


def lines_of(data: bytes, start: int = 0, **limits: int) -> list[bytes]:
    return [line for _, line in whole_lines(io.BytesIO(data), start, **limits)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(path: Path) -> Generator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    yield descriptor
    os.close(descriptor)


class TestWholeLines:
    def test_a_line_counts_once_its_newline_is_there(self):
        """Wherever the last line was torn, it does not count, and those before it do."""
        data = b"".join(RECORDS)
        before = len(data) - len(RECORDS[-1])
        for end in range(before, len(data)):
            assert lines_of(data[:end]) == RECORDS[:2]
        assert lines_of(data) == RECORDS

    def test_reading_goes_on_where_it_ended(self):
        """The offset after a line is where the next one begins."""
        data = b"".join(RECORDS)
        ends = [end for end, _ in whole_lines(io.BytesIO(data))]
        assert [lines_of(data, end) for end in (0, *ends)] == [RECORDS, RECORDS[1:], RECORDS[2:], []]

    def test_what_is_appended_meanwhile_is_left_to_the_next_reading(self):
        """So that a fast writer cannot keep a reader for ever."""
        file = io.BytesIO(RECORDS[0])
        for _, line in whole_lines(file):
            assert line == RECORDS[0]
            at = file.tell()
            file.write(line)
            file.seek(at)
        assert file.getvalue() == 2 * RECORDS[0]

    @pytest.mark.parametrize("length", [10, 11, 12, 20, 21, 22, 35])
    def test_a_line_that_is_too_long_is_passed_over_whole(self, length: int):
        """No piece of it is taken for a line, and the ones around it count."""
        long = b"x" * (length - 1) + b"\n"
        expected = [RECORDS[0], *([long] if length <= 10 else []), RECORDS[1]]
        assert lines_of(RECORDS[0] + long + RECORDS[1], longest=10) == expected

    def test_an_empty_file_has_no_lines(self):
        """Nor has one whose only line is torn."""
        assert lines_of(b"") == lines_of(b'{"n"') == []


class TestAppendLines:
    """For files that several processes append to."""

    def test_a_torn_line_does_not_swallow_the_next_one(self, path: Path):
        """It is ended by the newline in front, and what it was is for the format's reader to pass over."""
        path.write_bytes(RECORDS[0] + b'{"n":2')
        with open(path, "ab", buffering=0) as file:
            append_lines(file.fileno(), ['{"n":3}', '{"n":4}'])
        kept = [line for line in lines_of(path.read_bytes()) if line.endswith(b"}\n")]
        assert kept == [RECORDS[0], b'{"n":3}\n', b'{"n":4}\n']

    def test_lines_that_were_cut_off_are_an_error(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        """A second write would not be one with the first: another process may have written between them."""
        real = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:4]))
        with open(path, "ab", buffering=0) as file, pytest.raises(OSError, match="No space") as failure:
            append_lines(file.fileno(), ['{"n":3}'])
        assert failure.value.errno == errno.ENOSPC
        assert path.read_bytes() == b'\n{"n'


class TestAppendAt:
    """For files that one process holds alone."""

    def test_the_torn_end_is_cut_off(self, path: Path, journal: int):
        """The next record stands where the torn one stood, however long that was."""
        for torn in (b"", b"{", b'{"torn":"and longer than what follows it"'):
            path.write_bytes(RECORDS[0] + torn)
            end = append_at(journal, len(RECORDS[0]), RECORDS[1])
            assert end == len(RECORDS[0] + RECORDS[1])
            assert path.read_bytes() == RECORDS[0] + RECORDS[1]

    @pytest.mark.parametrize("call", ["pwrite", "fsync"])
    def test_a_failed_append_leaves_nothing(self, path: Path, journal: int, call: str, monkeypatch: pytest.MonkeyPatch):
        """Neither a half record, nor a whole one that was not acknowledged."""
        path.write_bytes(RECORDS[0])
        real = os.pwrite

        def fail(descriptor: int, *written: memoryview | int) -> int:
            if call == "pwrite":
                real(descriptor, b'{"n"', len(RECORDS[0]))
            raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="broken"):
                append_at(journal, len(RECORDS[0]), RECORDS[1])
        assert path.read_bytes() == RECORDS[0]

    def test_what_could_not_be_cut_off_is_cut_off_by_the_next_append(
        self, path: Path, journal: int, monkeypatch: pytest.MonkeyPatch
    ):
        """A disk that fails altogether, and is well again."""

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "broken")

        path.write_bytes(RECORDS[0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            patch.setattr(os, "ftruncate", fail)
            with pytest.raises(OSError, match="broken"):
                append_at(journal, len(RECORDS[0]), RECORDS[2])
        append_at(journal, len(RECORDS[0]), RECORDS[1])
        assert path.read_bytes() == RECORDS[0] + RECORDS[1]


class TestWriting:
    def test_all_is_written_however_little_a_call_takes(
        self, path: Path, journal: int, monkeypatch: pytest.MonkeyPatch
    ):
        """A signal, a quota or a network file system may cut a write short."""
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
        write_all(journal, b"0123456789", 2)
        assert path.read_bytes() == b"\0\0" + b"0123456789"

    @pytest.mark.parametrize(("private", "mode"), [(False, 0o644), (True, 0o600)])
    def test_a_file_is_replaced_whole(self, path: Path, private: bool, mode: int):
        """Readers see the old bytes or the new ones; the mode is that of the new file."""
        path.write_bytes(b"old")
        before = os.umask(0o022)
        try:
            with open(path, "rb") as reader:
                replace_file(path, b"new", private=private)
                assert reader.read() == b"old"
        finally:
            os.umask(before)
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", mode)
        assert list(path.parent.iterdir()) == [path]

    def test_the_bytes_are_on_disk_before_the_name(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        """Else a power cut could leave the name with no bytes."""
        events: list[str] = []
        fsync, rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
        monkeypatch.setattr(os, "rename", lambda *names: (events.append("rename"), rename(*names)))
        replace_file(path, b"new")
        assert events == ["fsync", "rename"]


class TestLocks:
    def test_one_holds_it_or_several_share_it(self, path: Path, journal: int):
        """Two open files of one process are two holders."""
        other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        assert try_lock(journal, shared=True)
        assert try_lock(other, shared=True)
        assert not try_lock(journal)
        os.close(other)
        assert try_lock(journal)

    def test_a_lock_is_given_back_although_a_child_keeps_the_file_open(self, path: Path, journal: int):
        """As a child does that was forked while it was held."""
        held = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        copy = os.dup(held)
        assert try_lock(held)
        unlock_and_close(held)
        assert try_lock(journal)
        os.close(copy)

    @pytest.mark.parametrize("harm", ["unlink", "replace", "link", "parent"])
    def test_a_file_that_lost_its_name_is_known(self, path: Path, journal: int, harm: str):
        """Whoever waited for its lock must begin again with the file that has the name now."""
        assert names_file(path, journal)
        if harm == "unlink":
            path.unlink()
        elif harm == "replace":
            replace_file(path, b"another")
        elif harm == "link":
            path.rename(path.with_name("elsewhere"))
            path.symlink_to("elsewhere")
        else:
            path = path / "below"
        assert not names_file(path, journal)

    def test_a_lock_file_has_one_holder_and_stays(self, path: Path):
        """The second one is told who is busy with what; closing the descriptor lets it in."""
        held = take_lock_file(path, "somebody else works here")
        with pytest.raises(TransferBusy, match="somebody else works here") as busy:
            take_lock_file(path, "somebody else works here")
        assert busy.value.path == str(path.parent)
        os.close(held)
        os.close(take_lock_file(path, "nobody"))
        assert path.exists()

    def test_a_link_is_no_lock_file(self, path: Path):
        """Else whoever planted it would have us make or lock a file elsewhere."""
        path.symlink_to("elsewhere")
        with pytest.raises(RefusedError):
            take_lock_file(path, "nobody")
        assert not path.with_name("elsewhere").exists()


def test_every_lock_is_taken_here():
    """Only `durable` calls flock(2); the other modules say what they want by its functions."""
    package = Path(durable.__file__).parent
    found = {
        str(module.relative_to(package)) for module in package.rglob("*.py") if "fcntl.flock(" in module.read_text()
    }
    assert found == {"durable.py"}
