"""One value for `MANIFEST.json`: its bytes, parsed once, and all that follows from them. No I/O happens here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from blobflow.artifact.manifest import Manifest, artifact_digest
from blobflow.artifact.tarmap import manifest_entry, manifest_entry_length
from blobflow.checksum import combine_crc32c, crc32c


@dataclass(frozen=True)
class ManifestFile:
    """The content of a `MANIFEST.json`. Two are equal if their bytes are: the bytes identify the artifact."""

    data: bytes
    manifest: Manifest = field(compare=False)
    """The parsed bytes; the bytes may also have fields that this version does not know."""

    @classmethod
    def parse(cls, data: bytes, key: str | None = None) -> ManifestFile:
        """The manifest in `data` from outside; see `Manifest.parse`.

        Raises:
            ArtifactInvalid: it is not a manifest.
        """
        return cls(data, Manifest.parse(data, key))

    @classmethod
    def of(cls, manifest: Manifest) -> ManifestFile:
        """The file of a manifest that this process made.

        Raises:
            ArtifactInvalid: it cannot be encoded; see `Manifest.encode`.
        """
        return cls(manifest.encode(), manifest)

    def __repr__(self) -> str:
        return f"<ManifestFile {self.digest[:19]} of {self.manifest.members} members>"

    @cached_property
    def digest(self) -> str:
        """The identity of the artifact: `sha256:<hex>` of the bytes."""
        return artifact_digest(self.data)

    @cached_property
    def entry(self) -> bytes:
        """The first bytes of the payload: the whole tar entry of the manifest."""
        return manifest_entry(self.data)

    @property
    def payload_size(self) -> int:
        """Bytes of the payload (the tar)."""
        return manifest_entry_length(len(self.data)) + self.manifest.body.size

    @cached_property
    def payload_crc32c(self) -> int:
        """The CRC32C of the payload, known before a byte of it is sent or read."""
        body = self.manifest.body
        return combine_crc32c(crc32c(self.entry), body.crc32c, body.size)
