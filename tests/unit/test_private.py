"""Private directories: what others plant in their place is refused, and nothing outside of them is touched."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow.backends.mirror_history import HistoryEntry, add_to_history, read_history
from blobflow.errors import RefusedError
from blobflow.layers.state import StateTable
from blobflow.mirror import MirrorReceiver
from blobflow.private import PrivateDirectory
from blobflow.scratch import scratch_directory
from blobflow.stores import PutMode
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Fifo, Symlink, Tree, read_tree, write_tree
from blobflow.transport.checkpoints import LocalCheckpointStore, TransferJournal
from blobflow.uploads.progress import TransferRecord
from tests.kit import give_away

VICTIM: Tree = {
    "old file": "precious",
    "old directory": {"deep": {"file": "precious"}},
    "f" * 32: {"upload.json": "{}"},
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of somebody's, in which everything has not been touched for two days."""
    path = write_tree(tmp_path / "victim", VICTIM)
    then = time.time() - 48 * 3600
    for entry in [*path.rglob("*"), path]:
        os.utime(entry, (then, then))
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The directory itself


def test_a_link_in_the_place_of_a_private_directory_is_refused(tmp_path: Path, victim: Path) -> None:
    """Neither a link nor a file is taken for the directory, wherever the link leads, and whether or not it is made."""
    write_tree(tmp_path / "home", {"link": Symlink("../victim"), "loop": Symlink("loop"), "file": "x", "fifo": Fifo()})
    with PrivateDirectory.at(tmp_path / "home") as home:
        for name in ("link", "loop", "file", "fifo"):
            for make in (False, True):
                with pytest.raises(RefusedError, match=f"{tmp_path}/home/{name} is not used") as refusal:
                    home.below(name, make=make)
                assert refusal.value.hint
    assert read_tree(victim) == VICTIM


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that another user has made where a private one belongs is not used, and named with its owner."""
    (tmp_path / "own").mkdir(mode=0o777)
    give_away(tmp_path / "own", monkeypatch)
    with (
        PrivateDirectory.at(tmp_path) as home,
        pytest.raises(RefusedError, match=r"belongs to another user \(uid 12345\)"),
    ):
        home.below("own", make=True)
    with pytest.raises(RefusedError, match=r"belongs to another user \(uid 12345\)"):
        PrivateDirectory.at(tmp_path / "own")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_private_directory_is_its_owners_alone(tmp_path: Path, umask: int) -> None:
    """Under every umask it has mode 700, also if an earlier version left it open to others."""
    before = os.umask(umask)
    try:
        (tmp_path / "laxer").mkdir()
        (tmp_path / "laxer").chmod(0o777)
        with PrivateDirectory.at(tmp_path / "home") as home, home.below("new", make=True) as new:
            os.close(new.open("file", os.O_WRONLY | os.O_CREAT))
        with PrivateDirectory.at(tmp_path) as outer:
            outer.below("laxer").close()
    finally:
        os.umask(before)
    found = {name: mode_of(tmp_path / name) for name in ("home", "home/new", "home/new/file", "laxer")}
    assert found == {"home": 0o700, "home/new": 0o700, "home/new/file": 0o600, "laxer": 0o700}


def test_a_shared_directory_stays_shared(tmp_path: Path) -> None:
    """Where the group of a volume may write and nobody else, what is made in it is for the group as well."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume").chmod(0o770)
    before = os.umask(0o002)
    try:
        with PrivateDirectory.at(tmp_path / "volume") as volume, volume.below("own", make=True) as own:
            os.close(own.open("lock", os.O_WRONLY | os.O_CREAT))
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "volume/own"), mode_of(tmp_path / "volume/own/lock")) == (0o770, 0o660)


def test_a_directory_that_is_moved_away_is_still_the_one_that_is_used(tmp_path: Path, victim: Path) -> None:
    """What is put in the place of an open directory meanwhile gets nothing, and loses nothing."""
    with PrivateDirectory.at(tmp_path / "home") as home, home.below("own", make=True) as own:
        os.close(own.open("old file", os.O_WRONLY | os.O_CREAT))
        os.rename(tmp_path / "home/own", tmp_path / "moved")
        os.symlink(victim, tmp_path / "home/own")
        own.remove("old file")
        own.unlink("old directory")
        os.close(own.open("new", os.O_WRONLY | os.O_CREAT))
    assert read_tree(victim) == VICTIM
    assert read_tree(tmp_path / "moved") == {"new": ""}


# Files in it


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC])
def test_only_a_file_of_ones_own_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """Links, pipes, hard links to other files and files of other users are refused, and stay as they are."""
    write_tree(tmp_path / "victim", {"file": "precious"})
    write_tree(tmp_path / "home", {"link": Symlink("../victim/file"), "fifo": Fifo(), "foreign": "theirs"})
    os.link(tmp_path / "victim/file", tmp_path / "home/hard")
    give_away(tmp_path / "home/foreign", monkeypatch)
    with PrivateDirectory.at(tmp_path / "home") as home:
        for name in ("link", "fifo", "hard", "foreign"):
            with pytest.raises(RefusedError, match=f"{tmp_path}/home/{name} is not used"):
                home.open(name, flags)
    assert read_tree(tmp_path / "victim") == {"file": "precious"}
    assert (tmp_path / "home/foreign").read_text() == "theirs"


# The local store's


def _write(store: LocalStore) -> None:
    store.put("key", b"x", mode=PutMode.CREATE)


def _begin(store: LocalStore) -> None:
    store.create_multipart("key", part_size=4)


def _delete(store: LocalStore) -> None:
    (store.root / "key").write_text("x")
    store.delete("key")


STORE_DIRECTORIES = (".blobflow", ".blobflow/tmp", ".blobflow/uploads", ".blobflow/locks")
NEEDED = [(name, call) for name in STORE_DIRECTORIES for call in (_write, _begin, _delete)]
NEEDED.remove((".blobflow/locks", _begin))


@pytest.mark.parametrize(("name", "call"), NEEDED)
def test_a_store_does_not_follow_a_link_to_its_own_directories(
    tmp_path: Path, victim: Path, name: str, call: Callable[[LocalStore], None]
) -> None:
    """A link in the place of a store's own directory leads nowhere: old things behind it stay, and no new ones come."""
    root = tmp_path / "store"
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(victim)
    with pytest.raises(RefusedError, match=f"{root / name} is not used: it is a link"):
        call(LocalStore(root))
    assert read_tree(victim) == VICTIM


@pytest.mark.parametrize(("name", "call"), NEEDED)
def test_a_store_does_not_use_directories_of_others(
    tmp_path: Path, name: str, call: Callable[[LocalStore], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of another user in the place of a store's own one is refused by every write that needs it."""
    root = tmp_path / "store"
    (root / name).mkdir(parents=True)
    give_away(root / name, monkeypatch)
    with pytest.raises(RefusedError, match=f"{root / name} is not used: it belongs to another user"):
        call(LocalStore(root))


def test_an_upload_that_was_planted_stops_no_other(tmp_path: Path, victim: Path) -> None:
    """A link among the uploads is no upload: it is neither listed, nor continued, nor removed, and others are."""
    store = LocalStore(tmp_path / "store")
    mine = store.create_multipart("key", part_size=4)
    (victim / "payload").touch()
    planted = tmp_path / "store/.blobflow/uploads" / ("e" * 32)
    planted.symlink_to(victim)
    assert [upload.upload_id for upload in store.list_uploads()] == [mine]
    with pytest.raises(RefusedError, match="it is a link"):
        store.list_parts("key", "e" * 32)
    store.abort_multipart("key", "e" * 32)
    LocalStore(tmp_path / "store").put("another", b"x")  # and it sweeps
    assert planted.is_symlink()
    assert read_tree(victim) == {**VICTIM, "payload": ""}


def test_the_directories_of_a_store_are_private(tmp_path: Path) -> None:
    """Nobody else lists what is being written to a store, whatever the umask lets others read of its objects."""
    before = os.umask(0)
    try:
        store = LocalStore(tmp_path / "store")
        store.put("key", b"x")
        store.create_multipart("large", part_size=4)
    finally:
        os.umask(before)
    assert {name: mode_of(tmp_path / "store" / name) for name in STORE_DIRECTORIES} == dict.fromkeys(
        STORE_DIRECTORIES, 0o700
    )


# Everybody else's


def _receive(home: Path) -> None:
    MirrorReceiver(home).close()


def _note(home: Path) -> None:
    record = TransferRecord(
        transfer_id="t", kind="upload", key="k", artifact_digest="", part_size=1, parts_total=1, parts_done=0,
        bytes_done=0, bytes_total=1, state="running",
    )  # fmt: skip
    TransferJournal(LocalCheckpointStore(home)).save(record)


def _keep_state(home: Path) -> None:
    StateTable(home / "state.db", "file:///store")


PLANTED: list[tuple[str, Callable[[Path], None]]] = [
    ("recv_snapshots", _receive),
    ("t.jsonl", _note),
    ("state.db", _keep_state),
]


@pytest.mark.parametrize(("name", "call"), PLANTED)
@pytest.mark.parametrize("leads_to", ["old file", "old directory"])
def test_receivers_journals_and_states_follow_no_link(
    tmp_path: Path, victim: Path, name: str, call: Callable[[Path], None], leads_to: str
) -> None:
    """What is planted under a name that can be foretold is refused, and what it leads to stays as it is."""
    home = tmp_path / "home"
    home.mkdir()
    (home / name).symlink_to(victim / leads_to)
    with pytest.raises(RefusedError, match="is not used"):
        call(home)
    assert read_tree(victim) == VICTIM


def test_leftovers_of_others_are_not_removed(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of scratch directories of killed processes only one's own go; a link that looks like one is left alone."""
    for name in ("own", "foreign"):
        write_tree(tmp_path / "tmp" / f".blobflow-push-{name}", {"artifact": {"deep": "x"}})
    give_away(tmp_path / "tmp" / ".blobflow-push-foreign", monkeypatch)
    (tmp_path / "tmp" / ".blobflow-push-link").symlink_to(victim)
    with scratch_directory(tmp_path / "source", tmp_path / "tmp") as scratch:
        assert mode_of(scratch) == 0o700
        assert {*os.listdir(tmp_path / "tmp")} == {".blobflow-push-foreign", ".blobflow-push-link", scratch.name}
    assert not scratch.exists()
    assert read_tree(victim) == VICTIM


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_history_of_a_mirror_follows_no_link(tmp_path: Path, kind: str) -> None:
    """A link or a pipe in its place is refused by an import, and neither followed nor waited for."""
    write_tree(tmp_path, {"mirror": {}, "victim": "precious"})
    planted = tmp_path / "mirror" / "history.jsonl"
    if kind == "link":
        planted.symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(planted)
    entry = HistoryEntry.model_validate_json(
        '{"imported_at": "2026-01-01T00:00:00Z", "artifact_digest": "x", "backend": "b",'
        ' "created_at": "2026-01-01T00:00:00Z"}'
    )
    with pytest.raises(RefusedError, match="not a regular file"):
        add_to_history(tmp_path / "mirror", entry)
    assert read_history(tmp_path / "mirror") == []
    assert (tmp_path / "victim").read_text() == "precious"
