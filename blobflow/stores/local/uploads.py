"""An upload directory of the local store: its intent, its journal of parts, and the locks of its parts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from blobflow.durable import append_lines, lock, unlock_and_close, whole_lines
from blobflow.errors import ArtifactInvalid, UploadIncomplete
from blobflow.private import PrivateDirectory
from blobflow.stores.base import PartMeta, is_key
from blobflow.stores.local.files import no_such_upload, part_meta, translated
from blobflow.untrusted import bounded_time, read_object

_READ_BYTES = 1024 * 1024
_PART_LOCKS = 64
_MAX_PARTS = 10_000


class JournalState(NamedTuple):
    """The parts in a journal up to byte `read_to`; never changed in place, because threads share it."""

    parts: dict[int, PartMeta]
    read_to: int


@dataclass
class OpenUpload:
    """An open upload directory."""

    key: str
    upload_id: str
    directory: PrivateDirectory
    part_size: int
    journals: dict[str, JournalState]

    def parts(self) -> dict[int, PartMeta]:
        """The acknowledged parts by number, including those of other processes."""
        with translated("list_parts", self.key):
            try:
                journal = os.fdopen(self.directory.open("parts.jsonl", os.O_RDONLY), "rb")
            except FileNotFoundError:
                raise no_such_upload(self.key, self.upload_id) from None
            with journal:
                # Each read starts where an earlier one ended, with a copy of its parts.
                state = self.journals.get(self.upload_id, JournalState({}, 0))
                parts, read_to = dict(state.parts), state.read_to
                for end, line in whole_lines(journal, state.read_to, longest=_READ_BYTES):
                    _replay(parts, line)
                    read_to = end
                self.journals[self.upload_id] = JournalState(parts, read_to)
                return parts

    @contextmanager
    def part_lock(self, part_number: int) -> Generator[None]:
        """Lock a part against other writers, so that all of its bytes come from one of them."""
        with translated("put_part", self.key):
            try:
                with self.directory.below("part-locks") as locks:
                    fd = locks.open(str(part_number % _PART_LOCKS), os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                raise no_such_upload(self.key, self.upload_id) from None
        try:
            lock(fd)
            yield
        finally:
            unlock_and_close(fd)

    @contextmanager
    def open_for_writing(self) -> Generator[tuple[int, int]]:
        """Descriptors of payload and journal."""
        fds: list[int] = []
        try:
            with translated("open_upload", self.key):
                try:
                    for name, flags in (("payload", os.O_WRONLY), ("parts.jsonl", os.O_WRONLY | os.O_APPEND)):
                        fds.append(self.directory.open(name, flags))
                except FileNotFoundError:
                    raise no_such_upload(self.key, self.upload_id) from None
            yield fds[0], fds[1]
        finally:
            for fd in fds:
                os.close(fd)

    @staticmethod
    def append(journal: int, part_number: int, size: int | None, checksum: int | None) -> None:
        """Record a part durably; `size` None revokes an earlier record."""
        append_lines(journal, [json.dumps({"part": part_number, "size": size, "crc32c": checksum})])
        os.fdatasync(journal)


def read_upload_intent(data: bytes) -> dict[str, Any]:
    """The contents of `upload.json`; `created` is a datetime.

    Raises:
        ArtifactInvalid: the file is damaged.
    """
    intent: dict[str, Any] = read_object(data, "upload.json")
    key, part_size = intent.get("key"), intent.get("part_size")
    try:
        created = bounded_time(datetime.fromisoformat(str(intent.get("created"))))
    except ValueError:
        created = None
    if not isinstance(key, str) or not is_key(key) or not isinstance(part_size, int) or created is None:
        raise ArtifactInvalid("upload.json is damaged", what="upload.json")
    if not 1 <= part_size < 1 << 50:
        raise ArtifactInvalid("upload.json has an impossible part size", what="upload.json")
    return {**intent, "created": created}


def _replay(parts: dict[int, PartMeta], line: bytes) -> None:
    try:
        record = read_object(line, "journal")
    except ArtifactInvalid:
        return  # empty, or the torn record of a process that died: that part was not acknowledged
    number, size, checksum = (record.get(name) for name in ("part", "size", "crc32c"))
    if not isinstance(number, int) or not 1 <= number <= _MAX_PARTS:
        return  # the record is damaged, so the part is sent again
    if size is None or not (isinstance(size, int) and isinstance(checksum, int)):
        parts.pop(number, None)
    else:
        parts[number] = part_meta(number, size, checksum)


def check_parts(key: str, parts: Sequence[PartMeta], held: dict[int, PartMeta], part_size: int) -> int:
    """The size of the object made of `parts`.

    Raises:
        UploadIncomplete: the parts have gaps in their numbers, differ from the journal, or leave holes in the payload.
    """

    def incomplete(reason: str) -> UploadIncomplete:
        return UploadIncomplete(
            f"{key!r} cannot be completed: {reason}", key=key, expected=len(parts), actual=len(held)
        )

    if not parts:
        raise incomplete("no parts were named")
    for number, part in enumerate(sorted(parts), start=1):
        if part.part_number != number:
            raise incomplete(f"part {number} was not named")
        if number not in held:
            raise incomplete(f"the store does not hold part {number}")
        if (part.size, part.e_tag) != (held[number].size, held[number].e_tag):
            raise incomplete(f"the store holds another part {number}")
        if part.size != part_size and number != len(parts):
            raise incomplete(f"part {number} has {part.size} bytes instead of {part_size}, and is not the last")
    return sum(part.size for part in parts)


def is_upload_id(upload_id: str) -> bool:
    """Whether the text has the form of an upload id."""
    return re.fullmatch(r"[0-9a-f]{32}", upload_id) is not None
