"""Directory trees through descriptors: deep ones, long ones, and ones that somebody plays with."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blobflow import trees
from blobflow.trees import Cursor, Opened, make_directories, open_below, open_beneath, remove_entries, remove_tree, walk

LEVELS = 2_000


def deep(root: Path, levels: int, name: str = "d") -> None:
    """`levels` directories below one another, with a file in each."""
    with Opened(root) as descriptor, Cursor(descriptor) as cursor:
        for _ in range(levels):
            os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=cursor.descriptor))
            os.mkdir(name, dir_fd=cursor.descriptor)
            cursor.enter(name)


class Counted:
    """How many directories were opened."""

    opens = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counter, real = Counted(), os.open

    def opened(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        counter.opens += 1
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr("blobflow.trees.os.open", opened)
    return counter


@contextmanager
def few_descriptors(number: int) -> Generator[None]:
    """This process may open only so many files at once."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", ["d", "n" * 255])
def test_a_deep_tree_is_walked_and_removed_without_recursion(name: str, tmp_path: Path, counted: Counted):
    """2,000 levels cost two openings of directories each, whether names have 1 byte or 255; paths have no limit."""
    root = tmp_path / "root"
    root.mkdir()
    deep(root, LEVELS, name)
    counted.opens = 0
    with few_descriptors(64 + len(os.listdir("/proc/self/fd"))), Opened(root) as descriptor:
        assert sum(entry.name == "f" for entry in walk(descriptor)) == LEVELS
    assert counted.opens <= 2 * LEVELS + 10
    counted.opens = 0
    remove_tree(root)
    assert counted.opens <= 2 * LEVELS + 10
    assert os.listdir(tmp_path) == []


def test_removal_does_not_follow_links(tmp_path: Path):
    """A link in a tree, or in its place, is removed; what it leads to stays."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "below" / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "link").symlink_to("victim")
    for name in ("tree", "link", "absent"):
        remove_tree(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["victim"]
    assert os.listdir(tmp_path / "victim") == ["file"]
    with Opened(tmp_path / "victim") as descriptor:
        remove_entries(descriptor)
    assert os.listdir(tmp_path / "victim") == []
    with Opened(tmp_path) as descriptor:
        remove_tree("victim", dir_fd=descriptor)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_became_a_link_under_the_removal_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever swaps a directory for a link between the look and the step down gets nothing removed behind it."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    (tmp_path / "tree" / "below").mkdir(parents=True)
    real = Cursor.enter

    def swapped(cursor: Cursor, name: str, *, follow: bool = False) -> None:
        (tmp_path / "tree" / "below").rmdir()
        (tmp_path / "tree" / "below").symlink_to(tmp_path / "victim")
        real(cursor, name, follow=follow)

    monkeypatch.setattr(Cursor, "enter", swapped)
    with pytest.raises(OSError, match=r"Too many levels|Not a directory"):
        remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path / "victim") == ["file"]


def test_a_tree_that_is_moved_away_under_a_walk_stops_it(tmp_path: Path):
    """`..` leads to where the directory was moved to; nothing there is looked at or removed."""
    (tmp_path / "tree" / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    with Opened(tmp_path / "tree") as descriptor, Cursor(descriptor) as cursor:
        cursor.enter("a")
        cursor.enter("b")
        os.rename(tmp_path / "tree" / "a" / "b", tmp_path / "elsewhere" / "b")
        with pytest.raises(OSError, match="moved away") as refusal:
            cursor.leave()
    assert refusal.value.errno == errno.ESTALE


def test_a_cursor_goes_the_shortest_way(tmp_path: Path, counted: Counted):
    """From one directory to the next of a sorted list only what differs is left and entered; missing ones are made."""
    with Opened(tmp_path) as descriptor, Cursor(descriptor) as cursor:
        cursor.go("a/b/c", make=True)
        counted.opens = 0
        os.mkdir("x", dir_fd=cursor.go("a/b/d", make=True))
        assert counted.opens == 2
        assert repr(cursor) == "<Cursor 3 levels deep>"
        os.mkdir("y", dir_fd=cursor.go("a", make=True))
        os.mkdir("z", dir_fd=cursor.go(""))
        with pytest.raises(FileNotFoundError):
            cursor.go("a/missing")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a", "a/b", "a/b/c", "a/b/d", "a/b/d/x", "a/y", "z"]


def test_followed_links_lead_back_to_where_they_lie(tmp_path: Path):
    """The target of a link has another parent: the way up is the way down."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "link").symlink_to(tmp_path / "real")
    before = len(os.listdir("/proc/self/fd"))
    with Opened(tmp_path / "tree") as descriptor, Cursor(descriptor) as cursor:
        cursor.enter("a")
        cursor.enter("link", follow=True)
        cursor.enter("below")
        assert (cursor.leave(), cursor.leave()) == ("below", "link")
        assert os.listdir(cursor.descriptor) == ["link"]
        cursor.enter("link", follow=True)
        assert os.listdir(cursor.descriptor) == ["below"]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_links_are_refused_in_every_place_of_a_path(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the kernel does not know openat2."""
    if kernel == "old":
        monkeypatch.setattr(trees, "_OPENAT2", 1_000_000)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("content")
    (tmp_path / "a" / "link").symlink_to("b")
    (tmp_path / "a" / "b" / "link").symlink_to("file")
    with Opened(tmp_path) as descriptor:
        file = open_beneath(descriptor, "a/b/file", os.O_RDONLY)
        assert os.read(file, 10) == b"content"
        assert not os.get_inheritable(file)
        os.close(file)
        for path in ("a/link/file", "a/b/link"):
            with pytest.raises(OSError, match=r"Too many levels|Not a directory"):
                open_beneath(descriptor, path, os.O_RDONLY)
        with pytest.raises(FileNotFoundError):
            open_beneath(descriptor, "a/missing/file", os.O_RDONLY)
        made = open_beneath(descriptor, "a/b/made", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.close(made)
    assert (tmp_path / "a" / "b" / "made").stat().st_mode & 0o777 == 0o600


def test_a_path_below_a_long_directory_is_opened(tmp_path: Path):
    """Both together may be longer than Linux takes in one path."""
    root = tmp_path / ("r" * 255) / ("s" * 255)
    root.mkdir(parents=True)
    parent = "/".join(["n" * 255] * 15)
    with Opened(root) as descriptor, Cursor(descriptor) as cursor:
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=cursor.go(parent, make=True)))
    path = f"{parent}/file"
    assert len(path) < 4096 < len(str(root / path))
    os.close(open_below(root, path, os.O_RDONLY))
    remove_tree(tmp_path / ("r" * 255))


def test_directories_are_made_without_recursion(tmp_path: Path):
    """A destination of a thousand levels has its parents made; what is there already is fine, a file is not."""
    path = tmp_path / "/".join(["d"] * 1_000)
    make_directories(path, 0o700)
    make_directories(path)
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "file").touch()
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        make_directories(path / "file")
    remove_tree(tmp_path / "d")
