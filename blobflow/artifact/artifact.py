"""An artifact on local disk: `MANIFEST.json`, `INDEX.parquet` and `data/`, and the payload that follows from them.

In a *reference* artifact nothing is copied: `data` is a symbolic link to the source directory. `REFERENCE.parquet`
records inode and mtime of each member's file; both are checked, together with its size, when the file is read again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from blobflow.artifact.index import Index
from blobflow.artifact.limits import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, Tally, over_the_limit
from blobflow.artifact.manifest import DATA_NAME, INDEX_NAME, MANIFEST_NAME, BodyInfo, IndexInfo, Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.small_file_lock import SmallFileLock
from blobflow.artifact.tarmap import FIRST_MEMBER, TarMap
from blobflow.checksum import crc32c, sha256
from blobflow.durable import replace_file
from blobflow.errors import ArtifactInvalid, ArtifactNotFound, ChecksumMismatch, DigestMismatch, SourceChanged, reading
from blobflow.trees import open_below
from blobflow.version import __version__

REFERENCE_NAME: Final = "REFERENCE.parquet"
_MAX_REFERENCE_BYTES: Final = 256 << 20
"""Two numbers of eight bytes for each of ten million members, and the overhead of the format."""

# The index needs pyarrow (0.3 s to import). An artifact that is already stored needs only its manifest, so everything
# that touches the index is imported where it is used.


class Artifact:
    """A complete artifact directory, opened for reading.

    Attributes:
        path: The directory.
        manifest_file: Its manifest; the sibling object in a store has the same bytes.
        manifest: The parsed manifest.
        digest: `sha256:<hex>` of the manifest's bytes, the identity of the artifact.
        payload_size: Bytes of the payload (the tar).
    """

    def __init__(self, path: Path, manifest_file: ManifestFile) -> None:
        self.path = path
        self.manifest_file = manifest_file
        self.manifest = manifest_file.manifest
        self.digest = manifest_file.digest
        self.payload_size = manifest_file.payload_size

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """The artifact in the directory `path`. Reads only the manifest.

        Raises:
            ArtifactNotFound: there is no manifest; an unfinished export has none.
            ArtifactInvalid: the manifest is not valid.
        """
        path = Path(path)
        try:
            with reading(path / MANIFEST_NAME), open(path / MANIFEST_NAME, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except SourceChanged as error:
            raise ArtifactNotFound(
                f"{path} is not a complete artifact: it has no {MANIFEST_NAME}",
                hint="make one with `blobflow export`",
                path=str(path),
            ) from error
        return cls(path, ManifestFile.parse(data))

    @staticmethod
    def is_artifact(path: Path) -> bool:
        """Whether an export made the directory `path`; another directory may have a MANIFEST.json too."""
        return (path / MANIFEST_NAME).is_file() and (path / INDEX_NAME).is_file() and (path / DATA_NAME).is_dir()

    def __repr__(self) -> str:
        return f"<Artifact {self.digest[:19]} {self.manifest.members} members in {self.path}>"

    @property
    def data(self) -> Path:
        """The directory of the members."""
        return self.path / DATA_NAME

    @property
    def is_reference(self) -> bool:
        """Whether `data` is the source itself and not a copy."""
        return self.data.is_symlink()

    @property
    def manifest_bytes(self) -> bytes:
        """The manifest's bytes."""
        return self.manifest_file.data

    @property
    def payload_crc32c(self) -> int:
        """The CRC32C of the payload, computed from the checksums of its members without reading them."""
        return self.manifest_file.payload_crc32c

    @cached_property
    def index_bytes(self) -> bytes:
        """The bytes of `INDEX.parquet`, checked against the manifest."""
        data = _read_own(self.path / INDEX_NAME, self.manifest.index.size)
        check_index_bytes(data, self.manifest)
        return data

    @cached_property
    def index(self) -> Index:
        """The members."""
        from blobflow.artifact.index_parquet import decode_index  # loads pyarrow, which takes 0.2 s

        return decode_index(self.index_bytes, members=self.manifest.members)

    @cached_property
    def layout(self) -> TarMap:
        """The layout of the payload: the origin of each byte."""
        return checked_layout(self.manifest_file, self.index)

    def adopt(self, manifest_file: ManifestFile) -> Artifact:
        """The same members with another manifest whose body is byte-identical (see `Manifest.same_body`)."""
        other = Artifact(self.path, manifest_file)
        if not other.manifest.same_body(self.manifest):
            raise ArtifactInvalid(
                f"{self!r} and the manifest {other.digest} describe different payloads", what="payload"
            )
        other.__dict__.update(index_bytes=self.index_bytes, index=self.index)
        return other

    def source(self) -> PayloadSource:
        """The payload as a random-access source of bytes."""
        return PayloadSource(self)


def checked_layout(manifest_file: ManifestFile, index: Index) -> TarMap:
    """The layout of a payload, after a proof that manifest and index agree in every bit.

    The sizes, the content digest and the CRC32C of the whole tar follow from the index; each must equal the
    manifest's value. So a manifest that passes fixes every byte of the payload except the members' contents, and their
    SHA-256 values fix those.

    Raises:
        ArtifactInvalid: they differ; the message names the value.
    """
    manifest = manifest_file.manifest
    # First, because a valid total is below 2**63: false sizes cannot overflow the layout after this check.
    if manifest.bytes != index.total_bytes:
        raise _contradiction("bytes", manifest.bytes, index.total_bytes)
    layout = TarMap(len(manifest_file.data), manifest.index.size, index)
    for what, promised, actual in (
        ("content_digest", manifest.content_digest, index.content_digest()),
        ("executables_digest", manifest.executables_digest or index.executables_digest(), index.executables_digest()),
        ("body.size", manifest.body.size, layout.size - layout.body_start),
        ("body.crc32c", manifest.body.crc32c, layout.body_crc32c(manifest.index.crc32c)),
    ):
        if promised != actual:
            raise _contradiction(what, promised, actual)
    layout.private = manifest.private_rows
    if layout.private.stop > len(index):
        raise _contradiction("private", manifest.private, f"rows 0 to {len(index) - 1}")
    return layout


def _contradiction(what: str, promised: object, actual: object) -> ArtifactInvalid:
    return ArtifactInvalid(
        f"the manifest's {what} is {promised}, its index gives {actual}",
        what=what,
        expected=str(promised),
        actual=str(actual),
    )


def _read_own(path: Path, limit: int) -> bytes:
    """The content of an artifact's file; at most one byte more than `limit`, if it is larger."""
    try:
        with reading(path), open(path, "rb") as file:
            return file.read(min(limit, MAX_INDEX_BYTES) + 1)
    except SourceChanged as error:
        raise ArtifactInvalid(f"{path} is missing", hint="export again", path=str(path), what=path.name) from error


def check_index_bytes(data: bytes, manifest: Manifest) -> None:
    """Compare the bytes of an index with the manifest.

    Raises:
        DigestMismatch, ChecksumMismatch: they differ.
    """
    actual = sha256(data).hex()
    if len(data) != manifest.index.size or actual != manifest.index.sha256:
        raise DigestMismatch(
            f"{INDEX_NAME} has SHA-256 {actual} in {len(data)} bytes,"
            f" the manifest says {manifest.index.sha256} in {manifest.index.size}",
            what=INDEX_NAME,
            expected=manifest.index.sha256,
            actual=actual,
        )
    if crc32c(data) != manifest.index.crc32c:
        raise ChecksumMismatch(f"{INDEX_NAME} has another CRC32C than the manifest says", what=INDEX_NAME)


class PayloadSource:
    """Produces any range of an artifact's payload from its files. Thread-safe: it keeps no file open.

    Every read raises `SourceChanged` if a file is not the one that was exported.
    """

    def __init__(self, artifact: Artifact) -> None:
        from blobflow.artifact.index_parquet import decode_origins  # loads pyarrow, which takes 0.2 s

        self.layout = artifact.layout
        self.size = artifact.layout.size
        self._contents = (artifact.manifest_bytes, artifact.index_bytes)
        self._index = artifact.index
        self._crowd = SmallFileLock()
        self._root = os.path.realpath(artifact.data)
        self._origins = (
            decode_origins(_read_own(artifact.path / REFERENCE_NAME, _MAX_REFERENCE_BYTES), members=len(artifact.index))
            if artifact.is_reference
            else None
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the payload's bytes from `offset`."""
        with self._crowd.around(self.layout.entries_in(offset, len(buffer))):
            self._read_into(offset, buffer)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        position = 0
        for span in self.layout.spans(offset, len(buffer)):
            target = buffer[position : position + span.length]
            if span.content_offset < 0:
                target[:] = span.literal
            elif span.entry < FIRST_MEMBER:
                target[:] = self._contents[span.entry][span.content_offset : span.content_offset + span.length]
            else:
                self._read_member(span.entry - FIRST_MEMBER, span.content_offset, target)
            position += span.length

    def _read_member(self, member: int, offset: int, target: memoryview) -> None:
        path = self._index.paths[member]
        with reading(path):
            self._pread_member(member, path, offset, target)

    def _pread_member(self, member: int, path: str, offset: int, target: memoryview) -> None:
        # Non-blocking, so that a pipe that took a file's place cannot hang the upload.
        descriptor = open_below(self._root, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            self._check_unchanged(member, os.fstat(descriptor))
            while target:
                count = os.preadv(descriptor, [target], offset)
                if not count:
                    raise SourceChanged(
                        f"source file {path!r} became shorter than {offset} bytes", path=path, what="size"
                    )
                target = target[count:]
                offset += count
        finally:
            os.close(descriptor)

    def _check_unchanged(self, member: int, status: os.stat_result) -> None:
        index = self._index
        path = index.paths[member]
        facts = [("size", index.sizes[member], status.st_size)]
        if self._origins is not None:
            inodes, mtimes_ns = self._origins
            facts += [
                ("mtime_ns", mtimes_ns[member], status.st_mtime_ns),
                ("inode", inodes[member], status.st_ino),
            ]
        for what, expected, actual in facts:
            if expected != actual:
                raise SourceChanged(
                    f"source file {path!r} changed after the export: {what} was {expected}, is {actual}",
                    path=path,
                    what=what,
                    expected=expected,
                    actual=actual,
                )


def write_artifact(
    dest: Path,
    index: Index,
    *,
    backend: str,
    cursor: JsonValue = None,
    created_at: datetime | None = None,
    origins: tuple[Sequence[int], Sequence[int]] | None = None,
    private: str | None = None,
    holes: int = 0,
) -> Artifact:
    """Finish the artifact in `dest`, whose `data` is already there: index first, manifest last.

    Args:
        origins: Inode and mtime (ns) of each member's file, for a reference artifact.
        holes: Bytes of the members that took no room at the source.
        private: The rows that only their owner may read; see `blobflow.artifact.privacy`.
    """
    from blobflow.artifact.index_parquet import encode_index, encode_origins  # loads pyarrow, which takes 0.2 s

    tally = Tally()
    for path, size in zip(index.paths, index.sizes, strict=True):
        tally.add(path, size)
    index_bytes = encode_index(index)
    if len(index_bytes) > MAX_INDEX_BYTES:
        raise over_the_limit("bytes in its index", MAX_INDEX_BYTES)
    index_crc = crc32c(index_bytes)
    created_at = created_at or datetime.now(timezone.utc)
    # The body's checksum does not depend on the size of the manifest, so the layout may use any size.
    layout = TarMap(0, len(index_bytes), index)
    manifest = Manifest(
        backend=backend,
        cursor=cursor,
        created_at=created_at.replace(microsecond=0),
        producer=f"blobflow {__version__}",
        members=len(index),
        bytes=index.total_bytes,
        content_digest=index.content_digest(),
        executables_digest=index.executables_digest(),
        holes=holes or None,
        private=private,
        index=IndexInfo(size=len(index_bytes), sha256=sha256(index_bytes).hex(), crc32c=index_crc),
        body=BodyInfo(size=layout.size - layout.body_start, crc32c=layout.body_crc32c(index_crc)),
    )
    if origins is not None:
        replace_file(dest / REFERENCE_NAME, encode_origins(*origins), private=private is not None)
    replace_file(dest / INDEX_NAME, index_bytes, private=private is not None)
    replace_file(dest / MANIFEST_NAME, manifest.encode(), private=private is not None)
    artifact = Artifact.open(dest)
    artifact.__dict__.update(index_bytes=index_bytes, index=index)
    return artifact
