"""Exports and imports, killed at every change that they make to the disk, and run again."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from blobflow import Artifact, DirectoryExporter, DirectoryImporter, import_artifact
from blobflow.artifact.members import verify_members
from blobflow.backends import (
    AppendLog,
    AppendLogExporter,
    AppendLogImporter,
    SqliteExporter,
    SqliteImporter,
    VersionedImporter,
)
from blobflow.backends.append_log import read_state
from blobflow.backends.base import OnBytes
from blobflow.errors import ArtifactNotFound
from blobflow.mirror import mirror_history, mirror_status

CHANGES = ("os.rename", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "sqlite3.connect")


@pytest.mark.seed("1.24", "W2.9")
@pytest.mark.parametrize("backend", ["directory", "append-log", "sqlite"])
def test_a_kill_at_any_moment_harms_nothing(backend: str, tmp_path: Path):
    """The mirror shows all of the old or all of the new, half an export is no artifact, and the next run finishes."""
    program = subprocess.run(
        [sys.executable, __file__, backend, tmp_path], capture_output=True, text=True, timeout=600, check=False
    )
    assert program.returncode == 0, program.stdout + program.stderr
    exports, imports = map(int, program.stdout.split())
    assert exports >= 4, "it was hardly killed"
    assert imports >= 10, "it was hardly killed"


# The rest runs in a process of its own, which forks one child for each moment: nothing is imported anew, and no thread
# of pytest's is there to be lost.


def killed_at(moment: int, work: Callable[[OnBytes], object]) -> bool:
    """Do the work in a child that is killed at its n-th change or sign of progress; False: it had fewer."""
    pid = os.fork()
    if not pid:
        left = moment

        def tick(*_: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                tick()

        sys.addaudithook(hook)
        try:
            work(tick)
        except BaseException as error:  # noqa: BLE001 - the child must not become a second parent
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


class Directory:
    """A directory; its revision is the content of a file."""

    def __init__(self, home: Path) -> None:
        self.source = home / "source"
        self.source.mkdir()
        self.exporter: Any = DirectoryExporter(path=self.source, mode="copy")
        self.importer: VersionedImporter = DirectoryImporter(path=home / "mirror")

    def write(self, revision: int) -> None:
        for name in ("a", "b"):
            (self.source / name).write_text(str(revision))

    def read(self, data: Path) -> set[int]:
        """The revisions that are found in the data: one, if it is whole."""
        return {int((data / name).read_text()) for name in ("a", "b")}


class Log(Directory):
    """An append log of which every record is a revision."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.exporter = AppendLogExporter(path=self.source)
        self.importer = AppendLogImporter(path=home / "mirror", rewind=True)

    def write(self, revision: int) -> None:
        with AppendLog(self.source) as log:
            log.append("revision", revision)

    def read(self, data: Path) -> set[int]:
        state = read_state(data)
        assert state.items["revision"] == state.cursor
        return {state.cursor}


class Database(Directory):
    """A database in WAL mode with one row for each revision."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.exporter = SqliteExporter(path=self.source / "db", cursor_query="SELECT max(id) FROM events")
        self.importer = SqliteImporter(path=home / "mirror")

    def write(self, revision: int) -> None:
        with closing(sqlite3.connect(self.source / "db")) as db, db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, content BLOB)")
            db.execute("INSERT INTO events VALUES (?, randomblob(2000))", (revision,))

    def read(self, data: Path) -> set[int]:
        with closing(sqlite3.connect(data / "database.sqlite")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return set(db.execute("SELECT count(*), max(id) FROM events").fetchone())


def kill_exports(thing: Directory, home: Path) -> int:
    """Kill exports of the source, which is changed meanwhile, until one is too quick."""
    for moment in count(1):
        thing.write(moment)
        dest = home / "exports" / str(moment)
        killed = killed_at(moment, lambda tick, dest=dest: thing.exporter.export(dest, on_progress=tick))
        with suppress(ArtifactNotFound):
            verify_members(Artifact.open(dest))
            assert thing.read(dest / "data") == {moment}
        again = thing.exporter.export(home / "again" / str(moment)).artifact
        assert thing.read(again.data) == {moment}
        if not killed:
            return moment - 1
    raise AssertionError


def kill_imports(thing: Directory, made: list[Artifact]) -> int:
    """Kill imports of two artifacts by turns, as copies and as what may be consumed, until one is too quick."""
    importer = thing.importer
    import_artifact(made[0], importer)
    turn = 0
    for moment in count(1):
        survived = 0
        for consume in (False, True):
            old, turn = made[turn % 2], turn + 1
            new = made[turn % 2]
            landed = importer.staging(new.digest)

            def land(new: Artifact = new, landed: Path = landed) -> Path:
                if not landed.exists():
                    shutil.copytree(new.path, landed)
                return landed

            def work(tick: OnBytes, consume: bool = consume, landed: Path = landed) -> None:
                import_artifact(landed, importer, consume=consume, on_progress=tick)

            land()
            survived += not killed_at(moment, work)
            seen = thing.read(importer.data)
            assert seen in (thing.read(old.data), thing.read(new.data)), (moment, seen)
            alive = importer.current()
            assert alive is not None
            assert (alive.digest == new.digest) == (seen == thing.read(new.data)), (moment, seen)

            import_artifact(land(), importer, consume=True)
            assert thing.read(importer.data) == thing.read(new.data)
            assert mirror_status(importer.path).cursor == new.manifest.cursor
            assert mirror_history(importer.path)[-1].artifact_digest == new.digest
            assert not landed.exists()
            assert [entry for entry in os.listdir(importer.path / "versions") if entry.startswith(".")] == []
        if survived == 2:
            return moment - 1
    raise AssertionError


def main(backend: str, home: Path) -> None:
    from blobflow.artifact import landing
    from blobflow.backends import sqlite

    # A killed process leaves its bytes with the kernel; what a power cut takes is the business of other tests.
    sqlite._STEP_PAGES = 8  # so that it is killed in the middle of its copy as well
    landing.sync_tree = landing.fsync_directory = os.fsync = lambda *_: None
    thing = {"directory": Directory, "append-log": Log, "sqlite": Database}[backend](home)
    exports = kill_exports(thing, home)
    made = [thing.exporter.export(home / f"artifact-{exports + 1}").artifact]
    thing.write(exports + 2)
    made.append(thing.exporter.export(home / f"artifact-{exports + 2}").artifact)
    print(exports, kill_imports(thing, made))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
