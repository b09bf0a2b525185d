"""Settings in messages and hints, which each surface (Python, command line, Dagster) writes in its own syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final, TypeAlias

Value: TypeAlias = str | int | float
Wording: TypeAlias = Callable[[str, Value | None], str]
"""Formats a setting for one surface, with its value or without one."""

_NUMBER: Final = r"-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|NaN"
_SETTING: Final = re.compile(rf'\x02([a-z0-9_]+)(?:=("[^"\\\x00-\x1f]*"|{_NUMBER}))?\x03')
"""Strict, because a message may also quote text from outside."""


def setting(name: str, value: Value | None = None) -> str:
    """A setting that a message or a hint mentions; each surface formats it.

    | surface | `setting("keep_last")` | `setting("mode", "copy")` |
    |---|---|---|
    | Python: an argument | `keep_last` | `mode="copy"` |
    | command line: an option (`blobflow.cli.formatting.as_option`) | `--keep-last` | `--mode copy` |
    | Dagster: a field (`blobflow.dagster.failures.as_field`) | `keep_last` | `mode: copy` |

    Args:
        name: The argument's name in Python.
        value: Its value, or the value that the hint recommends.
    """
    return f"\x02{name}\x03" if value is None else f"\x02{name}={json.dumps(value)}\x03"


def as_argument(name: str, value: Value | None) -> str:
    """A setting in Python's syntax."""
    return name if value is None else f"{name}={json.dumps(value)}"


def worded(text: str, wording: Wording) -> str:
    """`text` with every `setting` in it formatted for one surface."""
    return _SETTING.sub(lambda found: wording(found[1], None if found[2] is None else json.loads(found[2])), text)


LEAVE_IT_OUT: Final = f"leave it out with {setting('exclude')}"
"""The remedy for a part of a source that cannot be exported."""
