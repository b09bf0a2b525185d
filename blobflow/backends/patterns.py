"""Exclude patterns for trees, with the meaning that they have in a `.gitignore` file.

The rules are those of https://git-scm.com/docs/gitignore#_pattern_format; the library pathspec parses them. `./` at
the beginning means the root as well.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Final, NamedTuple

from pathspec.patterns.gitignore import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from blobflow.errors import UsageError

_BELOW: Final = "ps_d"
"""The library's group for the `/` after the matched name; what follows it is below that entry."""

_TOKEN: Final = re.compile(r"\\.|\[[!^]?\]?(?:\[:[a-z]*:\]|\\.|[^\]\\])*\]", re.DOTALL)
"""An escaped character, or brackets."""


class _Rule(NamedTuple):
    expression: re.Pattern[str]
    directories_only: bool
    excludes: bool
    """False if it includes again what an earlier rule excluded."""

    def matches(self, path: str, *, is_directory: bool) -> bool:
        """Whether the rule matches this entry itself, not a directory above it."""
        if self.directories_only:
            ends = (found.end(_BELOW) for found in self.expression.finditer(path + "/"))
            return is_directory and len(path) + 1 in ends
        found = self.expression.search(path)
        return found is not None and found.groupdict().get(_BELOW) is None


class ExcludePatterns:
    """Decides for each entry of one tree whether it is left out, and records the patterns that never matched.

    Ask for entries from the root down, and for nothing below an excluded directory, as git does. So the last pattern
    that matches the entry itself decides, and a `!` that includes a directory again does not include its content.

    Raises:
        UsageError: a pattern can never match; the message names it.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(patterns)
        self._rules = [_compiled(pattern) for pattern in self._patterns]
        self._matched = [False] * len(self._rules)

    def excludes(self, path: str, *, is_directory: bool) -> bool:
        """Whether the entry at `path` is left out; the path starts at the root and has no `/` at either end."""
        excluded = False
        for i, rule in enumerate(self._rules):
            if rule.matches(path, is_directory=is_directory):
                excluded = rule.excludes
                self._matched[i] = True
        return excluded

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The patterns that no entry has matched so far."""
        return tuple(pattern for pattern, matched in zip(self._patterns, self._matched, strict=True) if not matched)


def _compiled(pattern: str) -> _Rule:
    negation = "!" * pattern.startswith("!")
    text = pattern[len(negation) :]
    text = text[1:] if text.startswith("./") else text
    stripped = text.rstrip(" ")
    directories_only = stripped.endswith("/")
    if directories_only:
        # The library treats `a/**/` as `a/`; in git it means the directories below.
        text = stripped + "*/" if stripped.endswith("**/") else stripped
    # The library reads classes and escapes in brackets differently from git.
    if any(token.startswith("[") and ("\\" in token or "[:" in token) for token in _TOKEN.findall(text)):
        raise UsageError(
            f"the exclude pattern {pattern!r} has a class or a backslash in brackets, which is not supported",
            hint="write the characters out, e.g. [a-z] for [[:lower:]]",
        )
    if any(segment in (".", "..") for segment in text.split("/")) or "//" in text:
        raise _useless(pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a `[` in brackets, which the library does not escape
            expression, excludes = GitIgnoreSpecPattern.pattern_to_regex(negation + text)
            if expression is None or excludes is None:
                raise _useless(pattern)
            return _Rule(re.compile(expression), directories_only, excludes)
    except (GitIgnorePatternError, re.error) as error:
        raise _useless(pattern) from error


def _useless(pattern: str) -> UsageError:
    return UsageError(
        f"the exclude pattern {pattern!r} can never match: to git it is a comment, empty or malformed",
        hint=r"name what to leave out, e.g. '*.tmp', 'cache/' or '/logs/*', or '\#x' for the name #x",
    )
