"""Healing: a damaged artifact is uploaded again by who found the damage and has the content, and by nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blobflow import upload
from blobflow.artifact.artifact import Artifact
from blobflow.config import ChunkProfile
from blobflow.errors import ChecksumMismatch, IntegrityError, ObjectChanged, SourceChanged, StoreUnavailable
from blobflow.maintenance.retention import prune
from blobflow.stores.base import PutMode
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailBefore, Fault, FaultyStore, Hook, Request
from blobflow.transport import read_manifest_bytes, verify, verify_or_heal
from tests.kit import TREE, artifact_of, flip_a_byte, keys

KEY = "orders/it.tar"
EVIDENCE = KEY + ".damaged.json"
PROFILE = ChunkProfile(chunk_size=4096, workers=1, checkpoint_interval=1)


class Bench:
    """An artifact whose payload in the store was damaged."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = LocalStore(home / "store")
        self.artifact = artifact_of(home, TREE)
        upload(self.store, KEY, self.artifact)
        self.manifest = read_manifest_bytes(self.store, KEY)
        self.damage()

    def damage(self) -> None:
        flip_a_byte(self.home / "store" / KEY)

    def heal(self, artifact: Artifact | None, store: LocalStore | FaultyStore | None = None):
        return verify_or_heal(store or self.store, KEY, artifact, mode="deep", profile=PROFILE)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_damaged_artifact_is_uploaded_again_by_who_has_its_content(bench: Bench):
    """It is the very artifact that was there, so that refs stay right; what was found is kept beside it."""
    result, healed = bench.heal(bench.artifact)
    assert healed is not None
    assert isinstance(healed.found, ChecksumMismatch)
    assert healed.upload.bytes_sent == healed.upload.bytes_total
    assert result.mode_used == "deep"
    assert read_manifest_bytes(bench.store, KEY) == bench.manifest
    evidence = json.loads(bench.store.get(EVIDENCE, max_bytes=4096).data)
    assert evidence["error"] == type(healed.found).__name__
    assert evidence["artifact_digest"] == result.artifact_digest
    assert evidence["payload"]["e_tag"] != bench.store.head(KEY).e_tag
    assert keys(bench.store) == [KEY, EVIDENCE, KEY + ".manifest.json"]
    assert bench.store.list_uploads() == []


def test_a_later_export_of_the_content_heals_as_the_artifact_that_was_there(bench: Bench, tmp_path: Path):
    """Exported again, at another time: the digest that refs name does not change."""
    again = artifact_of(tmp_path / "again", TREE)
    assert again.digest != bench.artifact.digest
    result, healed = bench.heal(again)
    assert healed is not None
    assert verify(bench.store, KEY, mode="deep").artifact_digest == result.artifact_digest
    if again.manifest.same_body(bench.artifact.manifest):
        assert result.artifact_digest == bench.artifact.digest


def test_a_whole_artifact_is_left_alone(tmp_path: Path):
    """Nothing is sent, no evidence is written."""
    bench = Bench(tmp_path)
    bench.damage()  # the same byte: whole again
    _, healed = bench.heal(bench.artifact)
    assert healed is None
    assert keys(bench.store) == [KEY, KEY + ".manifest.json"]


@pytest.mark.parametrize("has", ["nothing", "other content"])
def test_without_the_content_nothing_is_touched(bench: Bench, tmp_path: Path, has: str):
    """The damage is reported, and what is there may still be read in part."""
    artifact = None if has == "nothing" else artifact_of(tmp_path / "other", {"other": "file"})
    before = bench.store.head(KEY)
    with pytest.raises(IntegrityError):
        bench.heal(artifact)
    assert bench.store.head(KEY) == before
    assert keys(bench.store) == [KEY, KEY + ".manifest.json"]


def test_evidence_that_somebody_planted_heals_nothing(tmp_path: Path):
    """Only a failed verification of our own counts."""
    bench = Bench(tmp_path)
    bench.heal(bench.artifact)
    evidence = json.loads(bench.store.get(EVIDENCE, max_bytes=4096).data)
    evidence["payload"]["e_tag"] = bench.store.head(KEY).e_tag
    bench.store.put(EVIDENCE, json.dumps(evidence).encode(), mode=PutMode.OVERWRITE)
    before = bench.store.head(KEY)
    assert upload(bench.store, KEY, bench.artifact).status == "unchanged"
    _, healed = bench.heal(bench.artifact)
    assert healed is None
    assert bench.store.head(KEY) == before


def test_a_payload_that_was_replaced_meanwhile_is_left_alone(bench: Bench):
    """Somebody else heals it between the last read and the consequence: the next look finds it whole."""

    def heal_elsewhere(_: Request) -> None:
        assert bench.heal(bench.artifact)[1] is not None

    def faults(request: Request) -> Fault | None:
        # Before the verification, at its beginning, and after it has failed.
        return Hook(heal_elsewhere) if (request.operation, request.number) == ("head", 3) else None

    store = FaultyStore(bench.store, faults)
    with pytest.raises(ObjectChanged, match="was replaced while it was verified"):
        bench.heal(bench.artifact, store)
    assert store.count("create_multipart") == 0
    assert bench.heal(bench.artifact)[1] is None


def test_a_heal_that_failed_is_continued_by_the_next_one(bench: Bench):
    """The damaged artifact stays visible until its successor is whole; an upload in between does not end the heal."""

    def outage(request: Request) -> Fault | None:
        fails = request.operation == "put_part" and request.number >= 4
        return FailBefore(StoreUnavailable("down", operation="put_part", key=KEY)) if fails else None

    with pytest.raises(StoreUnavailable):
        bench.heal(bench.artifact, FaultyStore(bench.store, outage))
    assert read_manifest_bytes(bench.store, KEY) == bench.manifest
    assert upload(bench.store, KEY, bench.artifact).status == "unchanged"
    assert len(bench.store.list_uploads()) == 1
    _, healed = bench.heal(bench.artifact)
    assert healed is not None
    assert healed.upload.bytes_resumed == 3 * 4096
    verify(bench.store, KEY, mode="deep")
    assert bench.store.list_uploads() == []


def test_a_source_that_changed_leaves_the_damaged_artifact(tmp_path: Path):
    """What would be sent is not what the manifest promises: nothing is published, nothing is lost."""
    bench = Bench(tmp_path)
    file = next(path for path in (tmp_path).rglob("big.bin") if "store" not in path.parts)
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(SourceChanged):
        bench.heal(bench.artifact)
    assert read_manifest_bytes(bench.store, KEY) == bench.manifest


def test_retention_removes_the_evidence_with_its_artifact(bench: Bench):
    """Nothing is left beside what is gone."""
    bench.heal(bench.artifact)
    assert prune(bench.store, keep_within_s=1.0, clock=lambda: 1e12).removed == [KEY]
    assert keys(bench.store) == []
