"""The append log: a keyed state as JSON lines, its snapshots, and mirrors that go on where a snapshot ends."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from blobflow import Artifact, import_artifact
from blobflow.backends import AppendLog, AppendLogExporter, AppendLogImporter, append_log
from blobflow.backends.append_log import LogRecord, read_records, read_state
from blobflow.errors import (
    ArtifactInvalid,
    ChecksumMismatch,
    DiskFull,
    HostileArtifact,
    NotFoundError,
    RefusedError,
    TransferBusy,
    UsageError,
)


def log_file(path: Path) -> Path:
    """The one file of a log."""
    (file,) = path.resolve().glob("*.jsonl")
    return file


def exported(log: Path, dest: Path) -> Artifact:
    return AppendLogExporter(path=log).export(dest).artifact


class TestLog:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "log"

    def test_what_was_appended_is_there_after_the_next_start(self, path: Path):
        """State and cursor; numbers go on where they ended."""
        with AppendLog(path) as log:
            assert (log.append("a", {"x": [1, None]}), log.append("b", "é\n"), log.delete("b")) == (1, 2, 3)
            assert repr(log) == "<AppendLog log at 3, 1 keys>"
        with AppendLog(path) as log:
            assert (log.cursor, log.items(), log.get("a"), log.get("b")) == (
                3,
                {"a": {"x": [1, None]}},
                {"x": [1, None]},
                None,
            )
            assert log.append("c", 1) == 4

    def test_every_line_is_json(self, path: Path):
        """So that anybody's tools read it."""
        with AppendLog(path) as log:
            log.append("a", 1)
            log.delete("a")
        lines = [json.loads(line) for line in log_file(path).read_text().splitlines()]
        assert [{k: v for k, v in line.items() if k != "crc32c"} for line in lines] == [
            {"log": 1, "base": 0, "records": 0},
            {"seq": 1, "key": "a", "value": 1},
            {"seq": 2, "key": "a", "deleted": True},
        ]

    def test_a_torn_last_line_is_no_record(self, path: Path):
        """Wherever it was torn, it is cut off by the next writer, who uses its number again."""
        with AppendLog(path) as log:
            log.append("a", 1)
            whole = log_file(path).read_bytes()
            log.append("b", "torn")
        last = log_file(path).read_bytes()[len(whole) :]
        for kept in range(len(last)):
            log_file(path).write_bytes(whole + last[:kept])
            assert read_state(path).cursor == 1
            assert [record.seq for record in read_records(path)] == [1]
            with AppendLog(path) as log:
                assert log.append("c", 3) == 2
            assert read_state(path).items == {"a": 1, "c": 3}

    @pytest.mark.parametrize("harm", ["flip", "remove", "repeat"])
    def test_damage_before_the_end_is_told_from_a_torn_end(self, path: Path, harm: str):
        """Records after it must not be lost silently: it is an error, with the byte."""
        with AppendLog(path) as log:
            for number in range(3):
                log.append("a", number)
        lines = log_file(path).read_bytes().splitlines(keepends=True)
        at = sum(map(len, lines[:2]))
        if harm == "flip":
            lines[2] = lines[2].replace(b'"value":1', b'"value":7')
        elif harm == "remove":
            del lines[2]
        else:
            lines.insert(2, lines[1])
        log_file(path).write_bytes(b"".join(lines))
        for use in (AppendLog, read_state, read_records):
            with pytest.raises(ChecksumMismatch) as refusal:
                use(path)
            assert (refusal.value.offset, refusal.value.retryable) == (at, False)

    def test_one_process_writes_at_a_time(self, path: Path):
        """The second is told to wait, and readers are not."""
        with AppendLog(path) as log:
            log.append("a", 1)
            with pytest.raises(TransferBusy):
                AppendLog(path)
            assert read_state(path).items == {"a": 1}
        AppendLog(path).close()

    def test_what_json_cannot_hold_is_refused(self, path: Path):
        """And nothing was written."""
        with AppendLog(path) as log:
            for key, value in (("a", float("nan")), ("a", {1, 2}), ("\ud800", 1), (5, 1)):
                with pytest.raises(UsageError):
                    log.append(key, value)  # pyright: ignore[reportArgumentType]
            assert log.append("a", 1) == 1
        assert read_state(path).items == {"a": 1}

    def test_the_state_is_its_own(self, path: Path):
        """What the caller does to a value afterwards is no record, and the state is what a reader would find."""
        value: Any = {"x": (1, 2), 3: []}
        with AppendLog(path) as log:
            log.append("a", value)
            value["x"] = None
            assert log.items() == read_state(path).items == {"a": {"x": [1, 2], "3": []}}

    def test_a_failed_append_leaves_no_half_line(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        """A full disk is told, and what is appended next follows the last whole record."""
        with AppendLog(path) as log:
            log.append("a", 1)

            real = os.pwrite

            def full(descriptor: int, data: memoryview, offset: int) -> int:
                real(descriptor, data[: len(data) // 2], offset)
                raise OSError(errno.ENOSPC, "no room")

            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", full)
                with pytest.raises(DiskFull):
                    log.append("b", 2)
            assert (log.cursor, log.items()) == (1, {"a": 1})
            assert log.append("c", 3) == 2
        assert read_state(path).items == {"a": 1, "c": 3}

    @pytest.mark.parametrize("threshold", [0, -1])
    def test_a_threshold_is_positive(self, path: Path, threshold: int):
        """Nothing is made otherwise."""
        with pytest.raises(UsageError):
            AppendLog(path, compact_threshold=threshold)
        assert not path.exists()


class TestCompaction:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "log"

    def test_begins_once_more_bytes_than_the_threshold_were_appended(self, path: Path):
        """Bytes since the last compaction count, not those of the state that is left."""
        record = len(append_log._encode(LogRecord(1, "a", "x" * 100)))
        with AppendLog(path, compact_threshold=3 * record) as log:
            for _ in range(3):
                log.append("a", "x" * 100)
            assert len(read_records(path)) == 3
            log.append("a", "x" * 100)
            assert log_file(path).name == f"{4:020}.log.jsonl"
            for number in range(5, 8):
                assert log.append("b", "y" * 100) == number
            assert log_file(path).name == f"{4:020}.log.jsonl"

    def test_keeps_the_newest_of_each_key_and_the_cursor(self, path: Path):
        """Also if the last record was a removal, of which nothing is left."""
        with AppendLog(path) as log:
            for number in range(100):
                log.append(f"key {number % 3}", number)
            log.append("gone", 1)
            log.delete("gone")
            size = log_file(path).stat().st_size
            log.compact()
            log.compact()
            assert log_file(path).stat().st_size < size / 10
        with AppendLog(path) as log:
            assert (log.cursor, log.items()) == (102, {"key 0": 99, "key 1": 97, "key 2": 98})
            assert log.append("next", 1) == 103
        assert read_state(path).cursor == 103

    def test_a_compacted_log_says_that_it_forgot(self, path: Path):
        """Who follows from before is sent to a snapshot instead of missing a removal."""
        with AppendLog(path) as log:
            for number in range(5):
                log.append("a", number)
            log.compact()
            log.append("b", 1)
        assert [record.seq for record in read_records(path, after=5)] == [6]
        with pytest.raises(NotFoundError, match="was compacted at 5") as refusal:
            read_records(path, after=4)
        assert refusal.value.base == 5

    def test_a_compaction_that_fails_does_not_fail_the_append(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        """The record is written: its writer must not write it again. The log goes on as it is."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no room")

        with AppendLog(path, compact_threshold=1) as log:
            with monkeypatch.context() as patch:
                patch.setattr(os, "rename", full)
                assert log.append("a", 1) == 1
                assert log.append("a", 2) == 2
                with pytest.raises(DiskFull):
                    log.compact()
            assert read_state(path).items == {"a": 2}
            assert log.append("a", 3) == 3
            assert log_file(path).name == f"{3:020}.log.jsonl"
        assert [entry.name for entry in path.iterdir() if "partial" in entry.name] == []

    def test_a_kill_at_any_moment_of_it_harms_nothing(self, path: Path):
        """Before the rename the old file counts, after it the new one; the rest is cleared away."""
        with AppendLog(path) as log:
            for number in range(5):
                log.append("a", number)
            old = (log_file(path), log_file(path).read_bytes())
            log.compact()
            new = (log_file(path), log_file(path).read_bytes())
        old[0].write_bytes(old[1])
        with AppendLog(path) as log:
            assert (log.cursor, log.items()) == (5, {"a": 4})
        assert log_file(path) == new[0]
        new[0].unlink()
        old[0].write_bytes(old[1])
        new[0].with_name(f".{new[0].name}.partial").write_bytes(new[1][:50])
        (path / "notes").write_text("somebody's")
        with AppendLog(path) as log:
            assert (log.cursor, log.items()) == (5, {"a": 4})
        assert sorted(entry.name for entry in path.iterdir()) == [old[0].name, "lock", "notes"]

    @settings(max_examples=40, deadline=None)
    @given(
        steps=st.lists(
            st.one_of(
                st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.integers(), st.text(max_size=40))),
                st.sampled_from(["reopen", "tear"]),
            ),
            max_size=30,
        ),
        threshold=st.integers(1, 400),
    )
    def test_the_state_is_that_of_the_records(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[Any], threshold: int
    ):
        """Whatever the threshold, wherever it is opened anew or torn: no record is lost, none counts twice."""
        path = tmp_path_factory.mktemp("log")
        model: dict[str, Any] = {}
        cursor = 0
        log = AppendLog(path, compact_threshold=threshold, sync=False)
        for step in steps:
            if isinstance(step, str):
                log.close()
                if step == "tear":
                    with open(log_file(path), "ab") as file:
                        file.write(b'{"seq":99,"key":"a","val')
                log = AppendLog(path, compact_threshold=threshold, sync=False)
            else:
                key, value = step
                cursor += 1
                if value is None:
                    assert log.delete(key) == cursor
                    model.pop(key, None)
                else:
                    assert log.append(key, value) == cursor
                    model[key] = value
            assert (log.cursor, log.items()) == (cursor, model)
        log.close()
        state = read_state(path)
        assert (state.cursor, state.items) == (cursor, model)


@pytest.mark.seed("W1.5")
class TestSnapshot:
    """An export of a log that is written to."""

    def test_ends_with_the_last_whole_record(self, tmp_path: Path):
        """What is half written at that moment is not in it, and the cursor says so."""
        with AppendLog(tmp_path / "log") as log:
            log.append("a", 1)
            whole = log_file(log.path).read_bytes()
            with open(log_file(log.path), "ab") as file:
                file.write(b'{"seq":2,"key":"b","va')
            artifact = exported(log.path, tmp_path / "artifact")
        assert artifact.manifest.cursor == 1
        assert (artifact.data / artifact.index.paths[0]).read_bytes() == whole

    def test_is_of_one_moment_while_others_append_and_compact(self, tmp_path: Path):
        """Each snapshot has every record up to its cursor, and none after it."""
        enough = threading.Event()
        path = tmp_path / "log"
        with AppendLog(path, compact_threshold=300, sync=False) as log:
            log.append("n", 1)

            def write() -> None:
                while not enough.is_set():
                    log.append("n", log.cursor + 1)

            writer = threading.Thread(target=write)
            writer.start()
            try:
                cursors = [0]
                for number in range(20):
                    artifact = exported(path, tmp_path / f"artifact-{number}")
                    state = read_state(artifact.data)
                    assert state.items == {"n": state.cursor}
                    assert artifact.manifest.cursor == state.cursor >= cursors[-1]
                    cursors.append(state.cursor)
            finally:
                enough.set()
                writer.join()

    def test_of_a_damaged_log_there_is_none(self, tmp_path: Path):
        """Damage is found by the export, not by who imports it next year."""
        with AppendLog(tmp_path / "log") as log:
            log.append("a", 1)
            log.append("a", 2)
            file = log_file(log.path)
            file.write_bytes(file.read_bytes().replace(b'"value":1', b'"value":7'))
            with pytest.raises(ChecksumMismatch):
                exported(log.path, tmp_path / "artifact")
        assert not (tmp_path / "artifact").exists()

    def test_of_no_log_there_is_none(self, tmp_path: Path):
        """A typing error in the path is told."""
        with pytest.raises(NotFoundError):
            exported(tmp_path / "typo", tmp_path / "artifact")


@pytest.mark.seed("1.24")
class TestMirror:
    """An imported log goes on where its snapshot ended."""

    @pytest.fixture
    def importer(self, tmp_path: Path) -> AppendLogImporter:
        return AppendLogImporter(path=tmp_path / "mirror")

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """A log with ten records."""
        with AppendLog(tmp_path / "log") as log:
            for number in range(1, 11):
                log.append(f"key {number % 4}", number)
        return tmp_path / "log"

    def test_appends_follow_the_last_record(self, importer: AppendLogImporter, source: Path, tmp_path: Path):
        """With the next number, and nothing in between."""
        result = import_artifact(exported(source, tmp_path / "artifact"), importer)
        assert result.cursor == importer.cursor() == 10
        with importer.open() as log:
            assert log.append("mine", 1) == 11
        assert importer.cursor() == 11
        assert [record.seq for record in read_records(importer.data)] == list(range(1, 12))

    def test_following_loses_and_repeats_nothing(self, importer: AppendLogImporter, source: Path, tmp_path: Path):
        """Records that come again are passed over, a gap is refused, and both logs say the same in the end."""
        with AppendLog(source) as log:
            log.compact()  # the snapshot is of a compacted log
        import_artifact(exported(source, tmp_path / "artifact"), importer)
        with AppendLog(source) as log:
            for number in range(11, 16):
                log.append("more", number)
            log.delete("key 1")
            news = read_records(source, after=10)
        with importer.open() as mirror:
            with pytest.raises(RefusedError) as refusal:
                mirror.apply(news[1:])
            assert (refusal.value.expected, refusal.value.actual, mirror.cursor) == (11, 12, 10)
            assert [mirror.apply(part) for part in (news[:3], news[1:4], news, news)] == [3, 1, 2, 0]
        assert read_state(importer.data) == read_state(source)
        assert read_records(importer.data, after=10) == news

    def test_the_same_artifact_again_takes_nothing_away(
        self, importer: AppendLogImporter, source: Path, tmp_path: Path
    ):
        """What was appended since the import stays."""
        artifact = exported(source, tmp_path / "artifact")
        import_artifact(artifact, importer)
        with importer.open() as log:
            log.append("mine", 1)
        assert import_artifact(artifact, importer).status == "unchanged"
        assert importer.cursor() == 11

    def test_an_artifact_that_is_behind_does_not_set_the_log_back(
        self, importer: AppendLogImporter, source: Path, tmp_path: Path
    ):
        """Unless somebody says so."""
        first = exported(source, tmp_path / "first")
        with AppendLog(source) as log:
            log.append("a", 1)
        second = exported(source, tmp_path / "second")
        import_artifact(second, importer)
        with pytest.raises(RefusedError, match="at 11, the artifact only reaches to 10"):
            import_artifact(first, importer)
        assert importer.cursor() == 11
        import_artifact(first, importer.model_copy(update={"rewind": True}))
        assert importer.cursor() == 10

    def test_nobody_imports_under_the_feet_of_a_writer(self, importer: AppendLogImporter, source: Path, tmp_path: Path):
        """What the writer appends next would be gone: the import waits until the log is closed."""
        import_artifact(exported(source, tmp_path / "first"), importer)
        with AppendLog(source) as log:
            log.append("a", 1)
        newer = exported(source, tmp_path / "second")
        with importer.open() as live:
            with pytest.raises(TransferBusy) as refusal:
                import_artifact(newer, importer)
            assert refusal.value.retryable
            live.append("late", 1)
        assert importer.cursor() == 11
        import_artifact(newer, importer)
        assert importer.cursor() == 11
        assert read_state(importer.data) == read_state(source)

    def test_records_that_came_during_an_import_are_not_thrown_away(
        self, importer: AppendLogImporter, source: Path, tmp_path: Path
    ):
        """The mirror was behind when the import began, and is ahead when it comes to the swap."""
        import_artifact(exported(source, tmp_path / "first"), importer)
        with AppendLog(source) as log:
            log.append("a", 1)

        def follow(_done: int, _total: int) -> None:
            with importer.open() as live:
                live.append("mine", live.cursor + 1)
                live.append("mine", live.cursor + 1)

        with pytest.raises(RefusedError, match="only reaches to 11"):
            import_artifact(exported(source, tmp_path / "second"), importer, on_progress=follow)
        assert read_state(importer.data).items["mine"] == importer.cursor()

    def test_a_log_that_is_opened_is_the_one_that_is_shown(
        self, importer: AppendLogImporter, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """An import that swaps between the finding and the opening does not leave the writer with the old log."""
        import_artifact(exported(source, tmp_path / "first"), importer)
        with AppendLog(source) as log:
            log.append("a", 1)
        newer = exported(source, tmp_path / "second")
        opened: list[str] = []

        def slow(path: str, **options: Any) -> AppendLog:
            if not opened:
                import_artifact(newer, importer)
            opened.append(path)
            return AppendLog(path, **options)

        monkeypatch.setattr(append_log, "AppendLog", slow)
        with importer.open() as live:
            assert live.append("mine", 1) == 12
        assert len(opened) == 2
        assert importer.cursor() == 12

    def test_an_empty_mirror_has_no_log(self, importer: AppendLogImporter):
        """A fresh log in its place would have no history."""
        with pytest.raises(NotFoundError):
            importer.open()
        assert importer.cursor() is None

    def test_the_threshold_is_that_of_the_live_log(self, source: Path, tmp_path: Path):
        """The mirror compacts as it is told, not as the source does."""
        importer = AppendLogImporter(path=tmp_path / "mirror", compact_threshold=1)
        import_artifact(exported(source, tmp_path / "artifact"), importer)
        with importer.open() as log:
            assert log_file(importer.data).name == f"{10:020}.log.jsonl"
            assert log.items() == read_state(source).items

    @pytest.mark.parametrize("lie", ["cursor", "torn", "members", "name"])
    def test_what_is_not_the_log_that_it_says_is_refused(
        self, importer: AppendLogImporter, source: Path, tmp_path: Path, lie: str
    ):
        """Whole by its checksums, and yet not what the manifest promises: nothing is shown."""
        artifact = exported(source, tmp_path / "artifact")
        name = artifact.index.paths[0]
        content = (artifact.data / name).read_bytes()
        files = {
            "cursor": {name: content},
            "torn": {name: content + b'{"seq":11,'},
            "members": {name: content, f"{99:020}.log.jsonl": content},
            "name": {"notes": content},
        }[lie]

        def write(data: Path) -> Any:
            for each, bytes_ in files.items():
                (data / each).write_bytes(bytes_)
            return 11 if lie == "cursor" else 10

        forged = append_log.export_files(tmp_path / "forged", backend="append-log", write=write).artifact
        with pytest.raises(ArtifactInvalid if lie in ("cursor", "torn") else HostileArtifact):
            import_artifact(forged, importer)
        assert importer.current() is None
