"""Handles in the store, for steps on machines that share nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest

from blobflow.dagster import BlobflowResource
from blobflow.dagster.handles import SnapshotHandle, UploadHandle
from blobflow.dagster.handoff import MAX_BYTES, HandoffIOManager, pack, unpack
from blobflow.errors import UsageError
from blobflow.testing import read_tree
from tests.dagster.kit import MIRROR, STEPS, Place, succeeded
from tests.kit import TREE, keys

pytestmark = pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning")


def handed(place: Place) -> list[str]:
    return [key for key in keys(place.store) if key.startswith("handoff/")]


def definitions(place: Place) -> dg.Definitions:
    return dg.Definitions(resources={"io_manager": HandoffIOManager(blobflow=place.resource())})


def test_a_pipeline_hands_its_handles_on_through_the_store(place: Place):
    """All steps work, lanes and all, and a run of the mirror alone finds what an earlier run handed on."""
    pipeline = place.pipeline(lanes=2)
    result = place.run(pipeline, also=definitions(place))
    assert result.success
    assert read_tree(place.current) == TREE
    names = handed(place)
    assert "handoff/assets/orders/remote.json" in names
    assert f"handoff/runs/{result.run_id}/orders__remote.upload.lane_1/result.json" in names
    assert not list((place.home / "instance").rglob("storage/orders"))

    again = place.run(select=[MIRROR], also=definitions(place))
    assert succeeded(again) == STEPS[3:]


def test_partitions_do_not_meet(place: Place):
    """Each partition hands its own on, also those with strange names."""
    names = ["a/b", "a%2Fb"]
    pipeline = place.pipeline(partitions_def=dg.StaticPartitionsDefinition(names))
    for name in names:
        assert place.run(pipeline, partition_key=name, also=definitions(place)).success
    assert len([name for name in handed(place) if name.startswith("handoff/assets/orders/remote/")]) == 2


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, "three", True, None],
        {"nested": {"list": [{}]}, "empty": {}},
        SnapshotHandle("k", "/scratch", b"\x00manifest\xff", 3),
        UploadHandle("k", "sha256:0", "/s", "uploaded", {"at": dg.MetadataValue.timestamp(5.0), "n": 1, "s": "x"}),
        UploadHandle(
            "k",
            "d",
            "/s",
            "u",
            {"t": dg.MetadataValue.table([dg.TableRecord({"a": 1})], dg.TableSchema([dg.TableColumn("a", "int")]))},
        ),
    ],
)
def test_values_come_back_as_they_were(value: object):
    """Handles with bytes and metadata, and plain JSON."""
    assert unpack(json.loads(json.dumps(pack(value)))) == value


@pytest.mark.parametrize("value", [Path("/tmp"), {"$bytes": "!"}, {1: 2}, {"nested": [object()]}])
def test_other_values_are_refused(value: object):
    """What is no handle is not pickled, and not mistaken for one."""
    with pytest.raises(UsageError) as answer:
        pack(value)
    assert "io_manager_key" in answer.value.hint


@pytest.mark.parametrize("document", [{"$Path": {}}, {"$RemoteHandle": {"other": 1}}, {"$RemoteHandle": {"key": "k"}}])
def test_handles_of_another_version_are_refused(document: object):
    """A handle that this version does not know is not guessed at."""
    with pytest.raises(UsageError, match="another version of blobflow"):
        unpack(document)


def test_payloads_are_refused():
    """Nobody passes gigabytes through the store's small objects by mistake."""
    with dg.build_output_context(asset_key="a") as context, pytest.raises(dg.Failure) as refusal:
        HandoffIOManager(blobflow=BlobflowResource(store="/nowhere")).handle_output(context, "x" * MAX_BYTES)
    assert "is not a handle" in (refusal.value.description or "")
    assert not refusal.value.allow_retries


def test_what_was_never_handed_on_is_named(tmp_path: Path):
    """The error says which object is missing, and what to do."""
    manager = HandoffIOManager(blobflow=BlobflowResource(store=str(tmp_path)))
    with (
        dg.build_input_context(asset_key=["orders", "remote"]) as context,
        pytest.raises(dg.Failure, match=r"there is no value 'handoff/assets/orders/remote\.json'") as answer,
    ):
        manager.load_input(context)
    assert "materialize" in str(answer.value.metadata["blobflow/hint"].value)
