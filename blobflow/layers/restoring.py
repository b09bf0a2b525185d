"""Restoring a layer: a download from a view of its tar; a directory appears whole, or takes another's place."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from typing_extensions import override

from blobflow.artifact.landing import Landing, Stage, check_destination, fsync_directory
from blobflow.artifact.manifest import DATA_NAME
from blobflow.config import ChunkProfile
from blobflow.errors import DestinationNotEmpty, writing
from blobflow.layers.format import manifest_digest
from blobflow.layers.remote import RemoteLayer
from blobflow.layers.state import Restored
from blobflow.transport.books import Books, OnProgress, OnRecord
from blobflow.transport.reading import failures_noted, land_parts, landing_plan

log = logging.getLogger(__name__)

_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100


@dataclass(frozen=True)
class Landed:
    """What landing a layer took."""

    parts: int
    bytes_received: int
    """Of the tar; what came through the network is `compressed`."""
    bytes_resumed: int
    checkpoints_saved: int
    seconds: float


def land_layer(
    layer: RemoteLayer,
    dest: Path,
    *,
    profile: ChunkProfile,
    replaceable: Callable[[os.stat_result], bool],
    on_swap: Callable[[Restored], None],
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> Landed:
    """Land a layer as the directory `dest`; until then, `dest` is as it was.

    Args:
        replaceable: Whether a directory that lies at `dest` may be replaced.
        on_swap: Told which directory is about to become `dest`.

    Raises:
        DestinationNotEmpty: `dest` holds something that may not be replaced.
        IntegrityError, HostileArtifact: the layer is damaged or dangerous.
        ObjectChanged: it was replaced meanwhile; try again.
        TransferBusy: another process lands the same layer at the same place.
    """
    started = time.monotonic()
    remote = layer.artifact()
    layout = remote.open_layout()
    # Whole frames: nothing is decompressed twice.
    frame_size = layer.meta.frame_size
    part_size = max(1, profile.chunk_size // frame_size) * frame_size
    stage = _LayerStage(dest, remote.digest, layer.meta.digest, replaceable, on_swap)
    stage.check_destination()
    with stage.held():
        if stage.part_size is None:
            stage.clear()
            stage.begin(part_size)
        landing = Landing(stage, layout, landing_plan(layout, stage), digests=profile.verify_digest)
        books: Books = remote.books(landing.plan, profile, "download", landing.sync, on_progress, on_checkpoint)
        with failures_noted(landing, books):
            land_parts(remote, landing, list(landing.plan), books, workers=profile.workers)
            contents = (remote.manifest_bytes, remote.index_bytes)
            landing.finish(remote.head, remote.payload_crc32c, *contents, books.tick)
    books.done()
    return Landed(
        parts=len(landing.plan),
        bytes_received=books.bytes_moved + len(remote.head),
        bytes_resumed=books.bytes_resumed,
        checkpoints_saved=books.saved,
        seconds=time.monotonic() - started,
    )


def sweep(dest: Path, layer: RemoteLayer) -> None:
    """Remove what a restore left that was killed after its last step."""
    Stage(dest, manifest_digest(layer.meta)).sweep()


class _LayerStage(Stage):
    """Publishes the members alone, without manifest and index, and may take the place of an earlier restore."""

    def __init__(
        self,
        dest: Path,
        artifact_digest: str,
        layer_digest: str,
        replaceable: Callable[[os.stat_result], bool],
        on_swap: Callable[[Restored], None],
    ) -> None:
        super().__init__(dest, artifact_digest)
        self._layer_digest = layer_digest
        self._replaceable = replaceable
        self._on_swap = on_swap

    @override
    def check_destination(self) -> None:
        try:
            check_destination(self.dest)
        except DestinationNotEmpty:
            if self.dest.is_symlink() or not self.dest.is_dir() or not self._replaceable(self.dest.stat()):
                raise

    def clear(self) -> None:
        """Remove what a process left that was killed after the exchange: another tree."""
        with writing(self.dest):
            shutil.rmtree(self.tree)
            self.tree.mkdir()

    @override
    def move(self) -> None:
        members = self.tree / DATA_NAME
        status = members.stat()
        self._on_swap(
            Restored(path=str(self.dest), device=status.st_dev, inode=status.st_ino, digest=self._layer_digest)
        )
        self.forget_all()  # what lies here after the exchange is another tree
        try:
            check_destination(self.dest)
        except DestinationNotEmpty:
            exchange(members, self.dest)  # what was there is in the stage now, and goes with it
        else:
            os.rename(members, self.dest)
        fsync_directory(self.tree)


def exchange(one: Path, other: Path) -> None:
    """Let two directories change places, in one step where the file system can.

    Elsewhere the second is away for the moment between two renames.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(one), os.fsencode(other)
        if not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(other))
    aside = one.with_name(f"{one.name}.replaced")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)
