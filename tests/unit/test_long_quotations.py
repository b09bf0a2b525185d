"""An error shows at most 200 characters of a name, however long it is; a program gets the whole of it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from blobflow import Artifact, DirectoryExporter, download, export_artifact, upload, verify
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.members import verify_members
from blobflow.backends import AppendLogImporter, ParquetExporter, ParquetImporter, SqliteImporter
from blobflow.dagster.failures import error_metadata
from blobflow.errors import MAX_QUOTED, BlobflowError, DigestMismatch, InvalidKey, reading, setting, storing, writing
from blobflow.trees import Cursor, Opened, open_below
from tests.kit import SMALL, local_store, noise
from tests.unit.test_deep_trees import plant

KEY = "far.tar"
LONG = ("it's " + "n" * 240 + "/") * 15 + 'the "end" ' + "f" * 200 + ".parquet"
"""About 4,000 characters, of which some look different where they are quoted."""


def shows_little(error: BlobflowError) -> bool:
    """Whether nowhere in what is shown there stands more than `MAX_QUOTED` characters of `LONG`."""
    shown = [error.message, error.hint, str(error)]
    shown += [str(value) for document in (error.to_dict(), error_metadata(error)) for value in document.values()]
    pieces = [LONG[start : start + MAX_QUOTED + 1] for start in range(0, len(LONG) - MAX_QUOTED, 11)]
    return not any(form in text for text in shown for piece in pieces for form in (piece, repr(piece)[1:-1]))


def errors_of(*works: Callable[[], object]) -> list[BlobflowError]:
    """What is raised by those that fail."""
    found: list[BlobflowError] = []
    for work in works:
        try:
            work()
        except BlobflowError as error:
            found.append(error)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return plant(tmp_path / "source", {LONG: noise(9_000)})


@pytest.fixture
def artifact(tmp_path: Path, source: Path) -> Artifact:
    return export_artifact(source, tmp_path / "artifact").artifact


def spoil(root: Path) -> None:
    """Another byte in the member."""
    with open(open_below(root, LONG, os.O_WRONLY), "wb", buffering=0) as file:
        file.write(b"changed")


def remove(root: Path, *, put: Callable[[str, int], None] = lambda *_: None) -> None:
    """The member goes, and something else comes."""
    parent, _, name = LONG.rpartition("/")
    with Opened(root) as descriptor, Cursor(descriptor) as cursor:
        directory = cursor.go(parent)
        os.unlink(name, dir_fd=directory)
        put(name, directory)


@pytest.mark.parametrize("damage", ["content", "header", "cut"])
def test_a_damaged_payload_is_told_in_few_words(tmp_path: Path, artifact: Artifact, damage: str) -> None:
    """By `verify` and by `pull`, whose errors name the member whole to a program alone."""
    store = local_store(tmp_path)
    upload(store, KEY, artifact, profile=SMALL)
    offset, _ = artifact.layout.content_range(2)
    [stored] = [path for path in tmp_path.rglob(KEY) if path.is_file()]
    with open(stored, "r+b") as file:
        if damage == "cut":
            file.truncate(offset + 100)
        else:
            file.seek(offset if damage == "content" else offset - 512)
            file.write(b"\xff")
    for work in (
        lambda: verify(store, KEY, mode="deep", profile=SMALL),
        lambda: download(store, KEY, tmp_path / "dest", profile=SMALL),
    ):
        with pytest.raises(BlobflowError) as refusal:
            work()
        assert shows_little(refusal.value)
        if damage == "content":
            assert isinstance(refusal.value, DigestMismatch)
            assert refusal.value.what == LONG
            assert "n" * 50 in refusal.value.message


@pytest.mark.parametrize("damage", ["content", "gone", "link", "fifo", "directory"])
def test_a_damaged_artifact_is_told_in_few_words(tmp_path: Path, artifact: Artifact, damage: str) -> None:
    """By what verifies it, by what sends it, and by what reads its footers."""
    puts: dict[str, Callable[[str, int], None]] = {
        "gone": lambda *_: None,
        "link": lambda name, directory: os.symlink("/", name, dir_fd=directory),
        "fifo": lambda name, directory: os.mkfifo(name, dir_fd=directory),
        "directory": lambda name, directory: os.mkdir(name, dir_fd=directory),
    }
    root = artifact.data.resolve()
    spoil(root) if damage == "content" else remove(root, put=puts[damage])
    works: list[Callable[[], object]] = [
        lambda: verify_members(artifact),
        lambda: upload(local_store(tmp_path), KEY, artifact, profile=SMALL),
        lambda: ParquetImporter(path=tmp_path / "mirror").verify_open(artifact),
        lambda: DirectoryExporter(path=root).export(tmp_path / "again"),
        lambda: ParquetExporter(path=root).export(tmp_path / "again"),
    ]
    errors = errors_of(*works)
    assert len(errors) >= 3
    assert [error for error in errors if not shows_little(error)] == []


def test_a_source_that_changes_is_told_in_few_words(tmp_path: Path, source: Path) -> None:
    """Reference mode reads it again when it is sent."""
    artifact = DirectoryExporter(path=source, mode="reference").export(tmp_path / "artifact").artifact
    spoil(source)
    with pytest.raises(BlobflowError) as refusal:
        upload(local_store(tmp_path), KEY, artifact, profile=SMALL)
    assert shows_little(refusal.value)


def test_what_a_manifest_says_is_told_in_few_words(tmp_path: Path, artifact: Artifact) -> None:
    """Its backend and its cursor, by whoever expects others."""
    manifest = artifact.manifest.model_copy(update={"backend": LONG, "cursor": {"rows": LONG, "schema_sha256": LONG}})
    strange = Artifact(artifact.path, ManifestFile.of(manifest))
    for importer in (
        ParquetImporter(path=tmp_path / "mirror", schema_sha256="00"),
        SqliteImporter(path=tmp_path / "mirror"),
        AppendLogImporter(path=tmp_path / "mirror"),
    ):
        steps = (importer.import_artifact, importer.prepare, importer.verify_open)
        errors = errors_of(*(partial(step, strange) for step in steps))
        assert len(errors) == 3
        assert [error for error in errors if not shows_little(error)] == []


def test_a_name_is_cut_wherever_it_stands() -> None:
    """As it is or quoted, in the message or in a remedy, as text or as a path; other words and settings stay."""
    message = f"{LONG!r} at {Path(LONG)} is bad: {LONG} {'x' * 500}"
    error = BlobflowError(message, hint=f"leave {LONG} out with {setting('exclude')}", path=LONG)
    assert shows_little(error)
    assert error.message.count("…") == 3
    assert error.message.endswith(f"… {'x' * 500}")
    assert error.hint.endswith("… out with exclude")
    assert error.path == LONG
    assert shows_little(BlobflowError(f"{Path(LONG)} is bad", path=str(Path(LONG))))
    again: BlobflowError = pickle.loads(pickle.dumps(error))
    assert (again.message, again.hint, again.fields) == (error.message, error.hint, error.fields)
    assert BlobflowError("short", path="p" * MAX_QUOTED).to_dict()["path"] == "p" * MAX_QUOTED


def test_errors_of_the_system_quote_little() -> None:
    """Whatever they are about: a source, a destination, a store."""
    for translated in (reading(LONG), writing(Path(LONG)), storing(f"put {LONG!r}", operation="put", key=LONG)):
        with pytest.raises(BlobflowError) as refusal, translated:
            os.stat("/" + "n" * 300)
        assert shows_little(refusal.value)
    with pytest.raises(InvalidKey) as bad:
        local_store(Path("/nowhere")).head(LONG)
    assert shows_little(bad.value)
