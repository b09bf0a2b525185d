"""Destinations that cannot be replaced: mount points, and directories below a parent that cannot be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blobflow import Artifact, download, upload
from blobflow.artifact.landing import STAGE_PREFIX, Stage, is_fixed
from blobflow.artifact.members import verify_members
from blobflow.errors import ArtifactNotFound, DestinationNotEmpty, RefusedError
from blobflow.lanes import begin_download, fetch_lane
from blobflow.layers import LayerSync
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, write_tree
from tests.kit import SERIAL, SMALL, TREE, Killed, artifact_of, dies_before, local_store

KEY = "a.tar"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = local_store(tmp_path)
    upload(store, KEY, artifact_of(tmp_path / "made"), profile=SMALL)
    return store


@pytest.fixture
def dest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that behaves like the root of a volume: it cannot be renamed or replaced."""
    (volume := tmp_path / "volume").mkdir()
    (volume / "lost+found").mkdir(mode=0o700)
    rename = os.rename

    def busy(source: Path, target: Path) -> None:
        assert Path(target) != volume
        # Otherwise it would be another file system.
        assert source.resolve().is_relative_to(volume) == target.resolve().is_relative_to(volume)
        rename(source, target)

    monkeypatch.setattr("blobflow.artifact.landing.is_fixed", lambda path: path == volume)
    monkeypatch.setattr("blobflow.artifact.landing.os.rename", busy)
    return volume


def is_whole(dest: Path) -> bool:
    """Whether a reader finds an artifact there; never a part of one."""
    try:
        artifact = Artifact.open(dest)
    except ArtifactNotFound:
        return False
    verify_members(artifact)
    return True


def test_a_volume_gets_the_artifact_inside(store: LocalStore, dest: Path):
    """Nothing is written beside it, and nothing of the download is left in it; what a file system keeps there stays."""
    before = sorted(os.listdir(dest.parent))
    assert download(store, KEY, dest, profile=SMALL).status == "downloaded"
    assert is_whole(dest)
    assert sorted(os.listdir(dest)) == ["INDEX.parquet", "MANIFEST.json", "data", "lost+found"]
    assert sorted(os.listdir(dest.parent)) == before
    assert download(store, KEY, dest, profile=SMALL).status == "unchanged"


def test_a_volume_that_holds_something_is_refused_before_the_first_byte(store: LocalStore, dest: Path):
    """As any destination, and what lies there stays."""
    (dest / "mine").write_text("mine")
    with pytest.raises(DestinationNotEmpty):
        download(store, KEY, dest, profile=SMALL)
    assert sorted(os.listdir(dest)) == ["lost+found", "mine"]


def test_a_killed_download_into_a_volume_goes_on(store: LocalStore, dest: Path):
    """What has landed inside is not fetched again; until it ends, no reader finds an artifact."""
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_before("get_range", 6)), KEY, dest, profile=SERIAL)
    assert not is_whole(dest)
    assert download(store, KEY, dest, profile=SERIAL).bytes_resumed > 0
    assert is_whole(dest)


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_download_killed_while_its_entries_are_moved_goes_on(
    moved: int, store: LocalStore, dest: Path, monkeypatch: pytest.MonkeyPatch
):
    """A reader finds nothing or the whole at every moment, and the next run moves the rest without fetching it."""
    rename, renamed = os.rename, 0

    def dies(source: Path, target: Path) -> None:
        nonlocal renamed
        if Path(target).parent == dest:
            assert not is_whole(dest)
            if renamed == moved:
                raise Killed
            renamed += 1
        rename(source, target)

    def discard(_: Stage) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("blobflow.artifact.landing.os.rename", dies)
        patch.setattr(Stage, "discard", discard)
        with pytest.raises(Killed):
            download(store, KEY, dest, profile=SMALL)
    assert is_whole(dest) == (moved == 3)
    watched = FaultyStore(store)
    result = download(watched, KEY, dest, profile=SMALL)
    assert (result.status, result.bytes_received) == ("downloaded", 0)
    assert is_whole(dest)
    assert [name for name in os.listdir(dest) if name.startswith(STAGE_PREFIX)] == []


def test_what_appears_in_a_volume_meanwhile_is_not_replaced(
    store: LocalStore, dest: Path, monkeypatch: pytest.MonkeyPatch
):
    """Somebody else's files with the names of ours, before any of ours has been moved, or after the first."""
    rename = os.rename

    def disturbed(source: Path, target: Path) -> None:
        rename(source, target)
        (dest / "INDEX.parquet").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr("blobflow.artifact.landing.os.rename", disturbed)
        with pytest.raises(DestinationNotEmpty):
            download(store, KEY, dest, profile=SMALL)
    with pytest.raises(DestinationNotEmpty):
        download(store, KEY, dest, profile=SMALL)
    assert (dest / "INDEX.parquet").read_text() == "mine"
    (dest / "INDEX.parquet").unlink()
    download(store, KEY, dest, profile=SMALL)
    assert is_whole(dest)


def test_lanes_land_in_a_volume(store: LocalStore, dest: Path):
    """They share the stage inside; whoever holds it alone moves its entries out."""
    ticket = begin_download(store, KEY, dest, lanes=2, profile=SMALL)
    for lane in range(2):
        fetch_lane(store, ticket, dest, lane, profile=SMALL)
    assert not is_whole(dest)
    assert download(store, KEY, dest, profile=SMALL).bytes_received < 10_000
    assert is_whole(dest)


def test_a_layer_is_not_restored_over_a_volume(dest: Path, tmp_path: Path):
    """It has no manifest that could come last: refused before the first byte, with a place where it can be restored."""
    store = FaultyStore(local_store(tmp_path))
    layers = LayerSync(store, home=tmp_path / "home")
    layers.sync("web", write_tree(tmp_path / "web", TREE))
    store.log.clear()
    with pytest.raises(RefusedError, match="is a mount point") as refusal:
        layers.restore("web", dest)
    assert str(dest / "restored") in refusal.value.hint
    assert {request.operation for request in store.log} <= {"get", "head"}


def test_mount_points_and_read_only_parents_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not a directory that can be replaced, nothing, a file or a link."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/proc")
    assert is_fixed(Path("/proc"))
    assert [is_fixed(tmp_path / name) for name in ("plain", "absent", "file", "link")] == [False] * 4
    monkeypatch.setattr("blobflow.artifact.landing.os.access", lambda *_, **__: False)
    assert is_fixed(tmp_path / "plain")


IN_A_MOUNT = """
import os, subprocess, sys
from pathlib import Path
from blobflow import download
from blobflow.artifact import landing
from blobflow.stores.local.store import LocalStore

base = Path(sys.argv[1])
volume = base / "volume"
volume.mkdir()
if subprocess.run(["mount", "-t", "tmpfs", "none", str(volume)], stderr=subprocess.DEVNULL).returncode:
    landing.is_fixed = lambda path: path == volume  # a sandbox without mounts
download(LocalStore(base / "store"), "a.tar", volume)
print(*sorted(os.listdir(volume)))
"""


def test_a_real_volume_gets_the_artifact(store: LocalStore, tmp_path: Path):
    """A mounted file system, where the kernel allows to mount one without being asked."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    can = subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode == 0
    command = [*(unshare if can else ()), sys.executable, "-c", IN_A_MOUNT, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["INDEX.parquet", "MANIFEST.json", "data"]
