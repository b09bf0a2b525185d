"""Directories: a snapshot of a tree of files, and a mirror that swaps whole trees."""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from blobflow.artifact.artifact import Artifact, write_artifact
from blobflow.artifact.hashing import FileHash, hash_descriptor, hash_files
from blobflow.artifact.manifest import DATA_NAME, INDEX_NAME, MANIFEST_NAME
from blobflow.artifact.members import open_regular, verify_members
from blobflow.backends.base import ExportResult, ImportResult, OnProgress
from blobflow.checksum import EMPTY_SHA256
from blobflow.errors import (
    ArtifactNotFound,
    NotFoundError,
    RefusedError,
    SourceChanged,
    UnsupportedSource,
)

BACKEND: Final = "directory"


class _Found:
    """The outcome of a scan: files and empty directories by path, and what was left out."""

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
    mode: Literal["reference", "link", "copy"] = Field(default="reference")

    @property
    def backend(self) -> str:
        return BACKEND

    def export(self, dest: Path, *, on_progress: OnProgress | None = None) -> ExportResult:
        """Write an artifact of the tree into `dest`; see `Exporter.export`.

        Raises:
            NotFoundError: the source is no directory.
            UnsupportedSource: naming a symbolic link, device, socket or name that an artifact cannot hold.
            SourceChanged: a file was written to while it was read.
            DestinationNotEmpty: `dest` holds something.
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
        found = self._scan(root)
        created = not dest.exists()
        dest.mkdir(parents=True, exist_ok=True)
        try:
            paths = [path for path, _ in found.entries]
            statuses = [status for _, status in found.entries]
            data = self._materialise(paths, root, dest / DATA_NAME)
            total = sum(status.st_size for path, status in found.entries if not path.endswith("/"))
            index = Index()
            hashes = hash_files(
                len(paths),
                lambda i: statuses[i].st_size,
                lambda i, buffer: _hash_stable(data, paths[i], statuses[i], buffer, copied=self.mode == "copy"),
                on_batch=(lambda _, done: on_progress(done, total)) if on_progress else None,
            )
            for path, status, hashed in zip(paths, statuses, hashes, strict=True):
                mode = EXECUTABLE_MODE if path.endswith("/") or status.st_mode & stat.S_IXUSR else FILE_MODE
                index.append(Member(path, hashed.size, mode, status.st_mtime_ns, hashed.sha256, hashed.crc32c))
            inodes = [status.st_ino for status in statuses] if self.mode == "reference" else None
            artifact = write_artifact(dest, index, backend=BACKEND, inodes=inodes)
        except BaseException:
            remove_tree(dest)
            if not created:
                dest.mkdir()
            raise
        return ExportResult(
            artifact=artifact,
            members=len(index),
            bytes=index.total_bytes,
            excluded=found.excluded,
            symlinks_skipped=found.symlinks_skipped,
            seconds=time.monotonic() - started,
        )

    def _root(self) -> Path:
        try:
            root = self.path.expanduser().resolve(strict=True)
        except OSError as error:
            raise NotFoundError(f"source {self.path} does not exist", path=str(self.path)) from error
        if not root.is_dir():
            raise NotFoundError(f"source {self.path} is not a directory", path=str(self.path))
        return root

    def _scan(self, root: Path) -> _Found:
        found = _Found()
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
                if entry.is_dir():
                    pending.append((entry.path, path + "/", (*above, os.path.realpath(entry.path))))
                    continue
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise _unsupported(path, "it is a device, socket or pipe", "exclude it")
                found.entries.append((path, status))
            if not kept and prefix:
                found.entries.append((prefix, os.stat(directory)))
        # Python compares strings by code point, which is the order of their UTF-8 bytes.
        found.entries.sort(key=lambda entry: entry[0])
        return found

    def _is_excluded(self, name: str, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in self.exclude)

    def _check_link(self, link: str, path: str, above: tuple[str, ...]) -> None:
        if self.symlinks == "refuse":
            raise _unsupported(path, "it is a symbolic link", "skip or follow symbolic links, or exclude it")
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(above[0]):
            raise _unsupported(path, f"it is a symbolic link to {target}, outside of the source", "exclude it")
        if not target.exists():
            raise _unsupported(path, "it is a symbolic link to nothing", "remove it, or exclude it")
        if any(Path(parent).is_relative_to(target) for parent in above):
            raise _unsupported(path, "it is a symbolic link to a directory above it", "exclude it")

    def _materialise(self, paths: Sequence[str], root: Path, data: Path) -> Path:
        """Put the members under `data` as the mode says, and return the directory to read them from."""
        if self.mode == "reference":
            data.symlink_to(root)
            return root
        _place_members(paths, root, data, os.link if self.mode == "link" else shutil.copy2)
        return data


class DirectoryImporter(BaseModel):
    """Keeps a mirror of a directory: `<path>/current` always shows one whole tree.

    Each version is an artifact directory `<path>/versions/<id>`; `current` is a symbolic link to the `data` of the
    newest, replaced by one atomic rename. A reader that opened the old tree keeps it until that version is removed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The directory that holds `current` and `versions`.")
    keep_versions: int = Field(default=2, ge=1, description="Versions kept, the current one included.")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()

    @property
    def backend(self) -> str:
        return BACKEND

    @property
    def _versions(self) -> Path:
        return self.path / "versions"

    def staging(self, artifact_digest: str) -> Path:
        return self.path / ".incoming" / _version_name(artifact_digest)

    def current(self) -> Artifact | None:
        """The artifact whose tree `current` shows, or None."""
        link = self.path / "current"
        try:
            return Artifact.open(Path(os.path.realpath(link, strict=True)).parent)
        except (OSError, ArtifactNotFound):
            return None

    def import_artifact(
        self, artifact: Artifact, *, consume: bool = False, on_progress: OnProgress | None = None
    ) -> ImportResult:
        """Verify every member of the artifact, keep it as a version, and show it as `current`.

        Raises:
            DigestMismatch: a member is not what the index says; nothing was changed.
            RefusedError: `current` is not a link, or the artifact came from another backend.
        """
        started = time.monotonic()
        if artifact.manifest.backend != BACKEND:
            raise RefusedError(
                f"{artifact!r} was made by backend {artifact.manifest.backend!r}, this importer takes {BACKEND!r}",
                hint=f"import it with the importer for {artifact.manifest.backend!r}",
            )
        link = self.path / "current"
        if link.exists() and not link.is_symlink():
            raise RefusedError(f"{link} is not a symbolic link", hint="name another path, or move it away")
        alive = self.current()
        if alive is not None and alive.digest == artifact.digest:
            if consume and artifact.path != alive.path:
                remove_tree(artifact.path)
            return self._result("unchanged", artifact, started, [])
        verify_members(artifact, on_progress=on_progress)
        version = self._keep(artifact, consume=consume)
        self._show(version, link)
        return self._result("imported", artifact, started, list(self._prune(version)))

    def _result(
        self, status: Literal["imported", "unchanged"], artifact: Artifact, started: float, removed: list[str]
    ) -> ImportResult:
        manifest = artifact.manifest
        return ImportResult(
            status=status,
            path=self.path / "current",
            artifact_digest=artifact.digest,
            members=manifest.members,
            bytes=manifest.bytes,
            cursor=manifest.cursor,
            seconds=time.monotonic() - started,
            removed_versions=removed,
        )

    def _keep(self, artifact: Artifact, *, consume: bool) -> Path:
        """Make the artifact a version: by rename if it may be consumed, by copy otherwise."""
        from blobflow.artifact.landing import fsync_directory, sync_tree

        version = self._versions / _version_name(artifact.digest)
        self._versions.mkdir(parents=True, exist_ok=True)
        if artifact.path == version:
            return version
        if version.exists():
            # An older import of the same artifact; it was not verified now, the new one was.
            retired = version.with_name(f".{version.name}.retired")
            remove_tree(retired)
            os.rename(version, retired)
            remove_tree(retired)
        movable = consume and not artifact.is_reference
        if movable and artifact.path.stat().st_dev == self._versions.stat().st_dev:
            os.rename(artifact.path, version)
        else:
            partial = version.with_name(f".{version.name}.partial")
            remove_tree(partial)
            partial.mkdir()
            _place_members(artifact.index.paths, artifact.data, partial / DATA_NAME, shutil.copy2)
            for name in (INDEX_NAME, MANIFEST_NAME):
                shutil.copy2(artifact.path / name, partial / name)
            sync_tree(partial)
            os.rename(partial, version)
            if consume:
                remove_tree(artifact.path)
        fsync_directory(self._versions)
        return version

    def _show(self, version: Path, link: Path) -> None:
        from blobflow.artifact.landing import fsync_directory

        fresh = self.path / ".current.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path("versions") / version.name / DATA_NAME)
        os.replace(fresh, link)
        fsync_directory(self.path)

    def _prune(self, current: Path) -> Iterator[str]:
        """Remove versions beyond `keep_versions`, oldest first, and whatever a killed import left."""
        versions = [entry for entry in self._versions.iterdir() if entry != current]
        complete = [entry for entry in versions if not entry.name.startswith(".")]
        complete.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
        for entry in complete[self.keep_versions - 1 :]:
            remove_tree(entry)
            yield entry.name
        for entry in versions:
            if entry.name.startswith("."):
                remove_tree(entry)


def remove_tree(path: Path) -> None:
    """Remove a directory tree of ours; absent is fine. Links are removed, not followed."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _version_name(artifact_digest: str) -> str:
    return artifact_digest.removeprefix("sha256:")[:16]


def _check_name(path: str) -> None:
    from blobflow.artifact.index import path_fault

    if fault := path_fault(path):
        raise _unsupported(path, fault, "rename it, or exclude it")


def _unsupported(path: str, reason: str, remedy: str) -> UnsupportedSource:
    shown = path.encode("utf-8", "backslashreplace").decode()
    return UnsupportedSource(f"{shown!r} cannot be exported: {reason}", hint=remedy, path=shown, reason=reason)


def _entries(directory: str, path: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except OSError as error:
        raise _unsupported(
            path or directory, f"it cannot be read: {error.strerror}", "give permission to read it, or exclude it"
        ) from error


def _hash_stable(root: Path, path: str, expected: os.stat_result, buffer: memoryview, *, copied: bool) -> FileHash:
    """Hash a file and prove that nobody wrote to it between the scan and the end of the reading."""
    if path.endswith("/"):
        return FileHash(0, EMPTY_SHA256, 0)
    with open_regular(root, path) as file:
        hashed = hash_descriptor(file.fileno(), buffer)
        status = os.fstat(file.fileno())
    seen = (hashed.size, status.st_size, status.st_mtime_ns, status.st_ino)
    inode = status.st_ino if copied else expected.st_ino
    if seen != (expected.st_size, expected.st_size, expected.st_mtime_ns, inode):
        raise SourceChanged(f"source file {path!r} changed while it was exported", path=path, what="size or mtime")
    return hashed


def _place_members(paths: Sequence[str], root: Path, data: Path, place: Callable[[Path, Path], object]) -> None:
    """Bring the members at `paths` from `root` to `data`; `place` links or copies one file."""
    data.mkdir()
    for path in paths:
        target = data / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            target.mkdir()
        else:
            place(Path(os.path.realpath(root / path)), target)
