"""The base of all importers: a mirror with whole versions side by side, one of which is shown."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, Literal

from pydantic import ConfigDict, Field, JsonValue, field_validator

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.leftovers import remove_stages
from blobflow.artifact.manifest import DATA_NAME, INDEX_NAME, MANIFEST_NAME
from blobflow.artifact.members import verify_members
from blobflow.backends.base import ImportResult, OnBytes
from blobflow.backends.files import copy_member, place_members
from blobflow.backends.mirror_history import HistoryEntry, add_to_history, read_history
from blobflow.durable import check_room, copies_take_room, fsync_directory, replace_file, sync_tree, take_lock_file
from blobflow.errors import ArtifactNotFound, RefusedError, UnsupportedSource, expanded, writing
from blobflow.fields import KnownFields
from blobflow.trees import remove_tree
from blobflow.untrusted import quoted

CURRENT_NAME: Final = "current"
INCOMING_NAME: Final = ".incoming"

_LOCK_NAME: Final = ".lock"
_VERSION_DIGITS: Final = 16
"""Digits of the artifact digest in a version's name: enough for the few versions of one mirror."""


class VersionedImporter(KnownFields, ABC):
    """Keeps a mirror of versions: `<path>/current` always shows the data of one whole artifact.

    Each version is an artifact directory `<path>/versions/<id>`. `current` is a symbolic link to the `data` of the
    newest, replaced by one atomic rename. The files that a database keeps beside its file (journals, locks) stay with
    their version, so they are never applied to the file of another one.

    An import is `prepare`, `verify_open`, `load`, `swap`, in this order. The first two refuse what must be refused,
    before anything is moved; nothing is visible before the last. Backends override `cursor`, and the steps to which
    they add something.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The directory that holds `current` and `versions`.")
    keep_versions: int = Field(default=2, ge=1, description="Versions kept, the current one included.")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return expanded(path).absolute()

    @property
    @abstractmethod
    def backend(self) -> str:
        """The backend of the artifacts that it imports."""

    @property
    def data(self) -> Path:
        """The path that shows the mirror's data; absent before the first import."""
        return self.path / CURRENT_NAME

    @property
    def _versions(self) -> Path:
        return self.path / "versions"

    def staging(self, artifact_digest: str) -> Path:
        return self.path / INCOMING_NAME / _version_name(artifact_digest)

    def current(self) -> Artifact | None:
        """The artifact that `current` shows, even if its data was written to since; None before the first import."""
        return shown_artifact(self.path)

    def cursor(self) -> JsonValue:
        """The mirror's position in the source's history; None before the first import, or if it is unknown."""
        alive = self.current()
        return alive.manifest.cursor if alive else None

    def import_artifact(
        self,
        artifact: Artifact,
        *,
        consume: bool = False,
        on_progress: OnBytes | None = None,
        key: str | None = None,
    ) -> ImportResult:
        """Verify every member of the artifact, keep it as a version, and show it as `current`.

        Raises:
            DigestMismatch: a member differs from the index; nothing was changed.
            RefusedError: `current` is not a link, the artifact came from another backend, or the mirror cannot be
                written.
            TransferBusy: another process imports into this mirror, or writes to what it shows.
            DiskFull: there is no room in the mirror.
        """
        started = time.monotonic()
        if artifact.manifest.backend != self.backend:
            made_by = quoted(artifact.manifest.backend)
            raise RefusedError(
                f"{artifact!r} was made by backend {made_by}, this importer takes {self.backend!r}",
                hint=f"import it with the importer for {made_by}",
            )
        if self.data.exists() and not self.data.is_symlink():
            raise RefusedError(f"{self.data} is not a symbolic link", hint="name another path, or move it away")
        with self._alone():
            alive = self.current()
            if alive is not None and alive.digest == artifact.digest:
                if consume and artifact.path != alive.path:
                    remove_tree(artifact.path)
                self._remember(artifact, key)  # the process may have been killed between the swap and this
                return self._result("unchanged", artifact, started, [])
            self.prepare(artifact)
            verify_members(artifact, on_progress=on_progress)
            self.verify_open(artifact)
            with writing(self.path):
                version = self.load(artifact, consume=consume)
                self.swap(version)
                self._remember(artifact, key)
                removed = list(self._prune(version))
                self._remove_superseded(artifact)
        return self._result("imported", artifact, started, removed)

    def prepare(self, artifact: Artifact) -> None:
        """Refuse an artifact that does not belong here, from its manifest and index; its data is not read yet."""

    def verify_open(self, artifact: Artifact) -> None:
        """Open the data as its users will, and refuse unusable data. The files must stay unchanged.

        Every member has already been checked against the index.
        """

    def load(self, artifact: Artifact, *, consume: bool) -> Path:
        """Make the artifact a version: by rename if it may be consumed, otherwise by copy."""
        version = self._versions / _version_name(artifact.digest)
        self._versions.mkdir(parents=True, exist_ok=True)
        if artifact.path == version:
            return version
        if version.exists():
            # From an older import of the same artifact. It was not verified now; the new one was.
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
            if copies_take_room(artifact.data, partial):
                check_room(partial, artifact.manifest.bytes - (artifact.manifest.holes or 0))
            private = artifact.layout.private
            partial.mkdir(0o700 if private.covers(len(artifact.index)) else 0o777)
            place_members(artifact.index.paths, artifact.data, partial / DATA_NAME, copy_member, private)
            replace_file(partial / INDEX_NAME, artifact.index_bytes, private=bool(private))
            replace_file(partial / MANIFEST_NAME, artifact.manifest_bytes, private=bool(private))
            sync_tree(partial)
            os.rename(partial, version)
            if consume:
                remove_tree(artifact.path)
        fsync_directory(self._versions)
        return version

    def swap(self, version: Path) -> None:
        """Show the version, in one atomic step.

        Raises:
            TransferBusy: another process writes to the version that is shown now; it stays.
        """
        fresh = self.path / ".current.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path("versions") / version.name / DATA_NAME)
        os.replace(fresh, self.data)
        fsync_directory(self.path)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Hold the mirror: two imports at once would remove each other's incomplete copies."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = take_lock_file(self.path / _LOCK_NAME, f"another process imports into {self.path}")
        try:
            yield
        finally:
            os.close(lock)

    def _remember(self, artifact: Artifact, key: str | None) -> None:
        history = read_history(self.path)
        if history and history[-1].artifact_digest == artifact.digest:
            return
        with writing(self.path):
            manifest = artifact.manifest
            entry = HistoryEntry(
                imported_at=datetime.now(timezone.utc),
                artifact_digest=artifact.digest,
                backend=manifest.backend,
                cursor=manifest.cursor,
                created_at=manifest.created_at,
                key=key,
            )
            add_to_history(self.path, entry)

    def _result(
        self, status: Literal["imported", "unchanged"], artifact: Artifact, started: float, removed: list[str]
    ) -> ImportResult:
        manifest = artifact.manifest
        return ImportResult(
            status=status,
            path=self.data,
            artifact_digest=artifact.digest,
            members=manifest.members,
            bytes=manifest.bytes,
            cursor=manifest.cursor,
            seconds=time.monotonic() - started,
            removed_versions=removed,
        )

    def _prune(self, current: Path) -> Iterator[str]:
        """Remove versions beyond `keep_versions`, oldest first, and everything that a killed import left."""
        versions = [entry for entry in self._versions.iterdir() if entry != current]
        complete = [entry for entry in versions if not entry.name.startswith(".")]
        complete.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
        for entry in complete[self.keep_versions - 1 :]:
            remove_tree(entry)
            yield entry.name
        for entry in versions:
            if entry.name.startswith("."):
                remove_tree(entry)

    def _remove_superseded(self, artifact: Artifact) -> None:
        """Remove what downloads of older artifacts left, once a newer artifact is shown; what a process holds stays.

        A download that was last written to before this artifact was made belongs to an older one, which nobody needs.
        """
        made_at = artifact.manifest.created_at.timestamp()
        incoming = self.path / INCOMING_NAME
        remove_stages(incoming, idle_since=made_at)
        # A complete download has its version's name until it is imported.
        for landed in incoming.glob("[0-9a-f]" * _VERSION_DIGITS):
            if landed.stat().st_mtime <= made_at:
                remove_tree(landed)


def shown_artifact(mirror: Path) -> Artifact | None:
    """The artifact whose data the mirror in a directory shows, or None."""
    try:
        return Artifact.open(Path(os.path.realpath(mirror / CURRENT_NAME, strict=True)).parent)
    except (OSError, ArtifactNotFound, UnsupportedSource):
        return None


def _version_name(artifact_digest: str) -> str:
    return artifact_digest.removeprefix("sha256:")[:_VERSION_DIGITS]
