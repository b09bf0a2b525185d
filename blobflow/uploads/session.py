"""A multipart upload, from the claim to the object: the steps of every upload under a key.

* **claim**: the same upload is joined; another one that is alive is `TransferBusy`. Otherwise an upload is created,
  the intent is taken by compare-and-swap, and only then the upload that it replaces is aborted. A layer is joined only
  if no process works on it, because the start of its parts depends on what was compressed before. `ObjectTarget` has
  no intent: its checkpoint keeps the upload id.
* **held**: the store's list is the truth; the intent adds checksums that the store does not report. If the two
  contradict each other, the part counts as missing.
* **put**: any thread sends; the calling thread records the checksum and saves it. A server copy has no parts.
* **prove**: the parts are listed once more and compared with the plan; their combined checksum must be the expected
  one. The checksum of a layer's compressed bytes is not known before, so its frames' contents are compared with the
  manifest instead.
* **complete**: the object is made; its size and entity tag are checked.
* **settle**: `NoSuchUpload` means that the upload was completed, aborted or expired. The object under the key decides
  which: an artifact by its embedded manifest, a stream by its CRC32C, a layer by its head and seek table.
* **publish**, by the caller: the sibling manifest, or the metadata of a layer. A stream's object is visible at once.
* **close**: the intent is removed, after everything else.
* If something **fails**, the intent is released: the parts stay, and other content may come. A lane that fails does
  not release it, because other lanes may be working.
* **abandon**: the upload is aborted, then its intent is removed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Final

from typing_extensions import Buffer, Self, override

from blobflow.artifact.manifest_file import ManifestFile
from blobflow.checksum import combine_all, crc32c
from blobflow.config import MIB
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import NoSuchUpload, ObjectChanged, ObjectNotFound, TransferBusy, UploadIncomplete
from blobflow.owner import process_owner
from blobflow.stores.base import Body, ObjectMeta, PartMeta, Store
from blobflow.uploads.intent import FrameLog, Intent, IntentKeeper

log = logging.getLogger(__name__)

CLAIM_ATTEMPTS: Final = 5
"""Each attempt is lost to another process that was faster; after the last one the key counts as busy."""
_READ_BACK_BYTES: Final = MIB


class HeldParts:
    """The parts of an upload that the store holds.

    Attributes:
        crcs: CRC32C of the parts whose checksum is known.
    """

    def __init__(self, parts: Iterable[PartMeta], remembered: Mapping[int, int]) -> None:
        self._parts: dict[int, PartMeta] = {}
        self.crcs: dict[int, int] = {}
        for part in parts:
            reported, known = part.crc32c, remembered.get(part.part_number)
            if None not in (reported, known) and reported != known:
                continue  # another process replaced the part
            self._parts[part.part_number] = part
            if (crc := reported if reported is not None else known) is not None:
                self.crcs[part.part_number] = crc

    def proven(self, plan: Iterable[Part]) -> dict[int, int]:
        """CRC32C of the parts of `plan` that are there, with the right size and a known checksum."""
        return {part.number: self.crcs[part.number] for part in plan if self.has(part) and part.number in self.crcs}

    def unproven(self, plan: Iterable[Part]) -> dict[int, str]:
        """Entity tags of the parts of `plan` that are there, with the right size and an unknown checksum."""
        parts = (part.number for part in plan if self.has(part) and part.number not in self.crcs)
        return {number: self._parts[number].e_tag for number in parts}

    def has(self, part: Part) -> bool:
        """Whether a part of that number and size is there."""
        found = self._parts.get(part.number)
        return found is not None and found.size == part.length

    def holds(self, number: int, data: Buffer, crc: int) -> bool:
        """Whether the store has exactly these bytes as that part; without a checksum its entity tag decides."""
        if not self.has(Part(number, 0, memoryview(data).nbytes)):
            return False
        if number in self.crcs:
            return self.crcs[number] == crc
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == md5_in(self._parts[number].e_tag)


def md5_in(e_tag: str) -> str | None:
    """The MD5 of a part's bytes, in hex, if its entity tag may be one; otherwise None, because the tag proves nothing.

    On S3 and Ceph the tag of a part is the MD5, unless KMS encrypts it.
    """
    tag = e_tag.strip('"').lower()
    return tag if len(tag) == 32 else None


def upload_part_size(store: Store, size: int, chunk_size: int) -> int:
    """Bytes per part of an upload of `size` bytes: `chunk_size`, enlarged if the limits of the store require it.

    Raises:
        Unsupported: there would be too many parts.
    """
    capabilities = store.capabilities()
    return TransferPlan.for_upload(
        size,
        chunk_size,
        min_part_size=capabilities.min_part_size,
        max_part_size=capabilities.max_part_size,
        max_parts=capabilities.max_parts,
    ).part_size


class UploadSession:
    """One multipart upload, identified by its upload id.

    Attributes:
        upload_id: The store's id; empty until `create` or `take_up`.
        part_size: Bytes of all parts except the last.
        crcs: Known CRC32C of the parts that the store holds. Only the calling thread changes it.
    """

    def __init__(self, store: Store, key: str, *, content_type: str, private: bool = False) -> None:
        self.store = store
        self.key = key
        self.upload_id = ""
        self.part_size = 0
        self.crcs: dict[int, int] = {}
        self._content_type = content_type
        self._private = private

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key!r} {self.upload_id or 'not begun'}, {len(self.crcs)} parts known>"

    def create(self, part_size: int) -> None:
        """Begin a new upload in the store."""
        upload_id = self.store.create_multipart(
            self.key, part_size=part_size, content_type=self._content_type, private=self._private
        )
        self.take_up(upload_id, part_size)

    def take_up(self, upload_id: str, part_size: int) -> None:
        """Continue an upload that was begun elsewhere."""
        self.upload_id, self.part_size, self.crcs = upload_id, part_size, {}

    def held(self) -> HeldParts:
        """The parts that the store holds."""
        return HeldParts(self.store.list_parts(self.key, self.upload_id), {})

    def put(self, number: int, body: Body) -> int:
        """Send a part, from any thread; returns its CRC32C, which the calling thread puts into `crcs`."""
        if body.crc32c is None:
            raise AssertionError("a part always knows its checksum")
        self.store.put_part(self.key, self.upload_id, number, body)
        return body.crc32c

    def crc32c(self, plan: Iterable[Part]) -> int:
        """CRC32C of the whole, once the checksums of all its parts are known."""
        return combine_all((self.crcs[part.number], part.length) for part in plan)

    def prove(self, plan: Iterable[Part]) -> list[PartMeta]:
        """The parts in the store, after comparing them with the plan: dense numbers, sizes, reported checksums.

        A reported checksum that was unknown is added to `crcs`.

        Raises:
            UploadIncomplete: a part is missing or wrong; the message names the first one, and another run sends it.
        """
        listed = {part.part_number: part for part in self.store.list_parts(self.key, self.upload_id)}
        parts = list(plan)
        for part in parts:
            found = listed.get(part.number)
            known = self.crcs.get(part.number)
            if (
                found is None
                or found.size != part.length
                or (found.crc32c != known and None not in (found.crc32c, known))
            ):
                raise UploadIncomplete(
                    f"part {part.number} of {self.key!r} is {'missing' if found is None else 'damaged'} in the store",
                    hint="run the same command again; it sends what is missing",
                    key=self.key,
                    expected=len(parts),
                    actual=len(listed),
                )
            if found.crc32c is not None:
                self.crcs[part.number] = found.crc32c
        return [listed[part.number]._replace(crc32c=self.crcs.get(part.number)) for part in parts]

    def complete(self, parts: list[PartMeta]) -> ObjectMeta:
        """Make the object of the parts that `prove` returned."""
        self.store.complete_multipart(self.key, self.upload_id, parts)
        return self.store.head(self.key)

    def settle(
        self, size: int, *, begins_with: bytes = b"", crc: int | None = None, other_than: str | None = None
    ) -> ObjectMeta | None:
        """The object under the key if this upload made it (the response to Complete was lost); otherwise None.

        Args:
            begins_with: Bytes that no other object begins with.
            crc: CRC32C of the whole, to compare with the store's checksum or with the bytes read back.
            other_than: Entity tag of an object that was there before.
        """
        try:
            meta = self.store.head(self.key)
            if meta.size != size or meta.e_tag == other_than:
                return None
            begins = self.store.get_range(self.key, 0, len(begins_with), e_tag=meta.e_tag) if begins_with else b""
            if begins != begins_with or (crc is not None and self._object_crc32c(meta) != crc):
                return None
        except (ObjectNotFound, ObjectChanged):
            return None
        return meta

    def attested(self, meta: ObjectMeta) -> int | None:
        """The CRC32C of an object that the store itself has computed; None if it has computed none."""
        return meta.crc32c if self.store.capabilities().attests_crc32c else None

    def _object_crc32c(self, meta: ObjectMeta) -> int:
        if (attested := self.attested(meta)) is not None:
            return attested
        actual, buffer = 0, memoryview(bytearray(_READ_BACK_BYTES))
        for offset in range(0, meta.size, len(buffer)):
            view = buffer[: meta.size - offset]
            self.store.get_range_into(self.key, offset, view, e_tag=meta.e_tag)
            actual = crc32c(view, actual)
        return actual

    def abandon(self) -> None:
        """Abort the upload; its parts are gone."""
        self.store.abort_multipart(self.key, self.upload_id)


class ClaimedUpload(UploadSession):
    """An upload session with an intent in the bucket, by which any machine finds it; it blocks other content.

    As a context manager, it releases the intent if the block fails. This process may continue and upload again, and its
    earlier intent must not block that.

    Args:
        owner: The owner that the intent names; None for this process.
        exclusive: One process sends at a time, and the caller ensures that this is one thread of this process.

    Attributes:
        is_new: Whether no other process can have sent parts before.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        content_type: str,
        private: bool = False,
        owner: str | None = None,
        exclusive: bool = False,
    ) -> None:
        super().__init__(store, key, content_type=content_type, private=private)
        self.is_new = False
        self._keeper = IntentKeeper(store, key, owner=owner)
        self._exclusive = exclusive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._keeper.release(self.upload_id)

    # The claim

    @property
    def intent(self) -> Intent | None:
        """The intent as it was read or written last."""
        return self._keeper.intent

    @property
    def owns_intent(self) -> bool:
        """Whether the intent names this upload. If not, another process may be using the key."""
        return self.intent is not None and self.intent.upload_id == self.upload_id

    def load(self) -> Intent | None:
        """The intent that is in the bucket now."""
        return self._keeper.load()

    def is_idle(self) -> bool:
        """Whether no process works on the upload of the loaded intent."""
        if self._exclusive and self.intent is not None and self.intent.owner == process_owner():
            return True  # left by an attempt of this process that could not even record its failure
        return not self._keeper.is_alive()

    def check_idle(self) -> None:
        """Return if no process works on the upload of the loaded intent.

        Raises:
            TransferBusy: a process works on it.
        """
        if self.intent is not None and not self.is_idle():
            raise TransferBusy(
                f"another upload to {self.key!r} is under way, by {self.intent.owner}",
                hint="run it again when that one is done",
                key=self.key,
                owner=self.intent.owner,
            )

    def claim(
        self,
        manifest_file: ManifestFile,
        part_size: int,
        is_same: Callable[[Intent], bool],
        *,
        replaces: str | None = None,
        frames: FrameLog | None = None,
    ) -> Intent:
        """Join the upload that is under way, if it is the same one, or begin an upload.

        Args:
            part_size: Part size of an upload that is begun here.
            is_same: Whether this upload would have the same parts as the intent's.
            replaces: Digest of the artifact that may be replaced.
            frames: Frames of a layer whose upload is begun here.

        Returns:
            The intent of the upload, which decides what is published at its end.

        Raises:
            TransferBusy: another process is uploading other content (for a layer: any content).
        """
        for _ in range(CLAIM_ATTEMPTS):
            intent = self._keeper.load()
            joins = intent is not None and is_same(intent)
            if self._exclusive or not joins:
                self.check_idle()
            if intent is not None:
                replaces = replaces or intent.replaces
            if self._join() if joins else self._begin(manifest_file, part_size, replaces, frames):
                return self._claimed()
        raise TransferBusy(f"too many processes begin an upload to {self.key!r}", key=self.key)

    def _claimed(self) -> Intent:
        if self.intent is None:
            raise AssertionError("a claimed upload has an intent")
        return self.intent

    def _join(self) -> bool:
        intent = self._claimed()
        self.take_up(intent.upload_id, intent.part_size)
        if self._exclusive:
            try:
                self.save()  # from now on with this process as the owner
            except NoSuchUpload:
                return False  # another process has just finished it, or given it up
        return True

    def _begin(
        self, manifest_file: ManifestFile, part_size: int, replaces: str | None, frames: FrameLog | None
    ) -> bool:
        before = self.intent
        self.create(part_size)
        if not self._keeper.begin(manifest_file, self.upload_id, part_size, replaces=replaces, frames=frames):
            self.store.abort_multipart(self.key, self.upload_id)
            return False
        if before is not None:
            # Not earlier: until the intent is ours, its owner may continue the upload.
            log.info("upload.superseded key=%s upload_id=%s", self.key, before.upload_id)
            self.store.abort_multipart(self.key, before.upload_id)
        self.is_new = True
        return True

    @override
    def take_up(self, upload_id: str, part_size: int) -> None:
        super().take_up(upload_id, part_size)
        self.is_new = False

    # During the upload

    @override
    def held(self) -> HeldParts:
        """The parts that the store holds, with the checksums that the intent records."""
        if self.is_new:
            return HeldParts([], {})
        remembered = self.intent.crcs if self.intent is not None and self.owns_intent else {}
        return HeldParts(self.store.list_parts(self.key, self.upload_id), remembered)

    def save(self, frames: FrameLog | None = None) -> None:
        """Write the checksums into the intent, which renews it.

        Raises:
            TransferBusy, NoSuchUpload: as `IntentKeeper.save`.
        """
        self._keeper.save(self.crcs, frames)

    def renew(self, frames: Callable[[], FrameLog] | None = None) -> None:
        """Save if the renewal of the intent is due."""
        if self._keeper.renewal_due():
            self.save(frames() if frames else None)

    # The end

    @override
    def abandon(self) -> None:
        """Abort the upload, and remove its intent."""
        super().abandon()
        self._keeper.remove(self.upload_id)

    def close(self) -> None:
        """Remove the intent after everything is published."""
        self._keeper.remove(self.upload_id)
