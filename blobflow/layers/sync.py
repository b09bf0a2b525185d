"""`LayerSync`: the directories of containers as layers in a bucket, sent when they change."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal

from blobflow.artifact.artifact import Artifact
from blobflow.backends.base import OnBytes
from blobflow.backends.directory import DirectoryExporter, Symlinks
from blobflow.backends.patterns import ExcludePatterns
from blobflow.config import ChunkProfile
from blobflow.coordination.refs import RefState, move_ref, read_ref
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    NotFoundError,
    SourceBusy,
    SourceChanged,
    UnsupportedSource,
    UploadInterrupted,
    UsageError,
    expanded,
)
from blobflow.fields import check_choice
from blobflow.layers.format import (
    DEFAULT_LEVEL,
    MAX_FRAME_BYTES,
    Codec,
    LayerMeta,
    as_layer,
    layer_digest,
    manifest_digest,
    tree_digest,
)
from blobflow.layers.names import CONTAINERS, container_name, container_ref, layer_key
from blobflow.layers.remote import RemoteLayer
from blobflow.layers.restoring import Replaceable, land_layer, sweep
from blobflow.layers.scanning import StatCache
from blobflow.layers.sending import LayerRequest, Sent, abandon_layer, finish_layer, send_layer
from blobflow.layers.state import PendingUpload, Restored, StateTable, SyncState
from blobflow.stores.base import Store
from blobflow.transport.catalog import REF_SUFFIX
from blobflow.trees import remove_tree
from blobflow.uploads.progress import OnProgress, OnRecord, PartStats

log = logging.getLogger(__name__)

HOME_ENV: Final = "BLOBFLOW_LAYERS_HOME"


@dataclass(frozen=True)
class LayerSyncResult(PartStats):
    """The result of a sync; `bytes_total` counts the tar, the other bytes the layer, which is compressed."""

    status: Literal["uploaded", "shared", "unchanged"]
    """`shared`: the store already had the content, from another container or an earlier time."""
    container: str
    digest: str
    key: str
    layer: LayerMeta
    """The same whether or not the upload was interrupted."""
    files_read: int
    """Files read for the digest; the others were known by their stats."""
    parts_resumed: int = 0
    bytes_sent: int = 0
    excluded: int = 0
    """Entries that matched an exclude pattern; a directory counts once."""
    symlinks_skipped: int = 0
    unmatched: tuple[str, ...] = ()
    """Exclude patterns that matched nothing."""


@dataclass(frozen=True)
class LayerRestoreResult(PartStats):
    """The result of a restore; bytes are those of the tar."""

    status: Literal["restored", "unchanged"]
    container: str
    digest: str
    key: str
    path: Path
    layer: LayerMeta
    bytes_received: int = 0
    kept: Path | None = None
    """The path of the replaced directory, if it was written to at the last moment."""


class LayerSync:
    """Keeps the directories of containers in a store, as content-addressed, compressed layers (docs/layers.md).

    ```python
    layers = LayerSync(open_store("s3://backups/layers"))
    layers.sync("web-1", "/var/lib/containers/web-1/diff")
    layers.restore("web-1", "/srv/restored/web-1")
    ```

    The bucket is the truth: another host, or this one without its database, needs nothing else.

    Args:
        level: zstd level. Another level makes other bytes, but not another layer: the name depends on the content.
        state: SQLAlchemy URL of a database that hosts may share; by default a SQLite file in `home`.
        home: Directory for that file and the stat cache; by default `$BLOBFLOW_LAYERS_HOME`, or `blobflow/layers` in
            the user's state directory.
        exclude, symlinks: As those of `DirectoryExporter`.
        frame_size: Bytes of the tar in a frame, 2 MiB by default; larger if there would be too many frames.
        on_progress, on_checkpoint: As those of `upload` and `download`; they count the bytes of the tar.
        on_scan: Called with bytes done and total bytes while files are read for the digest.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        level: int = DEFAULT_LEVEL,
        profile: ChunkProfile | None = None,
        state: str | None = None,
        home: str | Path | None = None,
        exclude: tuple[str, ...] = (),
        symlinks: Symlinks = "refuse",
        frame_size: int | None = None,
        on_progress: OnProgress | None = None,
        on_checkpoint: OnRecord | None = None,
        on_scan: OnBytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if frame_size is not None and not 0 < frame_size <= MAX_FRAME_BYTES:
            raise UsageError(f"frames of {frame_size} bytes", hint=f"give 1 to {MAX_FRAME_BYTES}")
        check_choice("symlinks", symlinks, Symlinks)
        ExcludePatterns(exclude)
        self.store = store
        self.codec = Codec(level)
        self.profile = profile or ChunkProfile()
        self.home = Path(home) if home is not None else default_home()
        self._table = StateTable(state or self.home / "state.db", store.url, clock=clock)
        self._scan_options: dict[str, Any] = {"exclude": exclude, "symlinks": symlinks}
        self._frame_size = frame_size
        self._told: dict[str, Any] = {"on_progress": on_progress, "on_checkpoint": on_checkpoint}
        self._on_scan = on_scan
        self._clock = clock

    def __repr__(self) -> str:
        return f"<LayerSync {self.store.url} level {self.codec.level}, state in {self._table.url}>"

    def register(self, container: str) -> SyncState:
        """Record a container from now on; the state of a known one stays the same."""
        _check_name(container)
        known = self._table.load(container)
        if known is None:
            known = self._recovered(container) or SyncState(container=container)
            self._table.save(known)
            log.info("layer.registered container=%s", container)
        return known

    def state(self, container: str) -> SyncState:
        """The known state of a container.

        Raises:
            NotFoundError: neither the database nor the bucket knows it.
        """
        _check_name(container)
        known = self._table.load(container)
        if known is None:
            known = self._recovered(container)
            if known is None:
                raise self._not_found(container)
            self._table.save(known)
        return known

    def list(self) -> list[SyncState]:
        """All containers: those of the bucket, and those that were only registered. A lost database is rebuilt."""
        known = self._table.load_all()
        for meta in self.store.list(CONTAINERS):
            if not meta.key.endswith(REF_SUFFIX):
                continue
            name = container_name(meta.key.removesuffix(REF_SUFFIX))
            if name is None:
                continue
            found = self._recovered(name)
            if found is not None and name not in known:
                self._table.save(found)
                known[name] = found
            elif found is not None and known[name].remote_digest != found.remote_digest:
                known[name] = known[name].model_copy(update={"remote_digest": found.remote_digest})
        return [known[name] for name in sorted(known)]

    def check_for_changes(self, container: str, path: str | Path) -> bool:
        """Whether the directory differs from the last sync or restore. Times do not count.

        Raises:
            NotFoundError: the container is unknown, or there is no such directory.
        """
        known = self.state(container)
        with self._scanned(Path(path)) as (artifact, _):
            return layer_digest(artifact.manifest) != known.local_digest

    def sync(self, container: str, path: str | Path) -> LayerSyncResult:
        """Send the directory to the store, unless it is there; may be called again after a crash, from any host.

        An earlier attempt's upload is handled first: it is completed if all of its parts were sent, continued if it has
        the same content, and aborted otherwise. The directory is then synced as it is now.

        Raises:
            UploadInterrupted: the directory is gone, so its upload cannot be continued.
            NotFoundError: there is no such directory.
            TransferBusy: another process sends the same layer, or scans the same directory.
            SourceChanged, ChecksumMismatch: the directory was written to meanwhile; nothing was published.
        """
        started = time.monotonic()
        path = Path(path).absolute()
        state, finished = self._take_up(self.register(container), path)
        with _of_layers(), self._scanned(path) as (artifact, cache):
            artifact = as_layer(artifact)
            digest = layer_digest(artifact.manifest)
            state = self._drop_superseded(state, digest)
            key = layer_key(digest)
            if finished is not None and finished.layer.digest == digest:
                status, sent = "uploaded", finished
            else:
                status, sent = self._send(state, digest, artifact, path)
            if status != "unchanged":
                move_ref(self.store, container_ref(container), key, manifest_digest(sent.layer))
        synced = self._table.load(container) or state
        self._table.save(
            synced.model_copy(
                update={
                    "path": str(path),
                    "local_digest": digest,
                    "remote_digest": digest,
                    "last_sync": datetime.fromtimestamp(self._clock(), timezone.utc),
                    "pending": None,
                }
            )
        )
        return LayerSyncResult(
            status=status,
            container=container,
            digest=digest,
            key=key,
            files_read=cache.files_read,
            excluded=cache.found.excluded,
            symlinks_skipped=cache.found.symlinks_skipped,
            unmatched=cache.found.unmatched,
            bytes_total=sent.layer.tar_size,
            seconds=time.monotonic() - started,
            **vars(sent),
        )

    def restore(self, container: str, dest: str | Path, *, overwrite: bool = False) -> LayerRestoreResult:
        """Restore the container's layer as the directory `dest`; needs only the bucket.

        Nothing is at `dest` before all of it is proven; then it appears in one step. An earlier restore of the same
        container is replaced, in one step as well, if it was not changed. One that equals the bucket's layer stays
        (`unchanged`). May be called again after a crash: what has landed is not fetched again.

        Args:
            overwrite: Replace any directory at `dest`, whatever its content.

        Raises:
            NotFoundError: the bucket has no such container.
            DestinationNotEmpty: `dest` is something else, or was changed since it was restored.
            IntegrityError, HostileArtifact: the layer is damaged or dangerous; `dest` is unchanged.
        """
        started = time.monotonic()
        dest = Path(dest).absolute()
        ref = self._ref(container)
        if ref is None:
            raise self._not_found(container)
        layer = RemoteLayer.open(self.store, ref.key)
        state = self._table.load(container) or SyncState(container=container)
        earlier = _earlier(state, dest)
        replaceable = Replaceable(earlier, overwrite, lambda directory: self._digest_of(directory, dest))
        replaceable.check(dest)
        result: dict[str, Any] = {"container": container, "digest": layer.meta.digest, "key": ref.key, "path": dest}
        result |= {"layer": layer.meta, "bytes_total": layer.meta.tar_size}
        if earlier is not None and not overwrite and earlier.digest == layer.meta.digest:
            kept = sweep(dest, layer, replaceable)
            return LayerRestoreResult("unchanged", kept=kept, seconds=time.monotonic() - started, **result)

        def remember(new: Restored, *, others: bool) -> None:
            # Both, until the new one is in its place: after a crash one of them is there.
            known = self._table.load(container) or state
            self._table.save(known.with_restored(new, others=others))

        swapped: list[Restored] = []

        def swap(new: Restored) -> None:
            remember(new, others=True)
            swapped.append(new)

        with _logged("restore", key=ref.key, container=container) as facts:
            landed = land_layer(layer, dest, profile=self.profile, replaceable=replaceable, on_swap=swap, **self._told)
            facts |= {"bytes": layer.object.size, "parts": landed.parts, "resumed": landed.bytes_resumed}
        remember(swapped[-1], others=False)
        known = self._table.load(container) or state
        digests = {"local_digest": layer.meta.digest, "remote_digest": layer.meta.digest}
        self._table.save(known.model_copy(update=digests))
        result |= {"seconds": time.monotonic() - started}
        return LayerRestoreResult("restored", **(vars(landed) | result))

    def _digest_of(self, directory: Path, dest: Path) -> str | None:
        """The present content of a restored directory; None if it contains something that no layer can hold.

        All of it counts, including what a sync would leave out.

        Args:
            directory: `dest` itself, or the path to which the tree at `dest` was moved after its scan a moment ago.
        """
        try:
            if directory != dest:
                with self._cache(dest).held() as cache:
                    if (known := cache.found_again(directory)) is not None:
                        return tree_digest(known.manifest)
            with self._cache(directory).held() as cache:
                digest = tree_digest(cache.scan(self._on_scan).manifest)
                if directory != dest:
                    remove_tree(cache.path)  # the path is not used again
                return digest
        except (UnsupportedSource, SourceBusy, SourceChanged):
            return None

    # The parts of a sync

    def _take_up(self, state: SyncState, path: Path) -> tuple[SyncState, Sent | None]:
        """Complete the earlier upload if only that is missing; abort it if its source is gone."""
        pending = state.pending
        if pending is None:
            return state, None
        finished = finish_layer(self.store, pending.key)
        if finished is not None:
            state = state.model_copy(update={"pending": None})
            self._table.save(state)
        elif not path.is_dir() and not Path(pending.path).is_dir():
            abandon_layer(self.store, pending.key, pending.upload_id)
            self._table.save(state.model_copy(update={"pending": None}))
            raise UploadInterrupted(
                f"the upload of {pending.path} cannot be continued: the directory is gone",
                key=pending.key,
                path=pending.path,
                upload_id=pending.upload_id,
            )
        return state, finished

    def _drop_superseded(self, state: SyncState, digest: str) -> SyncState:
        """Abort an upload whose content no longer exists, because the directory has changed since."""
        pending = state.pending
        if pending is None or pending.digest == digest:
            return state
        abandon_layer(self.store, pending.key, pending.upload_id)
        state = state.model_copy(update={"pending": None})
        self._table.save(state)
        return state

    def _send(
        self, state: SyncState, digest: str, artifact: Artifact, path: Path
    ) -> tuple[Literal["uploaded", "shared", "unchanged"], Sent]:
        key = layer_key(digest)
        ref = self._ref(state.container)
        try:
            there = RemoteLayer.find(self.store, key)
        except ArtifactInvalid as error:
            log.warning("layer.metadata_damaged key=%s error=%s", key, error)
            there = None
        if there is not None:
            if state.pending is not None:  # its process died after publishing
                abandon_layer(self.store, key, state.pending.upload_id)
            sent = Sent(there.meta, parts=0)
            unchanged = ref is not None and (ref.key, ref.manifest_sha256) == (key, manifest_digest(there.meta))
            return ("unchanged" if unchanged else "shared"), sent

        def begun(upload_id: str, part_size: int) -> None:
            pending = PendingUpload(
                upload_id=upload_id,
                key=key,
                digest=digest,
                part_size=part_size,
                path=str(path),
                started_at=datetime.fromtimestamp(self._clock(), timezone.utc),
            )
            self._table.save(state.model_copy(update={"pending": pending}))

        request = LayerRequest(
            self.store, artifact, self.codec, self.profile, self._frame_size, on_begin=begun, **self._told
        )
        with _logged("upload", key=key, container=state.container) as facts:
            sent = send_layer(request)
            facts |= {"bytes": sent.layer.object_size, "parts": sent.parts, "resumed": sent.bytes_resumed}
        return "uploaded", sent

    @contextmanager
    def _scanned(self, path: Path) -> Generator[tuple[Artifact, StatCache]]:
        """The directory as an artifact by reference, and the cache with the scan's counts."""
        with self._cache(path, **self._scan_options).held() as cache:
            yield cache.scan(self._on_scan), cache

    def _cache(self, path: Path, **options: Any) -> StatCache:
        exporter = DirectoryExporter(path=path, mode="reference", mtimes="drop", **options)
        return StatCache(self.home / "stats", exporter, clock=lambda: int(self._clock() * 1e9))

    def _ref(self, container: str) -> RefState | None:
        _check_name(container)
        return read_ref(self.store, container_ref(container))

    def _not_found(self, container: str) -> NotFoundError:
        hint = "list what there is with `blobflow layer ls`"
        return NotFoundError(f"no container {container!r} in {self.store.url}", hint=hint, name=container)

    def _recovered(self, container: str) -> SyncState | None:
        """The state of a container according to the bucket; None if it is unknown."""
        try:
            ref = self._ref(container)
            layer = RemoteLayer.find(self.store, ref.key) if ref is not None else None
        except ArtifactInvalid as error:
            log.warning("layer.container_unreadable container=%s error=%s", container, error)
            return None
        if ref is None or layer is None:
            return None
        return SyncState(container=container, remote_digest=layer.meta.digest, last_sync=ref.updated_at)


def default_home() -> Path:
    """The default directory for state and stat caches."""
    if told := os.environ.get(HOME_ENV):
        return Path(told)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return expanded(state) / "blobflow" / "layers"


def _check_name(container: str) -> None:
    if not container or not container.isprintable():
        raise UsageError(f"{container!r} is not a container name", hint="use printable characters, at least one")


def _earlier(state: SyncState, dest: Path) -> Restored | None:
    """The restore that is at `dest` now; None if there is none."""
    try:
        status = dest.stat(follow_symlinks=False)
    except OSError:
        return None
    here = (str(dest), status.st_dev, status.st_ino)
    return next((one for one in reversed(state.restored) if (one.path, one.device, one.inode) == here), None)


@contextmanager
def _of_layers() -> Generator[None]:
    """Drop the hint about copies from errors of a source that is written to; a sync makes no copies."""
    try:
        yield
    except (SourceBusy, SourceChanged) as error:
        hint = "sync again while nobody writes to the directory, leave out what is written to, or sync a snapshot"
        error.advise(hint)
        raise


@contextmanager
def _logged(what: str, **names: str) -> Generator[dict[str, Any]]:
    """Log one event for a transfer, whatever its outcome."""
    started = time.monotonic()
    facts: dict[str, Any] = dict(names)
    outcome = "done"
    try:
        yield facts
    except BlobflowError as error:
        outcome = type(error).__name__
        raise
    except BaseException:
        outcome = "stopped"
        raise
    finally:
        shown = " ".join(f"{name}={value}" for name, value in facts.items())
        log.info("layer.%s outcome=%s seconds=%.3f %s", what, outcome, time.monotonic() - started, shown)
