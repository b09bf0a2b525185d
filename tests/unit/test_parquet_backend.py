"""Parquet datasets: what their footers say is checked at both ends."""

# pyright: basic
# pyarrow has no type stubs.

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blobflow import Artifact, export_artifact, import_artifact
from blobflow.artifact.artifact import write_artifact
from blobflow.backends import ParquetExporter, ParquetImporter
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


def test_how_values_are_encoded_is_no_part_of_the_schema(dataset: Path, tmp_path: Path):
    """Pandas writes categories, polars large strings, Spark lists of its own naming: one dataset, whoever appends."""
    strings = pa.array(["y"])
    variants = {
        "plain": strings,
        "categories": strings.dictionary_encode(),
        "large": strings.cast(pa.large_string()),
    }
    for name, column in variants.items():
        write_parquet(dataset / f"{name}.parquet", {"id": [1], "name": column})
    with suppress(pa.ArrowNotImplementedError):  # of string views, pyarrow 20 writes none, but may find some
        write_parquet(dataset / "view.parquet", {"id": [1], "name": strings.cast(pa.string_view())})
        variants["view"] = strings
    if "view" not in variants:
        (dataset / "view.parquet").unlink(missing_ok=True)  # what was begun of it
    artifact = exported(dataset, tmp_path / "artifact")
    assert isinstance(artifact.manifest.cursor, dict)
    assert artifact.manifest.cursor["rows"] == 5 + len(variants)
    import_artifact(artifact, ParquetImporter(path=tmp_path / "mirror"))

    nested = tmp_path / "nested"
    nested.mkdir()
    values = [[{"a": "x", "b": {"k": b"v"}}]]
    for name, text, data, listed in (
        ("plain", pa.string(), pa.binary(), pa.list_),
        ("large", pa.large_string(), pa.large_binary(), pa.large_list),
        ("dictionary", pa.dictionary(pa.int8(), pa.string()), pa.binary(), pa.list_),
    ):
        inner = pa.struct([pa.field("a", text, nullable=name == "plain"), pa.field("b", pa.map_(pa.string(), data))])
        column = pa.array([[{"a": "x", "b": [("k", b"v")]}]], listed(pa.field(name, inner)))
        write_parquet(nested / f"{name}.parquet", {"values": column})
    assert exported(nested, tmp_path / "other").manifest.members == len(values) * 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.string(), pa.binary()),
        (pa.list_(pa.string()), pa.list_(pa.int64())),
        (pa.struct([("a", pa.string())]), pa.struct([("b", pa.string())])),
        (pa.timestamp("us"), pa.timestamp("us", "UTC")),
        (pa.decimal128(5, 2), pa.decimal128(6, 2)),
    ],
    ids=str,
)
def test_other_values_are_another_schema(one: pa.DataType, other: pa.DataType, tmp_path: Path):
    """What readers would get to see is compared, at whatever depth."""
    (tmp_path / "dataset").mkdir()
    for i, kind in enumerate((one, other)):
        write_parquet(tmp_path / "dataset" / f"{i}.parquet", {"a": pa.array([None], kind)})
    with pytest.raises(UnsupportedSource, match=r"'1\.parquet' cannot be exported: it has another schema"):
        exported(tmp_path / "dataset", tmp_path / "artifact")


def test_directories_of_the_writers_are_left_out_and_named(dataset: Path, tmp_path: Path):
    """What Spark did not finish and what Delta keeps beside it is not data; a partition may begin with `_`."""
    for name in ("_temporary/0/part-9.parquet", "_delta_log/0.json", "year=2026/.ipynb_checkpoints/x.parquet"):
        (dataset / name).parent.mkdir(parents=True)
        (dataset / name).write_bytes(b"not whole")
    (dataset / "_region=eu").mkdir()
    write_parquet(dataset / "_region=eu" / "part-0.parquet", {"id": [9], "name": ["z"]})
    result = export_artifact(ParquetExporter(path=dataset), tmp_path / "artifact")
    assert result.left_out == ("_delta_log/", "_temporary/", "year=2026/.ipynb_checkpoints/")
    assert isinstance(result.artifact.manifest.cursor, dict)
    assert (result.artifact.manifest.cursor["rows"], result.artifact.manifest.cursor["files"]) == (6, 3)
    import_artifact(result.artifact, ParquetImporter(path=tmp_path / "mirror"))
    assert not list((tmp_path / "mirror").glob("current/_delta_log"))


def test_an_encrypted_footer_needs_a_key_and_no_repair(dataset: Path, tmp_path: Path):
    """The message says what it is, and the remedy works: as a tree of files the dataset travels as it is."""
    import pyarrow.parquet.encryption as encryption

    class Keys(encryption.KmsClient):
        """Keeps keys in the clear."""

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return base64.b64decode(wrapped_key)

    factory = encryption.CryptoFactory(lambda _: Keys())
    configuration = encryption.EncryptionConfiguration(footer_key="footer", column_keys={"data": ["id"]})
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), configuration)
    table = pa.table({"id": [1]})
    with pq.ParquetWriter(dataset / "secret.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    with pytest.raises(UnsupportedSource, match=r"'secret\.parquet' cannot be exported: its footer is enc") as refusal:
        exported(dataset, tmp_path / "artifact")
    assert ("repair" in refusal.value.hint, "backend 'directory'" in refusal.value.hint) == (False, True)
    plain = export_artifact(dataset, tmp_path / "artifact").artifact
    assert "secret.parquet" in plain.index.paths


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
        says = "is not a Parquet file"
    else:
        forged = artifact.path
        cursor = {**artifact.manifest.cursor, "rows": 6} if isinstance(artifact.manifest.cursor, dict) else None
        write_artifact(forged, artifact.index, backend="parquet", cursor=cursor)
        says = "its manifest says"
    with pytest.raises(ArtifactInvalid, match=says):
        import_artifact(Artifact.open(forged), ParquetImporter(path=tmp_path / "mirror"))
    assert not (tmp_path / "mirror" / "current").exists()
