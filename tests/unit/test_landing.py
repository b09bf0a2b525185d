"""Landing: the stage, its journal, and the files that parts become."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from blobflow import Artifact, TransferRecord, download, upload
from blobflow.artifact.landing import STAGE_PREFIX, Landing, Stage, check_destination, remove_stage
from blobflow.artifact.tarmap import FIRST_MEMBER
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import DestinationNotEmpty, DigestMismatch, DiskFull, RefusedError, TransferBusy
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, Hook, Request, read_tree
from tests.kit import SERIAL, SMALL, Killed, artifact_of, local_store, noise

KEY = "a.tar"
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path / "made")


@pytest.fixture
def store(tmp_path: Path, artifact: Artifact) -> LocalStore:
    store = local_store(tmp_path)
    upload(store, KEY, artifact, profile=SMALL)
    return store


def die(_: Request) -> None:
    raise Killed


def killed_download(store: LocalStore, dest: Path, at: int) -> Path:
    """The stage that a download leaves which dies at its `at`-th range."""
    faults = FaultyStore(store, lambda r: Hook(die) if (r.operation, r.number) == ("get_range", at) else None)
    with pytest.raises(Killed):
        download(faults, KEY, dest, profile=SERIAL)
    [stage] = [path for path in dest.parent.iterdir() if path.name.startswith(STAGE_PREFIX)]
    return stage


def part_of(artifact: Artifact, landing: Landing, number: int) -> tuple[Part, memoryview]:
    part = landing.plan.part(number)
    data = memoryview(bytearray(part.length))
    artifact.source().read_into(part.offset, data)
    return part, data


def plan_of(artifact: Artifact, part_size: int) -> TransferPlan:
    layout = artifact.layout
    return TransferPlan(layout.size - layout.data_start, part_size, start=layout.data_start)


def test_only_nothing_or_an_empty_directory_is_a_destination(tmp_path: Path):
    """Files, links and directories with anything in them are refused."""
    check_destination(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    for name in ("file", "link", "."):
        with pytest.raises(DestinationNotEmpty):
            check_destination(tmp_path / name)


def test_a_stage_is_held_by_one(tmp_path: Path):
    """A second process for the same artifact and destination is told to wait; another artifact has another stage."""
    with Stage(tmp_path / "dest", DIGEST).held():
        with pytest.raises(TransferBusy, match="another process is landing"), Stage(tmp_path / "dest", DIGEST).held():
            pass
        with Stage(tmp_path / "dest", "sha256:" + "1" * 64).held():
            pass
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        assert repr(stage) == f"<Stage {stage.path.name} for {tmp_path / 'dest'}, 0 parts done>"
        assert stage.path.stat().st_mode & 0o777 == 0o700


def test_a_stage_that_was_removed_under_the_lock_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other process finished between our open and our lock: try again, and it will be there."""
    stage = Stage(tmp_path / "dest", DIGEST)
    monkeypatch.setattr("fcntl.flock", lambda *_: shutil.rmtree(stage.path))
    with pytest.raises(TransferBusy), stage.held():
        pass


def test_a_stage_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What somebody else prepared in a shared directory is not written into."""
    monkeypatch.setattr("blobflow.artifact.landing.os.geteuid", lambda: 12345)
    with pytest.raises(RefusedError, match="belongs to another user"), Stage(tmp_path / "dest", DIGEST).held():
        pass


def test_who_may_rename_the_stage_leads_nothing_elsewhere(tmp_path: Path):
    """In a directory of several users, somebody moves the stage away and puts a link there: it leads nothing elsewhere.

    What is written lands in the stage that was opened, wherever it is now.
    """
    (victim := tmp_path / "victim" / "artifact" / "data").mkdir(parents=True)
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        stage.path.rename(tmp_path / "moved")
        stage.path.symlink_to(tmp_path / "victim")
        stage.begin(4096)
        (stage.tree / "data").mkdir()
        (stage.tree / "data" / "file").write_text("x")
        stage.note(1, 2)
        stage.sync()
        assert list(victim.iterdir()) == []
        assert sorted(path.name for path in (tmp_path / "victim").iterdir()) == ["artifact"]
        assert (tmp_path / "moved" / "artifact" / "data" / "file").read_text() == "x"
        assert (tmp_path / "moved" / "journal").exists()


def test_long_destination_names_have_a_stage(tmp_path: Path):
    """The stage's name does not grow with the destination's."""
    with Stage(tmp_path / ("n" * 255), DIGEST).held():
        pass


@pytest.mark.parametrize("tail", [b'{"part": 9, "crc', b'{"drop": 1}', b"\0\0\0\0", b"\xff\xfe"])
def test_a_torn_journal_costs_one_record(tail: bytes, store: LocalStore, tmp_path: Path):
    """A kill in the middle of a write leaves a torn line: it is ignored, also after others were appended."""
    stage = killed_download(store, tmp_path / "dest", at=6)
    with open(stage / "journal", "ab") as journal:
        journal.write(tail)
    killed_download(store, tmp_path / "dest", at=5)
    result = download(store, KEY, tmp_path / "dest", profile=SERIAL)
    assert result.bytes_resumed > 0
    assert read_tree(tmp_path / "dest" / "data") == read_tree(tmp_path / "made" / "source")


def test_the_part_size_of_the_journal_counts(store: LocalStore, tmp_path: Path):
    """A download that continues with another profile keeps the cut of the first run."""
    killed_download(store, tmp_path / "dest", at=6)
    result = download(store, KEY, tmp_path / "dest", profile=SMALL.model_copy(update={"chunk_size": 100}))
    assert result.bytes_resumed == 3 * 4096
    assert read_tree(tmp_path / "dest" / "data") == read_tree(tmp_path / "made" / "source")


def test_damage_in_the_stage_is_found_and_fetched_again(store: LocalStore, tmp_path: Path):
    """A member that spans parts is hashed from the stage; the run fails, the next one fetches its parts."""
    stage = killed_download(store, tmp_path / "dest", at=6)
    with open(stage / "artifact" / "data" / "big.bin", "r+b") as file:
        file.write(b"damage")
    with pytest.raises(Exception, match=r"big\.bin"):
        download(store, KEY, tmp_path / "dest", profile=SERIAL)
    assert not (tmp_path / "dest").exists()
    download(store, KEY, tmp_path / "dest", profile=SERIAL)
    assert read_tree(tmp_path / "dest" / "data") == read_tree(tmp_path / "made" / "source")


def test_a_file_that_was_made_but_not_sized_gets_its_length(tmp_path: Path):
    """Killed between open and truncate, and the file ends in a hole: it still has every byte of its length."""
    (tmp_path / "source").mkdir()
    content = noise(300_000) + bytes(200_000)
    (tmp_path / "source" / "f").write_bytes(content)
    artifact = artifact_of(tmp_path)
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        landing = Landing(stage, artifact.layout, plan_of(artifact, 131_072))
        (stage.tree / "data" / "f").touch()
        for number in range(1, len(landing.plan) + 1):
            part, data = part_of(artifact, landing, number)
            landing.landed(part, landing.land(part, data))
        assert (stage.tree / "data" / "f").read_bytes() == content


def test_old_bytes_never_shine_through_a_hole(tmp_path: Path):
    """A file that an earlier process wrote wrong bytes into: zeros are written where there is no hole."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "f").write_bytes(bytes(400_000))
    artifact = artifact_of(tmp_path)
    for part_size in (100_000, 1_000_000):
        with Stage(tmp_path / f"dest{part_size}", artifact.digest).held() as stage:
            landing = Landing(stage, artifact.layout, plan_of(artifact, part_size))
            (stage.tree / "data" / "f").write_bytes(noise(500_000))
            for number in range(1, len(landing.plan) + 1):
                part, data = part_of(artifact, landing, number)
                landing.landed(part, landing.land(part, data))
            assert (stage.tree / "data" / "f").read_bytes() == bytes(400_000)


def test_a_small_file_whose_bytes_are_wrong_never_comes_into_being(artifact: Artifact, tmp_path: Path):
    """A part is checked before it is written."""
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        landing = Landing(stage, artifact.layout, plan_of(artifact, 1 << 20))
        part, data = part_of(artifact, landing, 1)
        small = next(m for m, size in enumerate(artifact.layout.index.sizes) if size)
        data[artifact.layout.content_range(small + FIRST_MEMBER)[0] - part.offset] ^= 1
        with pytest.raises(DigestMismatch):
            landing.land(part, data)
        assert not (stage.tree / "data" / artifact.layout.index.paths[small]).exists()


def test_links_in_the_stage_are_not_followed(tmp_path: Path):
    """A link that appears in the place of a file or a directory is an error, and its target stays as it is."""
    artifact = artifact_of(tmp_path)
    (tmp_path / "victim").write_text("mine")
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        landing = Landing(stage, artifact.layout, plan_of(artifact, 4096))
        (stage.tree / "data" / "big.bin").symlink_to(tmp_path / "victim")
        part, data = part_of(artifact, landing, 1)
        with pytest.raises(RefusedError, match="Too many levels of symbolic links"):
            landing.land(part, data)
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_full_disk_is_temporary_and_keeps_what_was_landed(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """When there is room again, the download continues."""
    real, calls = os.pwrite, 0

    def full(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("blobflow.artifact.landing.os.pwrite", full)
        with pytest.raises(DiskFull) as answer:
            download(store, KEY, tmp_path / "dest", profile=SERIAL)
    assert answer.value.exit_code == 75
    assert download(store, KEY, tmp_path / "dest", profile=SERIAL).bytes_resumed > 0


@pytest.mark.seed("W1.8")
def test_a_checkpoint_syncs_before_it_says_so(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The journal calls parts synced only after their bytes are; without news there is nothing to sync."""
    events: list[str] = []
    monkeypatch.setattr("blobflow.artifact.landing.sync_tree", lambda _: events.append("sync"))
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        stage.begin(4096)
        landing = Landing(stage, artifact.layout, plan_of(artifact, 4096))
        real = stage._append

        def append(records: list[dict[str, int | str]], *, durable: bool = False) -> None:
            events.append(next(iter(records[0])))
            assert durable == (events[-1] == "synced")
            real(records, durable=durable)

        monkeypatch.setattr(stage, "_append", append)
        landing.sync()
        assert events == []
        part, data = part_of(artifact, landing, 1)
        landing.landed(part, landing.land(part, data))
        landing.sync()
        assert events == ["part", "syncing", "sync", "synced"]
        assert repr(landing) == f"<Landing 1 of {len(landing.plan)} parts at {tmp_path / 'dest'}>"


def test_after_a_restart_of_the_machine_only_synced_parts_count(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A killed process loses no noted part; a machine that went down loses those that were not synced."""
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        stage.begin(4096)
        stage.note(1, 11)
        stage.sync()
        stage.note(2, 22)
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        assert stage.done == {1: 11, 2: 22}
    monkeypatch.setattr("blobflow.artifact.landing.boot_id", lambda: "another boot")
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        assert stage.done == {1: 11}
        stage.note(3, 33)
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        assert stage.done == {1: 11, 3: 33}
        stage.drop([1])
    with Stage(tmp_path / "dest", artifact.digest).held() as stage:
        assert stage.done == {3: 33}


def test_parts_that_land_during_a_checkpoint_are_kept(tmp_path: Path, store: LocalStore):
    """While the calling thread is busy with a checkpoint, workers go on, and what they land is noted."""
    ahead = threading.Event()

    def faults(request: Request) -> Hook | None:
        # The first two ranges are the embedded manifest and the index; the part that is fetched now is number 5.
        return Hook(lambda _: ahead.set()) if (request.operation, request.number) == ("get_range", 7) else None

    def busy(record: TransferRecord) -> None:
        if record.parts_done == 1:
            assert ahead.wait(30)
            raise Killed

    with pytest.raises(Killed):
        download(FaultyStore(store, faults), KEY, tmp_path / "dest", profile=SERIAL, on_checkpoint=busy)
    assert download(store, KEY, tmp_path / "dest", profile=SERIAL).bytes_resumed >= 4 * 4096


def test_a_part_that_is_noted_during_a_sync_may_not_be_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Workers note parts while the file system is synced: those count as synced at the next checkpoint only."""
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        stage.begin(4096)
        stage.note(1, 11)
        monkeypatch.setattr("blobflow.artifact.landing.sync_tree", lambda _: stage.note(2, 22))
        stage.sync()
    monkeypatch.setattr("blobflow.artifact.landing.boot_id", lambda: "another boot")
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        assert stage.done == {1: 11}


def test_a_dropped_part_stays_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the machine goes down afterwards, and the part had been synced; other parts gain nothing by it."""
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        stage.begin(4096)
        stage.note(1, 11)
        stage.note(2, 22)
        stage.sync()
        stage.note(3, 33)
        stage.drop([1])
    monkeypatch.setattr("blobflow.artifact.landing.boot_id", lambda: "another boot")
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        assert stage.done == {2: 22}


def test_lanes_share_a_stage_and_their_notes_are_taken_over(tmp_path: Path):
    """Each lane sees what was there before it, and its own; who holds the stage alone sees all."""
    dest = tmp_path / "dest"
    with Stage(dest, DIGEST).held() as stage:
        stage.begin(4096)
        stage.note(1, 11)
        stage.divide(2)
    with Stage(dest, DIGEST).lane(0, 2) as left, Stage(dest, DIGEST).lane(1, 2) as right:
        left.note(3, 33)
        right.note(2, 22)
        right.note(4, 44)
        assert (left.done, right.done) == ({1: 11, 3: 33}, {1: 11, 2: 22, 4: 44})
        with pytest.raises(TransferBusy), Stage(dest, DIGEST).held():
            pass
    with Stage(dest, DIGEST).lane(1, 2) as right:
        assert right.done == {1: 11, 2: 22, 4: 44}
    for _ in range(2):
        with Stage(dest, DIGEST).held() as stage:
            assert stage.done == {1: 11, 2: 22, 3: 33, 4: 44}
            assert {path.name for path in stage.path.iterdir()} == {"artifact", "journal", "lock"}


def test_notes_of_lanes_of_another_cut_are_nobodys(tmp_path: Path):
    """A journal that was left over from other parts says nothing about these."""
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        stage.begin(4096)
        (stage.path / "lane-0").write_text('{"artifact": "x", "part_size": 512}\n{"part": 1, "crc32c": 1}\n')
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        assert stage.done == {}
        assert not (stage.path / "lane-0").exists()


def test_a_stage_of_something_that_has_landed_is_not_begun(tmp_path: Path):
    """Who comes in the moment between publication and removal waits, and then finds that all is done."""
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "file").touch()
    with pytest.raises(TransferBusy, match="just landed"), Stage(tmp_path / "dest", DIGEST).held():
        pass


def test_a_stage_is_removed_lock_last(tmp_path: Path):
    """Until its lock is gone nobody begins another; and who has begun one by then keeps it."""
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        (stage.path / "artifact" / "file").touch()
        (stage.path / "link").symlink_to(tmp_path)
        real = os.unlink

        def unlink(path: str, *, dir_fd: int | None = None) -> None:
            real(path, dir_fd=dir_fd)
            if path == "lock":
                assert list(stage.path.iterdir()) == []
                with Stage(tmp_path / "dest", DIGEST).held() as other:
                    other.begin(512)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            remove_stage(stage.path)
    assert tmp_path.is_dir()
    with Stage(tmp_path / "dest", DIGEST).held() as stage:
        assert stage.part_size == 512
