"""The content of a directory without reading unchanged files: the cache has a reference artifact and files' stats.

```
<home>/<hash of the directory's path>/artifact     the last scan: manifest, index, inodes and mtimes; `data` is a link
<home>/<hash of the directory's path>/CTIMES       nanoseconds, 8 bytes each, in the order of the index; 0: not trusted
<home>/<hash of the directory's path>/lock         held while the cache is read or replaced
```

It is a cache for this machine alone: removing it costs one reading of every file.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blobflow.artifact.artifact import REFERENCE_NAME, Artifact
from blobflow.artifact.hashing import FileHash
from blobflow.artifact.privacy import encode
from blobflow.backends.base import OnBytes
from blobflow.backends.directory import DirectoryExporter, Scan
from blobflow.durable import try_lock
from blobflow.errors import BlobflowError, TransferBusy, writing
from blobflow.private import PrivateDirectory
from blobflow.trees import remove_tree

log = logging.getLogger(__name__)

RACY_NS: Final = 2_000_000_000
"""A file changed this shortly before a scan may change again without another time: coarse clocks tick in seconds."""
_CTIMES: Final = "CTIMES"


class StatCache:
    """The known state of one directory; use it in a `with` block, within which the artifact stays in place.

    Args:
        home: Directory of all caches of this machine.
        exporter: Exporter of the directory, by reference.
        clock: Nanoseconds of Unix time.
    """

    def __init__(self, home: Path, exporter: DirectoryExporter, *, clock: Callable[[], int]) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(exporter.path))).hexdigest()[:32]
        self._exporter = exporter
        self._clock = clock
        self.path = home / name
        self.found = Scan()
        self.files_read = 0
        """Files read by the last scan."""

    @contextmanager
    def held(self) -> Generator[StatCache]:
        """Hold the cache.

        Raises:
            TransferBusy: another process scans or sends this directory.
        """
        with (
            writing(self.path),
            PrivateDirectory.at(self.path.parent) as home,
            home.below(self.path.name, make=True) as own,
        ):
            lock = own.open("lock", os.O_RDWR | os.O_CREAT)
        try:
            if not try_lock(lock):
                raise TransferBusy(
                    f"another process is looking at {self._exporter.path}", path=str(self._exporter.path)
                )
            yield self
        finally:
            os.close(lock)

    def scan(self, on_progress: OnBytes | None = None) -> Artifact:
        """The directory as a reference artifact: only files whose stats changed are read.

        Raises:
            NotFoundError, UnsupportedSource, SourceChanged: see `DirectoryExporter.export`.
        """
        before_ns = self._clock()
        found = self.found = self._exporter.scan()
        known = _Known.read(self.path)
        self.files_read = 0
        if known is not None and known.covers(found):
            return known.artifact

        def hash_of(i: int) -> FileHash | None:
            return known.hash_of(found, i) if known is not None else None

        self.files_read = sum(not path.endswith("/") and hash_of(i) is None for i, path in enumerate(found.paths))

        fresh = self.path / "artifact.new"
        remove_tree(fresh)
        artifact = self._exporter.export(fresh, on_progress=on_progress, found=found, known=hash_of).artifact
        times = zip(found.mtimes_ns, found.ctimes_ns, strict=True)
        racy_ns = before_ns - RACY_NS
        ctimes = array("q", (ctime_ns if max(mtime_ns, ctime_ns) < racy_ns else 0 for mtime_ns, ctime_ns in times))
        with writing(self.path):
            remove_tree(self.path / "artifact")  # without it the new CTIMES have no meaning
            (self.path / _CTIMES).write_bytes(ctimes.tobytes())
            os.rename(fresh, self.path / "artifact")
        moved = Artifact(self.path / "artifact", artifact.manifest_file)
        moved.__dict__.update(index_bytes=artifact.index_bytes, index=artifact.index)
        log.info("layer.scanned path=%s members=%d read=%d", self._exporter.path, len(found.paths), self.files_read)
        return moved

    def found_again(self, directory: Path) -> Artifact | None:
        """The last scan, if its tree was moved to `directory` and no stat of it has changed since; otherwise None."""
        known = _Known.read(self.path)
        found = self._exporter.model_copy(update={"path": directory}).scan()
        return known.artifact if known is not None and known.covers(found) else None


class _Known:
    """The last scan."""

    def __init__(self, artifact: Artifact, ctimes: array[int], origins: tuple[array[int], array[int]]) -> None:
        self.artifact = artifact
        self._ctimes = ctimes
        self._inodes, self._mtimes_ns = origins

    @classmethod
    def read(cls, path: Path) -> _Known | None:
        """The last scan in `path`; None if there is none, or it is unusable."""
        from blobflow.artifact.index_parquet import decode_origins  # loads pyarrow, which takes 0.2 s

        try:
            artifact = Artifact.open(path / "artifact")
            ctimes = array("q", (path / _CTIMES).read_bytes())
            reference = (path / "artifact" / REFERENCE_NAME).read_bytes()
            origins = decode_origins(reference, members=artifact.manifest.members)
            if {len(ctimes), len(origins[0]), len(origins[1])} == {len(artifact.index)}:
                return cls(artifact, ctimes, origins)
        except (BlobflowError, OSError, ValueError) as error:
            log.debug("layer.cache_unusable path=%s error=%s", path, error)
        return None

    def covers(self, found: Scan) -> bool:
        """Whether a scan found exactly the same."""
        paths = self.artifact.index.paths
        same = found.paths == paths and encode(found.private) == self.artifact.manifest.private
        return same and all(path.endswith("/") or self._is_as_it_was(i, found, i) for i, path in enumerate(paths))

    def hash_of(self, found: Scan, i: int) -> FileHash | None:
        """The hash of entry `i` of a scan, if it is an unchanged file; otherwise None."""
        index, path = self.artifact.index, found.paths[i]
        row = bisect_left(index.paths, path)
        if path.endswith("/") or index.paths[row : row + 1] != [path] or not self._is_as_it_was(row, found, i):
            return None
        return FileHash(index.sizes[row], index.sha256_of(row), index.crcs[row])

    def _is_as_it_was(self, row: int, found: Scan, i: int) -> bool:
        index = self.artifact.index
        return (
            (index.sizes[row], index.modes[row]) == (found.sizes[i], found.modes[i])
            and (self._inodes[row], self._mtimes_ns[row]) == (found.inodes[i], found.mtimes_ns[i])
            and self._ctimes[row] == found.ctimes_ns[i]
        )
