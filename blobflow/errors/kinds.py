"""The error classes, each with its own typed fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast, get_type_hints

from typing_extensions import dataclass_transform, override

from blobflow.errors.wording import Value, Wording, as_argument, setting, worded


def required() -> Any:
    """A field that must be given, although a base class has a default for it."""
    return field()


@dataclass_transform(kw_only_default=True, eq_default=False, frozen_default=True, field_specifiers=(field, required))
class _Declared(Exception):
    """Gives each subclass a constructor: its annotations are keyword-only arguments and typed attributes.

    A field without a default must be given. Type checkers see the fields as read-only. It is not a real dataclass,
    because sixty of those take about 10 ms to make, at every start of the command line.
    """

    field_defaults: ClassVar[dict[str, Any]] = {}
    """The default of each field, or MISSING; `message` is positional and not among them."""
    _texts: tuple[str, str]
    """The message and the hint, with their settings not yet formatted."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        declared: dict[str, Any] = {}
        for name, annotation in cls.__annotations__.items():
            if "ClassVar" in str(annotation):
                continue
            default: Any = cls.__dict__.get(name, MISSING)
            if isinstance(default, Field):
                default = cast("Field[Any]", default).default
                delattr(cls, name)
            if name != "message":
                declared[name] = default
        cls.field_defaults = cls.field_defaults | declared

    if not TYPE_CHECKING:

        def __init__(self, message: str, **given: Any) -> None:
            unknown = given.keys() - self.field_defaults.keys()
            values = self.field_defaults | given
            missing = [name for name, value in values.items() if value is MISSING]
            if unknown or missing:
                problem = f"no field {', '.join(sorted(unknown))}" if unknown else f"needs {', '.join(missing)}"
                raise TypeError(f"{type(self).__name__}: {problem}")
            vars(self).update(values, message=message)
            self.__post_init__()


class BlobflowError(_Declared):
    """Base class of all errors of this package.

    The common fields say where it happened. A field that does not apply is None: an error of a store has a key and no
    path, an error of a local file has a path.

    Attributes:
        message: What happened, and to what. Settings are named as in Python; see `to_dict`.
        hint: What the operator can do about it, with settings named likewise; empty if there is no advice.
        operation: What was being done: `get`, `put`, `push` ...
        store: URL of the store, without credentials.
        key: The key of the object or artifact; also the name of a lease or ref.
        path: A local path, or the path of a member of an artifact.
        offset: A byte position.
        retryable: Whether the same call may succeed later without any change.
        exit_code: The exit code of the command line.
    """

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    message: str = field(kw_only=False)
    hint: str = ""
    operation: str | None = None
    store: str | None = None
    key: str | None = None
    path: str | None = None
    offset: int | None = None

    def __post_init__(self) -> None:
        facts = self.fields
        cut = [_cut(_without_long(text, facts.values()), _MAX_MESSAGE) for text in (self.message, self.hint)]
        vars(self).update({name: _cut(value, _MAX_FIELD) for name, value in facts.items() if isinstance(value, str)})
        self._write(*cut)

    @property
    def fields(self) -> dict[str, Any]:
        """The known fields except message and hint, with whole values; messages show only the beginning."""
        values = {name: getattr(self, name) for name in field_names(type(self))}
        return {name: value for name, value in values.items() if value is not None}

    @override
    def __repr__(self) -> str:
        shown = {"hint": self.hint, **self.fields} if self.hint else self.fields
        facts = "".join(f", {name}={_shown(value)!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.message!r}{facts})"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), *self._texts, self.fields)

    def locate(self, url: str, place: str) -> None:
        """Add the store to the message; an error of another place (a file, another store) stays unchanged.

        Args:
            url: URL of the store, without credentials.
            place: The same, with the server if the URL does not name it.
        """
        if self.path is not None or self.store not in (None, url):
            return
        vars(self)["store"] = place
        if url not in self.message:
            self._write(f"{self._texts[0]} ({place})", self._texts[1])

    def belongs_to(self, *, store: str, key: str) -> None:
        """Fill in the store and the key of the artifact in use, where the error has none."""
        vars(self).update(store=self.store or store, key=self.key or key)

    def advise(self, hint: str) -> None:
        """Replace the hint by more specific advice."""
        self._write(self._texts[0], hint)

    def to_dict(self, wording: Wording = as_argument) -> dict[str, Any]:
        """Type, message, hint and fields as plain values.

        Args:
            wording: Formats settings for the surface that shows the error; by default as arguments of Python.
        """
        message, hint = (worded(text, wording) for text in self._texts)
        plain = {name: _shown(value) for name, value in self.fields.items()}
        return {**plain, "type": type(self).__name__, "message": message, "hint": hint}

    def _write(self, message: str, hint: str) -> None:
        self._texts = (message, hint)
        vars(self).update(message=worded(message, as_argument), hint=worded(hint, as_argument))
        self.args = (self.message,)


MAX_QUOTED: Final = 200
"""Maximum characters of one value in a message, or of a field that is shown."""
_MAX_MESSAGE: Final = 2000
"""Maximum characters of a message, with all that it quotes."""
_MAX_FIELD: Final = 8192
"""Maximum characters of a field; twice the longest path of Linux."""


def field_names(kind: type[BlobflowError]) -> list[str]:
    """The fields that errors of this class can have, except message and hint."""
    return [name for name in kind.field_defaults if name != "hint"]


def required_fields(kind: type[BlobflowError]) -> set[str]:
    """The fields that an error of this class must have, except the message."""
    return {name for name, default in kind.field_defaults.items() if default is MISSING}


def _shown(value: Any) -> int | float | str:
    return value if isinstance(value, int | float) else _cut(str(value), MAX_QUOTED)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _without_long(text: str, values: Iterable[Any]) -> str:
    """`text` with each of `values` above `MAX_QUOTED` characters cut to that length, quoted or not."""
    for value in values:
        if isinstance(value, str) and len(value) > MAX_QUOTED:
            for form in (value, repr(value)[1:-1]):
                text = text.replace(form, _cut(form, MAX_QUOTED))
    return text


def rebuilt(name: str, message: str, hint: str, facts: Mapping[str, Value]) -> BlobflowError | None:
    """The error that another process reports; None for an unknown name.

    The process may run another version, or lie.

    Args:
        name: Name of the class. If `facts` lack a field that it requires, the error has the nearest base class that
            does not require it.
        message: The message as the error shows it.
        hint: The hint as the error shows it.
        facts: Fields; those that the class does not declare, or declares with another type, are left out.
    """
    found = globals().get(name)
    if not (isinstance(found, type) and issubclass(found, BlobflowError)):
        return None
    for kind in found.__mro__:
        if issubclass(kind, BlobflowError):
            types = get_type_hints(kind)
            known: dict[str, Any] = {
                each: facts[each] for each in field_names(kind) if _is_a(facts.get(each), types[each])
            }
            if required_fields(kind) <= known.keys():
                return kind(message, hint=hint, **known)
    raise AssertionError("BlobflowError requires no field")


def _is_a(value: Value | None, declared: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    return isinstance(value, declared) or (isinstance(value, int) and isinstance(0.0, declared))


def _rebuild(kind: type[BlobflowError], message: str, hint: str, facts: dict[str, Any]) -> BlobflowError:
    return kind(message, hint=hint, **facts)


class TemporaryError(BlobflowError):
    """Try again later: what was moved so far is kept.

    Attributes:
        retry_after_s: Seconds to wait, if the other side asked for a time.
    """

    retryable = True
    exit_code = 75
    hint: str = "run the same command again; it continues where it stopped"
    retry_after_s: float | None = None


class StoreUnavailable(TemporaryError):
    """The store refused, dropped or never answered a request.

    Attributes:
        operation: The request.
        status: HTTP status; None if there was no response.
        code: The store's own name of the error; None if there was no response.
    """

    operation: str = required()
    status: int | None = None
    code: str | None = None


class SlowDown(StoreUnavailable):
    """The store asks for fewer requests; `retry_after_s` is set if it asked for a time."""


class TimedOut(TemporaryError):
    """No byte moved for the whole idle timeout.

    Attributes:
        operation: The request.
        timeout_s: The timeout in seconds; None if a library has its own timeout.
    """

    operation: str = required()
    timeout_s: float | None = None


class ObjectChanged(TemporaryError):
    """A pinned object was replaced while it was read; reading again returns the new one.

    Attributes:
        key: The object.
        expected: Its entity tag when it was pinned; None if the contents were compared.
        actual: Its entity tag now; None if the store does not report it.
    """

    key: str = required()
    expected: str | None = None
    actual: str | None = None


class ReplacementInProgress(TemporaryError):
    """The key's artifact is being replaced at this moment.

    Attributes:
        key: The artifact.
    """

    key: str = required()


class TransferBusy(TemporaryError):
    """Another process holds what this call needs: `key` in a store, or `path` on this machine.

    Attributes:
        owner: The other process; None if it is unknown.
    """

    hint: str = "wait for the other process to end, or for its lease to expire"
    owner: str | None = None


class AtCapacity(TemporaryError):
    """The limit of concurrent operations, or of a receiver's snapshots, is reached; no input was read.

    Attributes:
        limit: The limit.
    """

    hint: str = "wait for another batch to end, or allow more operations at once"
    limit: int


class DeadlineExceeded(TemporaryError):
    """A batch operation exceeded its deadline and was given up; it may or may not have happened.

    Attributes:
        operation: `insert`, `get` or `delete`.
        key: The object.
        deadline_s: The deadline in seconds.
    """

    hint: str = "do it again: inserts, gets and deletes of a key may be repeated"
    operation: str = required()
    key: str = required()
    deadline_s: float


class WorkerDied(TemporaryError):
    """The process that ran a batch operation ended.

    Attributes:
        operation: `insert`, `get` or `delete`.
        key: The object.
        status: Exit code of the process; negative for the signal that killed it; None if unknown.
    """

    hint: str = "do it again; if it dies again, the operation itself kills its process"
    operation: str = required()
    key: str = required()
    status: int | None = None


class SessionPoisoned(TemporaryError):
    """A mirror failed in the middle of an earlier chunk, and returned to the state that its journal proves.

    Attributes:
        expected: The offset that it is at now.
    """

    hint: str = "go on at the expected offset, or begin again at 0"
    expected: int


class DiskFull(TemporaryError):
    """The local disk has no room: `path`, or the `key` of a store that keeps files.

    Attributes:
        limit: Bytes that may be used, if a limit below the size of the disk is set.
    """

    hint: str = "free some space and run the same command again; it continues where it stopped"
    limit: int | None = None


class SourceBusy(TemporaryError):
    """A source was written to while it was exported; nothing was published.

    Attributes:
        what: What changed: `size`, `mtime` ...
        expected: Its value before; None if only the change is known.
        actual: Its value now; None if only the change is known.
    """

    hint: str = (
        "run it again while nobody writes to the source, or export a snapshot of its file system;"
        f" {setting('mode', 'copy')} takes each file at a moment when nobody writes to it"
    )
    what: str
    expected: Value | None = None
    actual: Value | None = None


class IntegrityError(BlobflowError):
    """The bytes are not the expected ones."""

    exit_code = 3


class ChecksumMismatch(IntegrityError):
    """A checksum differs.

    Attributes:
        what: What the checksum covers.
        expected: The expected checksum; None if another party compared them.
        actual: The checksum of the bytes that are there; None if another party compared them.
    """

    hint: str = "the data was damaged in storage or on the way; restore it from another copy"
    what: str
    expected: Value | None = None
    actual: Value | None = None


class DigestMismatch(ChecksumMismatch):
    """A SHA-256 digest differs.

    Attributes:
        member: The index of a damaged member in its artifact; None for anything else.
    """

    member: int | None = None


class SizeMismatch(IntegrityError):
    """A length differs.

    Attributes:
        what: What the length is of.
        expected: Expected bytes.
        actual: Bytes that are there; None if the store does not report them.
    """

    what: str
    expected: int
    actual: int | None = None


class SourceTruncated(SizeMismatch):
    """The source ended early.

    Attributes:
        what: What ended.
        at: The byte position where it ended.
        want: The byte position it should have reached.
    """

    what: str = "source"
    at: int
    want: int


class ArtifactInvalid(IntegrityError):
    """Manifest, index or payload contradict each other or the format.

    `key` or `path` say where it is. Both are None in errors of parsers, which only see bytes.

    Attributes:
        what: What is invalid: `manifest`, `index`, `frame`, the name of a member ...
        field: The invalid field of a document.
        reason: What is wrong with it, in the words of the parser.
        expected: The correct value; None if several values are correct.
        actual: The value found; None if several values are correct.
    """

    what: str
    field: str | None = None
    reason: str | None = None
    expected: Value | None = None
    actual: Value | None = None


class ObjectTooLarge(IntegrityError):
    """An object that must be small is too large; `key` names it, unless it came in a frame.

    Attributes:
        limit: Bytes that are allowed.
    """

    limit: int


class UploadIncomplete(IntegrityError):
    """The parts in the store are not the parts of the plan.

    Attributes:
        key: The object.
        expected: The planned number of parts, or the planned size in bytes; None if the server only refuses.
        actual: The number or size in the store; None if the server only refuses.
        first: The number of the first missing part, when lanes are committed.
        lanes: The lanes that must run again, when lanes are committed.
    """

    key: str = required()
    expected: int | None = None
    actual: int | None = None
    first: int | None = None
    lanes: str | None = None


class OperationCrashed(BlobflowError):
    """A batch operation raised an error that no store should raise; the reason is the `__cause__`.

    Attributes:
        operation: `insert`, `get` or `delete`.
        key: The object.
        error: The type of the reason.
    """

    hint: str = "this is a defect of the store or of the operation; the other operations are not affected"
    operation: str = required()
    key: str = required()
    error: str


class NotFoundError(BlobflowError):
    """The named thing does not exist.

    Attributes:
        name: Name of a container or ref.
        status: HTTP status, if the source is read from a server.
        base: The record up to which a log was compacted.
    """

    exit_code = 4
    name: str | None = None
    status: int | None = None
    base: int | None = None


class ObjectNotFound(NotFoundError):
    """There is no object with this key.

    Attributes:
        key: The key.
    """

    key: str = required()


class ArtifactNotFound(NotFoundError):
    """There is no complete artifact with this `key`, or in this `path`."""

    hint: str = "list what there is with `blobflow ls`"


class UploadInterrupted(NotFoundError):
    """An upload cannot continue, because its source is gone; it was aborted.

    Attributes:
        key: The object.
        path: The source.
        upload_id: The upload.
    """

    hint: str = "restore the directory and sync again; the upload starts from the beginning"
    key: str = required()
    path: str = required()
    upload_id: str


class NoSuchUpload(NotFoundError):
    """The multipart upload is unknown: completed, aborted or expired.

    Attributes:
        key: The object.
        upload_id: The upload.
    """

    key: str = required()
    upload_id: str


class RefusedError(BlobflowError):
    """Refused for safety; nothing was changed.

    Attributes:
        what: The part of the input that is refused.
        reason: The reason.
        expected: What would be accepted.
        actual: What was found instead.
        limit: The maximum allowed.
    """

    exit_code = 5
    what: str | None = None
    reason: str | None = None
    expected: Value | None = None
    actual: Value | None = None
    limit: int | None = None


class SourceChanged(RefusedError):
    """A source differs from the one that was exported, or that a transfer began with.

    `path` names the source, unless it is a stream. `expected` and `actual` are its earlier and its present state; None
    if only the change is known.

    Attributes:
        what: What changed: `size`, `mtime`, `existence` ...
        at: The byte position up to which it was compared.
    """

    hint: str = (
        f"export again; where the source is written to all the time, export with {setting('mode', 'copy')},"
        " or export a snapshot of its file system"
    )
    what: str = required()
    at: int | None = None

    def while_exporting(self) -> SourceBusy:
        """The same change as a retryable error: the next export reads the source as it is then."""
        facts = {name: value for name, value in self.fields.items() if name in field_names(SourceBusy)}
        return SourceBusy(self.message, **facts)


class DiskTooSmall(RefusedError):
    """There is less room than needed; not a byte was moved.

    Attributes:
        path: The place.
        needed: Bytes needed.
        free: Bytes free.
    """

    hint: str = "free some space, or name a place on a larger file system"
    path: str = required()
    needed: int
    free: int


class PermissionMissing(RefusedError):
    """The batch, or the token of a push, does not have this permission.

    Attributes:
        operation: The refused operation.
        permission: The permission that it needs.
    """

    hint: str = "allow it where the executor is made"
    operation: str = required()
    permission: str


class PayloadTooLarge(RefusedError):
    """An insert of a batch carries too many bytes; `key` is None if the key depends on the payload.

    Attributes:
        actual: Bytes of the payload.
        limit: Maximum bytes.
    """

    hint: str = "upload large objects as artifacts, or with `transfer`"
    actual: int = required()
    limit: int = required()


class HostileArtifact(RefusedError):
    """The artifact names something that must never be written.

    Attributes:
        path: The member, or the artifact if it has the wrong members.
        reason: What is wrong with it.
    """

    path: str = required()
    reason: str = required()


class UnsupportedSource(RefusedError):
    """The source holds something that an artifact cannot store; `path` names it, unless it is the whole source.

    Attributes:
        reason: Why an artifact cannot store it.
    """

    reason: str = required()


class DestinationNotEmpty(RefusedError):
    """The destination exists and is not an empty directory.

    Attributes:
        path: The destination.
    """

    hint: str = "name a new path, or remove what is there"
    path: str = required()


class KeyConflict(RefusedError):
    """The key holds, or is receiving, another artifact.

    Attributes:
        key: The key.
        expected: The digest of the expected artifact; None if digests are not compared.
        actual: The digest of the artifact that is there; None if digests are not compared.
    """

    hint: str = f"use another key, or replace what is there with {setting('overwrite')}"
    key: str = required()
    expected: str | None = None
    actual: str | None = None


class ResultsConflict(RefusedError):
    """The results of a batch belong to other operations.

    Attributes:
        path: The results.
    """

    hint: str = f"name another file with {setting('results')}, or forget these results with {setting('fresh')}"
    path: str = required()


class PreconditionFailed(RefusedError):
    """A conditional write found another object.

    Callers that take part in a race treat this as the answer "lost", not as a failure.

    Attributes:
        key: The object.
        expected: The entity tag it should have; None if there should be no object.
        actual: The entity tag it has; None if there is no object, or the store does not report it.
    """

    key: str = required()
    expected: str | None = None
    actual: str | None = None


class LeaseLost(RefusedError):
    """Another process took the lease over; this holder must not publish.

    Attributes:
        name: The lease, or the ref it guards.
        generation: The generation that was held; None if none was held.
    """

    name: str
    generation: int | None = None


class OffsetRegressionError(RefusedError):
    """A chunk does not continue what a mirror holds; nothing was changed.

    Attributes:
        expected: The offset that the mirror is at.
        actual: The offset of the chunk.
    """

    hint: str = "go on at the expected offset, or begin again at 0"
    expected: int = required()
    actual: int = required()


class UsageError(BlobflowError):
    """The call or the configuration is wrong.

    Attributes:
        name: Name of the wrong setting.
        field: The invalid field of a model.
        header: The HTTP header that cannot be sent.
        options: The unknown options.
        expected: A correct value.
        actual: The given value.
    """

    exit_code = 2
    name: str | None = None
    field: str | None = None
    header: str | None = None
    options: str | None = None
    expected: Value | None = None
    actual: Value | None = None


class InvalidStoreUrl(UsageError):
    """The value is not a store URL.

    Attributes:
        url: The URL, never with credentials.
        reason: What is wrong with it.
    """

    url: str
    reason: str


class InvalidOperation(UsageError):
    """An entry of an operations file is not a valid operation.

    Attributes:
        path: The file.
        index: The entry's index, from 0.
    """

    path: str = required()
    index: int


class InvalidKey(UsageError):
    """The value is not a valid key.

    Attributes:
        key: The given value.
        reason: What is wrong with it.
    """

    key: str = required()
    reason: str


class StoreConfigurationError(UsageError):
    """The store refuses these credentials, this bucket or this region; `operation` is None before the first operation.

    Attributes:
        status: HTTP status; None if there was no response.
        code: The store's own name of the error; None if there was no response.
        bucket: The bucket that does not exist.
        credential: The name of a credential that cannot be sent.
    """

    status: int | None = None
    code: str | None = None
    bucket: str | None = None
    credential: str | None = None


class Unsupported(UsageError):
    """A store or file system lacks a capability that the call needs; `store` or `path` names it.

    Attributes:
        capability: The capability.
    """

    capability: str


class SystemLimit(UsageError):
    """A limit of the operating system is reached; trying again does not raise it.

    Attributes:
        limit: `open files` or `file size`.
    """

    limit: str
