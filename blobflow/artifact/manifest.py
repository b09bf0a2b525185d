"""The manifest: the small JSON document whose SHA-256 is the identity of an artifact. No I/O happens here."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.privacy import MAX_PRIVATE_CHARS, RANGES, PrivateRows
from blobflow.errors import ArtifactInvalid
from blobflow.untrusted import UtcTime, as_model, quoted, read_object

FORMAT: Final = "blobflow.artifact/1"
MANIFEST_NAME: Final = "MANIFEST.json"
INDEX_NAME: Final = "INDEX.parquet"
DATA_NAME: Final = "data"
FILE_MODE: Final = 0o644
EXECUTABLE_MODE: Final = 0o755

Crc32c = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
HexSha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha256Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
ByteCount = Annotated[int, Field(ge=0, lt=1 << 63)]


_ABSENT: Final = ("private", "holes")
"""Fields that a document omits if they are empty, so that it has the same bytes as in earlier versions."""


class IndexInfo(BaseModel):
    """Size (bytes) and checksums of `INDEX.parquet`."""

    model_config = ConfigDict(frozen=True)

    size: ByteCount
    sha256: HexSha256
    crc32c: Crc32c


class BodyInfo(BaseModel):
    """Size (bytes) and CRC32C of the payload after the `MANIFEST.json` member, which cannot cover itself."""

    model_config = ConfigDict(frozen=True)

    size: ByteCount
    crc32c: Crc32c


class Manifest(BaseModel):
    """Everything about an artifact except the list of its members. Fields of later minor versions are ignored."""

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    backend: str = Field(description="The exporter that made it, e.g. `directory`.")
    cursor: JsonValue = Field(default=None, description="Position of this snapshot in the source's history.")
    created_at: UtcTime
    producer: str
    members: ByteCount = Field(description="Rows of the index: files and empty directories.")
    bytes: ByteCount = Field(description="Sum of the sizes of the members.")
    content_digest: Sha256Digest = Field(description="Digest of the content alone: equal trees have equal digests.")
    executables_digest: Sha256Digest | None = Field(
        default=None, description="Digest of the executable members' list; with content_digest it decides 'unchanged'."
    )
    private: str | None = Field(
        default=None,
        max_length=MAX_PRIVATE_CHARS,
        pattern=RANGES,
        description="Rows of the index that only their owner may read, e.g. `0-3,7`; None: everybody may read all.",
    )
    holes: ByteCount | None = Field(
        default=None, description="Bytes of the members that took no room at the source; None if none count."
    )
    index: IndexInfo
    body: BodyInfo

    @field_validator("private")
    @classmethod
    def _in_order(cls, ranges: str | None) -> str | None:
        PrivateRows(ranges)
        return ranges

    @property
    def private_rows(self) -> PrivateRows:
        """The rows that `private` names."""
        return PrivateRows(self.private)

    @classmethod
    def parse(cls, data: bytes, key: str | None = None) -> Manifest:
        """The manifest in `data`.

        Args:
            key: Key of its artifact, if it comes from a store; for messages.

        Raises:
            ArtifactInvalid: it is too large, is not JSON, has another format or version, or has wrong fields.
        """
        what = "manifest" if key is None else f"manifest of {key!r}"
        if len(data) > MAX_MANIFEST_BYTES:
            raise ArtifactInvalid(f"the {what} exceeds {MAX_MANIFEST_BYTES} bytes", actual=len(data), what=what)
        document = read_object(data, what)
        found = document.get("format")
        if found != FORMAT:
            raise ArtifactInvalid(
                f"the {what} has format {quoted(found)}, this blobflow reads {FORMAT!r}",
                hint="a newer blobflow may be needed",
                expected=FORMAT,
                actual=quoted(found),
                what=what,
            )
        return as_model(cls, document, what)

    def document(self) -> dict[str, Any]:
        """The fields as JSON values. Without private members and holes they are the fields of earlier versions."""
        return self.model_dump(mode="json", exclude={name for name in _ABSENT if getattr(self, name) is None})

    def encode(self) -> bytes:
        """The JSON document as it is stored; its bytes are the artifact's identity.

        Raises:
            ArtifactInvalid: it would exceed `MAX_MANIFEST_BYTES` (a huge cursor), or the cursor is NaN or infinite.
        """
        try:
            data = json.dumps(self.document(), ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"
        except ValueError as error:
            raise ArtifactInvalid(f"the manifest cannot be encoded as JSON: {error}", what="manifest") from error
        if len(data) > MAX_MANIFEST_BYTES:
            raise ArtifactInvalid(
                f"manifest exceeds {MAX_MANIFEST_BYTES} bytes",
                hint="make the cursor smaller",
                actual=len(data),
                what="manifest",
            )
        return data

    def same_content(self, other: Manifest) -> bool:
        """Whether both describe the same tree: paths, bytes, executable and private files; times do not count."""
        return (self.content_digest, self.executables_digest, self.private) == (
            other.content_digest,
            other.executables_digest,
            other.private,
        )

    def same_body(self, other: Manifest) -> bool:
        """Whether both payloads are byte-identical after the manifest member, so that one may replace the other."""
        return (self.content_digest, self.private, self.index, self.body) == (
            other.content_digest,
            other.private,
            other.index,
            other.body,
        )


def is_private(manifest_bytes: bytes) -> bool:
    """Whether only its owner may read an artifact, or at least one file of it; also true for a damaged manifest."""
    try:
        return Manifest.parse(manifest_bytes).private is not None
    except ArtifactInvalid:
        return True


def artifact_digest(manifest_bytes: bytes) -> str:
    """The identity of an artifact: `sha256:<hex>` of its manifest's bytes."""
    return "sha256:" + hashlib.sha256(manifest_bytes).hexdigest()
