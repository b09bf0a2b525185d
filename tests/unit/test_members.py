"""Verifying a local artifact, member by member."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blobflow import Artifact
from blobflow.artifact.members import open_regular, verify_members
from blobflow.errors import DigestMismatch, SourceChanged
from tests.kit import artifact_of


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path, mode="copy")


def test_a_whole_artifact_passes(artifact: Artifact):
    """Progress ends with everything."""
    told: list[tuple[int, int]] = []
    verify_members(artifact, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (artifact.manifest.bytes, artifact.manifest.bytes)


@pytest.mark.parametrize("content", [b"Hello\n", b"hello", b"hello\nmore", b""])
def test_a_member_that_differs_is_named(content: bytes, artifact: Artifact):
    """Other bytes, fewer, more, none."""
    (artifact.data / "nested" / "deep" / "file.txt").write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"member 'nested/deep/file\.txt' has SHA-256"):
        verify_members(artifact)


def test_a_missing_member_is_named(artifact: Artifact):
    """A file, and an empty directory."""
    (artifact.data / "empty dir").rmdir()
    with pytest.raises(SourceChanged, match=r"directory 'empty dir/' of .* is missing"):
        verify_members(artifact)
    (artifact.data / "empty dir").mkdir()
    (artifact.data / "big.bin").unlink()
    with pytest.raises(SourceChanged, match=r"'big\.bin' cannot be read"):
        verify_members(artifact)


def test_a_pipe_or_a_directory_is_no_file(tmp_path: Path):
    """Opening does not wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    for name in ("pipe", "dir"):
        with pytest.raises(SourceChanged, match="no longer a regular file"):
            open_regular(tmp_path, name)
