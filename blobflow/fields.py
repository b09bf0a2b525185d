"""Models that reject an unknown field and suggest the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from blobflow.errors import UsageError


class KnownFields(BaseModel):
    """Rejects unknown fields, whether Python, Dagster's config or YAML creates the model.

    Pydantic drops unknown fields, or rejects them and shows their values, which may be secrets.

    Raises:
        UsageError: a field is unknown; the message names it and the nearest known one.
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
    """Return if all given names are known.

    Raises:
        UsageError: a name is unknown; the message names the nearest known one.
    """
    known = sorted(known)
    for name in map(str, given):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            # In the message, not in a hint: when Dagster loads definitions it shows nothing else.
            remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise UsageError(f"{what} has no field {name[:100]!r}: {remedy}", field=name[:100])


def check_choice(name: str, given: Any, choices: Any) -> None:
    """Return if an argument is one of the values that its type allows.

    Without this check, a misspelt value would mean whatever the last branch does.

    Args:
        choices: A `Literal` type.

    Raises:
        UsageError: it is not allowed; the message names the nearest allowed value.
    """
    known = sorted(get_args(choices))
    if given not in known:
        near = get_close_matches(str(given), known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(map(repr, known))}"
        raise UsageError(f"{name}={str(given)[:100]!r} is not known: {remedy}")
