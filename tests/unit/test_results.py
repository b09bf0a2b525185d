"""What results of transfers have in common: their counters, under one set of names."""

from __future__ import annotations

from pathlib import Path

import pytest

from blobflow import CopyResult, DownloadResult, UploadResult, copy_artifact, download, upload, verify
from blobflow.lanes import begin_upload, send_parts
from blobflow.layers import LayerSync
from blobflow.stores.local.store import LocalStore
from tests.kit import SMALL, artifact_of

KEY = "orders/monday"
IN_PARTS = {"bytes_total", "bytes_resumed", "parts", "checkpoints_saved", "seconds"}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_the_counters_of_a_result_are_told_by_name(store: LocalStore, tmp_path: Path):
    """Those that it has, with the values that its attributes have; each says in which direction bytes went."""
    artifact = artifact_of(tmp_path / "made")
    sent = upload(store, KEY, artifact, profile=SMALL)
    landed = download(store, KEY, tmp_path / "landed", profile=SMALL)
    copied = copy_artifact(store, KEY, LocalStore(tmp_path / "other"), KEY, profile=SMALL)
    verified = verify(store, KEY, mode="deep")
    assert sent.to_dict().keys() == IN_PARTS | {"bytes_sent"}
    assert landed.to_dict().keys() == IN_PARTS | {"bytes_received"}
    assert copied.to_dict().keys() == IN_PARTS | {"bytes_sent", "bytes_received"}
    assert verified.to_dict().keys() == {"bytes_total", "bytes_resumed", "seconds"}
    for result in (sent, landed, copied, verified):
        assert result.to_dict() == {name: getattr(result, name) for name in result.to_dict()}
        assert result.bytes_total == artifact.payload_size
        assert type(result).__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert (sent.bytes_sent, sent.bytes_resumed) == (artifact.payload_size, 0)
    assert sent.parts == copied.parts > 1
    assert [type(each) for each in (sent, landed, copied)] == [UploadResult, DownloadResult, CopyResult]


def test_lanes_count_what_is_theirs(store: LocalStore, tmp_path: Path):
    """The bytes of the parts of all lanes are those of the artifact."""
    artifact = artifact_of(tmp_path / "made")
    ticket = begin_upload(store, KEY, artifact, profile=SMALL)
    lanes = [send_parts(store, ticket, artifact, ticket.numbers(lane, 2), profile=SMALL) for lane in range(2)]
    assert sum(lane.bytes_total for lane in lanes) == ticket.bytes_total
    assert all(lane.to_dict().keys() == IN_PARTS | {"bytes_moved"} for lane in lanes)
    again = send_parts(store, ticket, artifact, ticket.numbers(0, 2), profile=SMALL)
    assert (again.bytes_moved, again.bytes_resumed) == (0, lanes[0].bytes_total)


def test_layers_count_the_tar_and_what_was_sent(store: LocalStore, tmp_path: Path):
    """The total is that of the tar, before it is compressed; what is unchanged sent nothing."""
    source = artifact_of(tmp_path / "made").path.parent / "source"
    layers = LayerSync(store, profile=SMALL, home=tmp_path / "home")
    synced = layers.sync("web", source)
    restored = layers.restore("web", tmp_path / "restored")
    assert synced.to_dict().keys() == IN_PARTS | {"bytes_sent", "parts_resumed"}
    assert restored.to_dict().keys() == IN_PARTS | {"bytes_received"}
    assert synced.bytes_total == restored.bytes_total == synced.layer.tar_size
    assert synced.bytes_sent == synced.layer.object_size
    unchanged = layers.sync("web", source)
    assert (unchanged.bytes_total, unchanged.bytes_sent, unchanged.parts) == (synced.bytes_total, 0, 0)
