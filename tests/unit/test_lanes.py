"""One upload by several machines: begun once, sent in lanes that share only the store, committed once."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import override

from blobflow import Artifact, ChunkProfile, TransferRecord, open_store, upload, verify
from blobflow.errors import (
    ChecksumMismatch,
    KeyConflict,
    NoSuchUpload,
    SourceChanged,
    TransferBusy,
    Unsupported,
    UploadIncomplete,
    UsageError,
)
from blobflow.lanes import UploadTicket, begin_upload, commit_upload, send_parts
from blobflow.stores.base import Body, Capabilities, ObjectMeta, PartMeta
from blobflow.stores.local.store import LocalStore
from blobflow.stores.wrapping import WrappingStore
from blobflow.testing import FaultyStore, Hook, Request, scripted_faults
from blobflow.uploads.intent import TTL_S, IntentKeeper
from tests.kit import SERIAL, SMALL, Killed, artifact_of, dies_at, keys, noise, watched

KEY = "orders/monday"
LANES = 3


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path / "made")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def elsewhere(artifact: Artifact) -> Artifact:
    """The artifact as another machine opens it."""
    return Artifact.open(artifact.path)


def test_lanes_make_one_artifact(artifact: Artifact, store: LocalStore):
    """Three lanes at once, through nothing but the ticket and the store; each part is sent exactly once."""
    ticket = UploadTicket.from_json_dict(
        json.loads(json.dumps(begin_upload(store, KEY, artifact, profile=SMALL).to_json_dict()))
    )
    watching = watched(store)
    results = []

    def lane(number: int) -> None:
        results.append(send_parts(watching, ticket, elsewhere(artifact), ticket.numbers(number, LANES), profile=SMALL))

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watching.count("put_part") == ticket.parts == sum(result.parts for result in results)
    assert sum(result.bytes_moved for result in results) == ticket.bytes_total
    assert not store.exists(KEY)

    committing = watched(store)
    result = commit_upload(committing, ticket, elsewhere(artifact))

    assert committing.count("put_part") == 0
    assert (result.status, result.artifact_digest) == ("uploaded", artifact.digest)
    assert (result.bytes_sent, result.bytes_resumed, result.parts) == (0, ticket.bytes_total, ticket.parts)
    assert keys(store) == [KEY, f"{KEY}.manifest.json"]
    assert store.list_uploads() == []
    verify(store, KEY, mode="deep", expected_digest=artifact.digest)


@pytest.mark.parametrize("lanes", [1, 2, 3, 100])
def test_every_part_belongs_to_one_lane(lanes: int):
    """However many there are; a lane may have none."""
    ticket = UploadTicket(KEY, "id", "sha256:x", 4096, 10, 40_000)
    numbers = [number for lane in range(lanes) for number in ticket.numbers(lane, lanes)]
    assert sorted(numbers) == list(range(1, 11))
    for wrong in (-1, lanes):
        with pytest.raises(UsageError):
            ticket.numbers(wrong, lanes)


def test_a_lane_that_never_ran_is_found_out(artifact: Artifact, store: LocalStore):
    """An orchestrator that skips a step and calls it a success publishes nothing."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    for number in (0, 2):
        send_parts(store, ticket, artifact, ticket.numbers(number, LANES), profile=SMALL)
    with pytest.raises(UploadIncomplete, match="are missing, of lane 1; the first is 2") as refusal:
        commit_upload(store, ticket, artifact, lanes=LANES)
    assert (refusal.value.expected, refusal.value.actual) == (ticket.parts, ticket.parts - 3)
    assert (refusal.value.lanes, refusal.value.first) == ("1", 2)
    assert "run the lanes again" in refusal.value.hint
    assert not store.exists(f"{KEY}.manifest.json")
    send_parts(store, ticket, artifact, ticket.numbers(1, LANES), profile=SMALL)
    assert commit_upload(store, ticket, artifact).status == "uploaded"
    verify(store, KEY, mode="deep")


def test_a_killed_lane_sends_the_rest_only(artifact: Artifact, store: LocalStore):
    """Its successor finds in the store what arrived."""
    ticket = begin_upload(store, KEY, artifact, profile=SERIAL)
    mine = ticket.numbers(0, 2)

    def die(_: Request) -> None:
        raise Killed

    with pytest.raises(Killed):
        send_parts(
            FaultyStore(store, scripted_faults({("put_part", 3): Hook(die)})), ticket, artifact, mine, profile=SERIAL
        )
    watching = watched(store)
    result = send_parts(watching, ticket, elsewhere(artifact), mine, profile=SERIAL)
    assert watching.count("put_part") == len(mine) - 2
    assert result.bytes_resumed == 2 * 4096
    assert result.parts == len(mine)


def test_a_commit_killed_at_any_request_is_finished_by_the_next(artifact: Artifact, tmp_path: Path):
    """Whatever it had done: running it again publishes, or says that it is published."""
    number, finished = 0, False
    while not finished:
        number += 1
        store = LocalStore(tmp_path / f"store-{number}")
        ticket = begin_upload(store, KEY, artifact, profile=SMALL)
        send_parts(store, ticket, artifact, ticket.numbers(0, 1), profile=SMALL)
        try:
            commit_upload(FaultyStore(store, dies_at(number)), ticket, artifact)
            finished = True
        except Killed:
            pass
        assert commit_upload(store, ticket, artifact).artifact_digest == artifact.digest
        verify(store, KEY, mode="deep")
        assert keys(store) == [KEY, f"{KEY}.manifest.json"]
    assert number > 8


def test_a_whole_run_may_be_repeated(artifact: Artifact, store: LocalStore):
    """After everything is published, every step says so and sends nothing: with the old ticket, and with a new one."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    send_parts(store, ticket, artifact, ticket.numbers(0, 1), profile=SMALL)
    commit_upload(store, ticket, artifact)
    watching = watched(store)
    again = begin_upload(watching, KEY, artifact, profile=SMALL)
    assert (again.upload_id, again.parts) == ("", 0)
    for each in (ticket, again):
        assert send_parts(watching, each, artifact, each.numbers(0, 1), profile=SMALL).status == "unchanged"
        assert commit_upload(watching, each, artifact).status == "unchanged"
    assert watching.count("put_part") == watching.count("create_multipart") == 0


def test_another_export_of_the_same_content_joins(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """A lane's machine exported the directory itself, at another time: the manifest of the first one is published."""
    manifest = json.loads(artifact.manifest_bytes)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("INDEX.parquet", "REFERENCE.parquet", "data"):
        (other / name).symlink_to((artifact.path / name).resolve())
    (other / "MANIFEST.json").write_bytes(json.dumps({**manifest, "producer": "x" * 700}).encode())
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    send_parts(store, ticket, artifact, ticket.numbers(0, 2), profile=SMALL)
    send_parts(store, ticket, other, ticket.numbers(1, 2), profile=SMALL)
    assert commit_upload(store, ticket, other).artifact_digest == artifact.digest
    verify(store, KEY, mode="deep", expected_digest=artifact.digest)
    assert begin_upload(store, KEY, other).artifact_digest == artifact.digest


def test_a_lane_that_sent_other_bytes_is_found_out(artifact: Artifact, store: LocalStore):
    """A part was put by a stranger: the sum is not the promised one, nothing is published, nothing stays."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    send_parts(store, ticket, artifact, ticket.numbers(0, 1), profile=SMALL)
    keeper = IntentKeeper(store, KEY)
    keeper.load()
    wrong = Body.of(noise(4096, 9))
    store.put_part(KEY, ticket.upload_id, 2, wrong)
    assert wrong.crc32c is not None
    keeper.save({2: wrong.crc32c})
    with pytest.raises(ChecksumMismatch):
        commit_upload(store, ticket, artifact)
    assert keys(store) == []
    assert store.list_uploads() == []


def test_a_changed_source_stops_its_lane(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The files are not the ones that were exported."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    (tmp_path / "made" / "source" / "big.bin").write_bytes(b"x")
    with pytest.raises(SourceChanged):
        send_parts(store, ticket, elsewhere(artifact), ticket.numbers(0, 1), profile=SMALL)


def test_the_end_of_one_lane_opens_the_key_to_nobody(artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Others are kept away although the process that wrote the intent last may be gone: not until it expires."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    send_parts(store, ticket, artifact, ticket.numbers(0, 2), profile=SMALL)
    other = artifact_of(tmp_path / "other", {"other": "x"})
    with pytest.raises(TransferBusy, match="by lanes"):
        upload(store, KEY, other)
    intent = IntentKeeper(store, KEY).load()
    assert intent is not None
    assert not intent.is_alive(intent.expires_at + TTL_S)


@pytest.mark.parametrize("what", ["upload", "intent"])
def test_lanes_of_a_lost_upload_are_told(what: str, artifact: Artifact, store: LocalStore, tmp_path: Path):
    """Somebody gave it up: begin again. Somebody else published: the key is taken."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    if what == "upload":
        store.abort_multipart(KEY, ticket.upload_id)
    else:
        store.delete(f"{KEY}.upload.json")
    with pytest.raises(NoSuchUpload):
        send_parts(store, ticket, artifact, ticket.numbers(0, 1), profile=SMALL)
    with pytest.raises(NoSuchUpload, match="is gone"):
        commit_upload(store, ticket, artifact)
    assert keys(store) == []
    other = artifact_of(tmp_path / "other", {"other": "x"})
    upload(store, KEY, other)
    with pytest.raises(KeyConflict):
        begin_upload(store, KEY, artifact)
    with pytest.raises((KeyConflict, NoSuchUpload)):
        commit_upload(store, ticket, artifact)
    verify(store, KEY, expected_digest=other.digest)


@pytest.mark.parametrize("is_back", [True, False])
def test_overwriting_is_decided_at_the_beginning(is_back: bool, artifact: Artifact, store: LocalStore, tmp_path: Path):
    """The intent remembers what may be replaced; what came there since is left alone, with or without the intent."""
    old, newer = artifact_of(tmp_path / "old", {"old": "x"}), artifact_of(tmp_path / "newer", {"newer": "x"})
    upload(store, KEY, old)
    ticket = begin_upload(store, KEY, artifact, profile=SMALL, overwrite=True)
    send_parts(store, ticket, artifact, ticket.numbers(0, 1), profile=SMALL)
    commit_upload(store, ticket, artifact)
    verify(store, KEY, mode="deep", expected_digest=artifact.digest)

    ticket = begin_upload(store, KEY, old, profile=SMALL, overwrite=True)
    send_parts(store, ticket, old, ticket.numbers(0, 1), profile=SMALL)
    intent = f"{KEY}.upload.json"
    kept = store.get(intent, max_bytes=2**20).data
    store.delete(intent)
    upload(store, KEY, newer, overwrite=True)
    if is_back:
        store.put(intent, kept)
    with pytest.raises(KeyConflict if is_back else NoSuchUpload):
        commit_upload(store, ticket, old)
    verify(store, KEY, mode="deep", expected_digest=newer.digest)


def test_a_lane_tells_of_itself(artifact: Artifact, store: LocalStore):
    """Records count the lane's parts, under an id that its next attempt has too; the commit's are of the whole."""
    records: list[TransferRecord] = []
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    ids: list[set[str]] = []
    for lane in (0, 1, 1):
        records.clear()
        numbers = ticket.numbers(lane, 2)
        sent = send_parts(store, ticket, artifact, numbers, profile=SMALL, on_checkpoint=records.append)
        last = records[-1]
        assert (last.state, last.parts_done, last.parts_total) == ("done", len(numbers), len(numbers))
        assert last.bytes_done == last.bytes_total == sent.bytes_moved + sent.bytes_resumed
        ids.append({record.transfer_id for record in records})
    assert ids[0] != ids[1] == ids[2]
    commit_upload(store, ticket, artifact, on_checkpoint=records.append)
    assert (records[-1].state, records[-1].parts_done) == ("done", ticket.parts)
    assert ids[0] != {records[-1].transfer_id} != ids[1]


def test_upload_finishes_what_lanes_began_and_the_reverse(artifact: Artifact, store: LocalStore):
    """There is one upload of a payload: whoever brings it takes up what the others sent."""
    ticket = begin_upload(store, KEY, artifact, profile=SERIAL)
    send_parts(store, ticket, artifact, ticket.numbers(0, 2), profile=SERIAL)
    watching = watched(store)
    assert upload(watching, KEY, artifact, profile=SERIAL).status == "uploaded"
    assert watching.count("put_part") == len(ticket.numbers(1, 2))
    late = send_parts(store, ticket, artifact, ticket.numbers(1, 2), profile=SERIAL)
    assert (late.status, late.bytes_moved) == ("unchanged", 0)
    assert commit_upload(store, ticket, artifact).status == "unchanged"

    key = "orders/tuesday"
    with pytest.raises(Killed):
        upload(FaultyStore(store, dies_at(8)), key, artifact, profile=SERIAL)
    ticket = begin_upload(store, key, artifact, profile=SMALL)
    lanes = [send_parts(store, ticket, artifact, ticket.numbers(lane, 2), profile=SMALL) for lane in (0, 1)]
    assert sum(lane.bytes_resumed for lane in lanes) > 0
    assert sum(lane.bytes_moved + lane.bytes_resumed for lane in lanes) == ticket.bytes_total
    assert commit_upload(store, ticket, artifact).status == "uploaded"
    verify(store, key, mode="deep", expected_digest=artifact.digest)


class Forgetful(WrappingStore):
    """Tells no checksums of parts but MD5 as e_tags, as some S3 servers do, and has no conditional writes."""

    def __init__(self, store: LocalStore, *, tells: bool = True) -> None:
        super().__init__(store)
        self.sent: list[int] = []
        self._md5s: dict[int, str] = {}
        self._tells = tells

    @override
    def capabilities(self) -> Capabilities:
        return replace(self.store.capabilities(), conditional=False)

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        self.sent.append(part_number)
        self._md5s[part_number] = hashlib.md5(b"".join(body)).hexdigest()
        return super().put_part(key, upload_id, part_number, body)

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return [
            part._replace(crc32c=None, e_tag=self._md5s[part.part_number] if self._tells else "opaque")
            for part in super().list_parts(key, upload_id)
        ]

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        return super().complete_multipart(key, upload_id, super().list_parts(key, upload_id))


@pytest.mark.parametrize("tells", [True, False])
def test_notes_that_were_lost_are_made_again(tells: bool, artifact: Artifact, store: LocalStore):
    """Where lanes write over each other's notes, the commit compares parts with the source, or sends them again."""
    forgetful = Forgetful(store, tells=tells)
    ticket = begin_upload(forgetful, KEY, artifact, profile=SERIAL)
    stale = IntentKeeper(forgetful, KEY)
    stale.load()
    send_parts(forgetful, ticket, artifact, ticket.numbers(0, 2), profile=SERIAL)
    stale.save({})  # of a lane that had looked before
    send_parts(forgetful, ticket, artifact, ticket.numbers(1, 2), profile=SERIAL)
    assert sorted(forgetful.sent) == list(range(1, ticket.parts + 1))
    forgetful.sent.clear()
    result = commit_upload(forgetful, ticket, artifact, profile=SERIAL)
    again = [] if tells else list(ticket.numbers(0, 2))
    assert sorted(forgetful.sent) == again
    assert result.bytes_sent == sum(min(4096, ticket.bytes_total - (number - 1) * 4096) for number in again)
    verify(store, KEY, mode="deep", expected_digest=artifact.digest)


def test_many_lanes_keep_their_notes_at_once(artifact: Artifact, store: LocalStore):
    """Each note is one compare-and-swap of the intent; whoever loses tries again, and none is lost."""
    fine = ChunkProfile.custom(512, 1, workers=1)
    ticket = begin_upload(store, KEY, artifact, profile=fine)
    with ThreadPoolExecutor(8) as pool:
        lanes = list(
            pool.map(lambda n: send_parts(store, ticket, artifact, ticket.numbers(n, 8), profile=fine), range(8))
        )
    assert sum(lane.parts for lane in lanes) == ticket.parts
    intent = IntentKeeper(store, KEY).load()
    assert intent is not None
    assert sorted(intent.crcs) == list(range(1, ticket.parts + 1))


def test_wrong_numbers_and_tickets_are_refused(artifact: Artifact, store: LocalStore):
    """Before anything is sent."""
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    watching = watched(store)
    with pytest.raises(UsageError, match="not 0"):
        send_parts(watching, ticket, artifact, [0], profile=SMALL)
    with pytest.raises(UsageError):
        send_parts(watching, ticket, artifact, [ticket.parts + 1], profile=SMALL)
    assert watching.log == []
    with pytest.raises(UsageError, match="not the ticket"):
        UploadTicket.from_json_dict({"key": "k"})
    with pytest.raises(Unsupported):
        begin_upload(open_store(f"memory://{uuid.uuid4().hex}"), KEY, artifact)
