"""Profiles: the numbers of the presets, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from blobflow import ChunkProfile
from blobflow.errors import UsageError

MIB = 2**20


@pytest.mark.seed("0.2")
def test_datacenter_is_large_and_impatient():
    """32 MiB chunks, a checkpoint every 4 GiB, verification, 60 s of silence."""
    profile = ChunkProfile.datacenter()
    assert (profile.chunk_size, profile.checkpoint_interval) == (32 * MIB, 128)
    assert (profile.verify_digest, profile.read_timeout, profile.write_timeout) == (True, 60.0, 60.0)
    assert profile.checkpoint_bytes == 32 * MIB * 128 == 4 * 2**30


@pytest.mark.seed("0.3", "1.4")
def test_tactical_is_the_default():
    """8 MiB chunks, a checkpoint every 64, 120 s; at most eight of them are in flight."""
    profile = ChunkProfile()
    assert profile == ChunkProfile.tactical() == ChunkProfile.named("tactical")
    assert (profile.chunk_size, profile.checkpoint_interval) == (8 * MIB, 64)
    assert (profile.verify_digest, profile.read_timeout, profile.write_timeout) == (True, 120.0, 120.0)
    assert profile.workers <= 8


@pytest.mark.seed("0.4")
def test_edge_is_small_and_patient():
    """1 MiB chunks, a checkpoint every 32, 300 s."""
    profile = ChunkProfile.edge()
    assert (profile.chunk_size, profile.checkpoint_interval) == (MIB, 32)
    assert (profile.verify_digest, profile.read_timeout, profile.write_timeout) == (True, 300.0, 300.0)


@pytest.mark.seed("0.5")
def test_custom_takes_a_chunk_and_an_interval():
    """The rest is as in the default, and can be named."""
    profile = ChunkProfile.custom(4096, 10)
    assert profile.checkpoint_bytes == 40_960
    assert (profile.verify_digest, profile.read_timeout) == (True, 120.0)
    assert ChunkProfile.custom(4096, 10, workers=1, verify_digest=False).workers == 1


@pytest.mark.seed("0.5", "W0.5")
@pytest.mark.parametrize(("chunk", "interval"), [(0, 1), (-1, 1), (1, 0), (1, -5)])
def test_sizes_below_one_are_refused(chunk: int, interval: int):
    """A chunk or an interval of nothing would move nothing and call it success."""
    with pytest.raises(ValidationError):
        ChunkProfile.custom(chunk, interval)


def test_unknown_and_impossible_options_are_refused():
    """A misspelt option is an error, and so is a timeout of zero."""
    for options in ({"read_timeout": 0.0}, {"workers": 0}):
        with pytest.raises(ValidationError):
            ChunkProfile.model_validate(options)
    with pytest.raises(UsageError, match="no field 'chunk': did you mean 'chunk_size'"):
        ChunkProfile.custom(1, 1, chunk=1)
    with pytest.raises(ValueError, match="unknown profile 'fast': one of datacenter, tactical, edge"):
        ChunkProfile.named("fast")


@pytest.mark.seed("0.6", "W0.6")
def test_fractions_of_a_second_survive():
    """A profile that is saved and loaded is the same, also with a quarter of a second."""
    profile = ChunkProfile.custom(4096, 10, read_timeout=0.25, write_timeout=1.5)
    loaded = ChunkProfile.model_validate_json(profile.model_dump_json())
    assert loaded == profile
    assert loaded.read_timeout == 0.25


def test_a_profile_cannot_be_changed():
    """Plans are made from it, so it stays what it is."""
    with pytest.raises(ValidationError):
        ChunkProfile().chunk_size = 1
