"""Values from outside: reading them is cheap, and the error for a bad one is short.

`tests/unit/test_hostile_bytes.py` and the targets in `tests/fuzz` hold every parser to this rule: whatever the bytes
are, the result is a value or a `BlobflowError`, and no message quotes more than `MAX_QUOTED` characters of them.
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
"""Two days inside the range of `datetime`, so that a time zone or a rounded nanosecond does not leave the range."""
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
    """A peer's text for a message: cut to `MAX_QUOTED`, on one line, without control characters."""
    cut = text[:MAX_QUOTED] if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"
    return "".join(character if character.isprintable() else " " for character in cut)


# Times


def utc_time(seconds: float) -> datetime | None:
    """A Unix time as a datetime; None if it is outside the range of `datetime`, as a server may claim."""
    try:
        return bounded_time(_EPOCH + timedelta(seconds=seconds))
    except (OverflowError, ValueError):
        return None


def bounded_time(time: datetime) -> datetime | None:
    """A time in UTC; None if it is so near to the ends of the range that arithmetic would fail."""
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
"""Time in a document: it has a time zone, and can be compared, subtracted and shown."""
MAX_COUNT: Final = (1 << 64) - 1
Counter = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Timestamp = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""Seconds since the epoch."""
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


# Documents


def read_json(data: bytes | str, what: str) -> JsonValue:
    """The JSON document in `data`: UTF-8, no NaN or infinity, no lone surrogates, at most 200 levels deep.

    Args:
        data: The bytes; the caller limits their length.
        what: Name of the document for messages: "manifest".

    Raises:
        ArtifactInvalid: it is not such a document, or it has more than `MAX_JSON_VALUES` values.
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
    """The JSON object in `data`; see `read_json`."""
    document = read_json(data, what)
    if not isinstance(document, dict):
        raise ArtifactInvalid(f"the {what} is not a JSON object", what=what)
    return document


def read_model(kind: type[Model], data: bytes | str, what: str) -> Model:
    """The JSON object in `data` as a pydantic model; see `read_json` and `as_model`."""
    return as_model(kind, read_object(data, what), what)


def as_model(kind: type[Model], document: object, what: str) -> Model:
    """A value from outside as a pydantic model.

    Raises:
        ArtifactInvalid: it does not fit the model; the message names the first field that is wrong.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        field, reason = first_fault(error)
        raise ArtifactInvalid(f"{what} field {field!r}: {reason}", field=field, what=what) from error


def first_fault(error: ValidationError) -> tuple[str, str]:
    """The name of the first field that is wrong, and the reason, both short enough for a message."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(step)[:MAX_QUOTED] for step in first["loc"][:20])
    return field[:MAX_QUOTED], first["msg"][:MAX_QUOTED]


def _values(raw: bytes) -> int:
    """About how many values a document has: its strings, and the commas and brackets outside them."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    if strings > MAX_JSON_VALUES:
        return strings
    return sum(piece.count(b",") + piece.count(b"[") + piece.count(b"{") for piece in plain.split(b'"')[::2])


def _is_finite(document: JsonValue) -> bool:
    """Whether all numbers are finite; `1e999` becomes infinite."""
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
