"""SQLite: snapshots of a database that is written to, and a mirror that swaps whole databases."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from blobflow import Artifact, import_artifact
from blobflow.backends import SqliteExporter, SqliteImporter, sqlite
from blobflow.backends.files import export_files
from blobflow.backends.sqlite import DATABASE_NAME
from blobflow.errors import (
    ArtifactInvalid,
    HostileArtifact,
    NotFoundError,
    RefusedError,
    TransferBusy,
    UnsupportedSource,
    UsageError,
)
from blobflow.testing import read_tree

LAST_ID = "SELECT max(id) FROM events"


def connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)


def filled(path: Path, rows: int = 100, *, mode: str = "DELETE") -> Path:
    """A database with `rows` events of about a page each."""
    with closing(connect(path)) as db:
        db.execute("PRAGMA page_size=1024")
        db.execute(f"PRAGMA journal_mode={mode}")
        db.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, content BLOB)")
        add(db, rows)
    return path


def add(db: sqlite3.Connection, rows: int = 1) -> None:
    """More events, in one transaction."""
    db.execute("BEGIN")
    db.executemany("INSERT INTO events (content) VALUES (?)", [(os.urandom(900),) for _ in range(rows)])
    db.execute("COMMIT")


def ids(path: Path) -> tuple[int, int]:
    """Count and newest id of the events; they are the same in every whole state."""
    with closing(connect(path)) as db:
        return db.execute("SELECT count(*), max(id) FROM events").fetchone()


def by_name(one: str, other: str) -> int:
    return (one.lower() > other.lower()) - (one.lower() < other.lower())


def applied(path: Path, *statements: str) -> Path:
    """A database that an application with a collation and a function of its own has made, 100 rows in table `t`."""
    with closing(connect(path)) as db:
        db.create_collation("BY_NAME", by_name)
        db.create_function("twice", 1, lambda value: 2 * (value or 0), deterministic=True)
        db.execute("CREATE TABLE plain (id INTEGER PRIMARY KEY, content TEXT)")
        db.execute("CREATE INDEX plain_content ON plain (content)")
        for statement in statements:
            db.execute(statement)
        db.execute("BEGIN")
        db.executemany("INSERT INTO t (name, size) VALUES (?, ?)", [(f"Name {i}", i) for i in range(100)])
        db.executemany("INSERT INTO plain (content) VALUES (?)", [(f"content {i}",) for i in range(100)])
        db.execute("COMMIT")
    return path


APPLICATIONS = {
    "a collation in an index": ("CREATE TABLE t (name, size)", "CREATE INDEX i ON t (name COLLATE BY_NAME)"),
    "a collation of the key": ("CREATE TABLE t (name TEXT COLLATE BY_NAME PRIMARY KEY, size) WITHOUT ROWID",),
    "a function in an index": (
        "CREATE TABLE t (name, size)",
        "CREATE INDEX i ON t (twice(size)) WHERE twice(size) > 9",
    ),
    "a function in a CHECK": ("CREATE TABLE t (name, size CHECK (twice(size) >= 0))",),
    "a function in a column": ("CREATE TABLE t (name, size, double GENERATED ALWAYS AS (twice(size)) NOT NULL)",),
    "both": (
        "CREATE TABLE t (name TEXT COLLATE BY_NAME UNIQUE, size, double AS (twice(size)) STORED)",
        "CREATE INDEX i ON t (double, twice(size) COLLATE BY_NAME)",
    ),
}


@pytest.mark.parametrize("statements", APPLICATIONS.values(), ids=APPLICATIONS.keys())
def test_a_sound_database_needs_no_application_to_be_moved(statements: tuple[str, ...], tmp_path: Path):
    """Collations and functions that only its application has do not make it a damaged one, at either end."""
    source = applied(tmp_path / "orders.db", *statements)
    artifact = exported(source, tmp_path / "artifact", cursor_query="SELECT count(*) FROM plain")
    importer = SqliteImporter(path=tmp_path / "mirror")
    import_artifact(artifact, importer)
    with closing(connect(importer.database)) as db:
        db.create_collation("BY_NAME", by_name)
        db.create_function("twice", 1, lambda value: 2 * (value or 0), deterministic=True)
        assert db.execute("SELECT count(*) FROM t WHERE name = 'Name 7'").fetchone() == (1,)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("statements", APPLICATIONS.values(), ids=APPLICATIONS.keys())
def test_damage_is_found_beside_what_needs_the_application(statements: tuple[str, ...], tmp_path: Path):
    """The other tables are checked in full (a row that is missing in an index), and these by their pages."""
    source = applied(tmp_path / "orders.db", *statements)
    with closing(connect(source)) as db:
        # The indexes of two tables that differ in their rows alone change places.
        db.execute("CREATE TABLE other (id INTEGER PRIMARY KEY, content TEXT)")
        db.execute("CREATE INDEX other_content ON other (content)")
        db.executemany("INSERT INTO other (content) VALUES (?)", [(f"other {i}",) for i in range(100)])
        db.execute("PRAGMA writable_schema=ON")
        roots = dict(
            db.execute("SELECT name, rootpage FROM sqlite_master WHERE name IN ('other_content', 'plain_content')")
        )
        for name, root in zip(roots, reversed(roots.values()), strict=True):
            db.execute("UPDATE sqlite_master SET rootpage = ? WHERE name = ?", (root, name))
    with pytest.raises(UnsupportedSource, match="is damaged: row 1 missing from index"):
        exported(source, tmp_path / "artifact", cursor_query="SELECT 1")

    broken = applied(tmp_path / "broken.db", *statements)
    with closing(connect(broken)) as db:
        root = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 't'").fetchone()[0]
        size = db.execute("PRAGMA page_size").fetchone()[0]
    with open(broken, "r+b") as file:
        file.seek((root - 1) * size + 8)
        file.write(os.urandom(200))
    with pytest.raises(UnsupportedSource, match=r"broken\.db is damaged|broken\.db cannot be read"):
        exported(broken, tmp_path / "other", cursor_query="SELECT 1")


def test_rows_older_than_a_constraint_are_no_damage(tmp_path: Path):
    """A NULL in a column that became NOT NULL, a row that a later CHECK forbids: they travel as they are."""
    source = filled(tmp_path / "orders.db")
    with closing(connect(source)) as db:
        db.execute("CREATE TABLE legacy (name TEXT)")
        db.executemany("INSERT INTO legacy VALUES (?)", [(None,), ("",), ("x",)] * 200)
        db.execute("PRAGMA writable_schema=ON")
        changed = "CREATE TABLE legacy (name TEXT NOT NULL CHECK (length(name) > 0))"
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'legacy'", (changed,))
    importer = SqliteImporter(path=tmp_path / "mirror")
    import_artifact(exported(source, tmp_path / "artifact"), importer)
    with closing(connect(importer.database)) as db:
        assert db.execute("SELECT count(*) FROM legacy WHERE typeof(name) = 'null'").fetchone() == (200,)
    with open(source, "r+b") as file:
        file.seek(-1024, os.SEEK_END)
        file.write(os.urandom(1024))
    with pytest.raises(UnsupportedSource, match=r"orders\.db"):
        exported(source, tmp_path / "again")


@contextmanager
def read_only_directory() -> Generator[Path]:
    """A directory that `forbid_writing` makes read-only, even for root, and one beside it, into which one can write."""
    home = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    try:
        (home / "source").mkdir()
        (home / "own").mkdir()
        home.chmod(0o755)
        yield home / "source"
    finally:
        if is_root:
            os.seteuid(0)
        (home / "source").chmod(0o755)
        shutil.rmtree(home)


def forbid_writing(directory: Path) -> None:
    """From now on, this process reads the directory and writes to its sibling `own`."""
    for file in directory.iterdir():
        file.chmod(0o444)
    directory.chmod(0o555)
    if os.geteuid() == 0:
        nobody = 65534
        os.chown(directory.parent / "own", nobody, nobody)
        os.seteuid(nobody)


@pytest.mark.parametrize("left", ["log", "empty log", "no log"])
def test_a_wal_database_in_a_read_only_directory_is_exported(left: str):
    """A snapshot of a file system is read-only and holds a log beside the database: what it says counts as well."""
    with read_only_directory() as source:
        live = filled(source / "live.db", 50, mode="WAL")
        with closing(connect(live)) as db:
            add(db, 7)
            for suffix in ("", "-wal"):
                shutil.copyfile(f"{live}{suffix}", f"{source}/orders.db{suffix}")
        if left != "log":
            with closing(connect(source / "orders.db")) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                if left == "empty log":
                    shutil.copyfile(source / "orders.db", source / "copy.db")
                    (source / "copy.db-wal").touch()
        database = source / ("copy.db" if left == "empty log" else "orders.db")
        Path(f"{database}-shm").unlink(missing_ok=True)
        forbid_writing(source)
        before = sorted(os.listdir(source))

        artifact = exported(database, source.parent / "own" / "artifact")
        assert ids(artifact.data / DATABASE_NAME) == (57, 57)
        assert artifact.manifest.cursor == 57
        assert sorted(os.listdir(artifact.data)) == [DATABASE_NAME]
        assert sorted(os.listdir(source)) == before


def exported(path: Path, dest: Path, **options: object) -> Artifact:
    exporter = SqliteExporter.model_validate({"path": path, "cursor_query": LAST_ID, **options})
    return exporter.export(dest).artifact


def hot(path: Path, dest: Path) -> Path:
    """What is on disk if the machine goes down in the middle of a transaction: half of it, and its journal."""
    dest.mkdir()
    with closing(connect(path)) as db:
        db.execute("PRAGMA cache_size=1")  # so that it writes into the file long before it commits
        db.execute("BEGIN")
        db.execute("UPDATE events SET content = randomblob(900)")
        for name in (path.name, f"{path.name}-journal"):
            shutil.copy(path.parent / name, dest / name)
        db.execute("ROLLBACK")
    return dest / path.name


@pytest.mark.seed("W1.5")
class TestExport:
    @pytest.mark.parametrize("pages", [1, 4096])
    def test_is_of_one_moment_while_others_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int):
        """Whatever is committed after the first byte was read is not in it, and the cursor is of the same moment."""
        monkeypatch.setattr(sqlite, "_STEP_PAGES", pages)
        path = filled(tmp_path / "db", mode="WAL")
        with closing(connect(path)) as writer:
            add(writer)  # it is in the write-ahead log only
            steps: list[int] = []

            def write(_done: int, _total: int) -> None:
                steps.append(1)
                add(writer)

            exporter = SqliteExporter(path=path, cursor_query=LAST_ID)
            artifact = exporter.export(tmp_path / "artifact", on_progress=write).artifact
            assert ids(path) == (101 + len(steps), 101 + len(steps))
        assert len(steps) >= (100 if pages == 1 else 1)
        assert artifact.manifest.cursor == 101
        assert ids(artifact.data / DATABASE_NAME) == (101, 101)

    @pytest.mark.parametrize("mode", ["DELETE", "WAL"])
    def test_is_one_file_whatever_the_journal_mode(self, tmp_path: Path, mode: str):
        """Nothing is made beside it when it is opened, and the source is as it was."""
        path = filled(tmp_path / "source", mode=mode)
        before = path.read_bytes()
        artifact = exported(path, tmp_path / "artifact")
        assert artifact.index.paths == [DATABASE_NAME]
        with closing(connect(artifact.data / DATABASE_NAME)) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            assert db.execute(LAST_ID).fetchone() == (100,)
            assert os.listdir(artifact.data) == [DATABASE_NAME]
        assert path.read_bytes() == before

    def test_without_a_query_the_cursor_is_the_versions(self, tmp_path: Path):
        """SQLite's own numbers that mean the same to every connection."""
        path = filled(tmp_path / "db")
        with closing(connect(path)) as db:
            db.execute("PRAGMA user_version=7")
            (schema,) = db.execute("PRAGMA schema_version").fetchone()
        artifact = exported(path, tmp_path / "artifact", cursor_query=None)
        assert artifact.manifest.cursor == {"schema_version": schema, "user_version": 7}

    @pytest.mark.parametrize(
        ("query", "cursor"),
        [
            ("SELECT count(*), 'x', NULL FROM events", [100, "x", None]),
            ("SELECT id FROM events WHERE id > 1000", None),
            ("SELECT 1.5", 1.5),
        ],
    )
    def test_a_query_gives_any_cursor(self, tmp_path: Path, query: str, cursor: object):
        """One column is the cursor itself, several are a list, no row is None."""
        artifact = exported(filled(tmp_path / "db"), tmp_path / "artifact", cursor_query=query)
        assert artifact.manifest.cursor == cursor

    @pytest.mark.parametrize("query", ["SELECT nothing FROM nowhere", "DELETE FROM events", "SELECT x'00'", "SELEC"])
    def test_a_query_that_gives_none_is_told(self, tmp_path: Path, query: str):
        """And one that would change the source cannot."""
        path = filled(tmp_path / "db")
        with pytest.raises(UsageError, match="cursor query"):
            exported(path, tmp_path / "artifact", cursor_query=query)
        assert ids(path) == (100, 100)
        assert not (tmp_path / "artifact").exists()

    @pytest.mark.seed("W1.10")
    def test_a_writer_that_does_not_commit_is_waited_for_in_vain(self, tmp_path: Path):
        """Trying again can help, and the error says so."""
        path = filled(tmp_path / "db")
        with closing(connect(path)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            with pytest.raises(TransferBusy) as refusal:
                exported(path, tmp_path / "artifact", busy_timeout_s=0)
            assert refusal.value.retryable
            writer.execute("ROLLBACK")
        assert exported(path, tmp_path / "artifact").manifest.cursor == 100

    def test_a_journal_that_a_killed_writer_left_is_its_applications(self, tmp_path: Path):
        """Half a transaction is neither exported nor rolled back by a reader."""
        path = hot(filled(tmp_path / "db"), tmp_path / "after the crash")
        before = read_tree(path.parent)
        with pytest.raises(RefusedError, match="journal") as refusal:
            exported(path, tmp_path / "artifact")
        assert "roll" in refusal.value.hint
        assert read_tree(path.parent) == before
        assert ids(path) == (100, 100)
        assert exported(path, tmp_path / "artifact").manifest.cursor == 100

    @pytest.mark.parametrize("harm", ["not one", "empty page", "absent"])
    def test_what_is_no_whole_database_is_refused(self, tmp_path: Path, harm: str):
        """Damage is found by the export, not by who imports it next year."""
        path = filled(tmp_path / "db")
        if harm == "not one":
            path.write_bytes(b"not a database at all, but long enough" * 100)
        elif harm == "empty page":
            content = bytearray(path.read_bytes())
            content[20 * 1024 : 21 * 1024] = bytes(1024)
            path.write_bytes(content)
        else:
            path.unlink()
        with pytest.raises(NotFoundError if harm == "absent" else UnsupportedSource):
            exported(path, tmp_path / "artifact")
        assert not (tmp_path / "artifact").exists()

    def test_is_cancelled_while_it_is_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The check of a large database takes minutes: it shows signs of life, and what they raise comes out."""
        monkeypatch.setattr(sqlite, "_STEP_INSTRUCTIONS", 100)
        path = filled(tmp_path / "db")
        signs = 0

        class Cancelled(Exception): ...

        def cancel(_done: int, _total: int) -> None:
            nonlocal signs
            signs += 1
            if signs == 3:  # the first is of the copying, which is done in one step
                raise Cancelled

        with pytest.raises(Cancelled):
            SqliteExporter(path=path).export(tmp_path / "artifact", on_progress=cancel)
        assert not (tmp_path / "artifact").exists()


@pytest.mark.seed("1.24")
class TestImport:
    @pytest.fixture
    def importer(self, tmp_path: Path) -> SqliteImporter:
        return SqliteImporter(path=tmp_path / "mirror")

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return filled(tmp_path / "source")

    @pytest.fixture
    def newer(self, importer: SqliteImporter, source: Path, tmp_path: Path) -> Artifact:
        """Offered to a mirror that shows the state before."""
        import_artifact(exported(source, tmp_path / "first"), importer)
        with closing(connect(source)) as db:
            add(db)
        return exported(source, tmp_path / "second")

    def test_readers_keep_the_database_that_they_opened(self, importer: SqliteImporter, newer: Artifact):
        """Also in the middle of a query; who opens it after the import gets the new one."""
        with closing(connect(importer.database)) as reader:
            rows = reader.execute("SELECT id FROM events ORDER BY id")
            assert next(rows) == (1,)
            import_artifact(newer, importer)
            assert len(list(rows)) == 99
            assert reader.execute(LAST_ID).fetchone() == (100,)
        assert ids(importer.database) == (101, 101)

    def test_readers_always_get_a_whole_database(self, importer: SqliteImporter, source: Path, tmp_path: Path):
        """Whatever they meet, count and newest id agree, and never go back."""
        importer = importer.model_copy(update={"keep_versions": 11})  # a reader may be slow to follow the link
        import_artifact(exported(source, tmp_path / "artifact-0"), importer)
        over = threading.Event()
        seen: list[tuple[int, int]] = []

        def read() -> None:
            while not over.is_set():
                seen.append(ids(importer.database))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for number in range(1, 11):
                with closing(connect(source)) as db:
                    add(db)
                import_artifact(exported(source, tmp_path / f"artifact-{number}"), importer, consume=True)
        finally:
            over.set()
            reader.join()
        assert all(count == last for count, last in seen)
        assert seen == sorted(seen)
        assert ids(importer.database) == (110, 110)

    @pytest.mark.seed("W1.10")
    @pytest.mark.parametrize("mode", ["DELETE", "WAL"])
    def test_nobody_swaps_under_the_feet_of_a_writer(self, importer: SqliteImporter, newer: Artifact, mode: str):
        """What it has not committed yet would be gone unseen: the import asks to be tried again."""
        with closing(connect(importer.database)) as writer:
            writer.execute(f"PRAGMA journal_mode={mode}")
            writer.execute("BEGIN")
            writer.execute("DELETE FROM events")
            with pytest.raises(TransferBusy) as refusal:
                import_artifact(newer, importer)
            assert refusal.value.retryable
            writer.execute("ROLLBACK")
            assert ids(importer.database) == (100, 100)
            assert import_artifact(newer, importer).status == "imported"
        assert ids(importer.database) == (101, 101)

    @pytest.mark.parametrize("state", ["hot", "damaged"])
    def test_what_is_broken_is_replaced(self, importer: SqliteImporter, newer: Artifact, tmp_path: Path, state: str):
        """A journal of the old database is never applied to the new one: it stays beside the old."""
        if state == "hot":
            half = hot(importer.database, tmp_path / "after the crash")
            for name in os.listdir(half.parent):
                shutil.copy(half.parent / name, importer.data / name)
        else:
            importer.database.write_bytes(b"?" * 5000)
        import_artifact(newer, importer)
        assert ids(importer.database) == (101, 101)
        assert os.listdir(importer.data) == [DATABASE_NAME]

    @pytest.mark.parametrize("name", ["application_id", "user_version"])
    def test_a_mirror_takes_what_it_was_made_for(self, source: Path, tmp_path: Path, name: str):
        """Another application's database, or another version of its schema, is refused before it is shown."""
        with closing(connect(source)) as db:
            db.execute(f"PRAGMA {name}=3")
        artifact = exported(source, tmp_path / "artifact")
        with pytest.raises(RefusedError) as refusal:
            import_artifact(artifact, SqliteImporter.model_validate({"path": tmp_path / "mirror", name: 4}))
        assert (refusal.value.expected, refusal.value.actual) == (4, 3)
        taken = SqliteImporter.model_validate({"path": tmp_path / "mirror", name: 3})
        assert taken.current() is None
        assert import_artifact(artifact, taken).status == "imported"

    @pytest.mark.parametrize("lie", ["damaged", "no database", "journal", "nothing"])
    def test_what_is_no_whole_database_is_refused(
        self, importer: SqliteImporter, newer: Artifact, tmp_path: Path, lie: str
    ):
        """Whole by its checksums, and yet of no use, or dangerous: the mirror shows what it showed."""
        content = bytearray((newer.data / DATABASE_NAME).read_bytes())
        if lie == "damaged":
            content[20 * 1024 : 21 * 1024] = bytes(1024)
        elif lie == "no database":
            content[:16] = b"something else.."

        def write(data: Path) -> None:
            (data / ("other" if lie == "nothing" else DATABASE_NAME)).write_bytes(content)
            if lie == "journal":
                (data / f"{DATABASE_NAME}-journal").write_bytes(b"to be applied by the first who opens it")

        forged = export_files(tmp_path / "forged", backend="sqlite", write=write).artifact
        with pytest.raises(HostileArtifact if lie in ("journal", "nothing") else ArtifactInvalid):
            import_artifact(forged, importer, consume=True)
        assert ids(importer.database) == (100, 100)
        assert read_tree(forged.data).keys()

    def test_its_cursor_may_be_asked_of_the_mirror(self, importer: SqliteImporter, newer: Artifact):
        """Of one that is followed further by other means than imports."""
        followed = importer.model_copy(update={"cursor_query": LAST_ID})
        assert followed.cursor() == importer.cursor() == 100
        with closing(connect(importer.database)) as db:
            add(db)
        assert (followed.cursor(), importer.cursor()) == (101, 100)
        assert newer.manifest.cursor == 101
        assert SqliteImporter(path=importer.path / "none", cursor_query=LAST_ID).cursor() is None
