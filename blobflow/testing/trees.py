"""Directory trees as literals, which tests write and compare."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from typing_extensions import override


@dataclass(frozen=True)
class Symlink:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Executable:
    """A file whose owner may execute it."""

    content: str | bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", _Content(_encoded(self.content)))


@dataclass(frozen=True)
class Fifo:
    """A named pipe."""


Tree: TypeAlias = "Mapping[str, str | bytes | Tree | Symlink | Executable | Fifo]"
"""A directory as a literal: text and bytes are files, mappings are directories."""


class _Content(bytes):
    """A file's bytes, equal to the text they encode: trees may be written as text."""

    __slots__ = ()

    @override
    def __eq__(self, other: object) -> bool:
        return bytes(self) == (other.encode() if isinstance(other, str) else other)

    __hash__ = bytes.__hash__


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def write_tree(path: str | os.PathLike[str], tree: Tree) -> Path:
    """Create the directory `path` with the contents of `tree`; existing entries stay.

    >>> write_tree(tmp_path / "orders", {"readme": "hello", "data": {"0.bin": b"...", "latest": Symlink("0.bin")}})
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    for name, node in tree.items():
        target = root / name
        match node:
            case Symlink():
                target.symlink_to(node.target)
            case Fifo():
                os.mkfifo(target)
            case Executable():
                target.write_bytes(_encoded(node.content))
                target.chmod(0o755)
            case str() | bytes():
                target.write_bytes(_encoded(node))
            case _:
                write_tree(target, node)
    return root


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """The contents of a directory, to compare with the expected literal."""
    tree: dict[str, str | bytes | Tree | Symlink | Executable | Fifo] = {}
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            tree[entry.name] = Symlink(os.readlink(entry.path))
        elif stat.S_ISDIR(status.st_mode):
            tree[entry.name] = read_tree(entry.path)
        elif stat.S_ISFIFO(status.st_mode):
            tree[entry.name] = Fifo()
        else:
            content = _Content(Path(entry.path).read_bytes())
            tree[entry.name] = Executable(content) if status.st_mode & stat.S_IXUSR else content
    return tree
