"""Schedules, backfills, and mirrors that follow by themselves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from blobflow.dagster import (
    ArtifactPipeline,
    BlobflowAssetProps,
    BlobflowResource,
    BlobflowTranslator,
    DirectoryImporter,
    artifact_mirror,
    artifact_partitions,
    export_schedule,
    mirror_condition,
)
from blobflow.errors import UsageError
from blobflow.testing import read_tree, write_tree
from tests.dagster.backfill_location import REGIONS
from tests.dagster.kit import FOLLOWING, MIRROR, REMOTE, SNAPSHOT, Place
from tests.processes import wait_for
from tests.servers import free_port

HOURLY = dg.HourlyPartitionsDefinition("2026-11-20-00:00")

# Schedules


def evaluate(pipeline: ArtifactPipeline, schedule: dg.ScheduleDefinition, at: str) -> dg.RunRequest | str:
    """What a tick at that time (ISO 8601) requests, or why it does not."""
    defs = dg.Definitions.merge(
        pipeline.definitions, dg.Definitions(resources={"blobflow": BlobflowResource(store="memory://unused")})
    )
    with dg.build_schedule_context(
        scheduled_execution_time=datetime.fromisoformat(at), repository_def=defs.get_repository_def()
    ) as context:
        data = schedule.evaluate_tick(context)
    return data.run_requests[0] if data.run_requests else str(data.skip_message)


def test_a_schedule_runs_the_whole_pipeline(place: Place):
    """Without partitions every tick requests a run of the pipeline's job."""
    pipeline = place.pipeline(schedule="0 * * * *")
    (schedule,) = pipeline.schedules
    assert (schedule.name, schedule.cron_schedule, schedule.job_name) == ("orders_schedule", "0 * * * *", "orders_job")
    request = evaluate(pipeline, schedule, "2026-11-21T03:00:00+00:00")
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key is None


def test_a_schedule_of_partitions_runs_the_last_one_that_is_over(place: Place):
    """The partition that has just ended; one that goes on is not exported yet."""
    pipeline = place.pipeline(partitions_def=HOURLY)
    schedule = export_schedule(pipeline, "5 * * * *")
    request = evaluate(pipeline, schedule, "2026-11-21T03:05:00+00:00")
    assert isinstance(request, dg.RunRequest)
    assert (request.partition_key, request.run_key) == ("2026-11-21-02:00", "2026-11-21-02:00")
    assert evaluate(pipeline, schedule, "2026-11-20T00:30:00+00:00") == "no partition is over yet"


@pytest.mark.parametrize(
    ("zone", "at", "due"),
    [
        ("Asia/Tokyo", "2026-11-21T01:00:00+09:00", "2026-11-20"),
        ("America/Los_Angeles", "2026-11-21T01:00:00-08:00", "2026-11-20"),
        # The nights in which clocks are put back and forward.
        ("Europe/Berlin", "2026-10-26T01:00:00+01:00", "2026-10-25"),
        ("Europe/Berlin", "2027-03-29T01:00:00+02:00", "2027-03-28"),
    ],
)
def test_a_schedule_keeps_the_time_of_its_partitions(place: Place, zone, at, due):
    """`0 1 * * *` is an hour after the day is over where the partitions are, not in UTC."""
    days = dg.DailyPartitionsDefinition("2026-10-01", timezone=zone)
    pipeline = place.pipeline(partitions_def=days)
    schedule = export_schedule(pipeline, "0 1 * * *")
    assert schedule.execution_timezone == zone
    request = evaluate(pipeline, schedule, at)
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == due


def test_a_schedule_may_have_another_time(place: Place):
    """The time zone of the cron string can be told apart from that of the partitions."""
    days = dg.DailyPartitionsDefinition("2026-10-01", timezone="Asia/Tokyo")
    pipeline = place.pipeline(partitions_def=days)
    schedule = export_schedule(pipeline, "0 15 * * *", execution_timezone="UTC", name="mine")
    assert (schedule.name, schedule.execution_timezone) == ("mine", "UTC")
    request = evaluate(pipeline, schedule, "2026-11-20T15:00:00+00:00")
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "2026-11-20"


@pytest.mark.parametrize("partitions", [dg.StaticPartitionsDefinition(["eu"]), artifact_partitions("orders")])
def test_a_schedule_needs_partitions_of_time(place: Place, partitions):
    """A time names no region: refused when the code location is loaded."""
    with pytest.raises(UsageError, match="which partition of 'orders' is due"):
        export_schedule(place.pipeline(partitions_def=partitions), "0 * * * *")


# The mirror's condition

PARTITIONS = artifact_partitions("orders")


@dg.asset(key=["orders", "mirror"], deps=[REMOTE], partitions_def=PARTITIONS, automation_condition=mirror_condition())
def mirror() -> None:
    """Stands for a mirror of every artifact."""


class Automation:
    """What Dagster's automation sensor does: evaluate the conditions tick by tick."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.defs = dg.Definitions(assets=[dg.AssetSpec(REMOTE, partitions_def=PARTITIONS), mirror])
        self.cursor: Any = None

    def tick(self) -> list[str]:
        """The partitions of the mirror that are requested."""
        result = dg.evaluate_automation_conditions(
            self.defs, self.instance, asset_selection=dg.AssetSelection.assets(mirror), cursor=self.cursor
        )
        self.cursor = result.cursor
        return sorted(map(str, result.get_requested_partitions(mirror.key)))

    def publish(self, *keys: str) -> None:
        """What the manifest sensor tells of new artifacts."""
        self.instance.add_dynamic_partitions(str(PARTITIONS.name), keys)
        for key in keys:
            self.instance.report_runless_asset_event(dg.AssetMaterialization(REMOTE, partition=key))

    def run(self, keys: Sequence[str], *, succeeds: bool = True) -> None:
        """The runs that were requested."""
        for key in keys if succeeds else ():
            self.instance.report_runless_asset_event(dg.AssetMaterialization(mirror.key, partition=key))


@pytest.fixture
def automation() -> Iterator[Automation]:
    with dg.DagsterInstance.ephemeral() as in_memory:
        yield Automation(in_memory)


def test_a_mirror_set_up_late_catches_up(automation: Automation):
    """Artifacts that were there before the condition was first evaluated are followed, once."""
    automation.publish("a", "b")
    assert automation.tick() == ["a", "b"]
    assert automation.tick() == []
    automation.run(["a", "b"])
    assert automation.tick() == []


def test_a_mirror_follows_new_and_replaced_artifacts(automation: Automation):
    """A new artifact is requested once, one that was replaced again, and one that is there for long never."""
    automation.publish("a")
    automation.run(automation.tick())
    automation.publish("b")
    requested = automation.tick()
    assert requested == ["b"]
    automation.run(requested)
    automation.publish("a")
    requested = automation.tick()
    assert requested == ["a"]
    automation.run(requested)
    assert automation.tick() == []


def test_a_partition_without_artifact_is_not_requested(automation: Automation):
    """A key that somebody added by hand waits for its artifact."""
    automation.instance.add_dynamic_partitions(str(PARTITIONS.name), ["a"])
    assert automation.tick() == []
    automation.publish("a")
    assert automation.tick() == ["a"]


def test_a_failed_run_is_left_to_the_retries(automation: Automation):
    """What was requested and came to nothing is not requested tick after tick."""
    automation.publish("a")
    automation.run(automation.tick(), succeeds=False)
    assert [automation.tick() for _ in range(3)] == [[], [], []]
    automation.publish("a")
    assert automation.tick() == ["a"]


def test_five_hundred_new_artifacts_are_one_request(automation: Automation):
    """However many there are: one tick requests all of them, which Dagster makes one backfill of."""
    keys = [f"{number:03}" for number in range(500)]
    automation.publish(*keys)
    assert automation.tick() == keys


def test_a_pipelines_mirror_takes_condition_and_freshness_policy(place: Place):
    """Both are attributes of an asset: the translator gives them, or `map_asset_specs` does afterwards."""
    policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=26), warn_window=timedelta(hours=25))

    class Watched(BlobflowTranslator):
        def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
            spec = super().get_asset_spec(props)
            if props.stage != "mirror":
                return spec
            return spec.replace_attributes(freshness_policy=policy, automation_condition=mirror_condition())

    by_translator = place.pipeline(translator=Watched())
    plain = place.pipeline()
    mirror = plain.mirror.map_asset_specs(
        lambda spec: spec.replace_attributes(freshness_policy=policy, automation_condition=mirror_condition())
    )
    afterwards = replace(plain, mirror=mirror)
    both = place.pipeline(freshness_policy=policy, translator=Watched())
    for pipeline in (by_translator, afterwards, both):
        specs = {spec.key: spec for asset in pipeline.assets for spec in asset.specs}
        assert specs[MIRROR].freshness_policy == policy
        assert specs[MIRROR].automation_condition == mirror_condition()
        assert specs[SNAPSHOT].freshness_policy is None


def test_a_mirror_is_given_its_freshness(place: Place):
    """As an argument, of pipelines and of mirrors of other deployments; the other assets have none."""
    policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=26))
    pipeline = place.pipeline(freshness_policy=policy)
    followed = artifact_mirror("orders", DirectoryImporter(path=place.home / "mirror"), freshness_policy=policy)
    for assets, mirror_key in ((pipeline.assets, MIRROR), ([followed.mirror], FOLLOWING)):
        specs = {spec.key: spec.freshness_policy for asset in assets for spec in asset.specs}
        assert specs == {key: policy if key == mirror_key else None for key in specs}
        assert mirror_key in specs


# Backfills

LAUNCH = """
mutation ($partitions: [String!]!, $assets: [AssetKeyInput!]!) {
  launchPartitionBackfill(backfillParams: {partitionNames: $partitions, assetSelection: $assets}) {
    __typename ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""
STATUS = """
query ($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }
"""


class Deployment:
    """A daemon and a web server over the pipeline in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        (home / "dagster").mkdir()
        (home / "dagster" / "dagster.yaml").write_text(
            "telemetry: {enabled: false}\nconcurrency: {runs: {max_concurrent_runs: 4}}\n"
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        environment = {
            **os.environ,
            "BACKFILL_HOME": str(self.home),
            "DAGSTER_HOME": str(self.home / "dagster"),
        }
        where = ["-m", "tests.dagster.backfill_location"]
        commands = [
            ["dagster-daemon", "run", *where],
            ["dagster-webserver", "-h", "127.0.0.1", "-p", str(self.port), *where],
        ]
        with open(self.home / "processes.log", "ab") as log, ExitStack() as stack:
            # Two processes that make the same new database get into each other's way.
            stack.enter_context(dg.DagsterInstance.from_config(str(self.home / "dagster")))
            for program, *arguments in commands:
                process = subprocess.Popen(
                    [Path(sys.executable).parent / program, *arguments],
                    env=environment,
                    cwd=EXAMPLE.parents[1],
                    start_new_session=True,
                    stdout=log,
                    stderr=log,
                )
                stack.callback(process.wait)
                stack.callback(os.killpg, process.pid, signal.SIGKILL)
            self.wait_for(self._answers)
            yield

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """What the web server's GraphQL answers, as it does to the UI."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, 2700, self.home / "processes.log")

    def _answers(self) -> bool:
        try:
            return self.ask("{ repositoriesOrError { __typename } }")["repositoriesOrError"] == {
                "__typename": "RepositoryConnection"
            }
        except OSError:
            return False


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_backfill_brings_every_partition(tmp_path: Path):
    """Started as the UI starts it: one run per partition brings each to its own mirror."""
    for region in REGIONS:
        write_tree(tmp_path / "source" / region, {"region": region, "more": {"data": region * 100}})
    deployment = Deployment(tmp_path)
    with deployment.running():
        launched = deployment.ask(
            LAUNCH, partitions=REGIONS, assets=[{"path": list(key.path)} for key in (SNAPSHOT, REMOTE, MIRROR)]
        )["launchPartitionBackfill"]
        backfill = launched["backfillId"]

        def status() -> str:
            return str(deployment.ask(STATUS, id=backfill)["partitionBackfillOrError"]["status"])

        deployment.wait_for(lambda: status() not in ("REQUESTED", "IN_PROGRESS"))
        assert status() == "COMPLETED_SUCCESS"

    for region in REGIONS:
        assert read_tree(tmp_path / "mirror" / region / "current") == read_tree(tmp_path / "source" / region)
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        assert [run.dagster_run.status for run in instance.get_run_records()] == [dg.DagsterRunStatus.SUCCESS] * len(
            REGIONS
        )
        for key in (SNAPSHOT, REMOTE, MIRROR):
            made = instance.fetch_materializations(key, limit=100).records
            assert sorted(str(record.partition_key) for record in made) == REGIONS


# The instance

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "dagster.yaml"


def test_the_example_of_an_instance_is_one(tmp_path: Path):
    """Dagster takes `examples/dagster.yaml` as it is, with the settings that killed workers make necessary."""
    shutil.copy(EXAMPLE, tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert (instance.run_retries_enabled, instance.run_retries_max_retries) == (True, 3)
        assert instance.run_monitoring_enabled
        assert instance.get_settings("run_monitoring")["free_slots_after_run_end_seconds"] == 60
        assert instance.freshness_enabled


def test_final_errors_are_not_retried_as_runs_wherever_an_instance_is_shown():
    """There is one `dagster.yaml`, and the lines of it that a page shows are as they are there."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in files if name.endswith("dagster.yaml")] == ["examples/dagster.yaml"]
    whole = yaml.safe_load(EXAMPLE.read_text())
    assert whole["run_retries"] == {"enabled": True, "max_retries": 3, "retry_on_asset_or_op_failure": False}
    shown = [
        yaml.safe_load(block)
        for name in files
        if name.endswith(".md")
        for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
        if re.search(r"^run_(retries|monitoring):", block, re.MULTILINE)
    ]
    assert len(shown) == 1  # the tutorial's
    for settings in shown:
        assert settings["run_retries"] == whole["run_retries"]
        assert all(values.items() <= whole[name].items() for name, values in settings.items())


def test_the_example_has_postgres_without_secrets():
    """The commented block is YAML, and names environment variables where credentials belong."""
    _, _, block = EXAMPLE.read_text().partition("#\n# storage:")
    uncommented = "\n".join(line.removeprefix("# ") for line in f"# storage:{block}".splitlines())
    settings = yaml.safe_load(uncommented)["storage"]["postgres"]["postgres_db"]
    assert settings["scheme"] == "postgresql+psycopg2"
    assert settings["password"] == {"env": "DAGSTER_PG_PASSWORD"}
