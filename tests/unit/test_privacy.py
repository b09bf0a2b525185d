"""Private rows: what a manifest says of the members that only their owner may read."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from blobflow.artifact.artifact import checked_layout, write_artifact
from blobflow.artifact.index import Index, Member
from blobflow.artifact.index_parquet import decode_index
from blobflow.artifact.manifest import Manifest, is_private
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.privacy import MAX_PRIVATE_CHARS, PrivateRows, directory_is_private, encode, file_is_private
from blobflow.checksum import crc32c, sha256
from blobflow.coordination.rounds import content_key
from blobflow.errors import ArtifactInvalid
from blobflow.layers.format import layer_digest


@given(st.lists(st.booleans(), max_size=300))
def test_exactly_the_private_rows_are_named(flags: list[bool]) -> None:
    """Every set of rows comes back from its ranges, and the ranges are what a manifest takes."""
    rows = PrivateRows(encode(flags))
    assert [row in rows for row in range(len(flags))] == flags
    assert (-1 in rows, len(flags) in rows) == (False, False)
    assert bool(rows) == any(flags)
    assert rows.covers(len(flags)) == (bool(flags) and all(flags))


def test_too_many_ranges_name_every_row() -> None:
    """Where naming the private rows takes more than a manifest has room for, all are private: never fewer."""
    flags = [row % 2 == 1 for row in range(40_000)]
    ranges = encode(flags)
    assert ranges == "0-39999"
    assert len(encode(flags[:10_000]) or "") < MAX_PRIVATE_CHARS


def test_a_file_is_public_only_if_everybody_may_read_it() -> None:
    """Of all modes, those are public that let group and others read; of directories, those that let them enter."""
    files = [mode for mode in range(0o1000) if not file_is_private(0o100000 | mode)]
    assert files == [mode for mode in range(0o1000) if mode & 0o044 == 0o044]
    directories = [mode for mode in range(0o1000) if not directory_is_private(0o040000 | mode)]
    assert directories == [mode for mode in range(0o1000) if mode & 0o055 == 0o055]


def manifest_of(path: Path, private: str | None) -> Manifest:
    index = Index()
    for name in ("a", "b"):
        index.append(Member(name, 5, 0o644, 0, sha256(b"hello"), crc32c(b"hello")))
    path.mkdir()
    made = datetime(2026, 11, 20, tzinfo=timezone.utc)
    return write_artifact(path, index, backend="directory", created_at=made, private=private).manifest


def test_a_public_artifact_is_what_it_was(tmp_path: Path) -> None:
    """Without private members a manifest has the bytes that earlier versions give it."""
    manifest = manifest_of(tmp_path / "a", None)
    assert "private" not in json.loads(manifest.encode())
    assert Manifest.parse(manifest.encode()) == manifest
    assert not is_private(manifest.encode())


def test_private_members_are_content(tmp_path: Path) -> None:
    """Equal files of which others are private are another artifact: another content, key and layer."""
    public, private = manifest_of(tmp_path / "a", None), manifest_of(tmp_path / "b", "1")
    assert is_private(private.encode())
    assert private.body == public.body
    assert not private.same_content(public)
    assert not private.same_body(public)
    assert layer_digest(private) != layer_digest(public)

    class Named:
        def __init__(self, manifest: Manifest) -> None:
            self.manifest = manifest

    names = [content_key("orders", Named(manifest)) for manifest in (public, private)]  # pyright: ignore[reportArgumentType]
    assert names[1].startswith(names[0].removesuffix(".tar") + "-")


@pytest.mark.parametrize(
    "ranges", ["", "x", "3-1", "1,1", "2,1", "0-3,2", "-1", "1-", "0," * 40_000 + "0", "\u0661", "0\n", 7]
)
def test_ranges_that_make_no_sense_are_refused(tmp_path: Path, ranges: object) -> None:
    """A manifest whose private rows are out of order, too many or no numbers is not read."""
    document = json.loads(manifest_of(tmp_path / "a", "1").encode())
    document["private"] = ranges
    with pytest.raises(ArtifactInvalid, match="private"):
        Manifest.parse(json.dumps(document).encode())


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """Manifest and index contradict each other where a private row is not in the index."""
    manifest = manifest_of(tmp_path / "a", "1-2")
    index = decode_index((tmp_path / "a/INDEX.parquet").read_bytes(), members=2)
    with pytest.raises(ArtifactInvalid, match="private is 1-2"):
        checked_layout(ManifestFile.of(manifest), index)
