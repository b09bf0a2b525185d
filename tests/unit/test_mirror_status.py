"""What a mirror says of itself, and whether it is behind."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

from blobflow import Artifact, DirectoryImporter, download, import_artifact, move_ref, upload
from blobflow.artifact.artifact import write_artifact
from blobflow.backends import AppendLog, AppendLogExporter, AppendLogImporter, mirror_history as history_module
from blobflow.backends.mirror_history import HISTORY_NAME
from blobflow.errors import NotFoundError, RefusedError
from blobflow.mirror import mirror_history, mirror_status
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore
from tests.kit import SERIAL, Killed, artifact_of, dies_at, local_store

REF = "orders/latest"


def published(store: LocalStore, artifact: Artifact, key: str) -> Artifact:
    """The artifact, uploaded and named by the ref."""
    upload(store, key, artifact)
    move_ref(store, REF, key, artifact.digest)
    return artifact


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return local_store(tmp_path)


@pytest.fixture
def importer(tmp_path: Path) -> DirectoryImporter:
    return DirectoryImporter(path=tmp_path / "mirror")


@pytest.mark.seed("W2.9")
def test_a_mirror_follows_after_its_import_and_not_before(
    importer: DirectoryImporter, store: LocalStore, tmp_path: Path
):
    """It is empty, then something is arriving, then it follows."""
    artifact = published(store, artifact_of(tmp_path), "orders/1")
    importer.path.mkdir()
    empty = mirror_status(importer.path, store, REF)
    assert (empty.state, empty.behind, empty.offered_key, str(empty)) == (
        "empty",
        True,
        "orders/1",
        "Empty, behind orders/1",
    )

    landed = importer.staging(artifact.digest)
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_at(6)), "orders/1", landed, profile=SERIAL)
    arriving = mirror_status(importer.path, store, REF)
    assert (arriving.state, arriving.behind, arriving.bytes_total) == ("bootstrapping", True, artifact.manifest.bytes)
    assert arriving.bytes_incoming > 0
    assert str(arriving).startswith(f"Bootstrapping{{{arriving.bytes_incoming}, {artifact.manifest.bytes}}}")

    download(store, "orders/1", landed, profile=SERIAL)
    assert mirror_status(importer.path).state == "bootstrapping"  # it has arrived, and is not shown
    import_artifact(landed, importer, consume=True, key="orders/1")

    status = mirror_status(importer.path, store, REF)
    assert (status.state, status.behind, status.key) == ("following", False, "orders/1")
    assert (status.artifact_digest, status.backend) == (artifact.digest, "directory")
    assert (status.created_at, status.bytes_incoming) == (artifact.manifest.created_at, 0)
    assert str(status) == "Following{None}"


def test_any_process_may_ask(importer: DirectoryImporter, store: LocalStore, tmp_path: Path):
    """The directory says it all, in words that fit into JSON."""
    artifact = published(store, artifact_of(tmp_path), "orders/1")
    import_artifact(artifact, importer, key="orders/1")
    ask = "import json, sys, blobflow; print(json.dumps(blobflow.mirror_status(sys.argv[1]).to_dict()))"
    answer = subprocess.run([sys.executable, "-c", ask, importer.path], capture_output=True, check=True)
    document = json.loads(answer.stdout)
    assert document == mirror_status(importer.path).to_dict()
    assert (document["state"], document["key"], document["behind"]) == ("following", "orders/1", None)
    assert datetime.fromisoformat(document["imported_at"]) <= datetime.now(timezone.utc)


def test_a_moved_ref_is_seen(importer: DirectoryImporter, store: LocalStore, tmp_path: Path):
    """The mirror is behind until what the ref names is imported."""
    import_artifact(published(store, artifact_of(tmp_path / "1", {"a": "1"}), "orders/1"), importer)
    assert mirror_status(importer.path, store, REF).behind is False
    newer = published(store, artifact_of(tmp_path / "2", {"a": "2"}), "orders/2")
    status = mirror_status(importer.path, store, REF)
    assert (status.behind, status.offered_key, status.offered_digest) == (True, "orders/2", newer.digest)
    import_artifact(newer, importer)
    status = mirror_status(importer.path, store, REF)
    assert (status.behind, status.key) == (False, "orders/2")  # nobody told the import, the ref did


def test_a_newer_manifest_under_the_same_key_is_seen(importer: DirectoryImporter, store: LocalStore, tmp_path: Path):
    """Without a ref, the key that it was imported from is looked at again."""
    first = artifact_of(tmp_path / "1", {"a": "1"})
    upload(store, "orders", first)
    import_artifact(first, importer, key="orders")
    assert mirror_status(importer.path, store).behind is False
    upload(store, "orders", artifact_of(tmp_path / "2", {"a": "2"}), overwrite=True)
    assert mirror_status(importer.path, store).behind is True


def test_nothing_offered_is_no_comparison(importer: DirectoryImporter, store: LocalStore, tmp_path: Path):
    """An absent ref, an absent artifact and an unknown key: nobody can say that the mirror is behind."""
    import_artifact(artifact_of(tmp_path), importer)
    for ref in (REF, None):
        status = mirror_status(importer.path, store, ref)
        assert (status.state, status.behind, status.offered_key) == ("following", None, None)
    move_ref(store, REF, "orders/gone", "sha256:" + "0" * 64)
    assert mirror_status(importer.path, store, REF).behind is None


def test_a_ref_whose_artifact_was_replaced_is_still_newer(
    importer: DirectoryImporter, store: LocalStore, tmp_path: Path
):
    """What the ref names is not what is shown; how large it was nobody can say any more."""
    import_artifact(artifact_of(tmp_path / "1", {"a": "1"}), importer)
    upload(store, "orders/2", artifact_of(tmp_path / "2", {"a": "2"}))
    move_ref(store, REF, "orders/2", "sha256:" + "0" * 64)
    status = mirror_status(importer.path, store, REF)
    assert (status.behind, status.offered_digest, status.bytes_total) == (True, "sha256:" + "0" * 64, None)


def test_a_typing_error_in_the_path_is_told(tmp_path: Path):
    """It is not an empty mirror."""
    with pytest.raises(NotFoundError, match="no mirror"):
        mirror_status(tmp_path / "typo")


@pytest.mark.seed("1.24")
def test_a_log_that_went_on_by_itself_is_not_behind(store: LocalStore, tmp_path: Path):
    """Its cursor is that of its last record: an artifact that reaches less far has nothing new for it."""
    source, importer = tmp_path / "log", AppendLogImporter(path=tmp_path / "mirror")
    with AppendLog(source) as log:
        log.append("a", 1)
        artifact = AppendLogExporter(path=source).export(tmp_path / "1").artifact
        import_artifact(published(store, artifact, "orders/1"), importer)
        with importer.open() as mirror:
            mirror.append("a", 2)
            mirror.append("a", 3)
        for cursor, behind in ((2, False), (3, False), (4, True)):
            log.append("a", cursor)
            newer = AppendLogExporter(path=source).export(tmp_path / str(cursor)).artifact
            published(store, newer, f"orders/{cursor}")
            status = mirror_status(importer.path, store, REF)
            assert (status.cursor, status.behind) == (3, behind)
            assert status.artifact_digest == artifact.digest


def test_an_artifact_of_an_unknown_backend_says_its_own_cursor(importer: DirectoryImporter, tmp_path: Path):
    """A mirror that somebody else's importer made is shown as far as it can be."""
    made = artifact_of(tmp_path)
    version = importer.path / "versions" / "v"
    version.mkdir(parents=True)
    (version / "data").symlink_to(made.data)
    write_artifact(version, made.index, backend="somebody-elses", cursor={"at": 1})
    (importer.path / "current").symlink_to("versions/v")
    assert mirror_status(importer.path).state == "empty"  # not where versions are
    (importer.path / "current").unlink()
    (version / "data").unlink()
    (version / "data").mkdir()
    (importer.path / "current").symlink_to("versions/v/data")
    status = mirror_status(importer.path)
    assert (status.state, status.backend, status.cursor) == ("following", "somebody-elses", {"at": 1})
    assert status.imported_at is not None


class TestHistory:
    """The cursors that a mirror has had."""

    def test_keeps_every_import_in_order(self, importer: DirectoryImporter, tmp_path: Path):
        """With digest, cursor, key and times; one that changed nothing is not one."""
        artifacts = [artifact_of(tmp_path / str(number), {"a": str(number)}) for number in range(3)]
        for number in (0, 0, 1, 2, 0):
            import_artifact(artifacts[number], importer, key=f"orders/{number}")
        entries = mirror_history(importer.path)
        assert [entry.key for entry in entries] == ["orders/0", "orders/1", "orders/2", "orders/0"]
        assert [entry.artifact_digest for entry in entries] == [artifacts[n].digest for n in (0, 1, 2, 0)]
        assert [entry.imported_at for entry in entries] == sorted(entry.imported_at for entry in entries)
        assert mirror_status(importer.path).imported_at == entries[-1].imported_at

    def test_survives_a_torn_line(self, importer: DirectoryImporter, tmp_path: Path):
        """What a kill cut off does not swallow the next import."""
        import_artifact(artifact_of(tmp_path / "1", {"a": "1"}), importer)
        with open(importer.path / HISTORY_NAME, "ab") as file:
            file.write(b'{"imported_at": "2026-')
        import_artifact(artifact_of(tmp_path / "2", {"a": "2"}), importer)
        assert len(mirror_history(importer.path)) == 2

    def test_a_kill_before_it_was_written_is_made_good(self, importer: DirectoryImporter, tmp_path: Path):
        """The next import of the same artifact finds it alive, and writes the line that is missing."""
        artifact = artifact_of(tmp_path)
        import_artifact(artifact, importer)
        (importer.path / HISTORY_NAME).unlink()
        assert mirror_status(importer.path).imported_at is not None
        assert import_artifact(artifact, importer).status == "unchanged"
        assert [entry.artifact_digest for entry in mirror_history(importer.path)] == [artifact.digest]

    def test_is_bounded(self, importer: DirectoryImporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The oldest entries go, the newest never."""
        monkeypatch.setattr(history_module, "_MAX_BYTES", 2000)
        artifacts = [artifact_of(tmp_path / str(number), {"a": str(number)}) for number in range(2)]
        for number in range(20):
            import_artifact(artifacts[number % 2], importer, key=str(number))
            assert (importer.path / HISTORY_NAME).stat().st_size <= 2000
            assert mirror_history(importer.path)[-1].key == str(number)
        keys = [int(entry.key or 0) for entry in mirror_history(importer.path)]
        assert keys == list(range(keys[0], 20))
        assert len(keys) >= 2

    def test_a_failed_import_is_none(self, importer: DirectoryImporter, tmp_path: Path):
        """Only what was shown is remembered."""
        artifact = artifact_of(tmp_path)
        manifest = artifact.manifest.model_copy(update={"backend": "another"})
        (artifact.path / "MANIFEST.json").write_bytes(manifest.encode())
        with pytest.raises(RefusedError):
            import_artifact(artifact.path, importer)
        assert mirror_history(importer.path) == []
