"""The checker: every byte of a payload is held to the index, in whatever order it comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from blobflow import Artifact
from blobflow.artifact import checker as checker_module
from blobflow.artifact.checker import PayloadChecker, Place
from blobflow.artifact.tarmap import FIRST_MEMBER
from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import ArtifactInvalid, DigestMismatch
from tests.kit import artifact_of, noise


class Kept:
    """Contents as they are placed; gives them back for reading."""

    def __init__(self, artifact: Artifact) -> None:
        self.files = {i: bytearray(size) for i, size in enumerate(artifact.index.sizes)}

    def place(self, member: int, offset: int, data: memoryview) -> None:
        self.files[member][offset : offset + len(data)] = data

    def read_back(self, member: int, offset: int, length: int) -> Iterable[bytes]:
        yield bytes(self.files[member][offset : offset + length])


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(tmp_path, {"a": "small", "big": noise(3000), "empty": "", "z": "last"})


@pytest.fixture
def payload(artifact: Artifact) -> bytearray:
    source = artifact.source()
    data = bytearray(source.size)
    source.read_into(0, memoryview(data))
    return data


def parts_of(artifact: Artifact, size: int) -> TransferPlan:
    layout = artifact.layout
    return TransferPlan(layout.size - layout.data_start, size, start=layout.data_start)


def consume_all(
    checker: PayloadChecker,
    payload: bytearray,
    parts: Iterable[Part],
    place: Place | None = None,
    *,
    settle: bool = False,
) -> None:
    for part in parts:
        checker.consume(part.offset, memoryview(payload)[part.offset : part.offset + part.length], place)
    if settle:
        checker.settle()


def test_parts_in_every_order_are_proven(artifact: Artifact, payload: bytearray):
    """Five parts, and a member that spans three of them: all 120 orders end with the same contents."""
    plan = parts_of(artifact, 1434)
    assert len(plan) == 5
    for order in itertools.permutations(plan):
        kept = Kept(artifact)
        checker = PayloadChecker(artifact.layout, read_back=kept.read_back)
        for part in order:
            checker.consume(part.offset, memoryview(payload)[part.offset : part.offset + part.length], kept.place)
        checker.settle()
        assert kept.files == {0: b"small", 1: noise(3000), 2: b"", 3: b"last"}


def test_every_single_flipped_byte_is_found(artifact: Artifact, payload: bytearray):
    """Header, content, padding or end: no byte after the index can be another."""
    layout = artifact.layout
    positions = [*range(layout.data_start, layout.size, 97), layout.size - 1, layout.content_range(3)[0] + 2999]
    for position in positions:
        payload[position] ^= 1
        checker = PayloadChecker(layout)
        with pytest.raises((ArtifactInvalid, DigestMismatch)):
            consume_all(checker, payload, parts_of(artifact, 1024))
        payload[position] ^= 1


def test_a_wrong_member_is_named_and_never_placed(artifact: Artifact, payload: bytearray):
    """A member inside one part is hashed before it is kept."""
    offset, length = artifact.layout.content_range(2)
    payload[offset] ^= 1
    kept = Kept(artifact)
    with pytest.raises(DigestMismatch, match="member 'a' has SHA-256") as refusal:
        PayloadChecker(artifact.layout).consume(
            offset - 512, memoryview(payload)[offset - 512 : offset + length], kept.place
        )
    assert (refusal.value.what, refusal.value.member) == ("a", 0)
    assert kept.files[0] == bytes(5)


def test_without_digests_the_structure_is_still_checked(artifact: Artifact, payload: bytearray):
    """Contents are left to the CRC32C of the whole, headers are not."""
    layout = artifact.layout
    content, header = layout.content_range(3)[0], layout.content_range(3)[0] - 512
    payload[content] ^= 1
    checker = PayloadChecker(layout, digests=False)
    checker.consume(layout.data_start, memoryview(payload)[layout.data_start :])
    checker.settle()
    payload[header] ^= 1
    with pytest.raises(ArtifactInvalid, match="header or padding of 'data/big'"):
        checker.consume(layout.data_start, memoryview(payload)[layout.data_start :])


def test_ranges_of_an_earlier_process_are_read_back(artifact: Artifact, payload: bytearray):
    """What was kept before the crash is hashed from where it is kept; a lie in it is found."""
    plan = parts_of(artifact, 1024)
    for damaged in (False, True):
        kept = Kept(artifact)
        before = PayloadChecker(artifact.layout, read_back=kept.read_back)
        done, missing = list(plan)[1:], list(plan)[:1]
        for part in done:
            before.consume(part.offset, memoryview(payload)[part.offset : part.offset + part.length], kept.place)
        if damaged:
            kept.files[1][2500] ^= 1
        checker = PayloadChecker(artifact.layout, read_back=kept.read_back)
        for part in done:
            checker.recall(part.offset, part.length)
        if damaged:
            with pytest.raises(DigestMismatch, match="'big'"):
                consume_all(checker, payload, missing, kept.place, settle=True)
        else:
            consume_all(checker, payload, missing, kept.place, settle=True)


def test_an_unfinished_member_is_not_settled(artifact: Artifact, payload: bytearray):
    """A member of which bytes are missing is an error at the end, not a success."""
    plan = parts_of(artifact, 1400)
    checker = PayloadChecker(artifact.layout)
    for part in list(plan)[:2]:
        checker.consume(part.offset, memoryview(payload)[part.offset : part.offset + part.length])
    with pytest.raises(ArtifactInvalid, match=r"member 'big' has .* of 3000 bytes"):
        checker.settle()


def test_a_large_run_that_came_too_early_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neighbours that arrive in the wrong order are hashed from memory: nothing is read back."""
    monkeypatch.setattr(checker_module, "_PATIENCE_S", 30.0)
    artifact = artifact_of(tmp_path, {"big": noise(3 << 20)})
    layout = artifact.layout
    start, _ = layout.content_range(FIRST_MEMBER)
    source = artifact.source()
    payload = bytearray(source.size)
    source.read_into(0, memoryview(payload))
    middle = start + (1 << 20)

    def read_back(member: int, offset: int, length: int) -> Iterable[bytes]:
        raise AssertionError("read back")

    checker = PayloadChecker(layout, read_back=read_back)
    placed = Event()
    with ThreadPoolExecutor(1) as other:
        early = other.submit(checker.consume, middle, memoryview(payload)[middle:], lambda *_: placed.set())
        assert placed.wait(30)
        checker.consume(layout.data_start, memoryview(payload)[layout.data_start : middle])
        early.result()
    checker.settle()
