"""What holds for every input: the algebra, the tar, the index, plans, intents, and landings that are killed."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from blobflow import ChunkProfile, download, upload, verify
from blobflow.artifact.checker import PayloadChecker
from blobflow.artifact.index import Index, Member, path_fault
from blobflow.artifact.index_parquet import decode_index, encode_index
from blobflow.artifact.manifest import EXECUTABLE_MODE, FILE_MODE, Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.tarmap import TarMap
from blobflow.checksum import EMPTY_SHA256, combine_all, combine_crc32c, crc32c, sha256
from blobflow.engine.plan import TransferPlan
from blobflow.errors import ArtifactInvalid, BlobflowError
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Executable, FaultyStore, Tree, read_tree
from blobflow.uploads.intent import Intent
from tests.kit import Killed, artifact_of, dies_at
from tests.unit.test_manifest import MANIFEST

settings.register_profile("core", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
settings.load_profile("core")
FEW = settings(max_examples=20)

names = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: path_fault(name) is None
)
long_names = st.builds(lambda name, times: (name * times)[:60], names, st.integers(1, 40))
contents = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda n, seed: random.Random(seed).randbytes(n), st.integers(0, 20_000), st.integers(0, 9)),
    st.integers(0, 200_000).map(bytes),
)
files = st.one_of(contents, contents.map(Executable))
trees: st.SearchStrategy[Tree] = st.recursive(
    st.dictionaries(st.one_of(names, long_names), files, max_size=4),
    lambda inner: st.dictionaries(st.one_of(names, long_names), st.one_of(files, inner), max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=5000), st.binary(max_size=5000))
def test_checksums_combine(first: bytes, second: bytes):
    """combine(crc(A), crc(B), len(B)) = crc(A + B)."""
    assert combine_crc32c(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


@given(st.lists(st.binary(max_size=500)))
def test_any_cut_combines_to_the_whole(pieces: list[bytes]):
    """However a whole is cut, its parts give its checksum."""
    assert combine_all((crc32c(piece), len(piece)) for piece in pieces) == crc32c(b"".join(pieces))


@given(st.integers(0, 10**13), st.integers(1, 10**11), st.integers(0, 10**6))
def test_a_plan_covers_its_range_exactly(size: int, part_size: int, start: int):
    """No gap, no overlap, nothing outside; every byte is in the part that parts_of names."""
    part_size = max(part_size, size // 5000)
    plan = TransferPlan(size, part_size, start)
    position = start
    for number, part in enumerate(plan, start=1):
        assert (part.number, part.offset) == (number, position)
        assert part.length == part_size or number == len(plan)
        position += part.length
    assert position == start + size
    if size:
        assert plan.part(plan.parts_of(start + size - 1, 1)[0]).number == len(plan)
        assert list(plan.parts_of(start, size)) == list(range(1, len(plan) + 1))


@given(st.integers(0, 6 * 10**13), st.integers(1, 10**9), st.sampled_from([1, 5 * 2**20]))
def test_an_upload_never_has_too_many_parts(size: int, chunk: int, minimum: int):
    """At most 10,000 parts, none below the chunk or the store's minimum."""
    plan = TransferPlan.for_upload(size, chunk, min_part_size=minimum, max_part_size=2**40)
    assert len(plan) <= 10_000
    assert plan.part_size >= max(chunk, minimum)


@given(
    st.dictionaries(st.integers(1, 10_000), st.integers(0, 2**32 - 1), max_size=200), st.text(), st.none() | st.text()
)
def test_an_intent_survives(crcs: dict[int, int], owner: str, replaces: str | None):
    """Any set of parts, any owner."""
    with contextlib.suppress(UnicodeEncodeError):
        intent = Intent(ManifestFile.of(MANIFEST), "up", 1, owner, 1, 0.5, "w", crcs, replaces)
        assert Intent.parse(intent.encode()) == intent


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_damaged_documents_are_refused_with_a_type(data: st.DataObject):
    """Whatever stands in a field of a manifest or an intent: it is read, or it is ArtifactInvalid."""
    intent = Intent(ManifestFile.of(MANIFEST), "up", 1, "o", 1, 0.5, "w", {1: 1}, None)
    for parse, encoded in ((Manifest.parse, MANIFEST.encode()), (Intent.parse, intent.encode())):
        document = json.loads(encoded)
        document[data.draw(st.sampled_from(sorted(document)))] = data.draw(json_values)
        with contextlib.suppress(ArtifactInvalid):
            parse(json.dumps(document).encode())
        noise = bytearray(encoded)
        noise[data.draw(st.integers(0, len(noise) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(ArtifactInvalid):
            parse(bytes(noise))


members = st.builds(
    lambda path, size, mode, mtime, crc: Member(
        path, size, mode, mtime, sha256(path.encode()) if size else EMPTY_SHA256, crc if size else 0
    ),
    st.lists(names, min_size=1, max_size=4).map("/".join),
    st.integers(0, 2**40),
    st.sampled_from([FILE_MODE, EXECUTABLE_MODE]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
)


def index_of(rows: list[Member]) -> Index:
    """The rows that may stand in one index, in order."""
    index = Index()
    for member in sorted({member.path: member for member in rows}.values()):
        if not any(member.path.startswith(f"{path}/") for path in index.paths):
            index.append(member)
    return index


@given(st.lists(members, max_size=20))
def test_an_index_survives(rows: list[Member]):
    """Every allowed list of members comes back row by row."""
    index = index_of(rows)
    decoded = decode_index(encode_index(index), members=len(index))
    assert list(decoded) == list(index)
    assert decoded.content_digest() == index.content_digest()


@given(st.lists(members, min_size=1, max_size=5), st.data())
def test_a_damaged_index_is_refused_with_a_type(rows: list[Member], data: st.DataObject):
    """Any byte of the Parquet file may be another: it decodes, or it is refused; it never crashes."""
    index = index_of(rows)
    encoded = bytearray(encode_index(index))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BlobflowError):
        decode_index(bytes(encoded), members=len(index))


@given(st.lists(members, max_size=8), st.integers(0, 2000), st.data())
def test_any_range_of_the_layout_is_covered(rows: list[Member], manifest_size: int, data: st.DataObject):
    """Spans add up to the range, follow each other, and content runs stay inside their member."""
    layout = TarMap(manifest_size, 700, index_of(rows))
    offset = data.draw(st.integers(0, layout.size))
    length = data.draw(st.integers(0, min(layout.size - offset, 10**6)))
    spans = list(layout.spans(offset, length))
    assert sum(span.length for span in spans) == length
    assert all(span.length > 0 for span in spans)
    position = offset
    for span in spans:
        if span.content_offset < 0:
            assert len(span.literal) == span.length
        else:
            start, size = layout.content_range(span.entry)
            assert position == start + span.content_offset
            assert span.content_offset + span.length <= size
        position += span.length


@FEW
@given(trees, st.data())
def test_any_tree_is_the_tar_that_python_reads(tree: Tree, data: st.DataObject):
    """Names, contents and modes; and every slice equals the whole."""
    with tempfile.TemporaryDirectory() as directory:
        artifact = artifact_of(Path(directory), tree)
        source = artifact.source()
        payload = bytearray(source.size)
        source.read_into(0, memoryview(payload))
        assert crc32c(payload) == artifact.payload_crc32c
        with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
            found = tar.getmembers()
            assert [info.name for info in found[:2]] == ["MANIFEST.json", "INDEX.parquet"]
            assert [info.name for info in found[2:]] == [f"data/{p}".rstrip("/") for p in artifact.index.paths]
            for info, member in zip(found[2:], artifact.index, strict=True):
                assert (info.size, info.mode, info.isdir()) == (member.size, member.mode, member.is_directory)
                if info.isfile():
                    file = tar.extractfile(info)
                    assert file is not None
                    assert sha256(file.read()) == member.sha256
        for _ in range(5):
            offset = data.draw(st.integers(0, source.size))
            piece = bytearray(data.draw(st.integers(0, source.size - offset)))
            source.read_into(offset, memoryview(piece))
            assert piece == payload[offset : offset + len(piece)]


@FEW
@given(trees, st.integers(500, 30_000), st.randoms(use_true_random=False))
def test_parts_in_any_order_from_many_threads_are_proven(tree: Tree, part_size: int, shuffle: random.Random):
    """Threads bring the parts as they like: contents are right, and every member was held to its digest."""
    with tempfile.TemporaryDirectory() as directory:
        artifact = artifact_of(Path(directory), tree)
        source, layout, index = artifact.source(), artifact.layout, artifact.index
        kept = [bytearray(size) for size in index.sizes]

        def place(member: int, offset: int, data: memoryview) -> None:
            kept[member][offset : offset + len(data)] = data

        checker = PayloadChecker(layout, read_back=lambda m, offset, n: [bytes(kept[m][offset : offset + n])])
        plan = TransferPlan(layout.size - layout.data_start, part_size, start=layout.data_start)
        parts = list(plan)
        shuffle.shuffle(parts)
        errors: list[BaseException] = []

        def work(own: int) -> None:
            try:
                for part in parts[own::4]:
                    data = memoryview(bytearray(part.length))
                    source.read_into(part.offset, data)
                    checker.consume(part.offset, data, place)
            except BaseException as error:  # noqa: BLE001  # given to the test
                errors.append(error)

        threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        checker.settle()
        assert all(sha256(content) == index.sha256_of(i) for i, content in enumerate(kept))


@FEW
@given(trees, st.integers(500, 30_000), st.lists(st.integers(1, 25), max_size=3), st.integers(1, 3))
def test_a_tree_arrives_however_often_it_is_killed(tree: Tree, part_size: int, deaths: list[int], workers: int):
    """Upload and download die at random requests and go on; the tree at the end is the tree at the beginning."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        artifact, store = artifact_of(path, tree), LocalStore(path / "store")
        profile = ChunkProfile.custom(part_size, 1, workers=workers)
        for death in deaths:
            with contextlib.suppress(Killed):
                upload(FaultyStore(store, dies_at(death)), "a.tar", artifact, profile=profile)
        upload(store, "a.tar", artifact, profile=profile)
        verify(store, "a.tar", mode="deep", profile=profile)
        for death in deaths:
            with contextlib.suppress(Killed):
                download(FaultyStore(store, dies_at(death)), "a.tar", path / "dest", profile=profile)
        download(store, "a.tar", path / "dest", profile=profile)
        assert read_tree(path / "dest" / "data") == tree


@pytest.mark.parametrize("path", ["a" * 255, "é" * 127, "a/b/c", "..a", "a..", "...", " ", "\u202e", "日本語"])
def test_unusual_but_harmless_paths_are_allowed(path: str):
    """The rules refuse what is dangerous, not what is strange."""
    assert path_fault(path) is None
