"""`blobflow layer`: what it prints, and what it exits with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blobflow.cli import run
from blobflow.testing import read_tree, write_tree
from tests.kit import TREE

Call = Callable[..., tuple[int, Any]]


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """One command line; its exit code, and its document or, without `json`, its output."""

    def call(*arguments: object, json_wanted: bool = True) -> tuple[int, Any]:
        options = ["--store", str(tmp_path / "store"), *["--json"] * json_wanted]
        home = [] if "--home" in arguments else ["--home", str(tmp_path / "home")]
        code = run([*options, "layer", *map(str, arguments), *home])
        out = capsys.readouterr().out
        return code, json.loads(out) if json_wanted else out

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", TREE)


def test_sync_restore_and_ls(call: Call, source: Path, tmp_path: Path):
    """What was sent comes back, also on a host with an empty home; the same facts every time."""
    code, first = call("sync", source, "web-1", "--level", 5)
    assert (code, first["status"]) == (0, "uploaded")
    assert first["bytes_sent"] == first["layer_bytes"] < first["bytes_total"]
    assert first["codec"].endswith("level 5")
    _, again = call("sync", source, "web-1")
    assert (again["status"], again["bytes_sent"], again["layer_digest"]) == ("unchanged", 0, first["layer_digest"])
    elsewhere = ("--home", tmp_path / "elsewhere")
    code, restored = call("restore", "web-1", tmp_path / "back", *elsewhere)
    assert (code, restored["status"], restored["layer_digest"]) == (0, "restored", first["layer_digest"])
    assert read_tree(tmp_path / "back") == read_tree(source)
    _, listed = call("ls", "--home", tmp_path / "third")
    assert [(one["container"], one["remote_digest"]) for one in listed["containers"]] == [
        ("web-1", first["layer_digest"])
    ]


def test_for_people(call: Call, source: Path, tmp_path: Path):
    """A line or two for each command."""
    _, out = call("sync", source, "web-1", json_wanted=False)
    assert out.startswith("uploaded web-1  sha256:")
    _, out = call("restore", "web-1", tmp_path / "back", json_wanted=False)
    assert out.startswith(f"restored {tmp_path / 'back'}  sha256:")
    _, out = call("ls", json_wanted=False)
    assert out.split("\t")[0] == "web-1"


def test_the_exit_code_says_what_to_do(call: Call, source: Path, tmp_path: Path):
    """2 usage, 3 integrity, 4 not found, 5 refused."""
    assert call("restore", "nobody", tmp_path / "back")[0] == 4
    assert call("sync", tmp_path / "nowhere", "web-1")[0] == 4
    assert call("sync", source, "")[0] == 2
    assert call("sync", source, "web-1")[0] == 0
    code, document = call("restore", "web-1", source)
    assert (code, document["error"]["type"]) == (5, "DestinationNotEmpty")
    (layer,) = (tmp_path / "store").glob("*.tar.zst")
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 1
    layer.write_bytes(data)
    assert call("restore", "web-1", tmp_path / "back")[0] == 3
    (source / "link").symlink_to("empty")
    code, document = call("sync", source, "web-1")
    assert (code, document["error"]["type"]) == (5, "UnsupportedSource")
    assert call("sync", source, "web-1", "--symlinks", "skip")[0] == 0
    assert call("sync", source, "web-1", "--exclude", "link")[0] == 0
