"""Verified artifacts on local disk, by digest, shared by all processes that use the same directory.

```
<root>/<digest>-<n>/           an artifact directory; held (flock, shared) by whoever was given its path
<root>/<digest>-<n>/STAMP      what its tree looked like when it had been verified; its mtime is the last use
<root>/.<digest>.lock          held by whoever looks for the artifact or fetches it; the others wait, and find it then
<root>/.blobflow-download-*    the stage of a download; the next process continues it
```

An entry is for reading. It is shared as it is, so somebody who writes into it changes what others read; that is found
out at the next use by the stamp, and the next user gets another entry (`-1`, `-2`, ...). Nothing is removed under the
feet of its users: locks end with the process, also when it is killed.
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
from blobflow.stores.base import (
    Reader,
)
from blobflow.transport import DownloadResult, download, read_manifest
from blobflow.uploads.progress import OnProgress, OnRecord

log = logging.getLogger(__name__)

CacheCheck: TypeAlias = Literal["stamp", "sha256"]

_STAMP: Final = "STAMP"
_REMOVED_PREFIX: Final = ".removed-"
_NAME_LENGTH: Final = 32
_ABANDONED_AFTER_S: Final = 24 * 3600.0
"""A download that made no progress for a day will not be continued."""
"""Digits of the digest in the name of an entry; the whole digest is compared with the manifest inside."""
_ENTRY: Final = re.compile(r"[0-9a-f]{32}-[0-9]+")


class CachedArtifact(NamedTuple):
    """An artifact that stays where it is until the cache is closed."""

    artifact: Artifact
    download: DownloadResult | None
    """None: it was there."""


class ArtifactCache:
    """Local copies of artifacts, fetched once and kept while there is room.

    Args:
        root: A directory on a file system with locks; made when it is needed.
        max_bytes: Before a download, entries that nobody uses go, the one that was used longest ago first, until the
            new one fits. What is in use stays, even if that is more. None: nothing goes.
        check: How an entry is looked at before it is used again. `stamp` compares names, sizes, times and inodes with
            those of the tree that was verified: one system call per member. `sha256` also reads every byte.
        clock: Seconds since the epoch.
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
        """The artifact `digest`, which lies under `key` in the store; fetched unless it is here already.

        May be called again after a crash: it fetches what is missing. It is kept in its place until `close`.

        Args:
            on_wait: Called if another process fetches the artifact at this moment, before waiting for its end.

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
            # Held before it has a stamp: without one, nobody takes it for an entry that may go.
            held = _hold(root, result.path.name, shared=True)
            if held is None:
                raise TransferBusy(f"{result.path} was removed by somebody when it had landed", path=str(result.path))
            _write_stamp(held)
            self._use(held)
            return CachedArtifact(Artifact.open(result.path), result)

    def close(self) -> None:
        """Give the entries back; they may go after that."""
        while self._held:
            self._held.popitem()[1].close()

    # Using entries

    def _find(self, root: PrivateDirectory, name: str, digest: str) -> Artifact | None:
        """An entry that is what it should be, held."""
        for entry in sorted(self._root.glob(f"{name}-*")):
            held = _hold(root, entry.name, shared=True)
            if held is None:
                continue  # it is being removed, or another user's
            artifact = self._intact(held, digest)
            if artifact is not None:
                self._use(held)
                return artifact
            held.close()
            log.warning("cache.entry_changed path=%s", entry)
            self._remove(root, entry)  # stays if somebody, perhaps in this process, still uses it
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
        if stamp is None:  # whoever fetched it was killed when it had landed
            _write_stamp(held)
        return artifact

    def _use(self, held: PrivateDirectory) -> None:
        """Keep the entry until `close`, and note when it was used."""
        now = self._clock()
        with writing(held.path):
            os.utime(_STAMP, (now, now), dir_fd=held.descriptor, follow_symlinks=False)
        if held.path in self._held:
            held.close()
        else:
            self._held[held.path] = held

    # Removing entries

    def _shrink_to(self, root: PrivateDirectory, limit: int) -> bool:
        """Remove entries that nobody uses, oldest use first, until all have at most `limit` bytes; whether any went."""
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
        """Remove an entry unless somebody uses it."""
        held = _hold(root, entry.name)
        if held is None:
            return False
        with held:
            # Whoever is killed here leaves nothing that could be taken for an entry.
            removed = f"{_REMOVED_PREFIX}{uuid.uuid4().hex}"
            with writing(entry):
                root.rename(entry.name, removed)
            with suppress(OSError):  # what stays goes the next time
                root.remove(removed)
        return True

    def _clean_up(self, root: PrivateDirectory) -> None:
        """Remove what killed processes left: halves of removed entries, stages that nobody came back for."""
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
    """The directory of an entry, held until it is closed; None if somebody else holds it, or it is not one of ours.

    Args:
        shared: With others that hold it shared, too.
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
    """Hold the lock file `name`, which is there only meanwhile; waits for whoever holds it."""
    while True:
        with writing(root.path):
            descriptor = root.open(name, os.O_RDWR | os.O_CREAT)
        try:
            if not try_lock(descriptor):
                if on_wait:
                    on_wait()
                lock(descriptor)  # a signal whose handler raises ends the wait
            if not root.names_file(name, descriptor):
                continue  # whoever held it has removed it, and whoever comes now locks another one
            try:
                yield
            finally:
                root.unlink(name)
            return
        finally:
            os.close(descriptor)


def _stamp(entry: Path) -> str:
    """A digest of what `stat` says of everything in an entry but its stamp."""
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
    """Seconds since the epoch; 0.0 for an entry that is gone."""
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
