"""An artifact in a store, opened for reading; everything except its contents is verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from blobflow.artifact.artifact import check_index_bytes, checked_layout
from blobflow.artifact.index import index_bytes_limit
from blobflow.artifact.manifest import FILE_MODE, INDEX_NAME, Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.tarmap import TarMap, header, member_length
from blobflow.config import ChunkProfile
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import (
    ArtifactInvalid,
    ArtifactNotFound,
    BlobflowError,
    DigestMismatch,
    ObjectChanged,
    ObjectNotFound,
    ReplacementInProgress,
    SizeMismatch,
)
from blobflow.stores.base import ObjectMeta, Reader
from blobflow.transport.catalog import read_manifest_bytes, read_manifest_file
from blobflow.uploads.progress import OnProgress, OnRecord, TransferProgress


def check_expected(key: str, digest: str, expected_digest: str | None) -> None:
    """Return if `key` holds the artifact that the caller expects, or if the caller expects none.

    Raises:
        DigestMismatch: it holds another one.
    """
    if expected_digest and digest != expected_digest:
        raise DigestMismatch(
            f"{key!r} is the artifact {digest}, not {expected_digest}",
            what=key,
            expected=expected_digest,
            actual=digest,
        )


@dataclass
class RemoteArtifact:
    """An artifact in a store, opened for reading; everything except its contents is verified."""

    store: Reader
    key: str
    manifest_file: ManifestFile
    payload: ObjectMeta
    head: bytes = b""
    index_bytes: bytes = field(default=b"", repr=False)

    @classmethod
    def open(cls, store: Reader, key: str, expected_digest: str | None) -> RemoteArtifact:
        """Read the manifest and pin the payload.

        Raises:
            ArtifactNotFound: there is no artifact.
            DigestMismatch: it is not the expected artifact.
            SizeMismatch, ArtifactInvalid: manifest and payload do not belong together.
            ObjectChanged: the artifact was replaced at this moment.
        """
        manifest_file = read_manifest_file(store, key)
        check_expected(key, manifest_file.digest, expected_digest)
        try:
            payload = store.head(key)
        except ObjectNotFound as error:
            raise _replaced_or(
                store,
                key,
                manifest_file,
                ArtifactInvalid(f"{key!r} has a manifest but no payload", key=key, what="payload"),
            ) from error
        if payload.size != (expected := manifest_file.payload_size):
            raise _replaced_or(
                store,
                key,
                manifest_file,
                SizeMismatch(
                    f"the payload of {key!r} has {payload.size} bytes, its manifest says {expected}",
                    what=key,
                    expected=expected,
                    actual=payload.size,
                ),
            )
        return cls(store, key, manifest_file, payload)

    @property
    def manifest(self) -> Manifest:
        return self.manifest_file.manifest

    @property
    def digest(self) -> str:
        """The identity of the artifact."""
        return self.manifest_file.digest

    def check_embedded(self) -> None:
        """Compare the embedded manifest with the sibling.

        Raises:
            ArtifactInvalid: they differ, or there is none.
        """
        entry = self.manifest_file.entry
        self.head = self.store.get_range(self.key, 0, len(entry), e_tag=self.payload.e_tag)
        if self.head != entry:
            raise _replaced_or(
                self.store,
                self.key,
                self.manifest_file,
                ArtifactInvalid(
                    f"the payload of {self.key!r} does not begin with its sibling manifest",
                    key=self.key,
                    what="payload",
                ),
            )

    def open_layout(self) -> TarMap:
        """Fetch the index and derive the layout of the whole payload from it, everything checked."""
        from blobflow.artifact.index_parquet import decode_index  # loads pyarrow, which takes 0.2 s

        self.check_embedded()
        size = self.manifest.index.size
        length = member_length(INDEX_NAME, size)
        if size > index_bytes_limit(self.manifest.members) or len(self.head) + length > self.payload.size:
            raise ArtifactInvalid(
                f"the manifest of {self.key!r} declares an index of {size} bytes", key=self.key, what="manifest"
            )
        entry = self.store.get_range(self.key, len(self.head), length, e_tag=self.payload.e_tag)
        expected_header = header(INDEX_NAME, size, FILE_MODE)
        start = len(expected_header)
        if entry[:start] != expected_header or any(entry[start + size :]):
            raise ArtifactInvalid(
                f"the index of {self.key!r} is not where the format puts it", key=self.key, what="index"
            )
        self.index_bytes = entry[start : start + size]
        check_index_bytes(self.index_bytes, self.manifest)
        self.head += entry
        index = decode_index(self.index_bytes, members=self.manifest.members)
        return checked_layout(self.manifest_file, index)

    def fetch(self, part: Part, buffer: memoryview) -> memoryview:
        """The bytes of a part of the pinned payload."""
        view = buffer[: part.length]
        self.store.get_range_into(self.key, part.offset, view, e_tag=self.payload.e_tag)
        return view

    def progress(
        self,
        plan: TransferPlan,
        profile: ChunkProfile,
        kind: Literal["download", "verify"],
        save: Callable[[], None],
        on_progress: OnProgress | None,
        on_checkpoint: OnRecord | None,
    ) -> TransferProgress:
        """The progress of fetching the parts of `plan`; the head of the payload is here already."""
        return TransferProgress(
            *(self.store, self.key, self.digest, kind),
            part_size=plan.part_size,
            parts=len(plan),
            size=plan.size,
            head_size=len(self.head),
            profile=profile,
            save=save,
            on_progress=on_progress,
            on_checkpoint=on_checkpoint,
        )


def _replaced_or(store: Reader, key: str, manifest_file: ManifestFile, error: BlobflowError) -> BlobflowError:
    """`error`, unless the artifact was replaced between two of our requests: then trying again helps."""
    try:
        unchanged = read_manifest_bytes(store, key) == manifest_file.data
    except (ReplacementInProgress, ArtifactNotFound):
        unchanged = False
    return error if unchanged else ObjectChanged(f"the artifact {key!r} was replaced while it was read", key=key)
