"""Artifacts on local disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blobflow import Artifact
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.errors import ArtifactInvalid, ArtifactNotFound, ChecksumMismatch, DigestMismatch
from tests.kit import artifact_of


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path)


def test_opening_reads_the_manifest_only(artifact: Artifact):
    """An artifact opens without its index, which may be large."""
    (artifact.path / "INDEX.parquet").rename(artifact.path / "moved")
    opened = Artifact.open(artifact.path)
    assert opened.digest == artifact.digest
    assert repr(opened) == f"<Artifact {artifact.digest[:19]} 6 members in {artifact.path}>"
    with pytest.raises(ArtifactInvalid, match=r"INDEX\.parquet is missing"):
        _ = opened.index


def test_what_is_no_artifact_is_named(tmp_path: Path):
    """A directory, a file, nothing: each is told apart from a damaged artifact."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(ArtifactNotFound, match="is not a complete artifact") as refusal:
            Artifact.open(path)
        assert "blobflow export" in refusal.value.hint
        assert not Artifact.is_artifact(path)


def test_an_export_that_did_not_finish_is_no_artifact(artifact: Artifact):
    """The manifest is written last."""
    assert Artifact.is_artifact(artifact.path)
    (artifact.path / "MANIFEST.json").unlink()
    assert not Artifact.is_artifact(artifact.path)
    with pytest.raises(ArtifactNotFound):
        Artifact.open(artifact.path)


def test_a_damaged_index_is_refused(artifact: Artifact):
    """The manifest holds its SHA-256 and its CRC32C."""
    path = artifact.path / "INDEX.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(DigestMismatch, match=r"INDEX\.parquet has SHA-256"):
        _ = Artifact.open(artifact.path).index
    path.write_bytes(data)
    document = json.loads(artifact.manifest_bytes)
    document["index"]["crc32c"] ^= 1
    (artifact.path / "MANIFEST.json").write_text(json.dumps(document))
    with pytest.raises(ChecksumMismatch, match="another CRC32C"):
        _ = Artifact.open(artifact.path).index


def test_a_manifest_can_be_adopted_if_only_its_own_bytes_differ(artifact: Artifact, tmp_path: Path):
    """Another time of export is another artifact of the same body; other content is not."""
    document = json.loads(artifact.manifest_bytes)
    later = json.dumps({**document, "created_at": "2031-01-01T00:00:00Z"}).encode()
    adopted = artifact.adopt(ManifestFile.parse(later))
    assert adopted.manifest_bytes == later
    assert adopted.index is artifact.index
    assert adopted.payload_size == adopted.layout.size
    with pytest.raises(ArtifactInvalid, match="describe different payloads"):
        artifact.adopt(ManifestFile.parse(json.dumps({**document, "content_digest": "sha256:" + "0" * 64}).encode()))
