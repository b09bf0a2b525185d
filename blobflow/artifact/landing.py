"""Landing: checked bytes become files beside the destination, and one rename makes them the destination.

Taken from an artifact: contents, sizes, the directory tree, the owner's execute bit. Everything is written into a
private stage through directory descriptors, with O_NOFOLLOW and O_EXCL. A journal of finished parts lets the next
process continue. Lanes land parts side by side, each with a separate journal. The process that holds the stage alone
proves the whole and publishes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blobflow.artifact.checker import PayloadChecker
from blobflow.artifact.manifest import DATA_NAME, INDEX_NAME, MANIFEST_NAME
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.members import permissions, visit_members
from blobflow.artifact.small_file_lock import SmallFileLock
from blobflow.artifact.tarmap import FIRST_MEMBER, TarMap
from blobflow.checksum import combine_all, crc32c
from blobflow.durable import (
    append_lines,
    check_room,
    fsync_directory,
    names_file,
    replace_file,
    sync_tree,
    too_small,
    try_lock,
    whole_lines,
    write_all,
)
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import (
    ArtifactInvalid,
    ChecksumMismatch,
    DestinationNotEmpty,
    DigestMismatch,
    DiskTooSmall,
    NotFoundError,
    RefusedError,
    TransferBusy,
    writing,
)
from blobflow.owner import boot_id
from blobflow.trees import OPEN_DIRECTORY, Cursor, Opened, make_directories, open_below, open_beneath, remove_tree
from blobflow.untrusted import read_json

_log = logging.getLogger(__name__)

STAGE_PREFIX: Final = ".blobflow-download-"
REPLACED_NAME: Final = "replaced"
"""Marks a stage that now contains the former content of its destination, until that was checked once more."""

_JOURNAL_NAME: Final = "journal"
_MOVING_NAME: Final = "moving"
"""Marks a stage inside its destination: all of it is proven, and its entries are being moved out."""
_MOVED: Final = (DATA_NAME, INDEX_NAME, MANIFEST_NAME)
"""The entries in the order in which they are moved: an artifact is complete when its manifest is there."""
_OF_THE_FILE_SYSTEM: Final = "lost+found"
_LANE_PREFIX: Final = "lane-"
_LOCK_NAME: Final = "lock"
"""A file, because network file systems pass flock(2) on to their server for files only."""
_TREE_NAME: Final = "artifact"
_HOLE: Final = bytes(64 * 1024)
"""Aligned runs of zeros of this size are left as holes, so that a sparse file lands sparse."""
_READ_BACK_SIZE: Final = 1 << 20
_MAX_NOTE_BYTES: Final = 4096
"""Maximum bytes of a line of the journal; ours have less than 150."""
_MAX_PART_BYTES: Final = 5 << 30
"""S3's largest part."""
_OPEN_FILE: Final = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_destination(dest: Path) -> None:
    """Refuse a destination that is not empty.

    Raises:
        DestinationNotEmpty: it exists and is not an empty directory.
    """
    try:
        with os.scandir(dest) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        empty = True
    except NotADirectoryError:
        empty = False
    # A link cannot be replaced by a directory in one step, whatever its target is.
    if not empty or dest.is_symlink():
        raise _not_empty(dest)


def _not_empty(dest: Path) -> DestinationNotEmpty:
    return DestinationNotEmpty(f"destination {dest} exists and is not an empty directory", path=str(dest))


def is_fixed(dest: Path) -> bool:
    """Whether a directory cannot be replaced: it is a mount point, or its parent allows no renames."""
    try:
        with Opened(dest) as here:
            parent = os.open(dest.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _mount_of(here) != _mount_of(parent):
                    return True
                above, own = os.fstat(parent), os.fstat(here)
            finally:
                os.close(parent)
    except OSError:  # absent, or not a directory
        return False
    user = os.geteuid()
    kept = bool(above.st_mode & stat.S_ISVTX) and user not in (0, above.st_uid, own.st_uid)
    return kept or not os.access(dest.parent, os.W_OK | os.X_OK, effective_ids=True)


def _mount_of(descriptor: int) -> str:
    """An id of the mount of a descriptor; bind mounts of one file system have different ids."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
            return next((line for line in file if line.startswith("mnt_id:")), "")
    except FileNotFoundError:  # no /proc
        return str(os.fstat(descriptor).st_dev)


class Stage:
    """The private directory beside a destination where one artifact lands.

    `<stage>/artifact` becomes the destination, `<stage>/journal` records the finished parts. One process holds it
    alone (`held`), or lanes hold it together (`lane`), each with a journal `<stage>/lane-<number>`.

    If the destination cannot be replaced (`is_fixed`), the stage is inside it. Then the entries of the artifact are
    moved out one by one, the manifest last, because an artifact without a manifest does not count. `<stage>/moving`
    records that this has begun, so that it continues after a crash.
    """

    def __init__(self, dest: Path, artifact_digest: str) -> None:
        self.dest = dest
        self.artifact_digest = artifact_digest
        name = f"{dest.name}-{artifact_digest.removeprefix('sha256:')}"
        # Destination names may be as long as the file system allows, so the stage's name is a hash of it.
        self.is_inside = is_fixed(dest)
        """Whether it is inside its destination, not beside it."""
        self._parent = dest if self.is_inside else dest.parent
        self.path = self._parent / f"{STAGE_PREFIX}{hashlib.sha256(os.fsencode(name)).hexdigest()[:24]}"
        self._at = self.path
        """The path that all accesses use. While the stage is held, it goes through the stage's descriptor, so that a
        user who may rename the stage cannot redirect a write."""
        self._journal_name = _JOURNAL_NAME
        self.part_size: int | None = None
        """Part size of the parts in the journal; None in a fresh stage."""
        self.lanes = 1
        """Number of processes that the parts are divided among."""
        self.done: dict[int, int] = {}
        """Finished parts: number -> CRC32C."""
        self.is_lane = False
        """Whether other processes land parts at the same time."""
        self._noting = threading.Lock()

    def __repr__(self) -> str:
        return f"<Stage {self.path.name} for {self.dest}, {len(self.done)} parts done>"

    @property
    def tree(self) -> Path:
        """The directory that becomes the destination. While the stage is held, only this process can use the path."""
        return self._at / _TREE_NAME

    @property
    def _journal(self) -> Path:
        return self._at / self._journal_name

    @contextmanager
    def held(self) -> Generator[Stage]:
        """Hold the stage alone, and take over what earlier processes and lanes left in it.

        Raises:
            TransferBusy: another process lands the same artifact at the same destination.
        """
        with self._locked():
            self._take_over(self._journal)
            if self.part_size is not None:
                self._append([{"boot": boot_id()}])
            self._merge_lanes()
            yield self

    @contextmanager
    def lane(self, number: int, lanes: int) -> Generator[Stage]:
        """Hold the stage as one of `lanes`, counted from 0. The progress of other lanes is not visible.

        Raises:
            TransferBusy: another process holds the stage alone, or runs this lane.
            NotFoundError: the stage is not divided into that many lanes (see `divide`).
        """
        with self._locked(shared=True):
            self._take_over(self._journal)
            if self.part_size is None or self.lanes != lanes:
                raise NotFoundError(
                    f"no download to {self.dest} in {lanes} lanes is under way",
                    hint="begin it again; what has landed is kept",
                    path=str(self.dest),
                )
            self.is_lane = True
            self._journal_name = f"{_LANE_PREFIX}{number}"
            with open(self._journal, "ab") as own:
                # Two processes that land the same part would remove each other's files.
                if not try_lock(own.fileno()):
                    raise TransferBusy(f"another process is lane {number} of {self.dest}", path=str(self.dest))
                self._take_over(self._journal)
                self._append([{"artifact": self.artifact_digest, "part_size": self.part_size}, {"boot": boot_id()}])
                yield self

    @contextmanager
    def _locked(self, *, shared: bool = False) -> Generator[None]:
        with writing(self.dest):
            make_directories(self.dest.parent)
            self.path.mkdir(mode=0o700, exist_ok=True)
        with lock_of(self.path) as lock:
            if lock is None or not try_lock(lock, shared=shared):
                raise TransferBusy(f"another process is landing {self.dest}", path=str(self.dest))
            with self._opened():
                if not self._is_open(lock):
                    raise TransferBusy(f"another process has just landed {self.dest}", path=str(self.dest))
                yield

    @contextmanager
    def _opened(self) -> Generator[None]:
        """Access everything in the stage through its descriptor, if the system has /proc."""
        try:
            directory = os.open(self.path, OPEN_DIRECTORY)
        except OSError:  # it is gone, or was replaced; `_is_open` finds out
            yield
            return
        try:
            through = Path(f"/proc/self/fd/{directory}")
            if through.exists() and os.fstat(directory).st_uid == os.geteuid():
                self._at = through
            yield
        finally:
            self._at = self.path
            os.close(directory)

    def _is_open(self, lock: int) -> bool:
        """Whether the locked stage still exists and is still needed; another process may have just published it."""
        with writing(self.dest):
            try:
                self.check_destination()
                self.tree.mkdir(exist_ok=True)
                return names_file(self._at / _LOCK_NAME, lock)
            except (FileNotFoundError, DestinationNotEmpty):
                return False

    def _take_over(self, journal: Path) -> None:
        notes = _Notes.read(journal)
        if notes.part_size is not None and self.part_size in (None, notes.part_size):
            self.part_size = notes.part_size
            self.lanes = notes.lanes or self.lanes
            self.done |= notes.done

    def _merge_lanes(self) -> None:
        """Move the notes of lanes, also of those on other machines, into the journal."""
        journals = sorted(self._at.glob(f"{_LANE_PREFIX}*"))
        if not journals:
            return
        before = dict(self.done)
        if self.part_size is not None:
            for journal in journals:
                self._take_over(journal)
            new = [{"part": number, "crc32c": crc} for number, crc in self.done.items() if number not in before]
            self._append(new)
            self.sync()
        for journal in journals:
            journal.unlink()
        fsync_directory(self._at)

    def begin(self, part_size: int) -> None:
        """Start the journal of a fresh stage."""
        self.part_size = part_size
        self._append([{"artifact": self.artifact_digest, "part_size": part_size}, {"boot": boot_id()}], durable=True)

    def check_room(self, layout: TarMap, plan: TransferPlan, holes: int | None) -> None:
        """Refuse to land more than there is room for, before the first byte; then a fresh stage is removed.

        Args:
            holes: Bytes of the members that are left as holes.

        Raises:
            DiskTooSmall: there is less room; the message has the needed and the free bytes.
        """
        landed = sum(plan.part(number).length for number in self.done)
        try:
            check_room(self._at, layout.index.total_bytes - landed - (holes or 0))
        except DiskTooSmall as error:
            if not self.done:
                self.discard()
            raise too_small(str(self.dest), error.needed, error.free) from None

    def forget_all(self) -> None:
        """Forget every part durably, because the tree is about to change."""
        with writing(self.dest):
            self._journal.unlink(missing_ok=True)
            fsync_directory(self._at)

    def divide(self, lanes: int) -> None:
        """Let that many lanes, on any machines that see this directory, land the missing parts."""
        self.sync()
        self.lanes = lanes
        self._append([{"lanes": lanes}], durable=True)

    def note(self, number: int, crc: int) -> None:
        """Record a part that was written. The note survives this process, but not yet a power cut. Thread-safe."""
        with self._noting:
            self._append([{"part": number, "crc32c": crc}])
            self.done[number] = crc

    def sync(self) -> int:
        """Make all parts noted so far durable, and return their number."""
        with self._noting:
            noted = len(self.done)
            self._append([{"syncing": noted}])
        with writing(self.dest):
            sync_tree(self._at)
        with self._noting:
            self._append([{"synced": noted}], durable=True)
        return noted

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget parts that are wrong, so that the next run fetches them again."""
        with self._noting:
            dropped = [number for number in numbers if self.done.pop(number, None) is not None]
            self._append([{"drop": number} for number in dropped], durable=True)

    def _append(self, records: Iterable[Mapping[str, int | str]], *, durable: bool = False) -> None:
        with writing(self.dest), open(self._journal, "ab", buffering=0) as file:
            append_lines(file.fileno(), map(json.dumps, records))
            if durable:
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Make the finished tree the destination in one step, and remove the stage.

        Raises:
            DestinationNotEmpty: something appeared at the destination meanwhile; it stays unchanged.
        """
        with writing(self.dest):
            sync_tree(self._at)
            self.check_destination()
            try:
                self.move()
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _not_empty(self.dest) from error
                raise
            fsync_directory(self._parent)
        try:
            self.discard()
        except OSError as error:  # the destination is complete; `sweep` removes the rest
            _log.warning("stage.stays path=%s error=%s", self.path, error)

    def check_destination(self) -> None:
        """Refuse a destination that must not be replaced; see `check_destination`."""
        if not self.is_inside:
            check_destination(self.dest)
            return
        ours = {name for name in _MOVED if self.is_moving and not os.path.lexists(self.tree / name)}
        foreign = set(os.listdir(self.dest)) - ours - {_OF_THE_FILE_SYSTEM}
        if any(not name.startswith(STAGE_PREFIX) for name in foreign):
            raise DestinationNotEmpty(
                f"destination {self.dest} exists and is not an empty directory", path=str(self.dest)
            )

    @property
    def is_moving(self) -> bool:
        """Whether a process was killed while it published a stage inside its destination; `publish` continues."""
        return self.is_inside and (self._at / _MOVING_NAME).exists()

    def move(self) -> None:
        """Make the tree the destination in one step, or move its entries there one by one, the manifest last."""
        if not self.is_inside:
            os.rename(self.tree, self.dest)
            return
        (self._at / _MOVING_NAME).touch()
        fsync_directory(self._at)
        for name in _MOVED:
            if os.path.lexists(self.tree / name):
                if os.path.lexists(self.dest / name):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.dest / name))
                os.rename(self.tree / name, self.dest / name)
                fsync_directory(self.dest)

    def sweep(self) -> None:
        """Remove the rest of a stage that a process published but did not remove."""
        with lock_of(self.path) as lock:
            if lock is not None and try_lock(lock):
                self.discard()

    def discard(self) -> None:
        """Remove the stage, which must be held alone."""
        remove_stage(self.path)


class _Notes:
    """The content of a journal, one JSON object per line.

    | line | means |
    |---|---|
    | `{"artifact", "part_size"}` | the head |
    | `{"lanes"}` | the missing parts are divided among that many lanes |
    | `{"boot"}` | a process begins, in that boot of a machine |
    | `{"part", "crc32c"}` | a part is written |
    | `{"drop"}` | a part was wrong |
    | `{"syncing"}`, later `{"synced"}` | the parts noted before `syncing` are durable since `synced` |

    A killed process leaves its bytes in the kernel, so every part that it noted counts. If the machine restarted since,
    or was another one, only the synced parts count.
    """

    def __init__(self) -> None:
        self.part_size: int | None = None
        self.lanes: int | None = None
        self.done: dict[int, int] = {}
        self._noted: dict[int, int] = {}
        self._syncing: dict[int, int] = {}
        self._durable: dict[int, int] = {}
        self._boot = ""

    @classmethod
    def read(cls, journal: Path) -> _Notes:
        """The notes in a file; no notes if there is no such file."""
        notes = cls()
        try:
            with open(journal, "rb") as file:
                for _, line in whole_lines(file, longest=_MAX_NOTE_BYTES):
                    notes._take(line)
        except FileNotFoundError:
            return notes
        notes.done = notes._noted if notes._boot and notes._boot == boot_id() else notes._durable
        return notes

    def _take(self, line: bytes) -> None:
        """Apply one line; a line that is damaged or torn is ignored."""
        try:
            match read_json(line, "journal"):
                case {"artifact": str(), "part_size": int(size)} if 1 <= size <= _MAX_PART_BYTES:
                    self.part_size = size
                case {"lanes": int(lanes)} if lanes >= 1:
                    self.lanes = lanes
                case {"boot": str(boot)}:
                    if boot != self._boot:
                        self._noted = dict(self._durable)
                    self._boot, self._syncing = boot, {}
                case {"part": int(number), "crc32c": int(crc)} if number >= 1 and 0 <= crc < 1 << 32:
                    self._noted[number] = crc
                case {"drop": int(number)}:
                    for known in (self._noted, self._syncing, self._durable):
                        known.pop(number, None)
                case {"syncing": _}:
                    self._syncing = dict(self._noted)
                case {"synced": _}:
                    self._durable |= self._syncing
                case _:
                    pass
        except ArtifactInvalid:
            pass  # its part is fetched again


@contextmanager
def lock_of(stage: Path) -> Generator[int | None]:
    """The descriptor of a stage's lock; None if the stage is gone.

    Raises:
        RefusedError: it belongs to another user, or cannot be written to.
    """
    lock: int | None = None
    with writing(stage), suppress(FileNotFoundError):
        directory = os.open(stage, OPEN_DIRECTORY)
        try:
            if os.fstat(directory).st_uid != os.geteuid():
                raise RefusedError(f"stage {stage} belongs to another user", hint="remove it", path=str(stage))
            # Network file systems give an exclusive lock only on a descriptor open for writing.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(_LOCK_NAME, flags, 0o600, dir_fd=directory)
        finally:
            os.close(directory)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)


def remove_stage(stage: Path) -> None:
    """Remove a stage that the caller holds alone; its lock goes last, so that nobody begins a new stage before."""
    with Opened(stage) as directory:
        for name in os.listdir(directory):
            if name != _LOCK_NAME:
                remove_tree(name, dir_fd=directory)
        os.unlink(_LOCK_NAME, dir_fd=directory)
    try:
        stage.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # another process came at this moment, and will see that it has landed
            raise


class Landing:
    """Turns the parts of one payload into files of a stage. `land` is thread-safe.

    Args:
        plan: The parts, over the payload from the first member's entry to the end.
        digests: Whether contents are checked against their SHA-256; the CRC32C of the whole always is. In a lane, the
            process that later holds the stage alone checks the members that span parts.
    """

    def __init__(self, stage: Stage, layout: TarMap, plan: TransferPlan, *, digests: bool = True) -> None:
        self.stage = stage
        self.layout = layout
        self.plan = plan
        self._index = layout.index
        self._checker = PayloadChecker(layout, digests=digests, spanning=not stage.is_lane, read_back=self._read_back)
        self._crowd = SmallFileLock()
        self._synced = len(stage.done)
        self._prepare()
        for number in [number for number in stage.done if number > len(plan)]:
            del stage.done[number]  # a damaged note
        for number in stage.done:
            part = plan.part(number)
            self._checker.recall(part.offset, part.length)

    def __repr__(self) -> str:
        return f"<Landing {len(self.stage.done)} of {len(self.plan)} parts at {self.stage.dest}>"

    def _prepare(self) -> None:
        """Create every directory, and the files that need no bytes."""
        index, private, data = self._index, self.layout.private, self.stage.tree / DATA_NAME
        with writing(self.stage.dest):
            if private.covers(len(index)):
                self.stage.tree.chmod(0o700)
                data.mkdir(0o700, exist_ok=True)
            else:
                data.mkdir(exist_ok=True)
            with Opened(data) as root, Cursor(root) as cursor:
                for row, _, name in visit_members(cursor, index.paths, private):
                    if name and not index.sizes[row]:
                        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                        mode = permissions(index.modes[row], private=row in private)
                        os.close(os.open(name, flags, mode, dir_fd=cursor.descriptor))

    def land(self, part: Part, data: memoryview) -> int:
        """Check the bytes of a part and write them; returns their CRC32C.

        Raises:
            IntegrityError: the bytes do not match the index; no wrong part is noted as finished.
            DiskFull, RefusedError: it cannot be written; finished parts are kept.
        """
        crowd = self._crowd.around(self.layout.entries_in(part.offset, part.length))
        with _Writer(self.stage.tree / DATA_NAME, self.layout) as writer, crowd, writing(self.stage.dest):
            self._checker.consume(part.offset, data, writer.place)
        return crc32c(data)

    def landed(self, part: Part, crc: int) -> None:
        """Record a part that `land` has finished; a killed process loses none of them. Thread-safe.

        The thread that landed it records it, because a checkpoint may block the calling thread for seconds.
        """
        self.stage.note(part.number, crc)

    def sync(self) -> None:
        """Make the parts landed so far survive a power cut as well. Not thread-safe."""
        if len(self.stage.done) != self._synced:
            self._synced = self.stage.sync()

    def finish(
        self,
        head: bytes,
        manifest_file: ManifestFile,
        index_bytes: bytes,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Prove the whole, then publish it at the destination.

        Args:
            head: The payload's bytes before the plan's first part.
            on_tick: Called from time to time while members are read back; an exception from it stops the work.

        Raises:
            IntegrityError: the whole is not the expected payload.
            DestinationNotEmpty: something appeared at the destination meanwhile.
        """
        self._checker.settle(on_tick)
        parts = [(crc32c(head), len(head)), *((self.stage.done[part.number], part.length) for part in self.plan)]
        if (actual := combine_all(parts)) != (expected := manifest_file.payload_crc32c):
            self.stage.drop(range(1, len(self.plan) + 1))
            raise ChecksumMismatch(
                f"the payload has CRC32C {actual:08x}, the manifest says {expected:08x}",
                what="payload",
                expected=expected,
                actual=actual,
            )
        with writing(self.stage.dest):
            for name, content in ((INDEX_NAME, index_bytes), (MANIFEST_NAME, manifest_file.data)):
                replace_file(self.stage.tree / name, content, private=bool(self.layout.private))
        self.stage.publish()

    def forget(self, error: DigestMismatch) -> None:
        """Forget the parts of the member that `error` names, so that the next run fetches them again."""
        if error.member is not None:
            offset, length = self.layout.content_range(error.member + FIRST_MEMBER)
            self.stage.drop(self.plan.parts_of(offset, length))

    def _read_back(self, member: int, offset: int, length: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(length, _READ_BACK_SIZE)))
        path = self._index.paths[member]
        with open(open_below(self.stage.tree / DATA_NAME, path, os.O_RDONLY), "rb", buffering=0) as file:
            file.seek(offset)
            while length:
                count = file.readinto(buffer[: min(length, len(buffer))])
                if not count:
                    raise DigestMismatch(f"the stage of {self.stage.dest} lost bytes", what=path, member=member)
                yield buffer[:count]
                length -= count


class _Writer:
    """Writes runs of members below a directory, never through a link. Neighbours in the index share a parent."""

    def __init__(self, data: Path, layout: TarMap) -> None:
        self._data = data
        self._index = layout.index
        self._private = layout.private
        self._root_descriptor = -1
        self._parent: str = ""
        self._parent_descriptor = -1
        self._member: int = -1
        self._descriptor: int = -1

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._descriptor, self._parent_descriptor, self._root_descriptor):
            if descriptor >= 0:
                os.close(descriptor)

    def place(self, member: int, offset: int, data: memoryview) -> None:
        """Write a run of a member's content, the whole of it or a piece."""
        size = self._index.sizes[member]
        if member != self._member:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
                self._member = -1
            parent, _, name = self._index.paths[member].rpartition("/")
            directory = self._open_parent(parent)
            self._descriptor = self._open(directory, name, member, fresh=len(data) == size)
            self._member = member
        _write_sparsely(self._descriptor, offset, data)
        if len(data) == size:
            os.ftruncate(self._descriptor, size)

    def _open(self, directory: int, name: str, member: int, *, fresh: bool) -> int:
        mode = permissions(self._index.modes[member], private=member in self._private)
        if not fresh:
            try:
                return self._sized(os.open(name, _OPEN_FILE, dir_fd=directory), member)
            except FileNotFoundError:
                pass
        try:
            descriptor = os.open(name, _OPEN_FILE | os.O_CREAT | os.O_EXCL, mode, dir_fd=directory)
        except FileExistsError:
            if not fresh:  # another worker created it for its piece
                return self._sized(os.open(name, _OPEN_FILE, dir_fd=directory), member)
            os.unlink(name, dir_fd=directory)  # left by a process that was killed before it could note the part
            return os.open(name, _OPEN_FILE | os.O_CREAT | os.O_EXCL, mode, dir_fd=directory)
        return descriptor if fresh else self._sized(descriptor, member)

    def _sized(self, descriptor: int, member: int) -> int:
        """Give the file its length, whoever created it: its last piece may be a hole, which is not written."""
        os.ftruncate(descriptor, self._index.sizes[member])
        return descriptor

    def _open_parent(self, parent: str) -> int:
        if self._root_descriptor < 0:
            self._root_descriptor = os.open(self._data, OPEN_DIRECTORY)
        if not parent:
            return self._root_descriptor
        if parent != self._parent or self._parent_descriptor < 0:
            if self._parent_descriptor >= 0:
                os.close(self._parent_descriptor)
                self._parent_descriptor = -1
            self._parent_descriptor = open_beneath(self._root_descriptor, parent, OPEN_DIRECTORY)
            self._parent = parent
        return self._parent_descriptor


def _write_sparsely(descriptor: int, offset: int, data: memoryview) -> None:
    """Write `data` at `offset`, leaving out runs of zeros where the file already has a hole."""
    if len(data) < len(_HOLE):
        write_all(descriptor, data, offset)
        return
    start = 0
    for position in range(0, len(data) - len(_HOLE) + 1, len(_HOLE)):
        # Checking two bytes avoids the full comparison for nearly all runs that are not holes.
        if data[position] or data[position + len(_HOLE) - 1]:
            continue
        run = data[position : position + len(_HOLE)]
        if bytes(run) == _HOLE and _is_hole(descriptor, offset + position):
            write_all(descriptor, data[start:position], offset + start)
            start = position + len(_HOLE)
    write_all(descriptor, data[start:], offset + start)


def _is_hole(descriptor: int, offset: int) -> bool:
    """Whether the file has no data in the `_HOLE`-sized run at `offset`: a killed process may have left some."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + len(_HOLE)
    except OSError as error:
        return error.errno == errno.ENXIO  # only holes up to the end
