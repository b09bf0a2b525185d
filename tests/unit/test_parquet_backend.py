"""Parquet datasets: what their footers say is checked at both ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from blobflow import Artifact, ParquetExporter, ParquetImporter, export_artifact, import_artifact
from blobflow.artifact.artifact import write_artifact
from blobflow.errors import ArtifactInvalid, RefusedError, UnsupportedSource
from tests.kit import read_parquet, write_parquet


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two partitions with five rows, and what writers put beside them."""
    for year, rows in (("2025", [1, 2]), ("2026", [3, 4, 5])):
        (tmp_path / "events" / f"year={year}").mkdir(parents=True)
        write_parquet(tmp_path / "events" / f"year={year}" / "part-0.parquet", {"id": rows, "name": ["x"] * len(rows)})
    (tmp_path / "events" / "_SUCCESS").touch()
    (tmp_path / "events" / ".part-0.parquet.crc").write_bytes(b"crc")
    return tmp_path / "events"


def exported(dataset: Path, dest: Path, **options: object) -> Artifact:
    return export_artifact(ParquetExporter.model_validate({"path": dataset, **options}), dest).artifact


def test_the_cursor_tells_rows_files_and_schema(dataset: Path, tmp_path: Path):
    """Of the data alone; what lies beside it goes along."""
    artifact = exported(dataset, tmp_path / "artifact")
    cursor = artifact.manifest.cursor
    assert isinstance(cursor, dict)
    assert (artifact.manifest.backend, cursor["rows"], cursor["files"]) == ("parquet", 5, 2)
    result = import_artifact(artifact, ParquetImporter(path=tmp_path / "mirror"))
    assert result.cursor == cursor
    assert read_parquet(tmp_path / "mirror" / "current" / "year=2026" / "part-0.parquet", "id") == [3, 4, 5]
    assert (tmp_path / "mirror" / "current" / "_SUCCESS").exists()


def test_what_is_no_parquet_is_refused_by_name(dataset: Path, tmp_path: Path):
    """Another kind of file, and one whose writer died before its footer; nothing is left of the export."""
    (dataset / "notes.txt").write_text("hello")
    with pytest.raises(UnsupportedSource, match=r"'notes\.txt' cannot be exported: it is not a Parquet file"):
        exported(dataset, tmp_path / "artifact")
    torn = dataset / "year=2026" / "part-1.parquet"
    torn.write_bytes(b"PAR1 and then the machine went down")
    with pytest.raises(UnsupportedSource, match=r"part-1\.parquet' cannot be exported: its footer cannot be read"):
        exported(dataset, tmp_path / "artifact", exclude=("notes.txt",))
    assert not (tmp_path / "artifact").exists()
    assert exported(dataset, tmp_path / "artifact", exclude=("notes.txt", "part-1.parquet")).manifest.members == 4


def test_files_of_one_dataset_have_one_schema(dataset: Path, tmp_path: Path):
    """The first file with other columns is named, with the column; unless they may differ."""
    write_parquet(dataset / "year=2026" / "part-1.parquet", {"id": [6.5], "name": ["y"]})
    with pytest.raises(
        UnsupportedSource, match=r"part-1\.parquet' .* another schema than 'year=2025/.*: id: "
    ) as refusal:
        exported(dataset, tmp_path / "artifact")
    assert (refusal.value.path, 'schemas="any"' in refusal.value.hint) == ("year=2026/part-1.parquet", True)
    one = exported(dataset, tmp_path / "one", exclude=("part-1.parquet",)).manifest.cursor
    two = exported(dataset, tmp_path / "two", schemas="any").manifest.cursor
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert (two["rows"], two["schema_sha256"] != one["schema_sha256"]) == (6, True)


def test_a_mirror_may_insist_on_a_schema(dataset: Path, tmp_path: Path):
    """Readers that know certain columns do not get others one night."""
    first = exported(dataset, tmp_path / "first")
    assert isinstance(first.manifest.cursor, dict)
    importer = ParquetImporter(path=tmp_path / "mirror", schema_sha256=str(first.manifest.cursor["schema_sha256"]))
    import_artifact(first, importer)
    other = tmp_path / "other"
    other.mkdir()
    write_parquet(other / "part-0.parquet", {"id": [1]})
    with pytest.raises(RefusedError, match="has the schema"):
        import_artifact(exported(other, tmp_path / "second"), importer)
    alive = importer.current()
    assert alive is not None
    assert alive.digest == first.digest


@pytest.mark.parametrize("what", ["no footer", "other rows"])
def test_what_is_shown_can_be_read(dataset: Path, tmp_path: Path, what: str):
    """Every byte is what the index says, and yet it is no dataset, or not the one of the cursor: it is not shown."""
    artifact = exported(dataset, tmp_path / "artifact", mode="copy")
    if what == "no footer":
        forged = tmp_path / "forged"
        (forged / "data").mkdir(parents=True)
        (forged / "data" / "part-0.parquet").write_bytes(b"no parquet")
        plain = export_artifact(forged / "data", tmp_path / "plain", mode="copy").artifact
        forged = plain.path
        write_artifact(forged, plain.index, backend="parquet", cursor=artifact.manifest.cursor)
        says = "is no Parquet file"
    else:
        forged = artifact.path
        cursor = {**artifact.manifest.cursor, "rows": 6} if isinstance(artifact.manifest.cursor, dict) else None
        write_artifact(forged, artifact.index, backend="parquet", cursor=cursor)
        says = "its manifest says"
    with pytest.raises(ArtifactInvalid, match=says):
        import_artifact(Artifact.open(forged), ParquetImporter(path=tmp_path / "mirror"))
    assert not (tmp_path / "mirror" / "current").exists()
