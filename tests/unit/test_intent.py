"""The intent: what lets any machine take an upload up again."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blobflow.artifact.manifest import artifact_digest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.errors import ArtifactInvalid, NoSuchUpload, ObjectTooLarge, TransferBusy
from blobflow.owner import process_owner
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, Hook, Request
from blobflow.uploads.intent import SUFFIX, TTL_S, Intent, IntentKeeper
from tests.clock import Clock
from tests.unit.test_manifest import MANIFEST

MANIFEST_FILE = ManifestFile.of(MANIFEST)
GONE = f"{process_owner().rpartition('/')[0]}/{10**9}"
"""A process of this machine that cannot exist."""
INTENT = Intent(
    manifest_file=MANIFEST_FILE,
    upload_id="up-1",
    part_size=4096,
    owner=process_owner(),
    generation=3,
    expires_at=1000.5,
    write_id="w",
    crcs={1: 0, 2: 0xFFFFFFFF, 3: 7, 9: 8},
    replaces="sha256:old",
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(INTENT.encode()), **fields}).encode()


def test_an_intent_survives_its_encoding():
    """Ranges of part numbers, little-endian checksums, the manifest byte for byte."""
    data = INTENT.encode()
    assert Intent.parse(data) == INTENT
    document = json.loads(data)
    assert document["parts"] == "1-3,9"
    assert base64.b64decode(document["crc32c"]) == bytes.fromhex("00000000 ffffffff 07000000 08000000")
    assert document["artifact_digest"] == MANIFEST_FILE.digest
    assert Intent.parse(replace(INTENT, crcs={}).encode()).crcs == {}


def test_ten_thousand_parts_stay_small():
    """54 kB of checksums, whatever the size of the payload."""
    crcs = dict.fromkeys(range(1, 10_001), 0xDEADBEEF)
    data = replace(INTENT, crcs=crcs).encode()
    assert len(data) < 56_000
    assert Intent.parse(data).crcs == crcs


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        changed(format="blobflow.upload/2"),
        changed(upload_id=None, artifact_digest="sha256:0"),
        changed(part_size=0),
        changed(part_size=-1),
        changed(part_size="x"),
        changed(part_size=float("inf")),
        changed(parts="1-4,9"),
        changed(parts="1-10001"),
        changed(parts="0-2,9"),
        changed(parts=7),
        changed(crc32c="!"),
        changed(crc32c="AAAA"),
        changed(manifest="{}"),
        changed(manifest=5),
        changed(manifest="{}", artifact_digest=artifact_digest(b"{}")),
        json.dumps({k: v for k, v in json.loads(INTENT.encode()).items() if k != "artifact_digest"}).encode(),
        json.dumps({k: v for k, v in json.loads(INTENT.encode()).items() if k != "replaces"}).encode(),
    ],
    ids=map(str, range(21)),  # what they hold names this process
)
def test_a_damaged_intent_counts_as_none_and_is_replaced(data: bytes, store: LocalStore):
    """Nobody has to remove it by hand before the next upload."""
    with pytest.raises(ArtifactInvalid):
        Intent.parse(data)
    store.put("key" + SUFFIX, data)
    keeper = IntentKeeper(store, "key")
    assert keeper.load() is None
    assert not keeper.is_alive()
    assert keeper.begin(MANIFEST_FILE, "up-2", 1, replaces=None)
    found = IntentKeeper(store, "key").load()
    assert found is not None
    assert found.upload_id == "up-2"


@pytest.mark.parametrize("size", [4 * 1024**2, 4 * 1024**2 + 1, 20 * 1024**2])
def test_an_oversized_intent_counts_as_none_and_is_replaced(size: int, store: LocalStore):
    """Whatever somebody put there does not block the key for ever, and is not read whole."""
    store.put("key" + SUFFIX, bytes(size))
    keeper = IntentKeeper(store, "key")
    assert keeper.load() is None
    assert keeper.begin(MANIFEST_FILE, "up-2", 1, replaces=None)
    found = IntentKeeper(store, "key").load()
    assert found is not None
    assert found.upload_id == "up-2"


def test_an_intent_that_takes_an_oversized_ones_place_is_not_replaced_unread(store: LocalStore):
    """Between the refusal of a large one and the look at it somebody may have begun an upload."""
    store.put("key" + SUFFIX, bytes(5_000_000))

    def begin(request: Request) -> Hook | None:
        rival = Hook(lambda _: store.put("key" + SUFFIX, INTENT.encode()) and None)
        return rival if request.operation == "head" else None

    keeper = IntentKeeper(FaultyStore(store, begin), "key")
    with pytest.raises(ObjectTooLarge):
        keeper.load()
    assert keeper.load() == INTENT


def test_an_intent_lives_as_long_as_its_owner_and_its_lease():
    """Gone owners are dead at once, unknown ones when the time is over."""
    assert INTENT.is_alive(1000.4)
    assert not INTENT.is_alive(1000.5)
    assert not replace(INTENT, owner=GONE).is_alive(0.0)
    assert replace(INTENT, owner="other/-/-/1").is_alive(0.0)


def test_only_one_of_two_begins(store: LocalStore):
    """Both saw no intent; the second write is refused, and its writer then sees the first one's intent."""
    first, second = IntentKeeper(store, "key"), IntentKeeper(store, "key")
    assert first.load() is second.load() is None
    assert first.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    assert not second.begin(MANIFEST_FILE, "up-2", 1, replaces=None)
    found = second.load()
    assert found is not None
    assert (found.upload_id, found.generation) == ("up-1", 1)
    assert repr(second) == "<IntentKeeper key.upload.json held>"


def test_taking_over_raises_the_generation(store: LocalStore):
    """The generation counts owners of the key."""
    first, second = IntentKeeper(store, "key"), IntentKeeper(store, "key")
    first.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    second.load()
    other = ManifestFile.of(MANIFEST.model_copy(update={"content_digest": "sha256:" + "9" * 64}))
    assert second.begin(other, "up-2", 1, replaces="sha256:x")
    assert second.intent is not None
    assert (second.intent.generation, second.intent.replaces) == (2, "sha256:x")
    with pytest.raises(TransferBusy, match="another upload took 'key' over"):
        first.save({1: 1})


def test_a_new_upload_of_the_same_payload_is_joined_not_fought(store: LocalStore):
    """The old upload is settled; whoever worked on it looks at the object and then joins the new one."""
    first, second = IntentKeeper(store, "key"), IntentKeeper(store, "key")
    first.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    second.load()
    second.begin(MANIFEST_FILE, "up-2", 1, replaces=None)
    with pytest.raises(NoSuchUpload):
        first.save({1: 1})


def test_joined_uploaders_merge_their_parts(store: LocalStore):
    """Neither writer loses what the other one acknowledged."""
    clock = Clock()
    first, second = IntentKeeper(store, "key", clock=clock), IntentKeeper(store, "key", clock=clock)
    first.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    second.load()
    first.save({1: 11})
    clock.now = 1010.0
    second.save({2: 22})
    first.save({3: 33})
    found = IntentKeeper(store, "key").load()
    assert found is not None
    assert found.crcs == {1: 11, 2: 22, 3: 33}
    assert found.expires_at == 1010.0 + TTL_S


def test_an_intent_that_is_gone_means_that_the_upload_is_settled(store: LocalStore):
    """A joined uploader has published: that is not a conflict, the object itself tells what happened."""
    first, second = IntentKeeper(store, "key"), IntentKeeper(store, "key")
    first.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    second.load()
    first.remove("up-1")
    with pytest.raises(NoSuchUpload):
        second.save({1: 1})


def test_the_intent_of_another_upload_is_not_removed(store: LocalStore):
    """A process that slept through its own replacement leaves the successor's intent alone."""
    sleeper, successor = IntentKeeper(store, "key"), IntentKeeper(store, "key")
    sleeper.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    successor.load()
    successor.begin(MANIFEST_FILE, "up-2", 1, replaces=None)
    sleeper.remove("up-1")
    assert store.exists("key" + SUFFIX)
    successor.remove("up-2")
    assert not store.exists("key" + SUFFIX)


def test_a_released_intent_keeps_nobody_away(store: LocalStore):
    """The parts stay known; the intent of another upload is not released."""
    clock = Clock()
    keeper = IntentKeeper(store, "key", clock=clock)
    keeper.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    keeper.save({1: 1})
    keeper.release("up-2")
    assert keeper.is_alive()
    keeper.release("up-1")
    found = IntentKeeper(store, "key", clock=clock)
    found.load()
    assert not found.is_alive()
    assert found.intent is not None
    assert found.intent.crcs == {1: 1}


def test_renewal_is_due_after_a_third(store: LocalStore):
    """Long enough before the end that one lost write does no harm."""
    clock = Clock()
    keeper = IntentKeeper(store, "key", clock=clock)
    keeper.begin(MANIFEST_FILE, "up-1", 1, replaces=None)
    clock.now += TTL_S / 3
    assert not keeper.renewal_due()
    clock.now += 1
    assert keeper.renewal_due()
    keeper.save({})
    assert not keeper.renewal_due()


def test_somebody_who_writes_all_the_time_does_not_hang_us(store: LocalStore):
    """The number of attempts is bounded."""
    keeper = IntentKeeper(store, "key")
    keeper.begin(MANIFEST_FILE, "up-1", 1, replaces=None)

    def disturb(_: Request) -> None:
        other = IntentKeeper(store, "key")
        other.load()
        other.save({})

    disturbed = IntentKeeper(
        FaultyStore(store, lambda request: Hook(disturb) if request.operation == "put" else None), "key"
    )
    disturbed.load()
    with pytest.raises(TransferBusy):
        disturbed.save({1: 1})
