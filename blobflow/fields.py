"""Models that refuse a field that they do not have, and name the nearest one that they have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from blobflow.errors import UsageError


class KnownFields(BaseModel):
    """Refuses a field that it does not have, whoever makes it: Python, Dagster's config or YAML.

    Pydantic drops unknown fields, or refuses them and shows their values, which may be secrets.

    Raises:
        UsageError: naming the field and the one that was meant.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_fields(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            check_names(cls.__name__, known, cast("Mapping[str, Any]", given))
        return cast("Any", given)


def check_names(what: str, known: Iterable[str], given: Iterable[Any]) -> None:
    """Return if all names that are given are known.

    Raises:
        UsageError: one is not; the message names the nearest that is.
    """
    known = sorted(known)
    for name in map(str, given):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            # In the message, not in a hint: where definitions are loaded Dagster shows nothing else.
            remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise UsageError(f"{what} has no field {name[:100]!r}: {remedy}", field=name[:100])


def check_choice(name: str, given: Any, choices: Any) -> None:
    """Return if an argument of a function is one of those that its type allows.

    A misspelt one would mean whatever the last branch does.

    Args:
        choices: A `Literal` type.

    Raises:
        UsageError: it is not; the message names the nearest that is.
    """
    known = sorted(get_args(choices))
    if given not in known:
        near = get_close_matches(str(given), known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(map(repr, known))}"
        raise UsageError(f"{name}={str(given)[:100]!r} is not known: {remedy}")
