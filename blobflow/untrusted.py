"""Values from outside: what is read of a file or a peer costs little, and is refused in a few words.

The rule, which `tests/unit/test_hostile_bytes.py` and the targets in `tests/fuzz` hold every parser to: whatever the
bytes are, the result is a value or a `BlobflowError`; and no message quotes more than `MAX_QUOTED` characters of them.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Annotated, Final, TypeVar, cast

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, JsonValue, ValidationError
from pydantic_core import from_json

from blobflow.config import MIB
from blobflow.errors import MAX_QUOTED, ArtifactInvalid

MAX_JSON_VALUES: Final = 250_000
"""Values in a document above 1 MiB: three bytes of it, `[],`, become a Python object of 64."""

_EARLIEST: Final = datetime(1, 1, 3, tzinfo=timezone.utc)
_LATEST: Final = datetime(9999, 12, 29, tzinfo=timezone.utc)
"""Two days inside of what `datetime` can say: a time zone or a rounded nanosecond does not lead beyond it."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)

Model = TypeVar("Model", bound=BaseModel)


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """`repr(value)`, cut to `limit` characters; for messages."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]  # the representation of 64 MiB would take 64 MiB
    elif isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"a number of {value.bit_length()} bits"  # more digits than Python converts
    elif isinstance(value, list | tuple | dict):
        return f"a {type(cast('object', value)).__name__}"
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def plain(text: str) -> str:
    """What a peer said, for a message: cut, on one line, and without characters that a terminal would obey."""
    cut = text[:MAX_QUOTED] if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"
    return "".join(character if character.isprintable() else " " for character in cut)


# Times


def utc_time(seconds: float) -> datetime | None:
    """A Unix time; None if it lies outside of what `datetime` can say, as a file system or a server may claim."""
    try:
        return bounded_time(_EPOCH + timedelta(seconds=seconds))
    except (OverflowError, ValueError):
        return None


def bounded_time(time: datetime) -> datetime | None:
    """A time in UTC; None if it is so near to the ends of what `datetime` can say that arithmetic would fail."""
    if time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)
    try:
        return time.astimezone(timezone.utc) if _EARLIEST <= time <= _LATEST else None
    except (OverflowError, ValueError):
        return None


def _in_range(time: datetime) -> datetime:
    bounded = bounded_time(time)
    if bounded is None:
        raise ValueError("the time is out of range")
    return bounded


UtcTime = Annotated[AwareDatetime, AfterValidator(_in_range)]
"""Of a document: it has a time zone, and can be compared, subtracted and shown."""
MAX_COUNT: Final = (1 << 64) - 1
Counter = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Timestamp = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""Seconds since the epoch."""
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


# Documents


def read_json(data: bytes | str, what: str) -> JsonValue:
    """The JSON document in `data`: UTF-8, no NaN or infinity, no lone surrogates, not deeper than 200 levels.

    Args:
        data: The caller bounds its length.
        what: For messages: "manifest".

    Raises:
        ArtifactInvalid: it is none, or has more than `MAX_JSON_VALUES` values.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > MIB and _values(raw) > MAX_JSON_VALUES:
        raise ArtifactInvalid(f"the {what} has more than {MAX_JSON_VALUES} values", what=what)
    try:
        document: JsonValue = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ArtifactInvalid(f"the {what} is not JSON: {error}", what=what) from error
    if not _is_finite(document):
        raise ArtifactInvalid(f"the {what} has a number that is out of range", what=what)
    return document


def read_object(data: bytes | str, what: str) -> dict[str, JsonValue]:
    """The same for a document that has to be an object."""
    document = read_json(data, what)
    if not isinstance(document, dict):
        raise ArtifactInvalid(f"the {what} is not a JSON object", what=what)
    return document


def read_model(kind: type[Model], data: bytes | str, what: str) -> Model:
    """The document as a model of pydantic's."""
    return as_model(kind, read_object(data, what), what)


def as_model(kind: type[Model], document: object, what: str) -> Model:
    """A value that came from outside as a model of pydantic's.

    Raises:
        ArtifactInvalid: it does not fit; the message names the first field that does not.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        field, reason = first_fault(error)
        raise ArtifactInvalid(f"{what} field {field!r}: {reason}", field=field, what=what) from error


def first_fault(error: ValidationError) -> tuple[str, str]:
    """The name of the first field that does not fit, and why, each fit for a message."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(step)[:MAX_QUOTED] for step in first["loc"][:20])
    return field[:MAX_QUOTED], first["msg"][:MAX_QUOTED]


def _values(raw: bytes) -> int:
    """About how many values a document has: its strings, and the commas and brackets outside of them."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    if strings > MAX_JSON_VALUES:
        return strings
    return sum(piece.count(b",") + piece.count(b"[") + piece.count(b"{") for piece in plain.split(b'"')[::2])


def _is_finite(document: JsonValue) -> bool:
    """Whether no number is infinite, as `1e999` becomes."""
    waiting: list[JsonValue] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float) and value - value != 0:
            return False
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
    return True
