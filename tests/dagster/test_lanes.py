"""Uploads and downloads in lanes: the same pipeline, its transfers divided among steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import dagster as dg
import pytest

from blobflow.dagster import BlobflowTranslator, metadata as md
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.testing import FailBefore, Fault, Hook, Request, read_tree
from tests.dagster.kit import MIRROR, REMOTE, STEPS, FaultyResource, Place, facts, failure, succeeded
from tests.kit import TREE, keys

LANES = 3
LANED = [
    "orders__snapshot.export",
    "orders__remote.upload.plan",
    *(f"orders__remote.upload.lane_{lane}" for lane in range(LANES)),
    "orders__remote.upload.commit",
    "orders__remote.verify",
    "orders__mirror.download.plan",
    *(f"orders__mirror.download.lane_{lane}" for lane in range(LANES)),
    "orders__mirror.download.assemble",
    "orders__mirror.import_",
]


def payload(place: Place) -> str:
    (key,) = (key for key in keys(place.store) if key.endswith(".tar"))
    return key


def rows(table: dg.TableMetadataValue) -> list[dict[str, object]]:
    return [dict(record.data) for record in table.records]


def outage(operation: str, first: int, last: int) -> Callable[[Request], Fault | None]:
    """The store is down for some requests of one kind, counted over all steps."""
    seen = itertools.count(1)

    def faults(request: Request) -> Fault | None:
        if request.operation == operation and first <= next(seen) <= last:
            return FailBefore(StoreUnavailable("the store is down", operation=operation, key=request.key))
        return None

    return faults


def test_lanes_bring_a_tree_to_its_mirror(place: Place):
    """Every part is sent and fetched once, by the lanes; what they did is told together."""
    result = place.run(place.pipeline(lanes=LANES))
    assert result.success
    assert succeeded(result) == LANED
    assert read_tree(place.current) == TREE

    size = place.store.head(payload(place)).size
    parts = -(-size // 4096)
    assert FaultyResource.count("put_part") == parts
    sent, fetched = facts(result, REMOTE), facts(result, MIRROR)
    assert (sent[md.STATUS], sent[md.BYTES_SENT], sent[md.BYTES_RESUMED]) == ("uploaded", size, 0)
    assert (fetched[md.STATUS], fetched[md.BYTES_RECEIVED], fetched[md.BYTES_RESUMED]) == ("imported", size, 0)
    lanes = rows(sent[md.LANES])
    assert [row["lane"] for row in lanes] == [0, 1, 2]
    assert [row["parts"] for row in lanes] == [parts // 3 + (lane < parts % 3) for lane in range(LANES)]
    assert len(rows(fetched[md.LANES])) == LANES


def test_one_lane_is_the_pipeline_as_it_always_was(place: Place):
    """No step more, and the same names."""
    assert succeeded(place.run(place.pipeline(lanes=1))) == STEPS


def test_what_is_unchanged_moves_nothing(place: Place):
    """A second run goes through its steps and sends, fetches and imports nothing; so does one without lanes."""
    assert place.run(place.pipeline(lanes=LANES)).success
    FaultyResource.script(lambda _: None)
    for lanes in (LANES, 1):
        result = place.run(place.pipeline(lanes=lanes))
        assert result.success
        for asset in (REMOTE, MIRROR):
            assert facts(result, asset)[md.STATUS] == "unchanged"
            assert facts(result, asset)[md.BYTES_RESUMED] == 0
    assert FaultyResource.count("put_part") == FaultyResource.count("create_multipart") == 0


def test_only_the_lane_that_failed_is_retried(place: Place):
    """A passing error is the lane's own: it alone is tried again, and sends what it lacks."""
    FaultyResource.script(outage("put_part", 5, 5))  # the second part of lane 1
    policy = dg.RetryPolicy(max_retries=1, delay=0)
    result = place.run(place.pipeline(lanes=LANES, retry_policy=policy))
    assert result.success
    restarted = [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_RESTARTED]
    assert restarted == ["orders__remote.upload.lane_1"]
    size = place.store.head(payload(place)).size
    assert FaultyResource.count("put_part") == -(-size // 4096) + 1
    remote = facts(result, REMOTE)
    assert remote[md.BYTES_SENT] + remote[md.BYTES_RESUMED] == size
    assert remote[md.BYTES_RESUMED] == 4096


def test_a_new_run_continues_what_lanes_began(place: Place):
    """A run whose lane failed for good, then one without lanes, then the mirror the other way round."""
    FaultyResource.script(outage("put_part", 5, 1000))
    failed = place.run(place.pipeline(lanes=LANES))
    assert succeeded(failed)[-1] == "orders__remote.upload.lane_0"
    FaultyResource.script(outage("get_range", 7, 1000))  # one of the verification, head, index, three parts
    result = place.run(place.pipeline(verify_mode="shallow"))
    assert facts(result, REMOTE)[md.BYTES_RESUMED] == 4 * 4096
    assert failure(result)[0] == "orders__mirror.download"

    FaultyResource.script(lambda _: None)
    result = place.run(place.pipeline(lanes=LANES), select=[MIRROR])
    assert result.success
    mirror = facts(result, MIRROR)
    assert mirror[md.BYTES_RESUMED] == 3 * 4096
    assert mirror[md.BYTES_RESUMED] + mirror[md.BYTES_RECEIVED] == place.store.head(payload(place)).size
    assert read_tree(place.current) == TREE


def test_a_commit_without_its_parts_publishes_nothing(place: Place):
    """Whatever was lost between the lanes and the commit: the step fails, names the lanes, and says what to do."""
    listings = itertools.count(1)

    def lose_a_part(request: Request) -> Fault | None:
        if request.operation != "list_parts" or next(listings) != LANES + 1:
            return None

        def lose(_: Request) -> None:
            (upload,) = place.store.list_uploads()
            (journal,) = place.home.glob(f"store/.blobflow/uploads/{upload.upload_id}/parts.jsonl")
            with open(journal, "a") as file:
                file.write('\n{"part": 2, "size": null, "crc32c": null}\n')

        return Hook(lose)

    FaultyResource.script(lose_a_part)
    step, message, metadata = failure(place.run(place.pipeline(lanes=LANES)))
    assert step == "orders__remote.upload.commit"
    assert "1 of 9 parts" in message
    assert "of lane 1" in message
    assert metadata[md.ERROR] == "UploadIncomplete"
    assert [key for key in keys(place.store) if key.endswith(".manifest.json")] == []

    FaultyResource.script(lambda _: None)
    result = place.run(place.pipeline(lanes=LANES))
    assert result.success
    assert FaultyResource.count("put_part") == 1


def test_a_partition_has_lanes_of_its_own(place: Place):
    """Its transfers are divided like any other."""
    pipeline = place.pipeline(lanes=2, partitions_def=dg.StaticPartitionsDefinition(["us/west"]))
    assert place.run(pipeline, partition_key="us/west").success
    assert payload(place).startswith("orders/us%2Fwest/")


@pytest.mark.slow
def test_lanes_wait_for_what_the_pipeline_waits_for(place: Place):
    """An asset that the translator adds to the deps comes before the plan."""

    @dg.asset
    def gate() -> None: ...

    class Waiting(BlobflowTranslator):
        def get_asset_spec(self, props):
            return super().get_asset_spec(props).merge_attributes(deps=["gate"] if props.stage != "snapshot" else [])

    result = place.run(place.pipeline(lanes=2, translator=Waiting()), also=dg.Definitions(assets=[gate]))
    assert result.success
    steps = succeeded(result)
    assert steps.index("gate") < min(steps.index(LANED[1]), steps.index("orders__mirror.download.plan"))


def test_a_pool_is_for_lanes(place: Place):
    """Lanes take the slots, as uploads and downloads do; the steps around them take none."""
    pipeline = place.pipeline(lanes=2, pool="wan")
    ops = itertools.chain.from_iterable(asset.node_def.iterate_op_defs() for asset in pipeline.assets)
    assert {op.name for op in ops if op.pool == "wan"} == {
        f"orders__{kind}_lane_{lane}" for kind in ("upload", "download") for lane in (0, 1)
    }


@pytest.mark.parametrize("lanes", [0, 65, -1])
def test_impossible_numbers_of_lanes_are_refused(place: Place, lanes: int):
    """When the code location loads."""
    with pytest.raises(UsageError, match="lanes"):
        place.pipeline(lanes=lanes)


def test_lanes_are_static(place: Place):
    """No step of a pipeline is mapped over a dynamic output: a retry from failure would skip it without a word."""
    pipeline = place.pipeline(lanes=LANES)
    ops = list(itertools.chain.from_iterable(asset.node_def.iterate_op_defs() for asset in pipeline.assets))
    assert len(ops) == len(LANED)
    assert not any(out.is_dynamic for op in ops for out in op.output_defs)
