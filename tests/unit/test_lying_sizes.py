"""Sizes that a store and a manifest agree on and nobody can have: refused, or read until the bytes end, at no cost."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from typing_extensions import override

from blobflow import ChunkProfile, copy_artifact, download, verify
from blobflow.artifact.index import Index, Member
from blobflow.artifact.index_parquet import encode_index
from blobflow.artifact.manifest import BodyInfo, IndexInfo, Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.tarmap import TarMap, header, manifest_entry
from blobflow.checksum import crc32c, sha256
from blobflow.engine.plan import MAX_PARTS, TransferPlan
from blobflow.errors import ArtifactInvalid, BlobflowError, SizeMismatch
from blobflow.stores.base import Body, ObjectMeta
from blobflow.stores.wrapping import WrappingStore
from blobflow.transport.lanes import begin_download, fetch_lane
from blobflow.uploads.intent import Intent
from tests.kit import local_store

KEY = "huge.tar"
HUGE = 1 << 61
PROFILE = ChunkProfile.custom(1 << 20, 8, workers=2)


class Liar(WrappingStore):
    """Says that its payload is far larger than what it can send of it."""

    size = 0

    @override
    def head(self, key: str) -> ObjectMeta:
        meta = self.store.head(key)
        return meta._replace(size=self.size) if key == KEY and self.size else meta


@pytest.fixture
def liar(tmp_path: Path) -> Liar:
    """Its manifest, its index and its `head` all tell of one file of 2 EiB; all of it would be holes."""
    index = Index()
    index.append(Member("file", HUGE, 0o644, 0, bytes(range(32)), 5))
    encoded = encode_index(index)
    about = IndexInfo(size=len(encoded), sha256=sha256(encoded).hex(), crc32c=crc32c(encoded))
    layout = TarMap(0, len(encoded), index)
    manifest = Manifest(
        backend="directory",
        created_at=datetime(2026, 11, 30, tzinfo=timezone.utc),
        producer="a liar",
        members=1,
        bytes=HUGE,
        content_digest=index.content_digest(),
        executables_digest=index.executables_digest(),
        holes=HUGE,
        index=about,
        body=BodyInfo(size=layout.size - layout.body_start, crc32c=layout.body_crc32c(about.crc32c)),
    ).encode()
    start = manifest_entry(manifest) + header("INDEX.parquet", len(encoded), 0o644) + encoded
    start += bytes(-len(start) % 512) + bytes(5 << 20)
    store = Liar(local_store(tmp_path))
    store.put(KEY, Body.of(start))
    store.put(KEY + ".manifest.json", Body.of(manifest))
    store.size = len(manifest_entry(manifest)) + layout.size - layout.body_start
    return store


def lanes(store: Liar, dest: Path) -> object:
    ticket = begin_download(store, KEY, dest, lanes=2, profile=PROFILE)
    return fetch_lane(store, ticket, dest, 1, profile=PROFILE)


WORKS: dict[str, Callable[[Liar, Path], object]] = {
    "verify": lambda store, _: verify(store, KEY, mode="deep", profile=PROFILE),
    "verify a sample": lambda store, _: verify(store, KEY, sample=(1, 2), profile=PROFILE),
    "download": lambda store, path: download(store, KEY, path / "dest", profile=PROFILE),
    "lanes": lambda store, path: lanes(store, path / "dest"),
    "copy": lambda store, path: copy_artifact(store, KEY, local_store(path / "other"), KEY, profile=PROFILE),
}


@pytest.mark.parametrize("work", sorted(WORKS))
def test_a_payload_of_two_exbibytes_costs_what_comes_of_it(liar: Liar, tmp_path: Path, work: str) -> None:
    """No list of its parts is made, and nothing is done for each of them."""
    tracemalloc.start()
    try:
        with pytest.raises(BlobflowError):
            WORKS[work](liar, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_size_that_is_not_the_manifests_is_refused_at_once(liar: Liar, tmp_path: Path) -> None:
    """Before anything of the payload is read."""
    liar.size += 1
    for work in WORKS.values():
        with pytest.raises(SizeMismatch):
            work(liar, tmp_path)


def test_what_is_left_of_a_plan_is_counted_and_gone_through() -> None:
    """As a list of its parts would be, also where it is one part, or one lane of several."""
    for size in (0, 1, 10, 11, 19, 20):
        plan = TransferPlan(size, 10 if size > 10 else 3, start=7)
        for lanes in (1, 2, 3):
            for lane in range(lanes):
                numbers = plan.numbers[lane::lanes]
                wanted = [part for part in plan if (part.number - 1) % lanes == lane]
                assert list(plan.rest(numbers, ())) == wanted
                assert plan.bytes_of(numbers) == sum(part.length for part in wanted)
                rest = plan.rest(numbers, [1, 3, 1000])
                assert list(rest) == [part for part in wanted if part.number not in (1, 3)]
                assert len(rest) == len(list(rest))


def test_an_intent_of_more_parts_than_an_upload_has_is_none(liar: Liar) -> None:
    """Anybody may plant one: parts of one byte would be a plan of billions."""
    manifest, _ = liar.get(KEY + ".manifest.json", max_bytes=1 << 20)
    size = Manifest.parse(manifest).body.size + len(manifest)
    right = Intent(ManifestFile.parse(manifest), "id", -(-size // MAX_PARTS), "owner", 3, 1.5, "w", {})
    assert Intent.parse(right.encode()) == right
    with pytest.raises(ArtifactInvalid, match="has parts of 1 bytes"):
        Intent.parse(replace(right, part_size=1).encode())
