"""The intent: the object `<key>.upload.json`, by which any machine can resume an upload (docs/format.md).

It is written before the first part and removed after the sibling manifest is published. It names the upload id, the
part size and the exact manifest, and records the CRC32C of the acknowledged parts.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
import time
import uuid
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.backoff import jittered_wait_s
from blobflow.engine.plan import MAX_PARTS
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    NoSuchUpload,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    TransferBusy,
)
from blobflow.owner import owner_is_gone, process_owner
from blobflow.stores.base import PutMode, Reader, Store
from blobflow.untrusted import quoted, read_object

log = logging.getLogger(__name__)

FORMAT: Final = "blobflow.upload/1"
SUFFIX: Final = ".upload.json"
TTL_S: Final = 120.0
"""Seconds after its last renewal for which an intent blocks uploads of other content; renewed after a third of them."""

_MAX_BYTES: Final = 4 * MAX_MANIFEST_BYTES
_LATEST_S: Final = 1e11
"""Unix time in the year 5138."""
_SAVE_ATTEMPTS: Final = 20
_SAVE_PAUSE_S: Final = 0.25


@dataclass(frozen=True)
class FrameLog:
    """What a layer's upload has compressed so far; it determines where each part begins (docs/layers.md)."""

    codec: str
    """Another codec makes other bytes."""
    frame_size: int
    """Bytes before compression; equal for all frames except the last of the head and the last of all."""
    sizes: array[int] = field(default_factory=lambda: array("I"))
    """Compressed sizes of the frames, from the first."""
    crcs: array[int] = field(default_factory=lambda: array("I"))
    """CRC32C of each frame's content."""

    def longer(self, other: FrameLog | None) -> FrameLog:
        """The longer of the two logs, which are logs of the same bytes."""
        return other if other is not None and len(other.sizes) > len(self.sizes) else self

    def encode(self) -> dict[str, Any]:
        return {
            "codec": self.codec,
            "frame_size": self.frame_size,
            "sizes": _pack(self.sizes),
            "crc32c": _pack(self.crcs),
        }

    @classmethod
    def parse(cls, document: dict[str, Any]) -> FrameLog:
        """The log in `document`; the inverse of `encode`."""
        sizes, crcs = _unpack(document["sizes"]), _unpack(document["crc32c"])
        if len(sizes) != len(crcs) or _whole(document["frame_size"]) <= 0:
            raise ValueError("frames")
        return cls(_words(document["codec"]), document["frame_size"], sizes, crcs)


@dataclass(frozen=True)
class Intent:
    """One upload under way."""

    manifest_file: ManifestFile
    upload_id: str
    part_size: int
    owner: str
    generation: int
    expires_at: float
    """Unix time in seconds."""
    write_id: str
    """Differs in every write, so that two equal intents can be distinguished."""
    crcs: dict[int, int]
    """CRC32C of the parts that the store has acknowledged, by part number."""
    replaces: str | None = None
    """Digest of the artifact that this upload will replace; None if it may replace none."""
    frames: FrameLog | None = None
    """The frames of a layer; None for an artifact."""

    @property
    def manifest(self) -> Manifest:
        return self.manifest_file.manifest

    def is_alive(self, now: float) -> bool:
        """Whether its owner may still be working."""
        return now < self.expires_at and not owner_is_gone(self.owner)

    def encode(self) -> bytes:
        """The JSON document; the checksums of 10,000 parts take 54 kB."""
        numbers = sorted(self.crcs)
        packed = array("I", (self.crcs[number] for number in numbers))
        document: dict[str, Any] = {
            "format": FORMAT,
            "artifact_digest": self.manifest_file.digest,
            "upload_id": self.upload_id,
            "part_size": self.part_size,
            "owner": self.owner,
            "generation": self.generation,
            "expires_at": self.expires_at,
            "write_id": self.write_id,
            "replaces": self.replaces,
            "parts": _encode_ranges(numbers),
            "crc32c": _pack(packed),
            "manifest": self.manifest_file.data.decode(),
        }
        if self.frames is not None:
            document["frames"] = self.frames.encode()
        return json.dumps(document, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, data: bytes) -> Intent:
        """The intent in `data`; the inverse of `encode`.

        Raises:
            ArtifactInvalid: it is not an intent of a known version, or it is damaged.
        """
        if len(data) > _MAX_BYTES:
            raise ArtifactInvalid(
                f"the intent of an upload exceeds {_MAX_BYTES} bytes", actual=len(data), what="intent"
            )
        document: dict[str, Any] = read_object(data, "intent of an upload")
        found = document.get("format")
        if found != FORMAT:
            raise ArtifactInvalid(
                f"the intent has format {quoted(found)}, this blobflow reads {FORMAT!r}", what="intent"
            )
        try:
            packed = _unpack(document["crc32c"])
            intent = cls(
                manifest_file=ManifestFile.parse(document["manifest"].encode()),
                upload_id=_words(document["upload_id"]),
                part_size=_whole(document["part_size"]),
                owner=_words(document["owner"]),
                generation=_whole(document["generation"]),
                expires_at=_time(document["expires_at"]),
                write_id=_words(document["write_id"]),
                crcs=dict(zip(_decode_ranges(document["parts"]), packed, strict=True)),
                replaces=None if document["replaces"] is None else _words(document["replaces"]),
                frames=FrameLog.parse(document["frames"]) if "frames" in document else None,
            )
            digest = document["artifact_digest"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArtifactInvalid(f"the intent of an upload is damaged: {quoted(error)}", what="intent") from error
        if intent.manifest_file.digest != digest or intent.part_size <= 0:
            raise ArtifactInvalid("the intent of an upload contradicts itself", what="intent")
        stored, frames = intent.manifest_file, intent.frames
        size = stored.manifest.body.size + len(stored.data) if frames is None else sum(frames.sizes)
        if size > intent.part_size * MAX_PARTS:
            raise ArtifactInvalid(
                f"the intent of an upload has parts of {intent.part_size} bytes for {size} bytes", what="intent"
            )
        return intent


def read_intent(store: Reader, key: str) -> tuple[Intent | None, str]:
    """The intent of the upload of `key`, and the entity tag of its object; None and an empty tag if there is none.

    A damaged or too large intent counts as none; its entity tag lets a writer replace it.
    """
    try:
        data, meta = store.get(key + SUFFIX, max_bytes=_MAX_BYTES)
    except ObjectNotFound:
        return None, ""
    except ObjectTooLarge:
        meta = store.head(key + SUFFIX)
        if meta.size <= _MAX_BYTES:
            raise  # another intent meanwhile, which must not be replaced unread
        return None, meta.e_tag
    try:
        return Intent.parse(data), meta.e_tag
    except ArtifactInvalid:
        return None, meta.e_tag


class IntentKeeper:
    """Reads and writes the intent of one key. Every write is a compare-and-swap if the store has one."""

    def __init__(
        self, store: Store, key: str, *, clock: Callable[[], float] = time.time, owner: str | None = None
    ) -> None:
        self._store = store
        self._key = key + SUFFIX
        self._clock = clock
        self._owner = owner
        """The owner that it writes; None for this process."""
        self._e_tag = ""
        self.intent: Intent | None = None
        self._renewed_at = clock()

    def __repr__(self) -> str:
        return f"<IntentKeeper {self._key} {'held' if self.intent else 'empty'}>"

    def load(self) -> Intent | None:
        """The intent in the store, or None. A damaged or too large one counts as none and is replaced."""
        self.intent, self._e_tag = read_intent(self._store, self._key.removesuffix(SUFFIX))
        return self.intent

    def is_alive(self) -> bool:
        """Whether a process may be working on the loaded intent."""
        return self.intent is not None and self.intent.is_alive(self._clock())

    def begin(
        self,
        manifest_file: ManifestFile,
        upload_id: str,
        part_size: int,
        *,
        replaces: str | None = None,
        frames: FrameLog | None = None,
    ) -> bool:
        """Replace what `load` saw by a new intent. False if another process wrote first."""
        intent = Intent(
            manifest_file=manifest_file,
            upload_id=upload_id,
            part_size=part_size,
            owner=self._owner or process_owner(),
            generation=self.intent.generation + 1 if self.intent else 1,
            expires_at=self._clock() + TTL_S,
            write_id=uuid.uuid4().hex,
            crcs={},
            replaces=replaces,
            frames=frames,
        )
        return self._write(intent)

    def save(self, crcs: dict[int, int], frames: FrameLog | None = None) -> None:
        """Add acknowledged parts and renew the intent; merges with the parts of a joined uploader.

        Raises:
            TransferBusy: the intent now belongs to another upload; this one must stop.
            NoSuchUpload: there is no intent any more, or a new one for the same payload: a joined uploader has
                published, or given up.
        """
        mine = self.intent
        if mine is None:
            raise AssertionError("save without an intent")
        for attempt in range(_SAVE_ATTEMPTS):
            current = self.intent
            if current is None or (current.upload_id != mine.upload_id and current.manifest.same_body(mine.manifest)):
                raise NoSuchUpload(
                    f"the intent of {self._key.removesuffix(SUFFIX)!r} is gone",
                    key=self._key.removesuffix(SUFFIX),
                    upload_id=mine.upload_id,
                )
            if current.upload_id != mine.upload_id:
                break
            renewed = replace(
                current,
                owner=self._owner or process_owner(),
                expires_at=self._clock() + TTL_S,
                write_id=uuid.uuid4().hex,
                crcs={**current.crcs, **crcs},
                frames=frames.longer(current.frames) if frames else current.frames,
            )
            if self._write(renewed):
                return
            if attempt:  # many lanes save at once
                time.sleep(jittered_wait_s(attempt + 1, first_s=0.001, longest_s=_SAVE_PAUSE_S))
            self.load()
        raise TransferBusy(f"another upload took {self._key.removesuffix(SUFFIX)!r} over", key=self._key)

    def renewal_due(self) -> bool:
        """Whether a third of the time to live has passed."""
        return self._clock() - self._renewed_at > TTL_S / 3

    def release(self, upload_id: str) -> None:
        """Stop blocking other content; best effort. The upload can still be resumed."""
        if self.intent is not None and self.intent.upload_id == upload_id:
            try:
                self._write(replace(self.intent, expires_at=self._clock(), write_id=uuid.uuid4().hex))
            except BlobflowError as error:
                log.info("intent.release_failed key=%s error=%s", self._key, error)

    def remove(self, upload_id: str) -> None:
        """Remove the intent of a published or abandoned upload; an intent of another upload stays."""
        current = self.load()
        if current is None or current.upload_id == upload_id:
            self._store.delete(self._key)
        self.intent, self._e_tag = None, ""

    def _write(self, intent: Intent) -> bool:
        mode, e_tag = PutMode.OVERWRITE, None
        if self._store.capabilities().conditional:
            mode, e_tag = (PutMode.UPDATE, self._e_tag) if self._e_tag else (PutMode.CREATE, None)
        try:
            meta = self._store.put(
                self._key,
                intent.encode(),
                mode=mode,
                e_tag=e_tag,
                content_type="application/json",
                private=intent.manifest.private is not None,
            )
        except PreconditionFailed:
            return False
        self.intent, self._e_tag, self._renewed_at = intent, meta.e_tag, self._clock()
        return True


def _pack(values: array[int]) -> str:
    """The values as base64, 4 bytes each."""
    return base64.b64encode(_little_endian(values).tobytes()).decode()


def _unpack(text: str) -> array[int]:
    return _little_endian(array("I", base64.b64decode(text, validate=True)))


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values


def _encode_ranges(numbers: list[int]) -> str:
    """The numbers as ranges: `[1, 2, 3, 7]` as `1-3,7`."""
    starts = [n for before, n in pairwise([-1, *numbers]) if n != before + 1]
    ends = [n for n, after in pairwise([*numbers, -1]) if after != n + 1]
    return ",".join(f"{start}-{end}" if start != end else str(start) for start, end in zip(starts, ends, strict=True))


def _words(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("not a whole number")
    return value


def _time(value: object) -> float:
    if not isinstance(value, int | float) or not -_LATEST_S <= value <= _LATEST_S:
        raise ValueError("not a time")
    return float(value)


def _decode_ranges(text: str) -> Iterable[int]:
    before = 0
    for piece in text.split(",") if text else ():
        start, _, end = piece.partition("-")
        first, last = int(start), int(end or start)
        if not before < first <= last <= 10_000:  # ascending, so that a text cannot expand beyond all numbers
            raise ValueError(f"part numbers {piece[:50]!r}")
        before = last
        yield from range(first, last + 1)
