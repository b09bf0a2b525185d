"""Verified artifacts on local disk, by digest, shared by all processes that use the same directory.

```
<root>/<digest>-<n>/           an artifact directory; held (flock, shared) by every process that was given its path
<root>/<digest>-<n>/STAMP      the state of its tree when it had been verified; its mtime is the last use
<root>/.<digest>.lock          held by the process that looks for the artifact or fetches it; the others wait for it
<root>/.blobflow-download-*    the stage of a download; the next process continues it
```

An entry is for reading. It is shared as it is, so a process that writes into it changes what others read. The stamp
reveals that at the next use, and the next user gets another entry (`-1`, `-2`, ...). No entry is removed while it is in
use: the locks end with their processes, even if those are killed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from blobflow.artifact.artifact import Artifact
from blobflow.artifact.leftovers import remove_stages
from blobflow.artifact.members import verify_members
from blobflow.config import ChunkProfile
from blobflow.durable import lock, try_lock
from blobflow.errors import (
    DiskFull,
    IntegrityError,
    NotFoundError,
    RefusedError,
    TransferBusy,
    UnsupportedSource,
    writing,
)
from blobflow.fields import check_choice
from blobflow.private import PrivateDirectory
from blobflow.stores.base import Reader
from blobflow.transport import DownloadResult, download, read_manifest
from blobflow.uploads.progress import OnProgress, OnRecord

log = logging.getLogger(__name__)

CacheCheck: TypeAlias = Literal["stamp", "sha256"]

_STAMP: Final = "STAMP"
_REMOVED_PREFIX: Final = ".removed-"
_NAME_LENGTH: Final = 32
"""Digits of the digest in the name of an entry; the whole digest is compared with the manifest inside."""
_ABANDONED_AFTER_S: Final = 24 * 3600.0
"""A download that made no progress for a day will not be continued."""
_ENTRY: Final = re.compile(r"[0-9a-f]{32}-[0-9]+")


class CachedArtifact(NamedTuple):
    """An artifact that stays in place until the cache is closed."""

    artifact: Artifact
    download: DownloadResult | None
    """The download; None if the artifact was in the cache."""


class ArtifactCache:
    """Local copies of artifacts, fetched once and kept while there is room.

    Args:
        root: A directory on a file system with locks; created on first use.
        max_bytes: Before a download, unused entries are removed, the least recently used first, until the new one fits.
            Entries in use stay, even if they exceed the limit. None: nothing is removed.
        check: The check of an entry before it is used again. `stamp` compares names, sizes, times and inodes with
            those of the verified tree: one system call per member. `sha256` also reads every byte.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int | None = None,
        check: CacheCheck = "stamp",
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_choice("check", check, CacheCheck)
        self._root = root
        self._max_bytes = max_bytes
        self._check = check
        self._clock = clock
        self._held: dict[Path, PrivateDirectory] = {}

    def __repr__(self) -> str:
        return f"<ArtifactCache {self._root}, {len(self._held)} entries in use>"

    def get(
        self,
        store: Reader,
        key: str,
        digest: str,
        *,
        profile: ChunkProfile | None = None,
        on_wait: Callable[[], None] | None = None,
        on_progress: OnProgress | None = None,
        on_checkpoint: OnRecord | None = None,
    ) -> CachedArtifact:
        """The artifact `digest`, whose key in the store is `key`; fetched unless it is in the cache.

        May be called again after a crash: it fetches what is missing. The artifact stays in place until `close`.

        Args:
            on_wait: Called before waiting, if another process is fetching the artifact.

        Raises:
            ArtifactNotFound, IntegrityError, HostileArtifact, DiskFull: as `download`.
        """
        name = digest.removeprefix("sha256:")[:_NAME_LENGTH]
        with _opened(self._root) as root, _alone(root, f".{name}.lock", on_wait):
            found = self._find(root, name, digest)
            if found is not None:
                return CachedArtifact(found, None)

            def fetch() -> DownloadResult:
                return download(
                    store,
                    key,
                    next(path for n in count() if not (path := self._root / f"{name}-{n}").exists()),
                    profile=profile,
                    expected_digest=digest,
                    on_progress=on_progress,
                    on_checkpoint=on_checkpoint,
                )

            self._clean_up(root)
            if self._max_bytes is not None:
                self._shrink_to(root, self._max_bytes - read_manifest(store, key).bytes)
            try:
                result = fetch()
            except DiskFull:
                if not self._shrink_to(root, 0):
                    raise
                result = fetch()
            # Held before it has a stamp: without one, no process considers it for removal.
            held = _hold(root, result.path.name, shared=True)
            if held is None:
                raise TransferBusy(f"{result.path} was removed right after it had landed", path=str(result.path))
            _write_stamp(held)
            self._use(held)
            return CachedArtifact(Artifact.open(result.path), result)

    def close(self) -> None:
        """Release the entries; they may be removed after that."""
        while self._held:
            self._held.popitem()[1].close()

    # Using entries

    def _find(self, root: PrivateDirectory, name: str, digest: str) -> Artifact | None:
        """An intact entry, held; None if there is none."""
        for entry in sorted(self._root.glob(f"{name}-*")):
            held = _hold(root, entry.name, shared=True)
            if held is None:
                continue  # it is being removed, or belongs to another user
            artifact = self._intact(held, digest)
            if artifact is not None:
                self._use(held)
                return artifact
            held.close()
            log.warning("cache.entry_changed path=%s", entry)
            self._remove(root, entry)  # it stays if another user, perhaps in this process, still holds it
        return None

    def _intact(self, held: PrivateDirectory, digest: str) -> Artifact | None:
        entry = held.path
        try:
            artifact = Artifact.open(entry)
            stamp = _read_stamp(entry)
            if artifact.digest != digest or (stamp is not None and stamp != _stamp(entry)):
                return None
            if stamp is None or self._check == "sha256":
                verify_members(artifact)
        except (IntegrityError, NotFoundError, UnsupportedSource, FileNotFoundError) as error:
            log.warning("cache.entry_damaged path=%s error=%s", entry, error)
            return None
        if stamp is None:  # the process that fetched it was killed right after it had landed
            _write_stamp(held)
        return artifact

    def _use(self, held: PrivateDirectory) -> None:
        """Keep the entry until `close`, and record the time of its use."""
        now = self._clock()
        with writing(held.path):
            os.utime(_STAMP, (now, now), dir_fd=held.descriptor, follow_symlinks=False)
        if held.path in self._held:
            held.close()
        else:
            self._held[held.path] = held

    # Removing entries

    def _shrink_to(self, root: PrivateDirectory, limit: int) -> bool:
        """Remove unused entries, oldest use first, down to `limit` bytes; returns whether any was removed."""
        entries = sorted((entry for entry in self._root.iterdir() if _ENTRY.fullmatch(entry.name)), key=_last_use)
        sizes = {entry: _size(entry) for entry in entries}
        total = sum(sizes.values())
        removed = False
        for entry in entries:
            if total <= limit:
                break
            landing = _read_stamp(entry) is None and self._clock() - _last_use(entry) < _ABANDONED_AFTER_S
            if not landing and self._remove(root, entry):
                log.info("cache.entry_evicted path=%s bytes=%d", entry, sizes[entry])
                total -= sizes[entry]
                removed = True
        return removed

    def _remove(self, root: PrivateDirectory, entry: Path) -> bool:
        """Remove an entry unless it is in use."""
        held = _hold(root, entry.name)
        if held is None:
            return False
        with held:
            # A process that is killed here leaves nothing that looks like an entry.
            removed = f"{_REMOVED_PREFIX}{uuid.uuid4().hex}"
            with writing(entry):
                root.rename(entry.name, removed)
            with suppress(OSError):  # the rest is removed the next time
                root.remove(removed)
        return True

    def _clean_up(self, root: PrivateDirectory) -> None:
        """Remove what killed processes left: parts of removed entries, and stages that were not resumed."""
        for name in root.names():
            if name.startswith(_REMOVED_PREFIX):
                with suppress(OSError):
                    root.remove(name)
        remove_stages(self._root, idle_since=self._clock() - _ABANDONED_AFTER_S)


@contextmanager
def _opened(path: Path) -> Generator[PrivateDirectory]:
    """The directory of a cache, made if it is missing."""
    with writing(path):
        root = PrivateDirectory.at(path)
    with root:
        yield root


def _hold(root: PrivateDirectory, name: str, *, shared: bool = False) -> PrivateDirectory | None:
    """The directory of an entry, held until it is closed; None if another holder has it, or it is not an entry of ours.

    Args:
        shared: Take a shared lock, which several holders can have at once.
    """
    try:
        entry = root.below(name)
    except (FileNotFoundError, RefusedError):
        return None
    try:
        # It may have been removed, or replaced, before it was held.
        if entry.hold(shared=shared) and root.names_file(name, entry.descriptor):
            return entry
    except BaseException:
        entry.close()
        raise
    entry.close()
    return None


@contextmanager
def _alone(root: PrivateDirectory, name: str, on_wait: Callable[[], None] | None) -> Generator[None]:
    """Hold the lock file `name`, which exists only meanwhile; waits for another holder."""
    while True:
        with writing(root.path):
            descriptor = root.open(name, os.O_RDWR | os.O_CREAT)
        try:
            if not try_lock(descriptor):
                if on_wait:
                    on_wait()
                lock(descriptor)  # a signal whose handler raises ends the wait
            if not root.names_file(name, descriptor):
                continue  # the previous holder has removed it, and the next process would lock another file
            try:
                yield
            finally:
                root.unlink(name)
            return
        finally:
            os.close(descriptor)


def _stamp(entry: Path) -> str:
    """A digest of the `stat` of everything in an entry except its stamp."""
    digest = hashlib.sha256()
    for path, status in _walk(entry, ""):
        facts = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
        digest.update(b"%s\0%d %d %d %d\n" % (os.fsencode(path), *facts))
    return digest.hexdigest()


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(directory / entry.name, path + "/")
        elif path != _STAMP:
            yield path, entry.stat(follow_symlinks=False)


def _write_stamp(entry: PrivateDirectory) -> None:
    stamp = _stamp(entry.path)
    with (
        writing(entry.path),
        open(entry.open(_STAMP, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="ascii") as file,
    ):
        file.write(stamp)


def _read_stamp(entry: Path) -> str | None:
    try:
        return (entry / _STAMP).read_text()
    except FileNotFoundError:
        return None


def _last_use(entry: Path) -> float:
    """Unix time of the last use; 0.0 for an entry that is gone."""
    for path in (entry / _STAMP, entry):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return 0.0


def _size(entry: Path) -> int:
    """Bytes of the members; 0 for an entry that is gone or damaged."""
    try:
        return Artifact.open(entry).manifest.bytes
    except (IntegrityError, NotFoundError):
        return 0
