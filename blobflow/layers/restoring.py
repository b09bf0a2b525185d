"""Restores a layer: a download from a view of its tar; a directory appears as a whole, or replaces another."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from blobflow.artifact.landing import REPLACED_NAME, Landing, Stage, check_destination
from blobflow.artifact.manifest import DATA_NAME
from blobflow.config import MIB, ChunkProfile
from blobflow.durable import fsync_directory, replace_file
from blobflow.errors import BlobflowError, DestinationNotEmpty, RefusedError, setting, writing
from blobflow.layers.format import LayerMeta, manifest_digest, tree_digest
from blobflow.layers.remote import RemoteLayer
from blobflow.layers.state import Restored
from blobflow.transport.reading import failures_noted, land_parts, landing_plan
from blobflow.trees import remove_tree
from blobflow.uploads.progress import OnProgress, OnRecord, PartStats, TransferProgress

log = logging.getLogger(__name__)

_RENAME_EXCHANGE: Final = 2
_ALLOWANCE_BYTES: Final = 64 * MIB
"""Memory that any input may take beyond the profile's own."""
_AT_FDCWD: Final = -100
_ASIDE_NAME_BYTES: Final = 230
"""Bytes of a destination's name before `.replaced-1`: names have at most 255 bytes."""


@dataclass(frozen=True)
class Replaceable:
    """What may be replaced at a destination: anything, or an unchanged directory of an earlier restore."""

    earlier: Restored | None
    overwrite: bool
    digest_of: Callable[[Path], str | None]
    """Returns the present content of a directory (`tree_digest`); None if no layer can hold it."""

    def admits(self, status: os.stat_result) -> bool:
        """Whether it is that directory, whatever its content."""
        return self.overwrite or (self.earlier is not None and _is_directory(status, self.earlier))

    def check(self, dest: Path) -> None:
        """Compare the destination with what the earlier restore made.

        Raises:
            DestinationNotEmpty: it was changed since.
        """
        if self.earlier is not None and not self.overwrite and self.digest_of(dest) != self.earlier.content:
            raise DestinationNotEmpty(
                f"{dest} was changed since a layer was restored there",
                hint=f"sync it, or replace it with {setting('overwrite')}",
                path=str(dest),
            )


@dataclass(frozen=True)
class Landed(PartStats):
    """What landing a layer took; bytes are those of the tar."""

    bytes_received: int
    kept: Path | None
    """The path of the replaced directory, if it was written to at the last moment."""


def land_layer(
    layer: RemoteLayer,
    dest: Path,
    *,
    profile: ChunkProfile,
    replaceable: Replaceable,
    on_swap: Callable[[Restored], None],
    on_progress: OnProgress | None = None,
    on_checkpoint: OnRecord | None = None,
) -> Landed:
    """Land a layer as the directory `dest`, which stays unchanged until the end.

    Args:
        replaceable: What may be replaced at `dest`. It is compared before the first byte, right before it is
            replaced, and once more before it is removed; if it was changed by then, it is kept beside `dest`.
        on_swap: Called with the directory that is about to become `dest`.

    Raises:
        DestinationNotEmpty: `dest` holds something that may not be replaced.
        IntegrityError, HostileArtifact: the layer is damaged or dangerous.
        ObjectChanged: it was replaced meanwhile; try again.
        TransferBusy: another process lands the same layer at the same place.
    """
    started = time.monotonic()
    stage = _LayerStage(dest, manifest_digest(layer.meta), layer.meta, replaceable, on_swap)
    stage.check_destination()
    workers = _workers_for(layer, profile)  # before any of it is decompressed
    remote = layer.artifact()
    layout = remote.open_layout()
    # Whole frames, so that nothing is decompressed twice.
    frame_size = layer.meta.frame_size
    part_size = max(1, profile.chunk_size // frame_size) * frame_size
    with stage.held():
        if stage.part_size is None:
            stage.clear()
            stage.begin(part_size)
        plan = landing_plan(layout, stage)
        stage.check_room(layout, plan, _may_be_holes(layer))
        landing = Landing(stage, layout, plan, digests=profile.verify_digest)
        progress: TransferProgress = remote.progress(
            landing.plan, profile, "download", landing.sync, on_progress, on_checkpoint
        )
        with failures_noted(landing, progress):
            land_parts(remote, landing, landing.plan.numbers, progress, workers=workers)
            landing.finish(remote.head, remote.manifest_file, remote.index_bytes, progress.tick)
    progress.done()
    return Landed(bytes_received=progress.bytes_moved + len(remote.head), kept=stage.kept, **progress.counters(started))


def _may_be_holes(layer: RemoteLayer) -> int:
    """Bytes that may be left as holes; how much of the saved space was zeros is unknown."""
    lengths = ((layer.meta.plan.frame(number).length, size) for number, size in enumerate(layer.frame_sizes, 1))
    return sum(max(0, length - size) for length, size in lengths)


def _workers_for(layer: RemoteLayer, profile: ChunkProfile) -> int:
    """How many workers may hold a frame at once, compressed and not, within the profile's memory plus 64 MiB.

    Raises:
        RefusedError: not even one worker may.
    """
    frame = min(layer.meta.frame_size, layer.meta.tar_size)
    allowed = profile.chunk_size * profile.workers + _ALLOWANCE_BYTES
    if 2 * frame > allowed:
        raise RefusedError(
            f"the layer {layer.meta.key!r} has frames of {frame} bytes: each takes twice that in memory, and"
            f" {allowed} bytes are allowed",
            hint=f"if you trust its origin, use a profile with {setting('chunk_size', frame)}",
            key=layer.meta.key,
            limit=allowed,
        )
    return profile.workers if frame <= profile.chunk_size else max(1, min(profile.workers, allowed // (2 * frame)))


def sweep(dest: Path, layer: RemoteLayer, replaceable: Replaceable) -> Path | None:
    """Remove what a restore left that was killed after its last step; returns what was kept of it (see `Landed`)."""
    stage = _LayerStage(dest, manifest_digest(layer.meta), layer.meta, replaceable, lambda _: None)
    stage.sweep()
    return stage.kept


class _Exchange(BaseModel):
    """The directories that were about to be exchanged when a process was killed."""

    model_config = ConfigDict(frozen=True)

    old: Restored
    new: Restored


class _LayerStage(Stage):
    """Publishes only the members, without manifest and index, and may replace an earlier restore."""

    def __init__(
        self,
        dest: Path,
        artifact_digest: str,
        layer: LayerMeta,
        replaceable: Replaceable,
        on_swap: Callable[[Restored], None],
    ) -> None:
        super().__init__(dest, artifact_digest)
        self.kept: Path | None = None
        self._layer = layer
        self._tree = tree_digest(layer.manifest_file.manifest)
        self._replaceable = replaceable
        self._on_swap = on_swap

    @property
    def _note(self) -> Path:
        return self._at / REPLACED_NAME

    @override
    def check_destination(self) -> None:
        if self.is_inside:
            raise RefusedError(
                f"{self.dest} is a mount point, or is in a directory that is not writable: a layer cannot appear"
                " there in one step",
                hint=f"restore it to a new directory inside, such as {self.dest / 'restored'}",
                path=str(self.dest),
            )
        try:
            check_destination(self.dest)
        except DestinationNotEmpty:
            if self.dest.is_symlink() or not self.dest.is_dir() or not self._replaceable.admits(self.dest.stat()):
                raise

    def clear(self) -> None:
        """Remove another tree, which a process left that was killed after the exchange."""
        with writing(self.dest):
            self._settle_replaced()
            remove_tree(self.tree)
            self.tree.mkdir()

    @override
    def move(self) -> None:
        members = self.tree / DATA_NAME
        replaces = not _is_free(self.dest)
        if replaces:
            self._replaceable.check(self.dest)
        status = members.stat()
        new = Restored(
            path=str(self.dest), device=status.st_dev, inode=status.st_ino, digest=self._layer.digest, tree=self._tree
        )
        self._on_swap(new)
        self.forget_all()  # after the exchange, the stage holds another tree
        if replaces:
            if self._replaceable.earlier is not None and not self._replaceable.overwrite:
                replace_file(self._note, _Exchange(old=self._replaceable.earlier, new=new).model_dump_json().encode())
            exchange(members, self.dest)  # the old content is in the stage now, and is removed with it
        else:
            os.rename(members, self.dest)
        fsync_directory(self.tree)

    @override
    def discard(self) -> None:
        self._settle_replaced()
        super().discard()

    def _settle_replaced(self) -> None:
        """Compare the replaced directory once more, and move it beside the destination if it was changed."""
        try:
            exchange = _Exchange.model_validate_json(self._note.read_bytes())
        except FileNotFoundError:
            return
        members = self.tree / DATA_NAME
        for directory in (members, _aside(members)):
            if not directory.exists():
                continue
            status = directory.stat(follow_symlinks=False)
            if _is_directory(status, exchange.new):  # killed before the exchange: nobody has used it yet
                continue
            if not _is_directory(status, exchange.old) or not self._holds(directory, exchange.old.content):
                self.kept = _set_aside(directory, self.dest)
                log.warning("layer.kept path=%s replaced=%s", self.kept, self.dest)
        self._note.unlink()

    def _holds(self, directory: Path, digest: str) -> bool:
        try:
            return self._replaceable.digest_of(directory) == digest
        except BlobflowError as error:  # what cannot be compared is not removed
            log.warning("layer.not_compared path=%s error=%s", directory, error)
            return False


def _is_directory(status: os.stat_result, restored: Restored) -> bool:
    return (status.st_dev, status.st_ino) == (restored.device, restored.inode)


def _is_free(dest: Path) -> bool:
    try:
        check_destination(dest)
    except DestinationNotEmpty:
        return False
    return True


def _set_aside(directory: Path, dest: Path) -> Path:
    name = os.fsdecode(os.fsencode(dest.name)[:_ASIDE_NAME_BYTES])
    aside = next(path for n in count(1) if not os.path.lexists(path := dest.with_name(f"{name}.replaced-{n}")))
    os.rename(directory, aside)
    fsync_directory(dest.parent)
    return aside


def _aside(directory: Path) -> Path:
    """The temporary path of the other directory, if the file system cannot exchange two."""
    return directory.with_name(f"{directory.name}.replaced")


def exchange(one: Path, other: Path) -> None:
    """Exchange two directories, in one step if the file system can.

    Otherwise the second is missing for the moment between two renames.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(one), os.fsencode(other)
        if not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(other))
    aside = _aside(one)
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)
