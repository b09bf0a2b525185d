"""The upload session: the steps that artifacts, copies, lanes, layers and streams share, each with its promise."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blobflow.artifact.manifest_file import ManifestFile
from blobflow.checksum import crc32c
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import NoSuchUpload, StoreUnavailable, TransferBusy, UploadIncomplete
from blobflow.owner import process_owner
from blobflow.stores.base import Body, PartMeta, Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailAfter, FaultyStore, Hook, Request, scripted_faults
from blobflow.uploads.intent import SUFFIX, FrameLog, Intent, IntentKeeper
from blobflow.uploads.session import ClaimedUpload, HeldParts, UploadSession, md5_in
from tests.kit import declare, keys, noise, watched
from tests.unit.test_manifest import MANIFEST

KEY = "orders/monday"
MINE = ManifestFile.of(MANIFEST)
THEIRS = ManifestFile.of(MANIFEST.model_copy(update={"content_digest": "sha256:" + "9" * 64}))
PLAN = TransferPlan(10_000, 4096)
DATA = noise(PLAN.size, 3)
ELSEWHERE = "another-host/boot/1/1"
"""A process of which only the expiry of its intent is known."""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def session_of(store: Store, *, owner: str | None = None, exclusive: bool = False) -> ClaimedUpload:
    return ClaimedUpload(store, KEY, content_type="application/x-tar", owner=owner, exclusive=exclusive)


def of(manifest_file: ManifestFile) -> Callable[[Intent], bool]:
    return lambda intent: intent.manifest_file == manifest_file


def claimed(store: Store, manifest_file: ManifestFile = MINE, *, owner: str | None = None) -> ClaimedUpload:
    session = session_of(store, owner=owner)
    session.claim(manifest_file, PLAN.part_size, of(manifest_file))
    return session


def send(session: UploadSession, *numbers: int) -> None:
    for number in numbers:
        part = PLAN.part(number)
        session.crcs[number] = session.put(number, Body.of(DATA[part.offset : part.offset + part.length]))


def intent_bytes(store: Store) -> bytes:
    return store.get(KEY + SUFFIX, max_bytes=2**20).data


def uploads(store: Store) -> list[str]:
    return [upload.upload_id for upload in store.list_uploads()]


# From the claim to the object


def test_an_upload_is_claimed_sent_proven_completed_and_closed(store: LocalStore):
    """In that order; the intent is there from the claim to the end, and nothing but the object stays."""
    watching = watched(store)
    session = claimed(watching)
    assert (session.is_new, session.owns_intent) == (True, True)
    with session:
        send(session, 1, 2, 3)
        session.save()
        assert session.crc32c(PLAN) == crc32c(DATA)
        made = session.complete(session.prove(PLAN))
    assert KEY + SUFFIX in keys(store)
    session.close()
    assert store.get(KEY, max_bytes=2**20) == (DATA, made)
    assert (keys(store), uploads(store)) == ([KEY], [])
    operations = [request.operation for request in watching.log if request.operation not in ("get", "put")]
    assert operations == [
        *("create_multipart", "put_part", "put_part", "put_part"),
        *("list_parts", "complete_multipart", "head", "delete"),
    ]


def test_a_session_tells_where_it_is(store: LocalStore):
    """Its key, its upload id, and how many parts are known."""
    assert repr(session_of(store)) == f"<ClaimedUpload '{KEY}' not begun, 0 parts known>"
    session = claimed(store)
    send(session, 1)
    assert repr(session) == f"<ClaimedUpload '{KEY}' {session.upload_id}, 1 parts known>"


# The claim


def test_an_upload_of_the_same_content_is_joined(store: LocalStore):
    """At once, alive as it is: its upload id, its part size, its manifest; nothing is created or written."""
    first = claimed(store, owner=ELSEWHERE)
    before = intent_bytes(store)
    watching = watched(store)
    second = session_of(watching)
    intent = second.claim(THEIRS, 2 * PLAN.part_size, of(MINE))
    assert (second.upload_id, second.part_size, second.is_new) == (first.upload_id, PLAN.part_size, False)
    assert (intent.manifest_file, intent_bytes(store)) == (MINE, before)
    assert [request.operation for request in watching.log] == ["get"]


def test_a_claim_by_somebody_else_is_not_overwritten(store: LocalStore):
    """Other content is refused while its owner may be alive; intent and parts stay as they are."""
    theirs = claimed(store, THEIRS, owner=ELSEWHERE)
    send(theirs, 1)
    before = intent_bytes(store)
    with pytest.raises(TransferBusy, match=f"under way, by {ELSEWHERE}") as refusal:
        claimed(store)
    assert (refusal.value.key, refusal.value.owner) == (KEY, ELSEWHERE)
    assert (intent_bytes(store), uploads(store)) == (before, [theirs.upload_id])
    assert [part.part_number for part in store.list_parts(KEY, theirs.upload_id)] == [1]


def test_of_two_who_claim_at_once_one_is_refused(store: LocalStore):
    """Both saw a free key; the later write of an intent loses, and its upload is aborted."""
    theirs: list[ClaimedUpload] = []
    faults = {("put", 1): Hook(lambda _: theirs.append(claimed(store, THEIRS, owner=ELSEWHERE)))}
    with pytest.raises(TransferBusy, match=f"by {ELSEWHERE}"):
        claimed(FaultyStore(store, scripted_faults(faults)))
    [winner] = theirs
    assert uploads(store) == [winner.upload_id]
    assert Intent.parse(intent_bytes(store)).manifest_file == THEIRS


def test_what_nobody_works_on_is_replaced_intent_first(store: LocalStore):
    """The old upload is aborted when the intent is ours and not before: until then it may come back to life."""
    theirs = claimed(store, THEIRS, owner=ELSEWHERE)
    with pytest.raises(RuntimeError), theirs:
        raise RuntimeError  # releases it
    watching = watched(store)
    mine = claimed(watching)
    assert [request.operation for request in watching.log] == ["get", "create_multipart", "put", "abort_multipart"]
    assert (uploads(store), mine.is_new) == ([mine.upload_id], True)
    assert Intent.parse(intent_bytes(store)).generation == 2


def test_an_idle_upload_that_comes_back_to_life_keeps_its_parts(store: LocalStore):
    """Its owner renews it between our look and our write: ours is the upload that is aborted."""
    theirs = claimed(store, THEIRS, owner=ELSEWHERE)
    send(theirs, 1)
    with pytest.raises(RuntimeError), theirs:
        raise RuntimeError
    faults = {("put", 1): Hook(lambda _: theirs.save())}
    with pytest.raises(TransferBusy):
        claimed(FaultyStore(store, scripted_faults(faults)))
    assert uploads(store) == [theirs.upload_id]
    assert [part.part_number for part in store.list_parts(KEY, theirs.upload_id)] == [1]


def test_a_key_at_which_everybody_is_quicker_is_busy(store: LocalStore):
    """The number of attempts is bounded, and none of them leaves an upload."""

    def quicker(request: Request) -> Hook | None:
        if request.operation != "put":
            return None
        keeper = IntentKeeper(store, KEY, owner=process_owner().rpartition("/")[0] + f"/{10**9}")
        keeper.load()
        return Hook(lambda _: _check(keeper.begin(THEIRS, "gone", PLAN.part_size)))

    with pytest.raises(TransferBusy, match="too many processes"):
        claimed(FaultyStore(store, quicker))
    assert uploads(store) == []


def _check(begun: bool) -> None:
    assert begun


def test_what_is_to_be_replaced_is_remembered(store: LocalStore):
    """An upload that takes the place of another one may replace what that one might have replaced."""
    first = session_of(store, owner=ELSEWHERE)
    first.claim(THEIRS, PLAN.part_size, of(THEIRS), replaces="sha256:old")
    with pytest.raises(RuntimeError), first:
        raise RuntimeError
    assert session_of(store).claim(MINE, PLAN.part_size, of(MINE)).replaces == "sha256:old"


def test_an_exclusive_upload_is_joined_only_if_nobody_works_on_it(store: LocalStore):
    """The same content or not; then the intent is written in the name of whoever continues."""
    frames = FrameLog("zstd", 4096, array("I", [7]), array("I", [8]))
    first = session_of(store, owner=ELSEWHERE, exclusive=True)
    assert first.claim(MINE, PLAN.part_size, of(MINE), frames=frames).frames == frames
    second = session_of(store, exclusive=True)
    with pytest.raises(TransferBusy, match=f"by {ELSEWHERE}"):
        second.claim(MINE, PLAN.part_size, of(MINE))
    with pytest.raises(RuntimeError), first:
        raise RuntimeError
    intent = second.claim(MINE, PLAN.part_size, of(MINE))
    assert (intent.upload_id, intent.owner, intent.frames) == (first.upload_id, process_owner(), frames)
    # What this process left itself keeps it away in neither case.
    assert session_of(store, exclusive=True).claim(MINE, PLAN.part_size, of(MINE)).upload_id == first.upload_id


def test_an_exclusive_upload_that_was_just_finished_is_not_continued(store: LocalStore):
    """Between the look at the intent and its renewal its owner finished: a new upload is begun."""
    first = session_of(store, owner=ELSEWHERE, exclusive=True)
    first.claim(MINE, PLAN.part_size, of(MINE))
    with pytest.raises(RuntimeError), first:
        raise RuntimeError
    second = session_of(
        FaultyStore(store, scripted_faults({("put", 1): Hook(lambda _: first.close())})), exclusive=True
    )
    second.claim(MINE, PLAN.part_size, of(MINE))
    assert (second.is_new, second.upload_id == first.upload_id) == (True, False)


def test_without_conditional_writes_an_upload_is_claimed_all_the_same(store: LocalStore):
    """The last writer has the intent; whoever lost it finds out at the next save."""
    declare(store, conditional=False)
    theirs: list[ClaimedUpload] = []
    faults = {("put", 1): Hook(lambda _: theirs.append(claimed(store, THEIRS, owner=ELSEWHERE)))}
    mine = claimed(FaultyStore(store, scripted_faults(faults)))
    assert Intent.parse(intent_bytes(store)).upload_id == mine.upload_id
    theirs[0].load()
    assert not theirs[0].owns_intent


# Held parts


def part_meta(number: int, size: int, crc: int | None) -> PartMeta:
    return PartMeta(number, size, f"tag-{number}", crc)


def test_held_parts_are_proven_before_they_count():
    """Neither a wrong size, nor a checksum that nobody knows, nor one that contradicts the intent's counts as there."""
    held = HeldParts(
        [
            part_meta(1, 4096, 11),
            part_meta(2, 4096, None),  # the intent remembers
            part_meta(3, 4095, 33),  # too small
            part_meta(4, 4096, None),  # nobody knows
            part_meta(5, 4096, 55),  # somebody put another part in its place
            part_meta(9, 4096, 99),  # beyond the plan
        ],
        {2: 22, 5: 56, 6: 66},
    )
    plan = TransferPlan(6 * 4096, 4096)
    assert held.proven(plan) == {1: 11, 2: 22}
    assert held.unproven(plan) == {4: "tag-4"}
    assert [held.has(part) for part in plan] == [True, True, False, True, False, False]


def test_another_process_finds_what_was_sent(store: LocalStore):
    """The store's list is the truth, and the intent adds the checksums that the store does not report."""
    first = claimed(store)
    send(first, 1, 3)
    first.save()
    send(first, 2)  # sent and never saved
    second = claimed(_Silent(store))
    held = second.held()
    assert held.proven(PLAN) == {number: first.crcs[number] for number in (1, 3)}
    assert list(held.unproven(PLAN)) == [2]


def test_a_part_is_held_if_it_has_these_bytes():
    """By its checksum where one is known, else by its entity tag if that is an MD5; else it is sent again."""
    data, crc, md5 = b"part", crc32c(b"part"), f'"{hashlib.md5(b"part").hexdigest()}"'
    held = HeldParts(
        [
            PartMeta(1, 4, "tag", crc),
            PartMeta(2, 4, md5, None),
            PartMeta(3, 4, "tag", None),
            PartMeta(4, 4, md5, crc ^ 1),  # its entity tag is not asked
            PartMeta(5, 3, md5, crc),
        ],
        {},
    )
    assert [number for number in range(1, 7) if held.holds(number, data, crc)] == [1, 2]


class _Silent(FaultyStore):
    """Reports no checksums of parts."""

    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return [part._replace(crc32c=None) for part in super().list_parts(key, upload_id)]


def test_the_intent_of_another_upload_adds_no_checksums(store: LocalStore):
    """A lane that slept: the intent now speaks of parts of another upload."""
    first = claimed(store, THEIRS)
    send(first, 1)
    first.save()
    late = session_of(_Silent(store))
    assert late.load() is not None
    late.take_up(store.create_multipart(KEY, part_size=PLAN.part_size), PLAN.part_size)
    store.put_part(KEY, late.upload_id, 1, Body.of(DATA[:4096]))
    assert not late.owns_intent
    assert (late.held().proven(PLAN), list(late.held().unproven(PLAN))) == ({}, [1])


def test_of_a_new_upload_nothing_is_listed(store: LocalStore):
    """Nobody can have sent a part of it: one request less."""
    watching = watched(store)
    assert claimed(watching).held().proven(PLAN) == {}
    assert watching.count("list_parts") == 0


@pytest.mark.parametrize(
    ("e_tag", "md5"),
    [('"D41D8CD98F00B204E9800998ECF8427E"', "d41d8cd98f00b204e9800998ecf8427e"), ("d41d8cd9-2", None), ("", None)],
)
def test_only_some_entity_tags_may_be_an_md5(e_tag: str, md5: str | None):
    """That of a part that KMS encrypts, for one, is not."""
    assert md5_in(e_tag) == md5


# Proof


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("missing", lambda session: session.crcs.update({3: 0})),
        ("damaged", lambda session: session.put(3, Body.of(DATA[: PLAN.part(3).length]))),
        ("damaged", lambda session: session.put(3, Body.of(b"short"))),
    ],
)
def test_what_the_store_does_not_hold_is_never_completed(
    what: str, spoil: Callable[[ClaimedUpload], object], store: LocalStore
):
    """A part that is missing, or that somebody replaced by other bytes or another length, is named."""
    session = claimed(store)
    send(session, 1, 2)
    if what == "damaged":
        send(session, 3)
    spoil(session)
    with pytest.raises(UploadIncomplete, match=f"part 3 of '{KEY}' is {what}"):
        session.prove(PLAN)
    assert not store.exists(KEY)


def test_without_reported_checksums_the_length_still_counts(store: LocalStore):
    """A part of another length is found out, whatever the store reports of its bytes."""
    session = claimed(_Silent(store))
    send(session, 1, 2)
    session.put(3, Body.of(b"short"))
    session.crcs[3] = 0
    with pytest.raises(UploadIncomplete, match="is damaged"):
        session.prove(PLAN)


def test_reported_checksums_are_taken_over(store: LocalStore):
    """Those of parts that an earlier process sent; then the whole can be held to its checksum."""
    first = UploadSession(store, KEY, content_type="text/plain")
    first.create(PLAN.part_size)
    send(first, 1, 2)
    second = UploadSession(store, KEY, content_type="text/plain")
    second.take_up(first.upload_id, first.part_size)
    send(second, 3)
    second.prove(PLAN)
    assert second.crc32c(PLAN) == crc32c(DATA)


# Settling


def test_a_lost_answer_to_complete_is_settled(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """The object is there, the upload is gone: its size and its beginning, or its checksum, say whose it is."""
    session = claimed(FaultyStore(store, scripted_faults({("complete_multipart", 1): FailAfter()})))
    send(session, 1, 2, 3)
    parts = session.prove(PLAN)
    with pytest.raises(StoreUnavailable):
        session.complete(parts)
    with pytest.raises(NoSuchUpload):
        session.prove(PLAN)
    made = store.head(KEY)
    assert session.settle(len(DATA), begins_with=DATA[:100]) == made
    assert session.settle(len(DATA), crc=crc32c(DATA)) == made
    declare(store, attests_crc32c=False)  # then it is read back, a piece at a time
    monkeypatch.setattr("blobflow.uploads.session._READ_BACK_BYTES", 4096)
    assert session.settle(len(DATA), crc=crc32c(DATA)) == made


@pytest.mark.parametrize("attests", [True, False])
def test_another_object_is_not_taken_for_a_lost_answer(attests: bool, store: LocalStore):
    """Nothing, another size, another beginning, other bytes, or what was there before: not this upload's."""
    session = claimed(store)
    assert session.settle(len(DATA), begins_with=DATA[:100]) is None
    there = store.put(KEY, Body.of(DATA))
    declare(store, attests_crc32c=attests)
    assert session.settle(len(DATA) + 1, begins_with=DATA[:100]) is None
    assert session.settle(len(DATA), begins_with=DATA[1:101]) is None
    assert session.settle(len(DATA), crc=crc32c(DATA) ^ 1) is None
    assert session.settle(len(DATA), begins_with=DATA[:100], other_than=there.e_tag) is None
    assert session.settle(len(DATA), begins_with=DATA[:100], crc=crc32c(DATA)) == there


# The end


def test_a_failed_upload_keeps_nobody_away_and_loses_nothing(store: LocalStore):
    """The intent is released: other content may come at once, and the same content finds the parts."""
    session = claimed(store, owner=ELSEWHERE)
    send(session, 1)
    session.save()
    with pytest.raises(TransferBusy):
        claimed(store, THEIRS)
    with pytest.raises(RuntimeError), session:
        raise RuntimeError
    assert claimed(store).held().proven(PLAN) == {1: session.crcs[1]}
    assert claimed(store, THEIRS).is_new


def test_what_was_abandoned_is_gone(store: LocalStore):
    """The upload first, then its intent: killed in between, the next one finds what is left."""
    session = claimed(store)
    send(session, 1)
    watching = watched(store)
    session.store = watching
    session.abandon()
    assert [request.operation for request in watching.log] == ["abort_multipart"]
    assert (keys(store), uploads(store)) == ([], [])


def test_closing_leaves_the_intent_of_another_upload(store: LocalStore):
    """Whoever slept through its own replacement takes nothing from its successor."""
    mine = claimed(store)
    with pytest.raises(RuntimeError), mine:
        raise RuntimeError
    theirs = claimed(store, THEIRS)
    before = intent_bytes(store)
    mine.close()
    assert (intent_bytes(store), uploads(store)) == (before, [theirs.upload_id])


def test_the_intent_is_renewed_when_a_third_of_its_time_is_over(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """With what was acknowledged until then; not sooner, because it is a request."""
    session = claimed(store)
    send(session, 1)
    before = intent_bytes(store)
    session.renew()
    assert intent_bytes(store) == before
    monkeypatch.setattr(IntentKeeper, "renewal_due", lambda _: True)
    session.renew()
    assert json.loads(intent_bytes(store))["parts"] == "1"


def test_parts_of_an_empty_plan_are_one(store: LocalStore):
    """An object of no bytes has one empty part."""
    session = claimed(store)
    plan = replace(PLAN, size=0)
    session.crcs[1] = session.put(1, Body.of(b""))
    assert list(plan) == [Part(1, 0, 0)]
    assert session.complete(session.prove(plan)).size == 0
