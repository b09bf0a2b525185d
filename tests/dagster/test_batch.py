"""Batches as Dagster runs them: a table, counts, a check, and only what failed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq

from blobflow.dagster import batch_asset, batch_op, metadata as md
from blobflow.errors import StoreConfigurationError
from blobflow.testing import FailBefore, Fault, Request
from tests.dagster.kit import FaultyResource, Place, failure
from tests.kit import keys


def operations(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


FIVE = [{"op": "insert", "key": f"k{number}", "payload": f"payload {number}"} for number in range(5)]


def denied(*denied_keys: str) -> Any:
    def faults(request: Request) -> Fault | None:
        error = StoreConfigurationError("denied", hint="ask")
        return FailBefore(error) if request.operation == "put" and request.key in denied_keys else None

    return faults


def materialize(place: Place, asset: dg.AssetsDefinition, **options: Any) -> dg.ExecuteInProcessResult:
    resources = {"blobflow": place.resource()}
    return dg.materialize([asset], instance=place.instance, resources=resources, raise_on_error=False, **options)


def told(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (made,) = [made for node in result.job_def.nodes for made in result.asset_materializations_for_node(node.name)]
    return {label: value.value for label, value in made.metadata.items()}


def test_a_batch_is_an_asset_with_a_check(place: Place, tmp_path: Path):
    """Counts are metadata, the table has all operations, failures fail the check, a second run executes those alone."""
    asset = batch_asset("fixtures", operations(tmp_path / "o.jsonl", *FIVE, {"op": "get", "key": "absent"}))
    FaultyResource.script(denied("k2", "k3"))
    first = materialize(place, asset)
    assert first.success
    counts = told(first)
    labels = (md.ROW_COUNT, md.BATCH_EXECUTED, md.BATCH_DONE, md.BATCH_ABSENT, md.BATCH_FAILED)
    assert [counts[label] for label in labels] == [6, 6, 3, 1, 2]
    assert counts[md.BATCH_KIND + "insert"] == 5
    (check,) = first.get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
    failures: Any = check.metadata[md.BATCH_FAILURES]
    assert [record.data["key"] for record in failures.records] == ["k2", "k3"]
    rows = pq.read_table(counts[md.BATCH_RESULTS]).to_pylist()
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed", "done", "absent"]

    FaultyResource.script(denied())
    second = materialize(place, asset)
    counts = told(second)
    assert [counts[label] for label in (*labels, md.BATCH_RESUMED)] == [6, 2, 5, 1, 0, 4]
    assert (FaultyResource.count("put"), FaultyResource.count("get")) == (2, 0)
    assert [check.passed for check in second.get_asset_check_evaluations()] == [True]
    assert second.output_for_node("fixtures") == counts[md.BATCH_RESULTS]
    assert keys(place.store) == [f"k{number}" for number in range(5)]

    fresh = {"ops": {"fixtures": {"config": {"fresh": True}}}}
    assert told(materialize(place, asset, run_config=fresh))[md.BATCH_EXECUTED] == 6


def test_what_fails_for_a_passing_reason_is_retried(place: Place, tmp_path: Path):
    """Dagster's retry executes only the operations that failed; the materialization tells of all of them."""
    path = operations(tmp_path / "o.jsonl", *FIVE)
    policy = dg.RetryPolicy(max_retries=1)
    asset = batch_asset("fixtures", path, deadline_s=0.3, window=1, retry_policy=policy)
    tried: list[str] = []

    def faults(request: Request) -> Fault | None:
        if request.operation != "put":
            return None
        tried.append(request.key)
        first_attempt = set(tried) != {f"k{number}" for number in range(5)}
        return FailBefore() if request.key == "k1" and first_attempt else None

    FaultyResource.script(faults)
    result = materialize(place, asset)
    assert result.success
    assert tried.count("k4") == 1
    assert (told(result)[md.BATCH_EXECUTED], told(result)[md.BATCH_FAILED]) == (1, 0)
    assert keys(place.store) == [f"k{number}" for number in range(5)]


def test_partitions_have_their_own_operations(place: Place, tmp_path: Path):
    """`{partition}` in the paths is the partition key."""
    days = dg.StaticPartitionsDefinition(["monday", "tuesday"])
    for number, day in enumerate(days.get_partition_keys()):
        operations(tmp_path / f"{day}.jsonl", FIVE[number])
    asset = batch_asset(
        "daily",
        tmp_path / "{partition}.jsonl",
        results=tmp_path / "{partition}.parquet",
        partitions_def=days,
        key_prefix=["batches"],
    )
    FaultyResource.script(denied())
    for day in days.get_partition_keys():
        assert materialize(place, asset, partition_key=day).success
        assert pq.read_table(tmp_path / f"{day}.parquet").num_rows == 1
    assert keys(place.store) == ["k0", "k1"]


def test_an_op_fails_for_failures(place: Place, tmp_path: Path):
    """`batch_op` executes everything, then fails and says how many failed; run again, it executes those alone."""
    op = batch_op("fixtures", operations(tmp_path / "o.jsonl", *FIVE), results=tmp_path / "results.parquet")

    @dg.job(resource_defs={"blobflow": place.resource()})
    def job():
        op()

    FaultyResource.script(denied("k1"))
    first = job.execute_in_process(instance=place.instance, raise_on_error=False)
    assert not first.success
    assert "1 of 5 operations failed" in failure(first)[1]
    FaultyResource.script(denied())
    second = job.execute_in_process(instance=place.instance)
    assert second.output_for_node("fixtures") == str(tmp_path / "results.parquet")
    assert FaultyResource.count("put") == 1
