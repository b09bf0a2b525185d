"""What push accepts, pull lands: trees of thousands of levels, and paths longer than Linux takes in one piece."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from blobflow import (
    ChunkProfile,
    DirectoryExporter,
    DirectoryImporter,
    download,
    export_artifact,
    import_artifact,
    trees,
    upload,
    verify,
)
from blobflow.artifact.limits import MAX_PATH_BYTES
from blobflow.artifact.members import verify_members
from blobflow.layers import LayerSync
from blobflow.testing import FaultyStore
from blobflow.trees import Cursor, Opened, remove_tree, walk
from tests.kit import SERIAL, SMALL, Killed, dies_before, local_store, noise

KEY = "deep.tar"
LEVELS = 2_000
FAR = "/".join(["r" * 200] * 3)
"""Where sources and destinations lie: their own path has several hundred bytes."""

DEEP = "d/" * LEVELS
LONG = ("n" * 255 + "/") * 15
TREES: dict[str, dict[str, bytes]] = {
    "deep": {DEEP + "file": noise(9_000), DEEP + "empty": b"", "d/" * 1_000 + "e/file": b"x", "e/": b""},
    "long": {LONG + "f" * (MAX_PATH_BYTES - len(LONG)): noise(9_000), LONG + "empty": b"", LONG + "x/": b""},
}


def plant(root: Path, tree: Mapping[str, bytes]) -> Path:
    """Write a tree whose paths may have any length."""
    trees.make_directories(root)
    with Opened(root) as descriptor, Cursor(descriptor) as cursor:
        for path, content in sorted(tree.items()):
            parent, _, name = path.rpartition("/")
            directory = cursor.go(parent, make=True)
            if name:
                with open(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=directory), "wb") as file:
                    file.write(content)
    return root


def planted(root: Path, tree: Mapping[str, bytes]) -> dict[str, bytes]:
    """What lies at the paths of a tree."""
    found: dict[str, bytes] = {}
    with Opened(root) as descriptor:
        for path in tree:
            file = os.open(path, os.O_RDONLY, dir_fd=descriptor)
            found[path] = b"" if path.endswith("/") else os.read(file, 1 << 20)
            os.close(file)
    return found


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / FAR
    remove_tree(tmp_path)  # pytest's own removal knows neither


@pytest.mark.parametrize(
    "mode", ["reference", pytest.param("link", marks=pytest.mark.slow), pytest.param("copy", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tree", ["deep", "long"])
def test_what_push_accepts_pull_lands(tree: str, mode: Literal["reference", "link", "copy"], far: Path, tmp_path: Path):
    """2,000 levels, or 4,095 bytes of path: exported, sent, verified, landed and imported."""
    source = plant(far / "source", TREES[tree])
    store = local_store(tmp_path)
    artifact = export_artifact(source, far / "artifact", mode=mode).artifact
    verify_members(artifact)
    upload(store, KEY, artifact, profile=SMALL)
    verify(store, KEY, mode="deep", profile=SMALL)
    landed = download(store, KEY, far / "landed", profile=SMALL)
    assert download(store, KEY, far / "landed", profile=SMALL).status == "unchanged"
    assert planted(landed.path / "data", TREES[tree]) == TREES[tree]
    importer = DirectoryImporter(path=far / "mirror", keep_versions=1)
    import_artifact(landed.path, importer)
    assert planted((far / "mirror" / "current").resolve(), TREES[tree]) == TREES[tree]


def test_a_killed_download_of_a_deep_tree_is_continued_and_its_stage_removed(far: Path, tmp_path: Path):
    """Parts that lie in the stage already are read back there, at any depth."""
    store = local_store(tmp_path)
    upload(store, KEY, export_artifact(plant(far / "source", TREES["deep"]), far / "artifact").artifact, profile=SMALL)
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_before("get_range", 6)), KEY, far / "landed", profile=SERIAL)
    assert download(store, KEY, far / "landed", profile=SERIAL).bytes_resumed > 0
    assert planted(far / "landed" / "data", TREES["deep"]) == TREES["deep"]
    assert sorted(os.listdir(far)) == ["artifact", "landed", "source"]


@pytest.mark.parametrize("tree", ["deep", "long"])
def test_a_deep_layer_is_synced_restored_and_replaced(tree: str, far: Path, tmp_path: Path):
    """The layer's scan, its landing, and the removal of what it replaces."""
    source = plant(far / "source", TREES[tree])
    layers = LayerSync(local_store(tmp_path), home=tmp_path / "home")
    layers.sync("web", source)
    layers.restore("web", far / "restored")
    assert planted(far / "restored", TREES[tree]) == TREES[tree]
    plant(source, {"new": b"new"})
    layers.sync("web", source)
    layers.restore("web", far / "restored")
    assert planted(far / "restored", TREES[tree] | {"new": b"new"}) == TREES[tree] | {"new": b"new"}
    assert sorted(os.listdir(far)) == ["restored", "source"]


class Opens:
    """How many openings of files and directories there were, and how many system calls of landing alone."""

    number = 0


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Opens:
    counter, real, real_beneath = Opens(), os.open, trees.open_beneath

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        counter.number += 1
        return real(path, flags, mode, dir_fd=dir_fd)

    def beneath(root: int, path: str, flags: int, mode: int = 0o666) -> int:
        counter.number += 1
        return real_beneath(root, path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr("blobflow.artifact.landing.open_beneath", beneath)
    return counter


@pytest.mark.parametrize("levels", [500, pytest.param(LEVELS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("work", ["scan", "land", "walk", "remove"])
def test_the_cost_of_a_deep_tree_is_linear(work: str, levels: int, far: Path, tmp_path: Path, opens: Opens):
    """With a file in each of its levels, twice as many levels cost twice as many openings, whoever goes there."""
    costs: list[int] = []
    for depth in (levels // 2, levels):
        source = plant(far / f"source{depth}", {"d/" * level + "f": b"content" for level in range(depth)})
        opens.number = 0
        if work == "scan":
            assert len(DirectoryExporter(path=source).scan().paths) == depth
        elif work == "walk":
            with Opened(source) as descriptor:
                assert sum(entry.name == "f" for entry in walk(descriptor)) == depth
        elif work == "remove":
            remove_tree(source)
        else:
            store = local_store(tmp_path / str(depth))
            profile = ChunkProfile.custom(16 * 1024, 8, workers=2)
            upload(store, KEY, export_artifact(source, far / f"artifact{depth}").artifact, profile=profile)
            opens.number = 0
            landed = download(store, KEY, far / f"landed{depth}", profile=profile)
            assert landed.parts > 20
        costs.append(opens.number)
    assert costs[1] < 2.1 * costs[0]
    assert costs[1] < 6 * levels
