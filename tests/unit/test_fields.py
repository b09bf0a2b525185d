"""A field that there is not is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from blobflow import ChunkProfile, DirectoryExporter, DirectoryImporter
from blobflow.backends import AppendLogExporter, ParquetImporter, SqliteExporter
from blobflow.errors import UsageError
from blobflow.fields import KnownFields

SECRET = "not-for-anybody"


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        (DirectoryExporter, {"path": "/data", "exlude": [SECRET]}, "exclude"),
        (SqliteExporter, {"path": "/data", "cursor_qery": SECRET}, "cursor_query"),
        (AppendLogExporter, {"pth": SECRET}, "path"),
        (DirectoryImporter, {"path": "/data", "keep_version": SECRET}, "keep_versions"),
        (ParquetImporter, {"path": "/data", "schema": SECRET}, "schema_sha256"),
        (ChunkProfile, {"chunksize": SECRET}, "chunk_size"),
    ],
)
def test_an_unknown_field_is_refused_with_the_one_that_was_meant(
    kind: type[KnownFields], given: dict[str, Any], meant: str
):
    """Exporters, importers and profiles name the field and the nearest one that they have, and show no value."""
    for make in (lambda: kind(**given), lambda: kind.model_validate(given)):
        with pytest.raises(UsageError) as refusal:
            make()
        (unknown,) = given.keys() - kind.model_fields.keys()
        assert refusal.value.message == f"{kind.__name__} has no field {unknown!r}: did you mean {meant!r}?"
        assert SECRET not in repr(refusal.value.to_dict())


def test_where_nothing_is_near_all_are_named():
    """A reader sees what there is."""
    with pytest.raises(UsageError, match=r"has no field 'x': it has checkpoint_interval, chunk_size, "):
        ChunkProfile(x=1)  # pyright: ignore[reportCallIssue]
