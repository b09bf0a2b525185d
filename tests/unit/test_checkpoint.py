"""Checkpoints: the durable record of a stream, and what is told of an artifact's transfer."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from blobflow import TransferRecord
from blobflow.errors import UsageError
from blobflow.streams import TransferCheckpoint


@pytest.mark.seed("0.7")
def test_a_fresh_checkpoint_stands_at_the_beginning():
    """Nothing is done, nothing is known but what was told."""
    checkpoint = TransferCheckpoint.new("session", "sha256:abc", 1000)
    assert (checkpoint.session_id, checkpoint.digest, checkpoint.total_size) == ("session", "sha256:abc", 1000)
    assert (checkpoint.offset, checkpoint.chunks_completed, checkpoint.prefix_crc32c) == (0, 0, 0)
    assert checkpoint.upload_session_url is None
    assert (checkpoint.is_complete, checkpoint.remaining, checkpoint.progress) == (False, 1000, 0.0)


@pytest.mark.seed("0.8")
@pytest.mark.parametrize(
    ("offset", "total", "progress", "remaining", "complete"),
    [
        (500, 1000, 0.5, 500, False),
        (1000, 1000, 1.0, 0, True),
        (1500, 1000, 1.0, 0, True),
        (0, 0, 1.0, 0, True),
        (500, None, 0.0, 0, False),
    ],
)
def test_progress_is_a_fraction(offset: int, total: int | None, progress: float, remaining: int, complete: bool):
    """It never leaves 0.0 to 1.0, nothing to do is complete, an unknown length never is."""
    checkpoint = TransferCheckpoint(session_id="s", offset=offset, total_size=total)
    assert (checkpoint.progress, checkpoint.remaining, checkpoint.is_complete) == (progress, remaining, complete)


@pytest.mark.seed("0.9")
def test_a_checkpoint_survives_json():
    """Every field, the optional session URL included."""
    checkpoint = TransferCheckpoint(
        session_id="s",
        digest="sha256:abc",
        total_size=10,
        offset=4,
        chunks_completed=2,
        prefix_crc32c=7,
        upload_session_url="https://store/session/1",
    )
    assert TransferCheckpoint.from_json(checkpoint.to_json()) == checkpoint
    plain = TransferCheckpoint.new("s")
    assert TransferCheckpoint.from_json(plain.to_json().encode()) == plain


@pytest.mark.seed("0.9")
def test_unknown_fields_are_tolerated_and_unknown_versions_are_not():
    """A field more is no harm; a version more may mean anything."""
    document = json.loads(TransferCheckpoint.new("s").to_json())
    assert TransferCheckpoint.from_json(json.dumps({**document, "colour": "red"})) == TransferCheckpoint.new("s")
    with pytest.raises(UsageError, match="version 2, this blobflow reads up to 1"):
        TransferCheckpoint.from_json(json.dumps({**document, "version": 2}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"session_id": "s", "offset": -1}'])
def test_what_is_no_checkpoint_is_refused(text: str):
    """Damage is an error with a type, not a transfer from a wrong place."""
    with pytest.raises(UsageError, match="not a checkpoint"):
        TransferCheckpoint.from_json(text)


def test_a_checkpoint_never_goes_below_zero():
    """Assignments are checked as well."""
    with pytest.raises(ValidationError):
        TransferCheckpoint.new("s").offset = -1


def test_a_record_is_plain_json():
    """What goes into metadata are plain values."""
    record = TransferRecord(
        transfer_id="t",
        kind="upload",
        key="a/b",
        artifact_digest="sha256:0",
        part_size=1,
        parts_total=2,
        parts_done=1,
        bytes_done=1,
        bytes_total=2,
        state="running",
    )
    assert TransferRecord.model_validate(json.loads(json.dumps(record.to_json_dict()))) == record
