"""The directory importer: a mirror that shows one whole tree at any time."""

from __future__ import annotations

import fcntl
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from blobflow import Artifact, DirectoryImporter, download, import_artifact, upload
from blobflow.artifact.artifact import write_artifact
from blobflow.artifact.landing import lock_of
from blobflow.errors import DigestMismatch, RefusedError
from blobflow.testing import FaultyStore, read_tree, write_tree
from tests.kit import SERIAL, TREE, Killed, artifact_of, dies_at, local_store


@pytest.fixture
def importer(tmp_path: Path) -> DirectoryImporter:
    return DirectoryImporter(path=tmp_path / "mirror")


def version_of(digest: str) -> str:
    return digest.removeprefix("sha256:")[:16]


def test_an_import_shows_the_tree_as_current(importer: DirectoryImporter, tmp_path: Path):
    """`current` is a relative link to the newest version; the artifact stays where it was."""
    artifact = artifact_of(tmp_path)
    result = import_artifact(artifact.path, importer)
    assert (result.status, result.members, result.bytes) == ("imported", 6, artifact.manifest.bytes)
    assert read_tree(importer.path / "current") == TREE == read_tree(artifact.data)
    assert os.readlink(importer.path / "current") == f"versions/{version_of(artifact.digest)}/data"
    current = importer.current()
    assert current is not None
    assert current.digest == artifact.digest
    assert not current.is_reference


def test_importing_again_changes_nothing(importer: DirectoryImporter, tmp_path: Path):
    """The same artifact is unchanged; one that may be consumed is gone afterwards."""
    artifact = artifact_of(tmp_path, mode="copy")
    import_artifact(artifact, importer)
    inode = (importer.path / "current" / "big.bin").stat().st_ino
    assert import_artifact(artifact, importer, consume=True).status == "unchanged"
    assert (importer.path / "current" / "big.bin").stat().st_ino == inode
    assert not artifact.path.exists()


def test_a_download_beside_the_versions_is_moved_not_copied(importer: DirectoryImporter, tmp_path: Path):
    """What landed in the staging place becomes the version by a rename."""
    artifact, store = artifact_of(tmp_path), local_store(tmp_path)
    upload(store, "a.tar", artifact)
    landed = importer.staging(artifact.digest)
    download(store, "a.tar", landed)
    inode = (landed / "data" / "big.bin").stat().st_ino
    import_artifact(landed, importer, consume=True)
    assert (importer.path / "current" / "big.bin").stat().st_ino == inode
    assert not landed.exists()


@pytest.mark.seed("3.20")
def test_damage_is_found_before_anything_changes(importer: DirectoryImporter, tmp_path: Path):
    """The target stays as it was."""
    good = artifact_of(tmp_path / "good")
    import_artifact(good, importer)
    bad = artifact_of(tmp_path / "bad", {"a": "x"}, mode="copy")
    (bad.data / "a").write_text("y")
    with pytest.raises(DigestMismatch, match="member 'a'"):
        import_artifact(bad, importer)
    assert read_tree(importer.path / "current") == TREE
    assert os.listdir(importer.path / "versions") == [version_of(good.digest)]


def test_old_versions_go_and_readers_keep_what_they_opened(tmp_path: Path):
    """As many versions stay as were asked for; an open file survives its version."""
    importer = DirectoryImporter(path=tmp_path / "mirror", keep_versions=2)
    artifacts = [artifact_of(tmp_path / str(i), {"f": str(i)}) for i in range(3)]
    import_artifact(artifacts[0], importer)
    with open(importer.path / "current" / "f") as reader:
        import_artifact(artifacts[1], importer)
        result = import_artifact(artifacts[2], importer)
        assert reader.read() == "0"
    assert result.removed_versions == [version_of(artifacts[0].digest)]
    kept = sorted(version_of(artifact.digest) for artifact in artifacts[1:])
    assert sorted(os.listdir(importer.path / "versions")) == kept
    assert (importer.path / "current" / "f").read_text() == "2"


def test_readers_always_see_one_whole_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At every rename and link of an import, `current` shows the old tree or the new one."""
    importer = DirectoryImporter(path=tmp_path / "mirror")
    old, new = ({"a": "1", "b": "1"}, {"a": "2", "b": "2"})
    import_artifact(artifact_of(tmp_path / "old", old), importer)
    seen: list[object] = []
    for name in ("rename", "replace", "symlink", "mkdir", "unlink"):
        real = getattr(os, name)

        def look(*arguments: object, real: object = real, **options: object) -> object:
            seen.append(read_tree(importer.path / "current"))
            return real(*arguments, **options)  # pyright: ignore[reportCallIssue]

        monkeypatch.setattr(os, name, look)
    import_artifact(artifact_of(tmp_path / "new", new), importer)
    monkeypatch.undo()
    assert seen
    assert all(tree in (old, new) for tree in seen)
    assert read_tree(importer.path / "current") == new


def test_what_a_killed_import_left_is_removed(importer: DirectoryImporter, tmp_path: Path):
    """Half copies and half removals start with a dot, and the next import takes them away."""
    import_artifact(artifact_of(tmp_path / "1", {"a": "1"}), importer)
    (importer.path / "versions" / ".x.partial" / "data").mkdir(parents=True)
    (importer.path / ".current.new").symlink_to("nowhere")
    import_artifact(artifact_of(tmp_path / "2", {"a": "2"}), importer)
    assert not (importer.path / "versions" / ".x.partial").exists()
    assert not (importer.path / ".current.new").is_symlink()


class TestWhatOlderDownloadsLeft:
    """A killed download into the mirror leaves a stage, or a landed artifact, that only its own successor takes up."""

    @pytest.fixture
    def made_at(self) -> datetime:
        return datetime(2026, 11, 20, tzinfo=timezone.utc)

    @pytest.fixture
    def newer(self, tmp_path: Path, made_at: datetime) -> Artifact:
        """An artifact that was made at that time."""
        directory = tmp_path / "newer"
        (directory / "data").mkdir(parents=True)
        (directory / "data" / "f").write_text("new")
        index = artifact_of(tmp_path / "like it", {"f": "new"}).index
        return write_artifact(directory, index, backend="directory", created_at=made_at)

    @pytest.fixture
    def stage(self, importer: DirectoryImporter, tmp_path: Path) -> Path:
        """What a killed download of another artifact left."""
        store = local_store(tmp_path)
        other = artifact_of(tmp_path / "other")
        upload(store, "other", other, profile=SERIAL)
        with pytest.raises(Killed):
            download(FaultyStore(store, dies_at(6)), "other", importer.staging(other.digest), profile=SERIAL)
        (stage,) = (importer.path / ".incoming").iterdir()
        return stage

    @staticmethod
    def written(path: Path, moment: datetime) -> None:
        """Let everything below look as if nobody wrote to it after this moment."""
        for each in (*path.rglob("*"), path):
            os.utime(each, (moment.timestamp(), moment.timestamp()))

    def test_goes_with_the_next_import(
        self, importer: DirectoryImporter, newer: Artifact, stage: Path, made_at: datetime
    ):
        """Nobody wrote to it since the newer artifact was made: it is of an older one, and will not be finished."""
        self.written(stage, made_at - timedelta(seconds=1))
        importer.import_artifact(newer)
        assert list((importer.path / ".incoming").iterdir()) == []
        assert (importer.path / "current" / "f").read_text() == "new"

    def test_stays_if_it_may_be_of_a_newer_artifact(
        self, importer: DirectoryImporter, newer: Artifact, stage: Path, made_at: datetime
    ):
        """An older artifact imported late does not throw away what the newest one has so far."""
        self.written(stage, made_at + timedelta(seconds=1))
        importer.import_artifact(newer)
        assert stage.is_dir()

    def test_stays_while_somebody_holds_it(
        self, importer: DirectoryImporter, newer: Artifact, stage: Path, made_at: datetime
    ):
        """A download on a link that is silent for long."""
        self.written(stage, made_at - timedelta(days=10))
        with lock_of(stage) as lock:
            assert lock is not None
            fcntl.flock(lock, fcntl.LOCK_SH)
            importer.import_artifact(newer)
        assert (stage / "journal").exists()

    def test_a_landed_artifact_that_was_never_imported_goes_too(
        self, importer: DirectoryImporter, newer: Artifact, made_at: datetime, tmp_path: Path
    ):
        """Killed between landing and import; what somebody else put beside it stays."""
        landed, foreign = importer.staging("sha256:" + "ab" * 32), importer.path / ".incoming" / "notes"
        write_tree(landed, {"data": {"f": "old"}})
        write_tree(foreign, {"f": ""})
        for each in (landed, foreign):
            self.written(each, made_at - timedelta(seconds=1))
        importer.import_artifact(newer)
        assert not landed.exists()
        assert foreign.exists()


def test_a_current_that_is_no_link_is_left_alone(importer: DirectoryImporter, tmp_path: Path):
    """Somebody's directory is not replaced."""
    (importer.path / "current").mkdir(parents=True)
    with pytest.raises(RefusedError, match="not a symbolic link"):
        import_artifact(artifact_of(tmp_path), importer)


def test_an_artifact_of_another_backend_is_refused(importer: DirectoryImporter, tmp_path: Path):
    """Only the importer of its backend knows what to do with it."""
    artifact = artifact_of(tmp_path)
    sqlite = tmp_path / "sqlite"
    sqlite.mkdir()
    (sqlite / "data").symlink_to(tmp_path / "source")
    other = write_artifact(sqlite, artifact.index, backend="sqlite")
    with pytest.raises(RefusedError, match="made by backend 'sqlite'"):
        import_artifact(other, importer)
