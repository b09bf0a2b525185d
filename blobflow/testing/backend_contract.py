"""Every promise of an exporter and an importer, as tests."""

from __future__ import annotations

import shutil
from pathlib import Path

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.members import verify_members
from blobflow.backends.base import Exporter, Importer
from blobflow.errors import DestinationNotEmpty, IntegrityError, RefusedError
from blobflow.stores.local.store import LocalStore
from blobflow.testing.checks import raises
from blobflow.testing.trees import read_tree, write_tree
from blobflow.transport import download, upload


class _Cancelled(Exception):
    """An exception from a progress callback; the work must raise it unchanged."""


class BackendContract:
    """Every promise of `blobflow.backends.base.Exporter` and `Importer` as tests. Inherit, and define your source.

    Sources have revisions, counted from 1. Each has other content than the one before, and a later cursor if any.

    >>> class TestMyBackend(BackendContract):
    ...     def write_source(self, source, revision):
    ...         (source / "my.db").write_text(f"revision {revision}")
    ...
    ...     def exporter(self, source):
    ...         return MyExporter(source)
    ...
    ...     def importer(self, target):
    ...         return MyImporter(target)
    ...
    ...     def revision_of(self, target):
    ...         return int((target / "my.db").read_text().split()[1])
    """

    def write_source(self, source: Path, revision: int) -> None:
        """Change the source in an existing directory from the previous revision to this one."""
        raise NotImplementedError

    def exporter(self, source: Path) -> Exporter:
        """An exporter of the source in a directory."""
        raise NotImplementedError

    def importer(self, target: Path) -> Importer:
        """An importer into a directory, which may be missing."""
        raise NotImplementedError

    def revision_of(self, target: Path) -> int:
        """The revision of the target in a directory, read as its users read it."""
        raise NotImplementedError

    def test_an_export_is_a_whole_artifact(self, tmp_path: Path) -> None:
        """Its members are those of the index, and the manifest names the importer for it."""
        artifact = self._export(tmp_path, 1)
        verify_members(artifact)
        assert artifact.manifest.backend == self.exporter(tmp_path).backend == self.importer(tmp_path).backend
        assert not artifact.is_reference or artifact.data.resolve().is_dir()

    def test_an_unchanged_source_has_the_same_content(self, tmp_path: Path) -> None:
        """So an upload of it is skipped; a changed source is noticed."""
        first, again = self._export(tmp_path, 1), self._export(tmp_path, 1, "again")
        assert first.manifest.same_content(again.manifest)
        assert not first.manifest.same_content(self._export(tmp_path, 2).manifest)

    def test_a_destination_that_holds_something_is_left_alone(self, tmp_path: Path) -> None:
        """No export writes over anything."""
        dest = tmp_path / "taken"
        write_tree(dest, {"precious": "1"})
        with raises(DestinationNotEmpty):
            self._exporter_at(tmp_path, 1).export(dest)
        assert read_tree(dest) == {"precious": "1"}

    def test_a_cancelled_export_leaves_nothing(self, tmp_path: Path) -> None:
        """An exception from the progress callback ends it, and the destination is as before."""

        def cancel(_done: int, _total: int) -> None:
            raise _Cancelled

        exporter = self._exporter_at(tmp_path, 1)
        with raises(_Cancelled):
            exporter.export(tmp_path / "absent", on_progress=cancel)
        (tmp_path / "empty").mkdir()
        with raises(_Cancelled):
            exporter.export(tmp_path / "empty", on_progress=cancel)
        assert not (tmp_path / "absent").exists()
        assert read_tree(tmp_path / "empty") == {}

    def test_an_import_brings_the_source_back(self, tmp_path: Path) -> None:
        """With the cursor in the artifact, from which following the source continues."""
        artifact, importer = self._export(tmp_path, 1), self.importer(tmp_path / "target")
        assert importer.current() is None
        assert importer.cursor() is None
        result = importer.import_artifact(artifact)
        assert (result.status, result.artifact_digest) == ("imported", artifact.digest)
        assert result.cursor == importer.cursor() == artifact.manifest.cursor
        alive = importer.current()
        assert alive is not None
        assert alive.digest == artifact.digest
        assert self.revision_of(tmp_path / "target") == 1
        assert Artifact.open(artifact.path).digest == artifact.digest

    def test_another_process_finds_what_is_alive(self, tmp_path: Path) -> None:
        """An importer keeps no state outside its directory."""
        artifact = self._export(tmp_path, 1)
        self.importer(tmp_path / "target").import_artifact(artifact)
        other = self.importer(tmp_path / "target")
        alive = other.current()
        assert alive is not None
        assert (alive.digest, other.cursor()) == (artifact.digest, artifact.manifest.cursor)

    def test_an_artifact_that_is_alive_is_left_alone(self, tmp_path: Path) -> None:
        """An import may be repeated after a crash; an artifact that may be consumed is gone afterwards."""
        artifact, importer = self._export(tmp_path, 1), self.importer(tmp_path / "target")
        importer.import_artifact(artifact)
        result = importer.import_artifact(artifact, consume=True)
        assert (result.status, result.cursor) == ("unchanged", artifact.manifest.cursor)
        assert not artifact.path.exists()
        assert self.revision_of(tmp_path / "target") == 1

    def test_a_newer_artifact_takes_the_place_of_the_older(self, tmp_path: Path) -> None:
        """From its staging path, to which a download would have written it."""
        importer = self.importer(tmp_path / "target")
        importer.import_artifact(self._export(tmp_path, 1))
        newer = self._exporter_at(tmp_path, 2).export(importer.staging("sha256:" + "a" * 64)).artifact
        result = importer.import_artifact(newer, consume=True)
        assert result.status == "imported"
        assert importer.cursor() == newer.manifest.cursor
        assert self.revision_of(tmp_path / "target") == 2
        assert not newer.path.exists()

    def test_a_published_artifact_is_brought_to_life(self, tmp_path: Path) -> None:
        """Over a store and the staging path, in which nothing remains."""
        artifact, importer = self._export(tmp_path, 1), self.importer(tmp_path / "target")
        store = LocalStore(tmp_path / "store")
        upload(store, "key", artifact)
        landed = importer.staging(artifact.digest)
        result = importer.import_artifact(Artifact.open(download(store, "key", landed).path), consume=True, key="key")
        assert result.cursor == importer.cursor() == artifact.manifest.cursor
        assert self.revision_of(tmp_path / "target") == 1
        assert list(landed.parent.iterdir()) == []

    def test_damage_is_found_before_anything_changes(self, tmp_path: Path) -> None:
        """The transport is not trusted: a flipped bit is refused, and the target stays as it was."""
        importer = self.importer(tmp_path / "target")
        importer.import_artifact(self._export(tmp_path, 1))
        landed = tmp_path / "landed"
        newer = self._export(tmp_path, 2)
        shutil.copytree(newer.path, landed)
        member = next(path for path in sorted((landed / "data").rglob("*")) if path.is_file() and path.stat().st_size)
        content = bytearray(member.read_bytes())
        content[len(content) // 2] ^= 1
        member.write_bytes(content)
        with raises(IntegrityError):
            importer.import_artifact(Artifact.open(landed), consume=True)
        assert self.revision_of(tmp_path / "target") == 1

    def test_an_artifact_of_another_backend_is_refused(self, tmp_path: Path) -> None:
        """Only the importer of its backend can import it."""
        artifact, importer = self._export(tmp_path, 1), self.importer(tmp_path / "target")
        manifest = artifact.manifest.model_copy(update={"backend": "somebody-elses"})
        (artifact.path / "MANIFEST.json").write_bytes(manifest.encode())
        with raises(RefusedError):
            importer.import_artifact(Artifact.open(artifact.path))
        assert importer.current() is None

    def _exporter_at(self, tmp_path: Path, revision: int) -> Exporter:
        """An exporter of the source at a revision."""
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        mark = tmp_path / "source.revision"
        for each in range(int(mark.read_text()) + 1 if mark.exists() else 1, revision + 1):
            self.write_source(source, each)
            mark.write_text(str(each))
        return self.exporter(source)

    def _export(self, tmp_path: Path, revision: int, name: str = "artifact") -> Artifact:
        return self._exporter_at(tmp_path, revision).export(tmp_path / f"{name}-{revision}").artifact
