"""Patterns of what is left out of a tree, with the meaning that they have in a `.gitignore` file.

The rules are those of https://git-scm.com/docs/gitignore#_pattern_format: a pattern without a `/` (except at its end)
means a name anywhere, one with a `/` a path from the root; `*`, `?` and `[...]` match no `/`, `**` matches any number
of directories, a `/` at the end means directories only, and a `!` at the beginning takes back what an earlier pattern
left out. The last pattern that matches decides; what lies in a directory that is left out is left out with it. Besides,
`./` at the beginning is the root.

Not the library pathspec: it matches whole paths, and so a `!` that means a directory takes back the files in it as
well (in 58 of 1,500 random cases git did something else). Here each entry is matched by itself on the way down, as git
does it, and `tests/property/test_exclude_patterns.py` asks git.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from blobflow.errors import UsageError

_CLASSES: Final = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": r" \t",
    "digit": "0-9",
    "lower": "a-z",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\s",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


class _Rule(NamedTuple):
    matches: re.Pattern[str]
    by_name: bool
    """Whether it is a name that is matched, not a path."""
    directories_only: bool
    excludes: bool
    """False: it takes back what an earlier rule left out."""


class ExcludePatterns:
    """Decides for each entry of one tree whether it is left out, and knows the patterns that never matched.

    Entries are asked for from the root down, and nothing below a directory that is left out.

    Raises:
        UsageError: naming a pattern that can never match.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(patterns)
        self._rules = [_compiled(pattern) for pattern in self._patterns]
        self._matched = [False] * len(self._rules)

    def excludes(self, name: str, path: str, *, is_directory: bool) -> bool:
        """Whether the entry is left out.

        Args:
            name: The last segment of `path`.
            path: From the root, without a `/` at either end.
        """
        excluded = False
        for i, rule in enumerate(self._rules):
            if (is_directory or not rule.directories_only) and rule.matches.fullmatch(name if rule.by_name else path):
                excluded = rule.excludes
                self._matched[i] = True
        return excluded

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The patterns that no entry has matched so far."""
        return tuple(pattern for pattern, matched in zip(self._patterns, self._matched, strict=True) if not matched)


def _compiled(pattern: str) -> _Rule:
    text = pattern.rstrip(" ")
    if text.endswith("\\") and text != pattern:
        text += " "  # that space is escaped
    if text.startswith("#"):
        raise _useless(pattern, "it is a comment", r"begin it with '\#' if names begin with '#'")
    excludes = not text.startswith("!")
    text = text if excludes else text[1:]
    directories_only = text.endswith("/")
    text = text[:-1] if directories_only else text
    by_name = "/" not in text
    text = text[2:] if text.startswith("./") else text.removeprefix("/")
    if not text:
        raise _useless(pattern, "it names nothing", "name what is to be left out, e.g. '*.tmp', 'cache/' or '/logs/*'")
    segments = text.split("/")
    if any(segment in ("", ".", "..") for segment in segments):
        raise _useless(pattern, "no path has such a segment", "write the path from the root of the source")
    try:
        expression = _segment(pattern, text) if by_name else _path(pattern, segments)
        return _Rule(re.compile(expression, re.DOTALL), by_name, directories_only, excludes)
    except re.error as error:
        raise _useless(pattern, str(error), "correct the range") from error


def _path(pattern: str, segments: Sequence[str]) -> str:
    *above, last = segments
    parts = ("(?:[^/]+/)*" if segment == "**" else f"{_segment(pattern, segment)}/" for segment in above)
    return "".join(parts) + (".+" if last == "**" else _segment(pattern, last))


def _segment(pattern: str, segment: str) -> str:
    """The expression of a pattern without `/`."""
    parts: list[str] = []
    at = 0
    while at < len(segment):
        character = segment[at]
        at += 1
        if character == "*":
            if parts[-1:] != ["[^/]*"]:  # a second one would cost time and nothing else
                parts.append("[^/]*")
        elif character == "?":
            parts.append("[^/]")
        elif character == "[":
            expression, at = _bracket(pattern, segment, at)
            parts.append(expression)
        elif character == "\\":
            if at == len(segment):
                raise _useless(pattern, r"nothing follows its last '\'", r"write '\\' for a backslash")
            parts.append(re.escape(segment[at]))
            at += 1
        else:
            parts.append(re.escape(character))
    return "".join(parts)


def _bracket(pattern: str, segment: str, at: int) -> tuple[str, int]:
    """The expression of what begins after a `[`, and the place after its `]`."""
    negated = segment[at : at + 1] in ("!", "^")
    at += negated
    items: list[str] = []
    while True:
        if at >= len(segment):
            raise _useless(pattern, "its '[' has no ']'", r"write '\[' for a bracket")
        if segment[at] == "]" and items:
            # A `/` is matched by no bracket.
            return f"{'(?!/)[^' if negated else '(?!/)['}{''.join(items)}]", at + 1
        named = re.compile(r"\[:(\w*):\]").match(segment, at)
        if named:
            if named[1] not in _CLASSES:
                raise _useless(pattern, f"it has the class {named[0]}", f"there are {', '.join(_CLASSES)}")
            items.append(_CLASSES[named[1]])
            at = named.end()
            continue
        first, at = _member(pattern, segment, at)
        if segment[at : at + 1] == "-" and segment[at + 1 : at + 2] not in ("", "]"):
            last, at = _member(pattern, segment, at + 1)
            items.append(f"{first}-{last}")
        else:
            items.append(first)


def _member(pattern: str, segment: str, at: int) -> tuple[str, int]:
    """One character of a bracket, escaped, and the place after it."""
    if segment[at] == "\\":
        at += 1
        if at == len(segment):
            raise _useless(pattern, "its '[' has no ']'", r"write '\[' for a bracket")
    return re.escape(segment[at]), at + 1


def _useless(pattern: str, reason: str, hint: str) -> UsageError:
    return UsageError(f"the exclude pattern {pattern!r} can never match: {reason}", hint=hint)
