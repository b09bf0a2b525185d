"""Layers: frames, parts and ranges fit together whatever their sizes, and in whatever order they come."""

from __future__ import annotations

import random
import subprocess
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from blobflow import ChunkProfile
from blobflow.errors import ArtifactInvalid
from blobflow.layers import LayerSync
from blobflow.layers.cutting import PartCutter, known_size
from blobflow.layers.format import FramePlan, encode_seek_table, parse_seek_table, seek_table_size
from blobflow.layers.remote import RemoteLayer
from blobflow.stores.local.store import LocalStore
from blobflow.testing import write_tree
from blobflow.uploads.intent import FrameLog
from tests.kit import TREE

PLANS = st.builds(
    lambda head, body, frame: FramePlan(head, head + body, frame),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 90),
)


@given(plan=PLANS, data=st.data())
def test_the_frames_of_a_range_are_those_that_overlap_it(plan: FramePlan, data: st.DataObject):
    """All of them, and no other one; together they are the tar, and the head ends where a frame ends."""
    frames = [plan.frame(number) for number in range(1, len(plan) + 1)]
    assert [frame.offset for frame in frames] == [0, *(frame.offset + frame.length for frame in frames)][:-1]
    assert (sum(frame.length for frame in frames), plan.head in {frame.offset for frame in frames}) == (plan.size, True)
    offset = data.draw(st.integers(0, plan.size - 1))
    length = data.draw(st.integers(1, plan.size - offset))
    overlapping = [f.number for f in frames if f.offset < offset + length and offset < f.offset + f.length]
    assert list(plan.frames_of(offset, length)) == overlapping


@given(plan=PLANS, seed=st.integers(), flip=st.integers(0), data=st.data())
def test_a_seek_table_is_read_back_and_no_flipped_bit_passes(
    plan: FramePlan, seed: int, flip: int, data: st.DataObject
):
    """Whatever bit it is, except in the compressed sizes, whose sum is compared with the object."""
    dice = random.Random(seed)
    sizes = array("I", (dice.randint(1, 1000) for _ in range(len(plan))))
    table = encode_seek_table(sizes, plan)
    assert len(table) == seek_table_size(len(plan))
    assert parse_seek_table(table, plan) == sizes
    damaged = bytearray(table)
    position = flip % len(table)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    in_sizes = 8 <= position < len(table) - 9 and (position - 8) % 8 < 4
    if in_sizes:
        assert sum(parse_seek_table(bytes(damaged), plan)) != sum(sizes)
    else:
        with pytest.raises(ArtifactInvalid):
            parse_seek_table(bytes(damaged), plan)


@given(plan=PLANS, seed=st.integers(), part_size=st.integers(1, 400), known=st.integers(0, 40), data=st.data())
def test_frames_in_any_order_make_the_parts_in_order(
    plan: FramePlan, seed: int, part_size: int, known: int, data: st.DataObject
):
    """From any part on whose beginning is known; the parts are equal but for the last, and the table comes last."""
    dice = random.Random(seed)
    frames = [dice.randbytes(dice.randint(1, 60)) for _ in range(len(plan))]
    table = encode_seek_table([len(frame) for frame in frames], plan)
    whole = b"".join(frames) + table
    log = FrameLog("codec", plan.frame_size)
    for number, frame in enumerate(frames[:known], 1):
        log.sizes.append(len(frame))
        log.crcs.append(number)
    complete = known_size(log.sizes, plan)
    assert complete in (None, len(whole))
    reach = sum(log.sizes) if complete is None else len(whole) - 1
    first_part = data.draw(st.integers(1, reach // part_size + 1))
    cutter = PartCutter(plan, log, first_part=first_part, part_size=part_size, window=4)
    pending = list(range(cutter.first_frame, len(plan) + 1))
    parts: dict[int, bytes] = {}
    while pending:
        number = dice.choice([n for n in pending if n <= pending[0] + 4])
        pending.remove(number)
        cutter.admit(number)  # returns at once: no further ahead than the window
        parts.update(cutter.add(number, frames[number - 1], number))
    cutter.admit(len(plan) + 1)
    assert cutter.seek_table() == table
    parts.update(cutter.add(len(plan) + 1, table, 0))
    assert list(parts) == list(range(first_part, first_part + len(parts)))
    assert b"".join(parts.values()) == whole[(first_part - 1) * part_size :]
    assert {len(part) for part in list(parts.values())[:-1]} <= {part_size}
    assert list(cutter.log().crcs) == list(range(1, len(plan) + 1))


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[RemoteLayer, bytes]:
    """A layer in a store, and the tar in it."""
    path = tmp_path_factory.mktemp("layer")
    store = LocalStore(path / "store")
    profile = ChunkProfile.custom(4096, 8, workers=2)
    source = write_tree(path / "source", TREE)
    made = LayerSync(store, home=path / "home", profile=profile, frame_size=1500).sync("web", source)
    remote = RemoteLayer.open(store, made.key)
    tar = remote.artifact().store.get_range(made.key, 0, made.layer.tar_size, e_tag=remote.object.e_tag)
    return remote, tar


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_the_tar_is_read_through_the_frames(layer: tuple[RemoteLayer, bytes], data: st.DataObject):
    """As if the tar itself were the object."""
    remote, tar = layer
    offset = data.draw(st.integers(0, len(tar)))
    length = data.draw(st.integers(0, len(tar) - offset))
    view = remote.artifact().store
    assert view.get_range(remote.meta.key, offset, length, e_tag=remote.object.e_tag) == tar[offset : offset + length]


def test_the_view_is_the_tar(layer: tuple[RemoteLayer, bytes], tmp_path: Path):
    """Byte by byte what `zstd -dc` makes of the layer."""
    remote, tar = layer
    (tmp_path / "layer").write_bytes(remote.store.get(remote.meta.key, max_bytes=1 << 30).data)
    done = subprocess.run(["zstd", "-qdc", tmp_path / "layer"], check=True, capture_output=True)
    assert done.stdout == tar
