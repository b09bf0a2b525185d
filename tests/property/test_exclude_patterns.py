"""Patterns of `exclude` mean what they mean to git."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blobflow.backends.patterns import ExcludePatterns

NAMES = ("a", "b", "c", "foo", "x.tmp", "#x", "a b", "[z]", "B", "a-b")
# No `a**`: git takes it for `**` where nothing but plain characters are before it, which its documentation denies.
SEGMENTS = (
    *("*", "**", "a", "b", "c", "foo", "x.tmp", "*.tmp", "?", "[ab]", "f*", "\\#x", "a\\ b", "[!a]", "[^b]*", "[a-c]"),
    *("\\[z\\]", "[[]z]", "[]z[]*", "a[ -]b", "\\f\\oo", "*o*"),
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", tmp_path / "tree"], check=True)
    return tmp_path / "tree"


def plant(root: Path, choice: random.Random) -> None:
    """Another tree in the place of the one that is there."""
    for entry in root.iterdir():
        if entry.is_dir():
            if entry.name != ".git":
                shutil.rmtree(entry)
        else:
            entry.unlink()
    for _ in range(14):
        path = root.joinpath(*(choice.choice(NAMES) for _ in range(choice.randint(1, 4))))
        if not any(part.is_file() for part in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def pattern(choice: random.Random) -> str:
    path = "/".join(choice.choice(SEGMENTS) for _ in range(choice.randint(1, 3)))
    decorations = (("!", 0.3), ("/", 0.3)), (("/", 0.3), (" ", 0.1))
    before, after = ("".join(c for c, share in kind if choice.random() < share) for kind in decorations)
    return before + path + after


def files_left(root: Path, patterns: list[str]) -> list[str]:
    matcher = ExcludePatterns(patterns)

    def walk(directory: Path, prefix: str) -> Iterator[str]:
        for entry in os.scandir(directory):
            path = prefix + entry.name
            if entry.name == ".git" or matcher.excludes(path, is_directory=entry.is_dir()):
                continue
            if entry.is_dir():
                yield from walk(Path(entry.path), path + "/")
            else:
                yield path

    return sorted(walk(root, ""))


def files_left_by_git(root: Path, patterns: list[str]) -> list[str]:
    (root / ".git" / "info" / "exclude").write_text("\n".join(patterns) + "\n", encoding="utf-8")
    command = ["git", "-C", str(root), "-c", "core.excludesFile=", "ls-files", "-o", "-z", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted(filter(None, listed.split("\0")))


def test_exclude_patterns_leave_what_git_leaves(repository: Path):
    """In random trees, with patterns of every kind that the documentation of gitignore names."""
    choice = random.Random(13)
    for _ in range(300):
        plant(repository, choice)
        patterns = [pattern(choice) for _ in range(choice.randint(1, 4))]
        assert files_left(repository, patterns) == files_left_by_git(repository, patterns), patterns
