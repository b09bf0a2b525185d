"""Parquet datasets: files of one schema, checked by their footers before they leave and before they are shown."""

# pyright: basic
# pyarrow has no type stubs: under the strict rules every line that touches it would be an error.

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, JsonValue
from typing_extensions import override

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.members import open_regular
from blobflow.backends.directory import DirectoryExporter
from blobflow.backends.files import unsupported
from blobflow.backends.versions import VersionedImporter
from blobflow.errors import LEAVE_IT_OUT, ArtifactInvalid, RefusedError, setting

BACKEND: Final = "parquet"
SUFFIXES: Final = (".parquet", ".parq", ".pq")

_BESIDE: Final = ("_", ".")
"""What names of files begin with that writers of datasets put beside the data: `_SUCCESS`, `_metadata`, `.crc`."""


class _NoFooterError(Exception):
    """The end of a file is no footer of Parquet's."""


class ParquetExporter(DirectoryExporter):
    """Exports a dataset of Parquet files, in one directory or partitioned into many.

    The footer of every file is read. The cursor tells the rows and files of the dataset and the SHA-256 of its schema,
    column by column as `name: type`.
    """

    schemas: Literal["one", "any"] = Field(
        default="one", description="`one`: refuse a file whose columns are not those of the others."
    )

    @property
    @override
    def backend(self) -> str:
        return BACKEND

    @override
    def _cursor(self, root: Path, paths: Iterable[str]) -> JsonValue:
        """Read the footers.

        Raises:
            UnsupportedSource: naming the file that is no Parquet, or has other columns.
        """
        rows = files = 0
        schemas: dict[str, str] = {}
        for path in paths:
            if not _is_data(path):
                continue
            if not path.endswith(SUFFIXES):
                raise unsupported(path, "it is not a Parquet file", LEAVE_IT_OUT)
            try:
                count, schema = _footer(root, path)
            except _NoFooterError as error:
                raise unsupported(
                    path, f"its footer cannot be read: {error}", f"repair it, or {LEAVE_IT_OUT}"
                ) from error
            first = next(iter(schemas), schema)
            if self.schemas == "one" and schema != first:
                column = next(iter(set(schema.splitlines()) ^ set(first.splitlines())), "the order of the columns")
                raise unsupported(
                    path,
                    f"it has another schema than {schemas[first]!r}: {column}",
                    f"accept it with {setting('schemas', 'any')}, or {LEAVE_IT_OUT}",
                )
            schemas.setdefault(schema, path)
            rows, files = rows + count, files + 1
        return {"rows": rows, "files": files, "schema_sha256": _fingerprint(schemas)}


class ParquetImporter(VersionedImporter):
    """Keeps a mirror of a dataset: `<path>/current` always shows all files of one snapshot, and no other.

    Before they are shown, every footer is read, and rows, files and schema are compared with what the exporter saw.
    """

    schema_sha256: str | None = Field(
        default=None, description="Refuse datasets of another schema, as `schema_sha256` of the cursor; None: take any."
    )

    @property
    @override
    def backend(self) -> str:
        return BACKEND

    @override
    def prepare(self, artifact: Artifact) -> None:
        cursor = artifact.manifest.cursor
        told = cursor.get("schema_sha256") if isinstance(cursor, dict) else None
        if self.schema_sha256 is not None and told != self.schema_sha256:
            raise RefusedError(
                f"{artifact!r} has the schema {told}, this mirror takes {self.schema_sha256}",
                hint="migrate the readers of the mirror first, then change schema_sha256",
                expected=self.schema_sha256,
                actual=told,
            )

    @override
    def verify_open(self, artifact: Artifact) -> None:
        rows = files = 0
        schemas: set[str] = set()
        for path in filter(_is_data, artifact.index.paths):
            try:
                count, schema = _footer(artifact.data, path)
            except _NoFooterError as error:
                raise ArtifactInvalid(
                    f"member {path!r} of {artifact!r} is no Parquet file: {error}", key=path
                ) from error
            schemas.add(schema)
            rows, files = rows + count, files + 1
        found = {"rows": rows, "files": files, "schema_sha256": _fingerprint(schemas)}
        if artifact.manifest.cursor != found:
            raise ArtifactInvalid(
                f"{artifact!r} holds {found}, its manifest says {artifact.manifest.cursor}",
                hint="another program made it: export the dataset again",
            )


def _is_data(path: str) -> bool:
    """Whether a member belongs to the dataset itself, and is no directory."""
    return not path.endswith("/") and not path.rpartition("/")[2].startswith(_BESIDE)


def _footer(root: Path, path: str) -> tuple[int, str]:
    """The number of rows of a file, and its columns, one a line."""
    # Not at the top: pyarrow costs 0.3 s, and a pipeline is defined more often than it is run.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(root, path) as file, pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            return parquet.metadata.num_rows, "".join(f"{field.name}: {field.type}\n" for field in schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _NoFooterError(str(error)) from error


def _fingerprint(schemas: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(schemas)).encode()).hexdigest()
