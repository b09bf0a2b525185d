"""Every error blobflow raises, grouped by what a handler does about it.

| group | the handler | exit code |
|---|---|---|
| `TemporaryError` | waits and tries again; nothing is lost, the next run continues | 75 |
| `IntegrityError` | stops: the bytes are not the ones that were promised | 3 |
| `NotFoundError` | names another key | 4 |
| `RefusedError` | stops: untrusted input, or a conflict that somebody has to settle | 5 |
| `UsageError` | corrects the configuration or the call | 2 |

Errors of other libraries are translated once, at the store seam, and kept as `__cause__`. Errors of the operating
system are told apart here and nowhere else: `reading` for sources, `writing` for destinations, `storing` for stores.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

Value: TypeAlias = str | int | float
Wording: TypeAlias = Callable[[str, Value | None], str]
"""How a surface writes a setting, with its value or without one."""

_NUMBER: Final = r"-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|NaN"
_SETTING: Final = re.compile(rf'\x02([a-z0-9_]+)(?:=("[^"\\\x00-\x1f]*"|{_NUMBER}))?\x03')
"""Strict, because a message may also quote what comes from elsewhere."""


def setting(name: str, value: Value | None = None) -> str:
    """A setting that a message or a hint speaks of; every surface writes it in its own words.

    | surface | `setting("keep_last")` | `setting("mode", "copy")` |
    |---|---|---|
    | Python: an argument | `keep_last` | `mode="copy"` |
    | command line: an option (`blobflow.cli.formatting.as_option`) | `--keep-last` | `--mode copy` |
    | Dagster: a field (`blobflow.dagster.failures.as_field`) | `keep_last` | `mode: copy` |

    Args:
        name: The argument's name in Python.
        value: What it is, or what the hint recommends.
    """
    return f"\x02{name}\x03" if value is None else f"\x02{name}={json.dumps(value)}\x03"


def as_argument(name: str, value: Value | None) -> str:
    """A setting as Python writes it."""
    return name if value is None else f"{name}={json.dumps(value)}"


def worded(text: str, wording: Wording) -> str:
    """`text` with every `setting` in it in the words of one surface."""
    return _SETTING.sub(lambda found: wording(found[1], None if found[2] is None else json.loads(found[2])), text)


LEAVE_IT_OUT: Final = f"leave it out with {setting('exclude')}"
"""The remedy for a part of a source that cannot be exported."""


class BlobflowError(Exception):
    """Base of all errors of this package.

    Attributes:
        message: What happened, naming the thing it happened to. Settings are named as in Python; see `to_dict`.
        hint: What the operator can do about it, likewise; empty where there is nothing to say.
        fields: Machine-readable facts (key, offset, expected, actual ...). They also are attributes. Those of more than
            `MAX_QUOTED` characters are whole here; the message, the hint and `to_dict` show their beginning.
        retryable: Whether the same call may succeed later without anybody changing anything.
        exit_code: What the command line exits with.
    """

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None, **fields: Any) -> None:
        texts = (message, self.default_hint if hint is None else hint)
        self._texts = tuple(_cut(_without_long(text, fields.values()), _MAX_MESSAGE) for text in texts)
        self.message, self.hint = (worded(text, as_argument) for text in self._texts)
        super().__init__(self.message)
        self.fields: dict[str, Any] = {
            name: _cut(value, _MAX_FIELD) if isinstance(value, str) else value
            for name, value in fields.items()
            if value is not None
        }

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), *self._texts, self.fields)

    def locate(self, url: str, place: str) -> None:
        """Have the message say in which store it happened; for errors of other places (files, other stores) nothing.

        Args:
            url: Of the store, without credentials.
            place: The same, with the server where the URL does not name it.
        """
        if "path" in self.fields or self.fields.get("store", url) != url:
            return
        self.fields["store"] = place
        if url not in self.message:
            self._texts = (f"{self._texts[0]} ({place})", self._texts[1])
            self.message = worded(self._texts[0], as_argument)
            self.args = (self.message,)

    def advise(self, hint: str) -> None:
        """Replace the hint by that of somebody who knows more."""
        self._texts = (self._texts[0], hint)
        self.hint = worded(hint, as_argument)

    def to_dict(self, wording: Wording = as_argument) -> dict[str, Any]:
        """Type, message, hint and fields as plain values.

        Args:
            wording: How the surface that shows the error writes settings; by default as arguments of Python.
        """
        plain = {k: v if isinstance(v, int | float) else _cut(str(v), MAX_QUOTED) for k, v in self.fields.items()}
        message, hint = (worded(text, wording) for text in self._texts)
        return {**plain, "type": type(self).__name__, "message": message, "hint": hint}


MAX_QUOTED: Final = 200
"""Characters of one value in a message, or where a field is shown."""
_MAX_MESSAGE: Final = 2000
"""Characters of a message, with all that it quotes."""
_MAX_FIELD: Final = 8192
"""Characters; twice the longest path of Linux."""


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _without_long(text: str, values: Iterable[Any]) -> str:
    """`text`, in which each of `values` that has more than `MAX_QUOTED` characters is cut to them, quoted or not."""
    for value in values:
        if isinstance(value, str | Path) and len(whole := str(value)) > MAX_QUOTED:
            for form in (whole, repr(whole)[1:-1]):
                text = text.replace(form, _cut(form, MAX_QUOTED))
    return text


def _rebuild(kind: type[BlobflowError], message: str, hint: str, fields: dict[str, Any]) -> BlobflowError:
    return kind(message, hint=hint, **fields)


class TemporaryError(BlobflowError):
    """Try again later: what was moved so far is kept."""

    retryable = True
    exit_code = 75
    default_hint = "run the same command again; it continues where it stopped"


class StoreUnavailable(TemporaryError):
    """The store refused, dropped or never answered a request.

    Fields: operation, key, offset; status (HTTP) where there was an answer.
    """


class SlowDown(StoreUnavailable):
    """The store asks for fewer requests. Field: retry_after_s, where the store said so."""


class TimedOut(TemporaryError):
    """No byte moved for the whole idle timeout. Fields: operation, key, offset, timeout_s."""


class ObjectChanged(TemporaryError):
    """A pinned object was replaced while it was read; reading again gives the new one.

    Fields: key, expected and actual (entity tags).
    """


class ReplacementInProgress(TemporaryError):
    """The key's artifact is being replaced at this moment. Field: key."""


class TransferBusy(TemporaryError):
    """Another process holds what this call needs. Fields: key or path, owner."""

    default_hint = "wait for the other process to end, or for its lease to expire"


class AtCapacity(TemporaryError):
    """All permits for batch operations are taken; nothing was read of the input. Field: limit."""

    default_hint = "wait for another batch to end, or allow more operations at once"


class DeadlineExceeded(TemporaryError):
    """An operation of a batch took too long, and was given up; whether it happened is not known.

    Fields: operation, key, deadline_s.
    """

    default_hint = "do it again: inserts, gets and deletes of a key may be repeated"


class WorkerDied(TemporaryError):
    """The process that an operation of a batch ran in ended. Fields: operation, key, status (its exit code)."""

    default_hint = "do it again; if it dies again, the operation itself kills its process"


class SessionPoisoned(TemporaryError):
    """A mirror failed in the middle of an earlier chunk, and took up what its journal vouches for. Field: expected."""

    default_hint = "go on at the expected offset, or begin again at 0"


class DiskFull(TemporaryError):
    """The local disk has no room. Fields: path."""

    default_hint = "free some space and run the same command again; it continues where it stopped"


class SourceBusy(TemporaryError):
    """A source was written to while it was exported; nothing was published. Fields: path, what."""

    default_hint = (
        "run it again while nobody writes to the source, or export a snapshot of its file system;"
        f" {setting('mode', 'copy')} takes each file at a moment when nobody writes to it"
    )


class IntegrityError(BlobflowError):
    """The bytes are not the ones that were promised."""

    exit_code = 3


class ChecksumMismatch(IntegrityError):
    """A checksum differs. Fields: what, expected, actual."""

    default_hint = "the data was damaged in storage or on the way; restore it from another copy"


class DigestMismatch(ChecksumMismatch):
    """A SHA-256 digest differs. Fields: what, expected, actual."""


class SizeMismatch(IntegrityError):
    """A length differs. Fields: what, expected, actual (bytes)."""


class SourceTruncated(SizeMismatch):
    """The source ended early. Fields: at, want (byte positions)."""


class ArtifactInvalid(IntegrityError):
    """Manifest, index or payload contradict each other or the format. Field: key or path."""


class ObjectTooLarge(IntegrityError):
    """An object that must be small is not. Fields: key, limit (bytes)."""


class UploadIncomplete(IntegrityError):
    """The parts in the store are not the parts of the plan. Fields: key, expected, actual."""


class OperationCrashed(BlobflowError):
    """An operation of a batch raised what no store should; the reason is the `__cause__`.

    Fields: operation, key, error (its type).
    """

    default_hint = "this is a defect of the store or of the operation; the other operations are not affected"


class NotFoundError(BlobflowError):
    """The named thing does not exist."""

    exit_code = 4


class ObjectNotFound(NotFoundError):
    """No object under this key. Field: key."""


class ArtifactNotFound(NotFoundError):
    """No complete artifact under this key. Field: key."""

    default_hint = "list what there is with `blobflow ls`"


class UploadInterrupted(NotFoundError):
    """An upload cannot be taken up again, because its source is gone; it was aborted. Fields: key, path, upload_id."""

    default_hint = "bring the directory back and sync again; it begins anew"


class NoSuchUpload(NotFoundError):
    """The multipart upload is unknown: completed, aborted or expired. Fields: key, upload_id."""


class RefusedError(BlobflowError):
    """Refused as a matter of safety; nothing was changed."""

    exit_code = 5


class SourceChanged(RefusedError):
    """A source is not the one that was exported, or that a transfer began with. Fields: path, what."""

    default_hint = (
        f"export again; where the source is written to all the time, export with {setting('mode', 'copy')},"
        " or export a snapshot of its file system"
    )


class DiskTooSmall(RefusedError):
    """There is less room than is needed; not a byte was moved. Fields: path, needed, free (bytes)."""

    default_hint = "free some space, or name a place on a larger file system"


class PermissionMissing(RefusedError):
    """The batch may not do this. Fields: operation, key, permission."""

    default_hint = "allow it where the executor is made"


class PayloadTooLarge(RefusedError):
    """An insert of a batch carries more than it may. Fields: key, actual, limit (bytes)."""

    default_hint = "upload large objects as artifacts, or with `transfer`"


class HostileArtifact(RefusedError):
    """The artifact names something that must never be written. Fields: path, reason."""


class UnsupportedSource(RefusedError):
    """The source holds something that an artifact cannot. Fields: path, reason."""


class DestinationNotEmpty(RefusedError):
    """The destination exists and is not an empty directory. Field: path."""

    default_hint = "name a new path, or remove what is there"


class KeyConflict(RefusedError):
    """The key holds, or is receiving, another artifact. Fields: key, expected, actual (digests)."""

    default_hint = f"use another key, or replace what is there with {setting('overwrite')}"


class ResultsConflict(RefusedError):
    """The results of a batch belong to other operations. Field: path."""

    default_hint = f"name another file with {setting('results')}, or forget these results with {setting('fresh')}"


class PreconditionFailed(RefusedError):
    """A conditional write found another object. Fields: key, expected, actual (entity tags).

    Callers that take part in a race treat this as the answer "lost", not as a failure.
    """


class LeaseLost(RefusedError):
    """Somebody else took the lease over; the holder must not publish. Fields: name, generation."""


class OffsetRegressionError(RefusedError):
    """A chunk does not continue what a mirror holds; nothing was changed. Fields: expected, actual (offsets)."""

    default_hint = "go on at the expected offset, or begin again at 0"


class UsageError(BlobflowError):
    """The call or the configuration is wrong."""

    exit_code = 2


class InvalidStoreUrl(UsageError):
    """Not a store URL. Field: url (never with credentials)."""


class InvalidOperation(UsageError):
    """An entry of a file of operations is none. Fields: path, index (from 0)."""


class InvalidKey(UsageError):
    """Not a key. Fields: key, reason."""


class StoreConfigurationError(UsageError):
    """The store refuses these credentials, this bucket or this region.

    Fields: operation, key; status (HTTP) and code (the store's own name of the error) where there was an answer.
    """


class Unsupported(UsageError):
    """This store or file system lacks an ability the call needs. Fields: store, ability."""


class SystemLimit(UsageError):
    """A limit of the operating system is reached, and trying again does not raise it. Fields: path or key, limit."""


class OsFault(Enum):
    """What an error of the operating system means, whatever was being done."""

    NO_ROOM = auto()
    FILE_SIZE = auto()
    OPEN_FILES = auto()
    DENIED = auto()
    GONE = auto()
    NAME_TOO_LONG = auto()
    CANNOT = auto()
    """The file system lacks the operation."""
    DAMAGED = auto()
    LATER = auto()
    """It may work the next time, without anybody changing anything."""
    OTHER = auto()


_FAULTS: Final = {
    errno.ENOSPC: OsFault.NO_ROOM,
    errno.EDQUOT: OsFault.NO_ROOM,
    errno.EFBIG: OsFault.FILE_SIZE,
    errno.EMFILE: OsFault.OPEN_FILES,
    errno.EACCES: OsFault.DENIED,
    errno.EPERM: OsFault.DENIED,
    errno.EROFS: OsFault.DENIED,
    errno.ENOENT: OsFault.GONE,
    errno.ENOTDIR: OsFault.GONE,
    errno.ESTALE: OsFault.GONE,
    errno.ENAMETOOLONG: OsFault.NAME_TOO_LONG,
    errno.EXDEV: OsFault.CANNOT,
    errno.EMLINK: OsFault.CANNOT,
    errno.ENOSYS: OsFault.CANNOT,
    errno.ENOTSUP: OsFault.CANNOT,
    errno.EOPNOTSUPP: OsFault.CANNOT,
    errno.EIO: OsFault.DAMAGED,
    errno.EAGAIN: OsFault.LATER,
    errno.EINTR: OsFault.LATER,
    errno.ENFILE: OsFault.LATER,
    errno.ENOBUFS: OsFault.LATER,
    errno.ENOLCK: OsFault.LATER,
    errno.ENOMEM: OsFault.LATER,
    errno.ETIMEDOUT: OsFault.LATER,
}

_LIMITS: Final = {
    OsFault.FILE_SIZE: (
        "file size",
        "raise the limit on file sizes (`ulimit -f`), or use a file system that holds files of this size",
    ),
    OsFault.OPEN_FILES: ("open files", "raise the limit on open files (`ulimit -n`), or use fewer workers"),
}


def os_fault(error: OSError) -> OsFault:
    """What `error` means."""
    return _FAULTS.get(error.errno or 0, OsFault.OTHER)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Generator[None]:
    """Translate errors of the operating system while `path`, a source or a part of one, is read.

    Raises:
        SourceChanged: it is gone.
        UnsupportedSource: it cannot be read, whether it is a file or a directory.
        SystemLimit, TemporaryError: this process or machine cannot read anything more.
    """
    try:
        yield
    except OSError as error:
        raise _source_error(error, os.fspath(path)) from error


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Translate errors of the operating system while `path`, a destination, is written to.

    Raises:
        DiskFull: there is no room.
        RefusedError: it cannot be written to.
        Unsupported: its file system cannot do what is needed.
        SystemLimit, TemporaryError: this process or machine cannot write anything more.
    """
    try:
        yield
    except OSError as error:
        raise _destination_error(error, path) from error


@contextmanager
def storing(doing: str, **fields: Any) -> Generator[None]:
    """Translate errors of the operating system in a store that keeps its objects as files.

    Args:
        doing: What was being done to what; the message begins with it.
        fields: Of the error: operation, key, offset, path.

    Raises:
        DiskFull: there is no room. Not StoreUnavailable: repeating it at once makes none.
        StoreConfigurationError: the directory cannot be used.
        InvalidKey: the key is too long for the file system.
        SystemLimit: this process cannot store anything more.
        StoreUnavailable: anything else; it may work the next time.
    """
    try:
        yield
    except OSError as error:
        raise _store_error(error, doing, fields) from error


def _source_error(error: OSError, path: str) -> BlobflowError:
    shown = path.encode("utf-8", "backslashreplace").decode()
    message = f"{shown!r} cannot be read: {_reason(error)}"
    fault = os_fault(error)
    if fault is OsFault.GONE:
        return SourceChanged(message, path=shown, what="existence")
    remedies = {
        OsFault.DENIED: f"give permission to read it, or {LEAVE_IT_OUT}",
        OsFault.DAMAGED: f"look after the disk, or {LEAVE_IT_OUT}",
        OsFault.NAME_TOO_LONG: f"shorten the path, or {LEAVE_IT_OUT}",
    }
    return error_anywhere(error, message, {"path": shown}) or UnsupportedSource(
        message, hint=remedies.get(fault, LEAVE_IT_OUT), path=shown, reason=_reason(error)
    )


def _destination_error(error: OSError, path: Path) -> BlobflowError:
    fault = os_fault(error)
    message = f"{path} cannot be written: {_reason(error)}"
    if fault is OsFault.NO_ROOM:
        message = f"no room left for {path}: {_reason(error)}"
    if fault is OsFault.CANNOT:
        hint = "name a directory on another file system"
        return Unsupported(message, hint=hint, path=str(path), capability=_reason(error))
    remedies = {
        OsFault.DAMAGED: "look after the disk, or name a directory on another one",
        OsFault.NAME_TOO_LONG: "name a directory with a shorter path",
    }
    return error_anywhere(error, message, {"path": str(path)}) or RefusedError(
        message, hint=remedies.get(fault, "name a directory that can be written to"), path=str(path)
    )


def _store_error(error: OSError, doing: str, fields: dict[str, Any]) -> BlobflowError:
    message = f"{doing}: {_reason(error)}"
    fault = os_fault(error)
    if fault is OsFault.NAME_TOO_LONG:
        return InvalidKey(message, reason="longer than the file system allows", **fields)
    if fault in (OsFault.DENIED, OsFault.CANNOT):
        hint = "the directory must be one writable file system with hard links"
        return StoreConfigurationError(message, hint=hint, **fields)
    if fault is OsFault.LATER:
        return StoreUnavailable(message, **fields)
    return error_anywhere(error, message, fields) or StoreUnavailable(message, **fields)


def error_anywhere(error: OSError, message: str, fields: dict[str, Any]) -> BlobflowError | None:
    """The error that is the same for sources, destinations and stores; None where they differ."""
    fault = os_fault(error)
    if fault is OsFault.NO_ROOM:
        return DiskFull(message, **fields)
    if fault in _LIMITS:
        limit, hint = _LIMITS[fault]
        return SystemLimit(message, hint=hint, limit=limit, **fields)
    if fault is OsFault.LATER:
        return TemporaryError(message, **fields)
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~user` replaced.

    Raises:
        UsageError: nothing says where that home directory is (a container's user without a passwd entry).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{os.fspath(path)}: there is no home directory for it",
            hint="set HOME to a directory that can be written to, or give a path without ~",
            path=os.fspath(path),
        ) from error
