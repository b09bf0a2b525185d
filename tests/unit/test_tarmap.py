"""The virtual tar: bytes that every tar understands, from any offset."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from blobflow.artifact.index import Index, Member
from blobflow.artifact.tarmap import BLOCK, TarMap, header, manifest_entry
from blobflow.checksum import EMPTY_SHA256, crc32c, sha256
from blobflow.testing import Executable
from tests.kit import TREE, artifact_of, noise


def parsed(head: bytes, content: bytes = b"") -> tarfile.TarInfo:
    data = head + content + bytes(-len(content) % BLOCK) + bytes(2 * BLOCK)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        [info] = tar.getmembers()
    return info


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "data/with space",
        "data/" + "x" * 95,
        "data/" + "x" * 96,
        "data/" + "/".join("y" * 200 for _ in range(5)),
        "data/grüße/日本語/🙂",
        "data/dir/",
        "data/" + "d" * 120 + "/",
    ],
)
@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_headers_are_normalised(name: str, mode: int):
    """Name, mode and kind come back; owner, group and times are 0 on every machine."""
    head = header(name, 0, mode)
    info = parsed(head)
    assert len(head) % BLOCK == 0
    assert (info.name, info.mode, info.size) == (name.rstrip("/"), mode, 0)
    assert (info.uid, info.gid, info.uname, info.gname, info.mtime) == (0, 0, "", "", 0)
    assert info.isdir() == name.endswith("/")
    assert len(head) == (BLOCK if name.isascii() and len(name) <= 100 else 3 * BLOCK if len(name) < 400 else len(head))


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 2**40, 2**62])
def test_sizes_from_8_gib_on_stand_in_a_pax_record(size: int):
    """Eleven octal digits end at 8 GiB."""
    head = header("data/big", size, 0o644)
    with tarfile.open(fileobj=io.BytesIO(head + bytes(2 * BLOCK)), errorlevel=0) as tar:
        info = tar.next()
    assert info is not None
    assert info.size == size
    assert len(head) == (BLOCK if size < 8**11 else 3 * BLOCK)
    assert (b"size=" in head) == (size >= 8**11)


@pytest.mark.parametrize("length", [*range(88, 100), *range(985, 1000)])
def test_a_pax_record_counts_its_own_digits(length: int):
    """Also where the length gains a digit by counting itself."""
    name = "n" * (length + 20)
    assert parsed(header(name, 0, 0o644)).name == name


def test_a_member_may_be_larger_than_any_disk():
    """Offsets are exact for sizes that nobody could test with real bytes."""
    huge = 2**62
    index = Index()
    index.append(Member("huge", huge, 0o644, 0, bytes(32), 1))
    index.append(Member("last", 5, 0o644, 0, sha256(b"hello"), crc32c(b"hello")))
    layout = TarMap(100, 200, index)
    offset, length = layout.content_range(3)
    assert length == 5
    assert layout.content_range(2)[1] == huge
    assert layout.size == offset + BLOCK + 2 * BLOCK
    [span] = layout.spans(offset, 5)
    assert (span.entry, span.content_offset, span.length) == (3, 0, 5)
    [middle] = layout.spans(layout.content_range(2)[0] + 2**61, 1000)
    assert (middle.entry, middle.content_offset) == (2, 2**61)


def test_ranges_outside_are_refused():
    """Nothing before the beginning, nothing behind the end."""
    layout = TarMap(1, 1, Index())
    assert list(layout.spans(layout.size, 0)) == []
    for offset, length in ((-1, 1), (0, layout.size + 1), (layout.size, 1), (0, -1)):
        with pytest.raises(ValueError, match="outside"):
            list(layout.spans(offset, length))


def test_an_empty_artifact_is_two_entries_and_the_end():
    """Manifest, index, two blocks of zeros."""
    layout = TarMap(10, 600, Index())
    assert layout.body_start == 2 * BLOCK
    assert layout.data_start == 2 * BLOCK + BLOCK + 2 * BLOCK
    assert layout.size == layout.data_start + 2 * BLOCK
    assert repr(layout) == f"<TarMap 0 members, {layout.size} bytes>"


def test_the_checksum_is_known_before_a_byte_is_read(tmp_path: Path):
    """What follows from manifest and index alone is the CRC32C of the real bytes."""
    artifact = artifact_of(tmp_path)
    source = artifact.source()
    payload = bytearray(source.size)
    source.read_into(0, memoryview(payload))
    assert crc32c(payload) == artifact.payload_crc32c
    assert crc32c(payload[artifact.layout.body_start :]) == artifact.manifest.body.crc32c
    assert payload.startswith(manifest_entry(artifact.manifest_bytes))


@pytest.mark.seed("1.1")
def test_stock_tar_unpacks_a_payload(tmp_path: Path):
    """The order is manifest, index, members; nothing else is in it; the tools of the system agree."""
    artifact = artifact_of(
        tmp_path, {**TREE, "run.sh": Executable("#!/bin/sh\n"), "long" * 50: {"long" * 50: "deep"}}, mode="copy"
    )
    source = artifact.source()
    payload = bytearray(source.size)
    source.read_into(0, memoryview(payload))
    (tmp_path / "payload.tar").write_bytes(payload)
    listed = subprocess.run(
        ["tar", "--quoting-style=literal", "-tf", tmp_path / "payload.tar"], check=True, capture_output=True
    ).stdout.decode()
    assert listed.splitlines() == [
        "MANIFEST.json",
        "INDEX.parquet",
        *(f"data/{path}" for path in artifact.index.paths),
    ]
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "payload.tar", "-C", tmp_path / "unpacked"], check=True)
    subprocess.run(["diff", "-r", tmp_path / "source", tmp_path / "unpacked" / "data"], check=True)
    assert (tmp_path / "unpacked" / "data" / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "unpacked" / "MANIFEST.json").read_bytes() == artifact.manifest_bytes


@pytest.mark.seed("W1.2")
def test_the_same_content_gives_the_same_bytes(tmp_path: Path):
    """Whatever the times, owners and the order in which the files were made."""
    tree = {"a": noise(1000), "b": {"c": "x"}}
    first = artifact_of(tmp_path / "1", tree)
    second = artifact_of(tmp_path / "2", dict(reversed(tree.items())))
    assert first.manifest.content_digest == second.manifest.content_digest
    for number in (2, 3):
        name, size, mode = first.layout.entry(number)
        assert (name, size, mode) == second.layout.entry(number)
        assert header(name, size, mode) == header(*second.layout.entry(number))


def test_empty_members_have_no_content():
    """Directories and empty files are headers only."""
    index = Index()
    index.append(Member("dir/", 0, 0o755, 0, EMPTY_SHA256, 0))
    index.append(Member("empty", 0, 0o644, 0, EMPTY_SHA256, 0))
    layout = TarMap(1, 1, index)
    spans = list(layout.spans(layout.data_start, layout.size - layout.data_start))
    assert [span.length for span in spans] == [BLOCK, BLOCK, 2 * BLOCK]
    assert all(span.content_offset == -1 for span in spans)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_slices_are_whole_members_and_together_all_of_them(tmp_path: Path, count: int):
    """Each slice begins where the one before ends, at the beginning of an entry; the last one has the end blocks."""
    layout = artifact_of(tmp_path).layout
    position = layout.data_start
    for number in range(1, count + 1):
        start, length = layout.slice_of_members(number, count)
        assert start == position
        position += length
        contents = [span for span in layout.spans(start, length) if span.content_offset >= 0]
        assert all(span.content_offset == 0 for span in contents)
        assert all(span.length == layout.entry(span.entry)[1] for span in contents)
    assert position == layout.size


def test_slices_are_about_equal(tmp_path: Path):
    """Many members of one size are divided evenly."""
    layout = artifact_of(tmp_path, {f"{i:03}": noise(700, i) for i in range(100)}).layout
    lengths = [layout.slice_of_members(number, 10)[1] for number in range(1, 11)]
    assert max(lengths) - min(lengths) <= 2 * (BLOCK + 1024)


def test_nothing_to_slice_is_the_end_blocks(tmp_path: Path):
    """An artifact without members has one slice with something in it."""
    layout = artifact_of(tmp_path, {}).layout
    assert [layout.slice_of_members(number, 3)[1] for number in (1, 2, 3)] == [2 * BLOCK, 0, 0]
