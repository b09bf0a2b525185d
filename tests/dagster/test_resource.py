"""The resource: defaults, profiles, credentials and their secrecy."""

from __future__ import annotations

import importlib
import pkgutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import blobflow.dagster
from blobflow.config import ChunkProfile
from blobflow.dagster import (
    BlobflowResource,
    DirectoryImporter,
    ProfileConfig,
    ReceiverResource,
    artifact_pipeline,
    metadata as md,
)
from blobflow.errors import UsageError
from blobflow.stores import Store
from blobflow.testing import read_tree
from tests.dagster.kit import Place, facts, failure
from tests.kit import TREE
from tests.servers import S3Endpoint


def configured(place: Place, resource: BlobflowResource) -> BlobflowResource:
    """The resource as a step sees it."""
    seen: list[BlobflowResource] = []

    @dg.op
    def look(blobflow: BlobflowResource) -> None:
        seen.append(blobflow)

    @dg.job(resource_defs={"blobflow": resource})
    def looking() -> None:
        look()

    looking.execute_in_process(instance=place.instance)
    return seen[0]


def test_everything_lies_in_the_instance_by_default(place):
    """Without any setting, store and scratch directory are in the Dagster instance's storage."""
    blobflow = configured(place, BlobflowResource())
    storage = Path(place.instance.storage_directory())
    assert blobflow.get_store().url == (storage / "blobflow" / "store").as_uri()
    assert blobflow.scratch_path("a", "b") == storage / "blobflow" / "scratch" / "a" / "b"
    assert blobflow.get_profile() == ChunkProfile.tactical()


def test_outside_of_a_run_dagster_home_counts(monkeypatch, tmp_path):
    """A script may use the resource; without an instance to look at, it takes DAGSTER_HOME or asks for paths."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert BlobflowResource().scratch_path() == tmp_path / "storage" / "blobflow" / "scratch"
    monkeypatch.delenv("DAGSTER_HOME")
    with pytest.raises(UsageError, match="storage of the Dagster instance is unknown") as refusal:
        BlobflowResource().get_store()
    assert "scratch_dir" in refusal.value.hint
    assert BlobflowResource(scratch_dir=str(tmp_path)).scratch_path("x") == tmp_path / "x"


def test_a_profile_has_a_name_or_fields(place):
    """Presets by name; `custom_profile` takes the fields of a `ChunkProfile` and its validation."""
    assert BlobflowResource(profile="edge").get_profile() == ChunkProfile.edge()
    custom = BlobflowResource(custom_profile=ProfileConfig(chunk_size=5, checkpoint_interval=7))
    assert configured(place, custom).get_profile() == ChunkProfile.custom(5, 7)
    with pytest.raises(ValueError, match="chunk_size"):
        ProfileConfig(chunk_size=0)


def configurable() -> list[Any]:
    """Every resource, IO manager and config that the Dagster layer defines."""
    names = [found.name for found in pkgutil.iter_modules(blobflow.dagster.__path__)]
    modules = [importlib.import_module(f"blobflow.dagster.{name}") for name in names]
    members = {member for module in modules for member in vars(module).values() if isinstance(member, type)}
    ours = [kind for kind in members if issubclass(kind, dg.Config) and kind.__module__.startswith("blobflow.")]
    return sorted(ours, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", configurable())
def test_every_resource_io_manager_and_config_refuses_an_unknown_field(kind: Any):
    """Dagster drops it without a word, and with it, say, the endpoint; ours names it and the one that was meant."""
    name = next(iter(kind.model_fields))
    misspelt = f"{name}x"
    makers = [kind, kind.configure_at_launch] if hasattr(kind, "configure_at_launch") else [kind]
    for make in makers:
        with pytest.raises(UsageError) as refusal:
            make(**{misspelt: "not-for-anybody"})
        assert refusal.value.message == f"{kind.__name__} has no field {misspelt!r}: did you mean {name!r}?"


def test_the_endpoint_that_was_misspelt_is_not_aws():
    """The example of the report."""
    with pytest.raises(UsageError, match="no field 'endpont_url': did you mean 'endpoint_url'"):
        BlobflowResource(store="s3://bucket", endpont_url="http://localhost")  # pyright: ignore[reportCallIssue]
    with pytest.raises(UsageError, match="no field 'chunk_siez': did you mean 'chunk_size'"):
        BlobflowResource(custom_profile={"chunk_siez": 1})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("field", ["store", "endpoint_url", "secret_access_key", "leases"])
def test_a_receiver_takes_no_store_and_no_keys(field: str):
    """Its directory is the store; what would be ignored is refused."""
    given: dict[str, Any] = {"directory": "/srv/receiver", field: "x"}
    with pytest.raises(UsageError, match=f"ReceiverResource has no field '{field}'"):
        ReceiverResource(**given)


def test_two_profiles_are_refused():
    """One of them would be ignored."""
    with pytest.raises(UsageError, match="the profile 'edge' and a custom_profile"):
        BlobflowResource(profile="edge", custom_profile=ProfileConfig(chunk_size=5))


def test_the_stores_of_a_run_are_closed_with_it(place: Place, moto_s3: S3Endpoint):
    """A code server that runs job after job keeps no connections of theirs, whatever their steps opened."""
    opened: list[Store] = []
    closed: list[Store] = []

    class Watching(BlobflowResource):
        def get_store(self, **options: Any) -> Store:
            store = super().get_store(**options)
            release = store.close

            def close() -> None:
                closed.append(store)
                release()

            store.close = close
            opened.append(store)
            return store

    resource = Watching(
        store=f"s3://{moto_s3.new_bucket()}",
        endpoint_url=moto_s3.endpoint_url,
        region=moto_s3.region,
        access_key_id=moto_s3.access_key_id,
        secret_access_key=moto_s3.secret_access_key,
        scratch_dir=str(place.scratch),
    )
    assert place.run(resource=resource).success
    assert len(opened) >= 5
    assert {id(store) for store in closed} == {id(store) for store in opened}


def test_secrets_reach_the_store_and_nothing_else(place, moto_s3: S3Endpoint, monkeypatch):
    """With credentials from the environment a run works, and no trace of them is in events, metadata, files or repr."""
    secret = "s3cr3t-nobody-may-see"
    monkeypatch.setenv("ORDERS_KEY_ID", "orders-key-id")
    monkeypatch.setenv("ORDERS_SECRET", secret)
    resource = place.resource(
        store=f"s3://{moto_s3.new_bucket()}/backups",
        endpoint_url=moto_s3.endpoint_url,
        region=moto_s3.region,
        access_key_id=dg.EnvVar("ORDERS_KEY_ID"),
        secret_access_key=dg.EnvVar("ORDERS_SECRET"),
        session_token=dg.EnvVar("ORDERS_SECRET"),
    )
    result = place.run(resource=resource)

    assert result.success
    assert read_tree(place.current) == TREE
    assert facts(result, dg.AssetKey(["orders", "remote"]))["dagster/uri"].startswith("s3://")
    shown = configured(place, resource)
    assert shown.secret_access_key == secret
    assert secret not in repr(shown) + str(shown)
    for event in result.all_events:
        assert secret not in repr(event)
    for path in place.home.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("field", ["access_key_id", "secret_access_key", "session_token"])
def test_a_spoiled_secret_fails_the_run_at_once_and_is_left_nowhere(place: Place, monkeypatch, field: str):
    """A line break in the middle: the step fails for good, by the name of the secret, and no file or event shows it."""
    secret = "s3cr3t-nobody-may-see"
    keys = dict.fromkeys(("access_key_id", "secret_access_key", "session_token"), "x") | {field: f"{secret}\nx"}
    for name, value in keys.items():
        monkeypatch.setenv(f"ORDERS_{name.upper()}", value)
    variables = {name: dg.EnvVar(f"ORDERS_{name.upper()}") for name in keys}
    resource = place.resource(store="s3://bucket", endpoint_url="http://127.0.0.1:1", **variables)
    result = place.run(resource=resource)

    _, message, metadata = failure(result)
    assert metadata[md.ERROR] == "StoreConfigurationError"
    assert field.replace("_", " ") in message
    assert not [event for event in result.all_events if event.event_type_value == "STEP_UP_FOR_RETRY"]
    for event in result.all_events:
        assert secret not in repr(event)
    for entry in place.instance.all_logs(result.run_id):
        assert secret not in entry.to_json()
    for path in place.home.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_the_password_of_the_leases_is_not_told(place: Place, monkeypatch: pytest.MonkeyPatch):
    """A database that does not answer is named in the failure without its password."""
    secret = "s3cr3t-nobody-may-see"
    monkeypatch.setenv("ORDERS_LEASES", f"postgresql+psycopg2://orders:{secret}@127.0.0.1:1/leases")
    result = place.run(resource=place.resource(leases=dg.EnvVar("ORDERS_LEASES")))
    step, message, metadata = failure(result)
    assert (step, metadata[md.ERROR]) == ("orders__snapshot.export", "StoreUnavailable")
    assert "postgresql+psycopg2://orders:***@127.0.0.1:1/leases" in message
    for event in result.all_events:
        assert secret not in repr(event)


@pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is deprecated:DeprecationWarning")  # Dagster's own
def test_credentials_may_come_from_an_s3_resource(place, moto_s3: S3Endpoint, monkeypatch):
    """dagster-aws users configure endpoint, region and keys once."""
    from dagster_aws.s3 import S3Resource

    monkeypatch.setenv("SHARED_SECRET", moto_s3.secret_access_key)
    shared = S3Resource(
        endpoint_url=moto_s3.endpoint_url,
        region_name=moto_s3.region,
        aws_access_key_id=moto_s3.access_key_id,
        aws_secret_access_key=dg.EnvVar("SHARED_SECRET"),
    )
    resource = place.resource(store=f"s3://{moto_s3.new_bucket()}", s3=shared)
    assert place.run(resource=resource).success
    assert read_tree(place.current) == TREE
    assert moto_s3.secret_access_key not in repr(configured(place, resource))


@pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"profile_name": "backup"}, {}, "profile_name"),
        ({}, {"access_key_id": "a", "secret_access_key": "b"}, "keys are given twice"),
    ],
)
def test_an_s3_resource_that_cannot_be_followed_is_refused(place, theirs, ours, message):
    """What would be ignored is refused, with the way out."""
    from dagster_aws.s3 import S3Resource

    resource = configured(place, BlobflowResource(store="s3://bucket", s3=S3Resource(**theirs), **ours))
    with pytest.raises(UsageError, match=message) as refusal:
        resource.get_store()
    assert refusal.value.hint


def test_schedules_follow_the_pipeline(place):
    """A cron string gives a schedule of the whole pipeline; with time partitions a tick asks for the last one."""
    (plain,) = place.pipeline(schedule="0 * * * *").schedules
    assert (plain.name, plain.cron_schedule, plain.job_name) == ("orders_schedule", "0 * * * *", "orders_job")

    daily = artifact_pipeline(
        "daily",
        exporter=lambda day: None,  # pyright: ignore[reportArgumentType]  # never called
        importer=DirectoryImporter(path=place.home / "mirror"),
        partitions_def=dg.DailyPartitionsDefinition(start_date="2026-01-01"),
        schedule="15 6 * * *",
    )
    defs = dg.Definitions.merge(daily.definitions, dg.Definitions(resources={"blobflow": place.resource()}))
    tick = dg.build_schedule_context(
        instance=place.instance,
        repository_def=defs.get_repository_def(),
        scheduled_execution_time=datetime(2026, 3, 5, 6, 15, tzinfo=timezone.utc),
    )
    requests = defs.resolve_schedule_def("daily_schedule").evaluate_tick(tick).run_requests
    assert [request.partition_key for request in requests or ()] == ["2026-03-04"]
