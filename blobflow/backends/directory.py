"""Directories: a snapshot of a tree of files, and a mirror that swaps whole trees."""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from blobflow.artifact.artifact import write_artifact
from blobflow.artifact.hashing import FileHash, hash_descriptor, hash_files
from blobflow.artifact.manifest import DATA_NAME
from blobflow.artifact.members import open_regular
from blobflow.backends.base import ExportResult, OnProgress
from blobflow.backends.files import all_or_nothing, place_members, reading, unsupported
from blobflow.backends.versions import VersionedImporter
from blobflow.checksum import EMPTY_SHA256
from blobflow.errors import NotFoundError, RefusedError, SourceChanged, writing

BACKEND: Final = "directory"


class Scan:
    """What a directory holds: files and empty directories by path, and what was left out."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, os.stat_result]] = []
        self.excluded = 0
        self.symlinks_skipped = 0


class DirectoryExporter(BaseModel):
    """Exports a directory tree.

    Modes: `reference` copies nothing (the files are read again when they are sent, and refused if they changed),
    `link` makes hard links (for sources that replace files instead of writing into them), `copy` makes copies
    (reflinks where the file system can).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The directory to export.")
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Patterns (`*`, `?`, `[...]`) against the name of an entry, or, with a `/`, against its path.",
    )
    symlinks: Literal["refuse", "skip", "follow"] = Field(
        default="refuse", description="`follow` follows links to files and directories inside the root only."
    )
    mode: Literal["reference", "link", "copy"] = Field(
        default="reference", description="Whether files are read where they lie, hard-linked or copied."
    )
    mtimes: Literal["keep", "drop"] = Field(
        default="keep",
        description="`drop` records 0 as the time of every member: trees of the same content, whenever they were made,"
        " then give the same payload, so that the upload of one can be continued with another.",
    )

    @property
    def backend(self) -> str:
        return BACKEND

    def export(
        self,
        dest: Path,
        *,
        on_progress: OnProgress | None = None,
        found: Scan | None = None,
        known: Callable[[str], FileHash | None] = lambda _: None,
    ) -> ExportResult:
        """Write an artifact of the tree into `dest`; see `Exporter.export`.

        Args:
            found: What `scan` has just found.
            known: The hash of a member that need not be read for it.

        Raises:
            NotFoundError: the source is no directory.
            UnsupportedSource: naming a symbolic link, device, socket or name that an artifact cannot hold, or a file
                that cannot be read.
            SourceChanged: a file was written to or removed while it was read.
            DestinationNotEmpty: `dest` holds something.
            DiskFull: there is no room at `dest`.
            Unsupported: mode `link` cannot make hard links at `dest`.
        """
        # Not at the top: pyarrow behind them costs 0.3 s, and a pipeline is defined more often than it is run.
        from blobflow.artifact.index import EXECUTABLE_MODE, FILE_MODE, Index, Member
        from blobflow.artifact.landing import check_destination

        started = time.monotonic()
        root = self._root()
        check_destination(dest)
        if dest.resolve().is_relative_to(root):
            raise RefusedError(
                f"the artifact {dest} would lie inside its own source {root}", hint="name a directory elsewhere"
            )
        found = found or self.scan()
        with all_or_nothing(dest):
            with writing(dest):
                dest.mkdir(parents=True, exist_ok=True)
            paths = [path for path, _ in found.entries]
            statuses = [status for _, status in found.entries]
            data = self._materialise(paths, root, dest / DATA_NAME)
            total = sum(status.st_size for path, status in found.entries if not path.endswith("/"))
            index = Index()
            hashes = hash_files(
                len(paths),
                lambda i: statuses[i].st_size,
                lambda i, buffer: (
                    known(paths[i]) or _hash_stable(data, paths[i], statuses[i], buffer, copied=self.mode == "copy")
                ),
                on_batch=(lambda _, done: on_progress(done, total)) if on_progress else None,
            )
            for path, status, hashed in zip(paths, statuses, hashes, strict=True):
                mode = EXECUTABLE_MODE if path.endswith("/") or status.st_mode & stat.S_IXUSR else FILE_MODE
                mtime_ns = status.st_mtime_ns if self.mtimes == "keep" else 0
                index.append(Member(path, hashed.size, mode, mtime_ns, hashed.sha256, hashed.crc32c))
            cursor = self._cursor(data, paths)
            origins = None
            if self.mode == "reference":
                origins = [status.st_ino for status in statuses], [status.st_mtime_ns for status in statuses]
            with writing(dest):
                artifact = write_artifact(dest, index, backend=self.backend, cursor=cursor, origins=origins)
        return ExportResult(
            artifact=artifact,
            members=len(index),
            bytes=index.total_bytes,
            excluded=found.excluded,
            symlinks_skipped=found.symlinks_skipped,
            seconds=time.monotonic() - started,
        )

    def _cursor(self, root: Path, paths: Sequence[str]) -> JsonValue:
        """Where in its history the tree stands, for exporters that know what is in the files below `root`."""
        del root, paths
        return None

    def _root(self) -> Path:
        try:
            root = self.path.expanduser().resolve(strict=True)
        except OSError as error:
            raise NotFoundError(f"source {self.path} does not exist", path=str(self.path)) from error
        if not root.is_dir():
            raise NotFoundError(f"source {self.path} is not a directory", path=str(self.path))
        return root

    def scan(self) -> Scan:
        """Look at every entry of the tree; no file is opened.

        Raises:
            NotFoundError, UnsupportedSource, SourceChanged: as `export`.
        """
        root = self._root()
        found = Scan()
        # Directories still to read, each with its path in the artifact and the real directories above it.
        pending: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", (str(root),))]
        while pending:
            directory, prefix, above = pending.pop()
            kept = 0
            for entry in _entries(directory, prefix):
                path = prefix + entry.name
                if self._is_excluded(entry.name, path):
                    found.excluded += 1
                    continue
                _check_name(path)
                if entry.is_symlink():
                    if self.symlinks == "skip":
                        found.symlinks_skipped += 1
                        continue
                    self._check_link(entry.path, path, above)
                kept += 1
                with reading(path):
                    directory_below, status = entry.is_dir(), entry.stat()
                if directory_below:
                    pending.append((entry.path, path + "/", (*above, os.path.realpath(entry.path))))
                    continue
                if not stat.S_ISREG(status.st_mode):
                    raise unsupported(path, "it is a device, socket or pipe", "exclude it")
                found.entries.append((path, status))
            if not kept and prefix:
                with reading(prefix):
                    found.entries.append((prefix, os.stat(directory)))
        # Python compares strings by code point, which is the order of their UTF-8 bytes.
        found.entries.sort(key=lambda entry: entry[0])
        return found

    def _is_excluded(self, name: str, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in self.exclude)

    def _check_link(self, link: str, path: str, above: tuple[str, ...]) -> None:
        if self.symlinks == "refuse":
            raise unsupported(path, "it is a symbolic link", "skip or follow symbolic links, or exclude it")
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(above[0]):
            raise unsupported(path, f"it is a symbolic link to {target}, outside of the source", "exclude it")
        if not target.exists():
            raise unsupported(path, "it is a symbolic link to nothing", "remove it, or exclude it")
        if any(Path(parent).is_relative_to(target) for parent in above):
            raise unsupported(path, "it is a symbolic link to a directory above it", "exclude it")

    def _materialise(self, paths: Sequence[str], root: Path, data: Path) -> Path:
        """Put the members under `data` as the mode says, and return the directory to read them from."""
        if self.mode == "reference":
            with writing(data):
                data.symlink_to(root)
            return root
        place_members(paths, root, data, os.link if self.mode == "link" else shutil.copy2)
        return data


def _check_name(path: str) -> None:
    from blobflow.artifact.index import path_fault

    if fault := path_fault(path):
        raise unsupported(path, fault, "rename it, or exclude it")


def _entries(directory: str, path: str) -> list[os.DirEntry[str]]:
    with reading(path or directory), os.scandir(directory) as entries:
        return list(entries)


def _hash_stable(root: Path, path: str, expected: os.stat_result, buffer: memoryview, *, copied: bool) -> FileHash:
    """Hash a file and prove that nobody wrote to it between the scan and the end of the reading."""
    if path.endswith("/"):
        return FileHash(0, EMPTY_SHA256, 0)
    with open_regular(root, path) as file, reading(path):
        hashed = hash_descriptor(file.fileno(), buffer)
        status = os.fstat(file.fileno())
    seen = (hashed.size, status.st_size, status.st_mtime_ns, status.st_ino)
    inode = status.st_ino if copied else expected.st_ino
    if seen != (expected.st_size, expected.st_size, expected.st_mtime_ns, inode):
        raise SourceChanged(f"source file {path!r} changed while it was exported", path=path, what="size or mtime")
    return hashed


class DirectoryImporter(VersionedImporter):
    """Keeps a mirror of a directory: `<path>/current` always shows one whole tree.

    A reader that opened the old tree keeps it until that version is removed.
    """

    @property
    def backend(self) -> str:
        return BACKEND
