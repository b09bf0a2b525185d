"""Parquet datasets: files of one schema; their footers are checked before an export and before an import is shown."""

# pyright: basic
# pyarrow has no type stubs: under the strict rules every line that uses it would be an error.

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, JsonValue
from typing_extensions import override

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.members import open_regular
from blobflow.artifact.pages import check_foreign_footer
from blobflow.backends.directory import DirectoryExporter
from blobflow.backends.files import unsupported
from blobflow.backends.versioned_importer import VersionedImporter
from blobflow.errors import LEAVE_IT_OUT, ArtifactInvalid, RefusedError, setting
from blobflow.untrusted import plain

if TYPE_CHECKING:
    import pyarrow as pa

BACKEND: Final = "parquet"
SUFFIXES: Final = (".parquet", ".parq", ".pq")

_BESIDE: Final = ("_", ".")
"""First characters of file names that writers put beside the data: `_SUCCESS`, `_metadata`, `.crc`."""


_ENCRYPTED: Final = b"PARE"
"""The end of a file whose footer is encrypted: https://parquet.apache.org/docs/file-format/data-pages/encryption/."""


class _NoFooterError(Exception):
    """The file does not end with a Parquet footer, or the footer is encrypted."""

    def __init__(self, reason: str, *, encrypted: bool = False) -> None:
        super().__init__(reason)
        self.encrypted = encrypted


class ParquetExporter(DirectoryExporter):
    """Exports a dataset of Parquet files, in one directory or partitioned into many.

    The footer of every file is read. The cursor has the rows and files of the dataset and the SHA-256 of its schema.
    The schema is one `name: type` for each column; the type is that of the values, whatever their encoding.

    Directories that begin with `_` or `.` belong to the writers and not to the dataset (`_temporary/`, `_delta_log/`).
    They are left out, and named in the result. A directory with a `=` is a partition, whatever it begins with.
    """

    schemas: Literal["one", "any"] = Field(
        default="one", description="`one`: refuse a file whose columns differ from the others'."
    )

    @property
    @override
    def backend(self) -> str:
        return BACKEND

    @override
    def _leaves_out(self, name: str, *, is_directory: bool) -> bool:
        return is_directory and name.startswith(_BESIDE) and "=" not in name

    @override
    def _cursor(self, root: Path, paths: Iterable[str]) -> JsonValue:
        """The cursor, from the footers of all files.

        Raises:
            UnsupportedSource: a file is not Parquet, or has other columns; the message names it.
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
                if error.encrypted:
                    raise unsupported(
                        path,
                        "its footer is encrypted, so that its schema and rows cannot be checked without the key",
                        f"move the dataset as a tree of files (backend 'directory'), or {LEAVE_IT_OUT}",
                    ) from error
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

    Before a snapshot is shown, every footer is read, and rows, files and schema are compared with the exporter's
    cursor.
    """

    schema_sha256: str | None = Field(
        default=None, description="Refuse datasets with another `schema_sha256` in the cursor; None: accept any schema."
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
                f"{artifact!r} has the schema {plain(str(told))}, this mirror takes {self.schema_sha256}",
                hint="migrate the readers of the mirror first, then change schema_sha256",
                expected=self.schema_sha256,
                actual=str(told),
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
                    f"member {path!r} of {artifact!r} is not a Parquet file: {plain(str(error))}", key=path, what=path
                ) from error
            schemas.add(schema)
            rows, files = rows + count, files + 1
        found = {"rows": rows, "files": files, "schema_sha256": _fingerprint(schemas)}
        if artifact.manifest.cursor != found:
            raise ArtifactInvalid(
                f"{artifact!r} holds {found}, its manifest says {plain(str(artifact.manifest.cursor))}",
                hint="another program made it: export the dataset again",
                what="cursor",
            )


def _is_data(path: str) -> bool:
    """Whether a member belongs to the dataset itself, and is not a directory."""
    return not path.endswith("/") and not path.rpartition("/")[2].startswith(_BESIDE)


def _footer(root: Path, path: str) -> tuple[int, str]:
    """The number of rows of a file, and its columns, one per line.

    Raises:
        _NoFooterError: it has no footer, or an encrypted one.
    """
    # pyarrow takes 0.2 s to import, and a pipeline is loaded more often than it is run.
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_regular(root, path) as file:
        try:
            if not _ends_with(file, _ENCRYPTED):
                check_foreign_footer(file)
            with pq.ParquetFile(file) as parquet:
                columns = (f"{field.name}: {_kind(field.type)}\n" for field in parquet.schema_arrow)
                return parquet.metadata.num_rows, "".join(columns)
        except (pa.ArrowException, ArtifactInvalid, OSError, RuntimeError, ValueError) as error:
            raise _NoFooterError(str(error), encrypted=_ends_with(file, _ENCRYPTED)) from error


def _ends_with(file: io.FileIO, end: bytes) -> bool:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), len(end), max(0, size - len(end))) == end


def _kind(kind: pa.DataType) -> str:
    """The type of a column's values, without dictionary encoding and large offsets.

    Parquet has neither type; Arrow stores its schema, which names the original type, in the metadata of the file.
    """
    # As in `_footer`.
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _kind(kind.storage_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return "binary"
    if types.is_map(kind):
        return f"map<{_kind(kind.key_type)}, {_kind(kind.item_type)}>"
    if types.is_fixed_size_list(kind):
        return f"list<{_kind(kind.value_type)}>[{kind.list_size}]"
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list<{_kind(kind.value_type)}>"
    if types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_kind(field.type)}' for field in kind)}>"
    return str(kind)


def _fingerprint(schemas: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(schemas)).encode()).hexdigest()
