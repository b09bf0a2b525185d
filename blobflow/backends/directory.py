"""Directories: a snapshot of a tree of files, and a mirror that swaps whole trees."""

from __future__ import annotations

import errno
import os
import stat
import time
from array import array
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pydantic import ConfigDict, Field, JsonValue, field_validator

from blobflow.artifact.artifact import write_artifact
from blobflow.artifact.hashing import FileHash, hash_descriptor, hash_files
from blobflow.artifact.index import Index, Member, path_fault
from blobflow.artifact.landing import check_destination
from blobflow.artifact.limits import Tally
from blobflow.artifact.manifest import DATA_NAME, EXECUTABLE_MODE, FILE_MODE
from blobflow.artifact.members import open_regular
from blobflow.artifact.privacy import PrivateRows, directory_is_private, encode, file_is_private
from blobflow.backends.base import ExportResult, OnBytes
from blobflow.backends.files import all_or_nothing, copy_still, link_member, place_members, unsupported
from blobflow.backends.patterns import ExcludePatterns
from blobflow.backends.versioned_importer import VersionedImporter
from blobflow.checksum import EMPTY_SHA256
from blobflow.durable import check_room, copies_take_room
from blobflow.errors import (
    LEAVE_IT_OUT,
    NotFoundError,
    RefusedError,
    SourceBusy,
    SourceChanged,
    expanded,
    reading,
    setting,
    writing,
)
from blobflow.fields import KnownFields
from blobflow.trees import Cursor, Opened

BACKEND: Final = "directory"
_BLOCK_BYTES: Final = 512
"""The unit of `st_blocks`."""
_LEAST_HOLE_BYTES: Final = 64 * 1024
"""Smallest gap in one file that counts; a smaller one is not left as a hole on landing, either."""
_LAST_NS: Final = 2**63 - 1
"""The last time that an index can hold; file systems know later times."""

Symlinks: TypeAlias = Literal["refuse", "skip", "follow"]


class Scan:
    """The content of a directory: files and empty directories, and what was left out.

    It is stored in columns and sorted by path in UTF-8 order, as an index is; the paths of directories end in `/`.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes = array("q")
        self.modes = array("I")
        """Mode of the member: 644 or 755."""
        self.inodes = array("Q")
        self.mtimes_ns = array("q")
        self.ctimes_ns = array("q")
        self.private = bytearray()
        """Whether its group or everybody else cannot read it: 0 or 1."""
        self.excluded = 0
        self.unmatched: tuple[str, ...] = ()
        self.left_out: list[str] = []
        self.symlinks_skipped = 0
        self.holes = 0
        """Bytes of the files that take no room."""
        self._tally = Tally()

    def append(self, path: str, size: int, mode: int, status: os.stat_result, *, private: bool) -> None:
        """Add an entry; call `sort` after the last one.

        Raises:
            UnsupportedSource: an index cannot hold its time, or there are too many entries already.
        """
        self._tally.add(path, size)
        if abs(status.st_mtime_ns) > _LAST_NS:
            raise unsupported(path, "its modification time is after 2262 or before 1678", "touch it")
        self.paths.append(path)
        self.sizes.append(size)
        gap = size - status.st_blocks * _BLOCK_BYTES
        if gap >= _LEAST_HOLE_BYTES:
            self.holes += gap
        self.modes.append(mode)
        self.inodes.append(status.st_ino)
        self.mtimes_ns.append(status.st_mtime_ns)
        self.ctimes_ns.append(status.st_ctime_ns)
        self.private.append(private)

    def sort(self) -> None:
        """Sort the entries by path."""
        # Python compares strings by code point, which is the order of their UTF-8 bytes.
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        self.paths = [self.paths[i] for i in order]
        for column in (self.sizes, self.modes, self.inodes, self.mtimes_ns, self.ctimes_ns):
            column[:] = array(column.typecode, map(column.__getitem__, order))
        self.private[:] = bytes(map(self.private.__getitem__, order))


class DirectoryExporter(KnownFields):
    """Exports a directory tree.

    Mode `reference` copies nothing: the files are read again when they are sent, and refused if they changed. Mode
    `link` makes hard links, for sources that replace files instead of writing into them. Mode `copy` makes copies
    (reflinks if the file system can), each at a moment without a writer. So the source may be written to during the
    export, and its files may be from different moments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The directory to export.")
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Patterns of what to leave out, as in a .gitignore file: `*.tmp` and `cache/` anywhere, `/logs/*`"
        " from the root, `a/**/b` at any depth; `!keep.tmp` includes it again. Unmatched patterns are reported.",
    )
    symlinks: Symlinks = Field(
        default="refuse", description="`follow` follows links to files and directories inside the root only."
    )
    mode: Literal["reference", "link", "copy"] = Field(
        default="reference", description="Whether files are read in place, hard-linked or copied."
    )
    mtimes: Literal["keep", "drop"] = Field(
        default="keep",
        description="`drop` records 0 as the time of every member. Then trees with the same content have the same"
        " payload, whenever they were made, and the upload of one can continue with another.",
    )

    @field_validator("exclude")
    @classmethod
    def _can_match(cls, exclude: tuple[str, ...]) -> tuple[str, ...]:
        ExcludePatterns(exclude)
        return exclude

    @property
    def backend(self) -> str:
        return BACKEND

    def export(
        self,
        dest: Path,
        *,
        on_progress: OnBytes | None = None,
        found: Scan | None = None,
        known: Callable[[int], FileHash | None] = lambda _: None,
    ) -> ExportResult:
        """Write an artifact of the tree into `dest`; see `Exporter.export`.

        Args:
            found: The result of a `scan` made just now.
            known: Returns the hash of entry i of `found` if it is known without reading the file.

        Raises:
            NotFoundError: the source is not a directory.
            UnsupportedSource: an artifact cannot hold a symbolic link, device, socket or name of the source, or a file
                cannot be read; the message names it.
            SourceBusy: a file was written to or removed while it was read; with mode `copy`, a file was written to
                during each of several attempts to copy it.
            DestinationNotEmpty: `dest` holds something.
            DiskFull: there is no room at `dest`.
            Unsupported: mode `link` cannot make hard links at `dest`.
        """
        started = time.monotonic()
        root = self._root()
        check_destination(dest)
        if dest.resolve().is_relative_to(root):
            raise RefusedError(
                f"the artifact {dest} would be inside its own source {root}", hint="name a directory elsewhere"
            )
        with all_or_nothing(dest):
            found = found or self.scan()
            with writing(dest):
                dest.mkdir(parents=True, exist_ok=True)
            paths = found.paths
            if self.mode == "copy" and copies_take_room(root, dest):
                check_room(dest, sum(found.sizes) - found.holes)
            data = self._materialise(found, root, dest / DATA_NAME)
            if self.mode == "copy":
                found = _scan_of_copies(data, found)
            total = sum(found.sizes)
            index = Index()
            hashes = hash_files(
                len(paths),
                found.sizes.__getitem__,
                lambda i, buffer: known(i) or _hash_stable(data, found, i, buffer),
                on_batch=(lambda _, done: on_progress(done, total)) if on_progress else None,
            )
            for path, mode, mtime_ns, hashed in zip(paths, found.modes, found.mtimes_ns, hashes, strict=True):
                kept_ns = mtime_ns if self.mtimes == "keep" else 0
                index.append(Member(path, hashed.size, mode, kept_ns, hashed.sha256, hashed.crc32c))
            cursor = self._cursor(data, paths)
            origins = (found.inodes, found.mtimes_ns) if self.mode == "reference" else None
            with writing(dest):
                artifact = write_artifact(
                    dest,
                    index,
                    backend=self.backend,
                    cursor=cursor,
                    origins=origins,
                    private=encode(found.private),
                    holes=found.holes,
                )
        return ExportResult(
            artifact=artifact,
            members=len(index),
            bytes=index.total_bytes,
            excluded=found.excluded,
            unmatched=found.unmatched,
            left_out=tuple(found.left_out),
            symlinks_skipped=found.symlinks_skipped,
            seconds=time.monotonic() - started,
        )

    def _cursor(self, root: Path, paths: Sequence[str]) -> JsonValue:
        """The tree's position in its history, for exporters that know the files below `root`."""
        del root, paths
        return None

    def _root(self) -> Path:
        try:
            with reading(self.path):
                root = expanded(self.path).resolve(strict=True)
        except SourceChanged as error:
            raise NotFoundError(f"source {self.path} does not exist", path=str(self.path)) from error
        if not root.is_dir():
            raise NotFoundError(f"source {self.path} is not a directory", path=str(self.path))
        return root

    def scan(self) -> Scan:
        """The content of the tree, without opening a file.

        Raises:
            NotFoundError, UnsupportedSource: as `export`.
            SourceChanged: a directory was removed while it was read.
        """
        root = self._root()
        found = Scan()
        patterns = ExcludePatterns(self.exclude)
        with reading(str(root)), Opened(root) as top, Cursor(top) as cursor:
            # For each directory from the root to the cursor: the prefix of its members' paths, and the names of its
            # subdirectories that are still to be read. `hidden` records whether only the owner can enter one of these
            # directories.
            prefixes, hidden = [""], [directory_is_private(os.fstat(top).st_mode)]
            pending = [self._look(cursor, "", found, patterns, str(root), hidden=hidden[-1])]
            while pending:
                if not pending[-1]:
                    pending.pop()
                    prefixes.pop()
                    hidden.pop()
                    if pending:
                        cursor.leave()
                    continue
                name, is_link, is_hidden = pending[-1].pop()
                prefix = f"{prefixes[-1]}{name}/"
                with reading(prefix):
                    cursor.enter(name, follow=is_link)
                    closed = directory_is_private(os.fstat(cursor.descriptor).st_mode)
                prefixes.append(prefix)
                hidden.append(hidden[-1] or is_hidden or closed)
                pending.append(self._look(cursor, prefix, found, patterns, str(root), hidden=hidden[-1]))
        found.sort()
        found.unmatched = patterns.unmatched
        found.left_out.sort()
        return found

    def _leaves_out(self, name: str, *, is_directory: bool) -> bool:
        """Whether an entry of that name is not content of the source, for exporters that know it."""
        del name, is_directory
        return False

    def _look(
        self, cursor: Cursor, prefix: str, found: Scan, patterns: ExcludePatterns, root: str, *, hidden: bool
    ) -> list[tuple[str, bool, bool]]:
        """Add the files of the cursor's directory, and find its subdirectories.

        Args:
            hidden: Whether only the owner can enter it.

        Returns:
            For each subdirectory: its name, whether it is a link, and whether it leads to a place that only the owner
            can enter.
        """
        below: list[tuple[str, bool, bool]] = []
        kept = 0
        with reading(prefix or root), os.scandir(cursor.descriptor) as listed:
            entries = list(listed)
        for entry in entries:
            path = prefix + entry.name
            may_be_directory = _may_be_directory(entry)
            if patterns.excludes(path, is_directory=may_be_directory):
                found.excluded += 1
                continue
            if self._leaves_out(entry.name, is_directory=may_be_directory):
                found.left_out.append(path + "/" * may_be_directory)
                continue
            if fault := path_fault(path):
                raise unsupported(path, fault, f"rename it, or {LEAVE_IT_OUT}")
            is_link, is_hidden = entry.is_symlink(), hidden
            if is_link:
                if self.symlinks == "skip":
                    found.symlinks_skipped += 1
                    continue
                is_hidden |= self._check_link(cursor, entry.name, path, root)
            kept += 1
            with reading(path):
                is_directory, status = entry.is_dir(), entry.stat()
            if is_directory:
                below.append((entry.name, is_link, is_hidden))
                continue
            if not stat.S_ISREG(status.st_mode):
                raise unsupported(path, "it is a device, socket or pipe", LEAVE_IT_OUT)
            mode = EXECUTABLE_MODE if status.st_mode & stat.S_IXUSR else FILE_MODE
            found.append(path, status.st_size, mode, status, private=is_hidden or file_is_private(status.st_mode))
        if not kept and prefix:
            with reading(prefix):
                found.append(prefix, 0, EXECUTABLE_MODE, os.fstat(cursor.descriptor), private=hidden)
        return below

    def _check_link(self, cursor: Cursor, name: str, path: str, root: str) -> bool:
        """Refuse a link that must not be followed; returns whether only the owner can enter its target's place."""
        if self.symlinks == "refuse":
            remedies = f"{setting('symlinks', 'skip')}, {setting('symlinks', 'follow')}, or {LEAVE_IT_OUT}"
            raise unsupported(path, "it is a symbolic link", remedies)
        with reading(path):
            try:
                target = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=cursor.descriptor)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                raise unsupported(path, "it is a symbolic link to nothing", f"remove it, or {LEAVE_IT_OUT}") from error
            try:
                real, status = os.readlink(f"/proc/self/fd/{target}"), os.fstat(target)
            finally:
                os.close(target)
        if not Path(real).is_relative_to(root):
            raise unsupported(path, f"it is a symbolic link to {real}, outside of the source", LEAVE_IT_OUT)
        if (status.st_dev, status.st_ino) in cursor.identities:
            raise unsupported(path, "it is a symbolic link to a directory above it", LEAVE_IT_OUT)
        with reading(path):
            above = takewhile(lambda directory: directory != Path(root), Path(real).parents)
            return any(directory_is_private(directory.stat().st_mode) for directory in above)

    def _materialise(self, found: Scan, root: Path, data: Path) -> Path:
        """Put the members below `data` according to the mode, and return the directory to read them from."""
        if self.mode == "reference":
            with writing(data):
                data.symlink_to(root)
            return root
        if self.mode == "link":
            # The links have the modes of their files, so the directory must deny access to others.
            place_members(found.paths, root, data, link_member, closed=any(found.private))
        else:
            place_members(found.paths, root, data, copy_still, PrivateRows(encode(found.private)))
        return data


def _may_be_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is a directory or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a circular link, for example; reading it will show the error
        return False


def _scan_of_copies(data: Path, found: Scan) -> Scan:
    """The scan of the copies; the source may have been written to since its scan."""
    copies = Scan()
    with Opened(data) as root:
        for path, mode, private in zip(found.paths, found.modes, found.private, strict=True):
            status = os.stat(path, dir_fd=root)
            copies.append(path, 0 if path.endswith("/") else status.st_size, mode, status, private=bool(private))
    copies.excluded, copies.symlinks_skipped = found.excluded, found.symlinks_skipped
    copies.unmatched, copies.left_out = found.unmatched, found.left_out
    return copies


def _hash_stable(root: Path, found: Scan, i: int, buffer: memoryview) -> FileHash:
    """Hash entry `i` of a scan and prove that it was not written to between the scan and the end of the reading."""
    path = found.paths[i]
    if path.endswith("/"):
        return FileHash(0, EMPTY_SHA256, 0)
    with open_regular(root, path) as file, reading(path):
        hashed = hash_descriptor(file.fileno(), buffer)
        status = os.fstat(file.fileno())
    seen = (hashed.size, status.st_size, status.st_mtime_ns, status.st_ino)
    if seen != (found.sizes[i], found.sizes[i], found.mtimes_ns[i], found.inodes[i]):
        raise SourceBusy(f"source file {path!r} changed while it was exported", path=path, what="size or mtime")
    return hashed


class DirectoryImporter(VersionedImporter):
    """Keeps a mirror of a directory: `<path>/current` always shows one whole tree.

    A reader that opened the old tree keeps it until that version is removed.
    """

    @property
    def backend(self) -> str:
        return BACKEND
