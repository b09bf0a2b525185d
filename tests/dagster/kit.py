"""What the tests of the Dagster layer share: a place for everything, and runs through the implicit asset job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg

from blobflow.dagster import (
    ArtifactPipeline,
    BlobflowResource,
    DirectoryExporter,
    DirectoryImporter,
    ProfileConfig,
    artifact_pipeline,
)
from blobflow.stores import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import Fault, FaultyStore, Request, Tree, write_tree
from tests.kit import TREE

SMALL = ProfileConfig(chunk_size=4096, checkpoint_interval=1, workers=1)
"""Parts of 4 KiB, one after the other, a checkpoint after each."""
STEPS = [
    "orders__snapshot.export",
    "orders__remote.upload",
    "orders__remote.verify",
    "orders__mirror.download",
    "orders__mirror.import_",
]
FOLLOWED, FOLLOWING = (dg.AssetKey(["mirrors", "orders", name]) for name in ("remote", "mirror"))
"""What a mirror without pipeline follows, and the mirror itself."""
SNAPSHOT, REMOTE, MIRROR = (dg.AssetKey(["orders", stage]) for stage in ("snapshot", "remote", "mirror"))


class FaultyResource(BlobflowResource):
    """A store that fails as the test says. Dagster copies resources, so the script belongs to the class."""

    faults: ClassVar[Callable[[Request], Fault | None]] = staticmethod(lambda _: None)
    opened: ClassVar[list[FaultyStore]] = []

    def get_store(self, **options: Any) -> Store:
        store = FaultyStore(super().get_store(**options), type(self).faults)
        self.opened.append(store)
        return store

    @classmethod
    def script(cls, faults: Callable[[Request], Fault | None]) -> None:
        cls.faults = staticmethod(faults)
        cls.opened.clear()

    @classmethod
    def count(cls, operation: str) -> int:
        """Requests of that kind since the last `script`."""
        return sum(store.count(operation) for store in cls.opened)


@dataclass
class Place:
    """A source, a store and a mirror below one directory, and the pipeline `orders` between them."""

    home: Path
    instance: dg.DagsterInstance

    @property
    def source(self) -> Path:
        return self.home / "source"

    @property
    def current(self) -> Path:
        return self.home / "mirror" / "current"

    @property
    def scratch(self) -> Path:
        return self.home / "scratch"

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.home / "store")

    def write(self, tree: Tree = TREE) -> None:
        write_tree(self.source, tree)

    def resource(self, **options: Any) -> FaultyResource:
        settings = {"store": str(self.home / "store"), "scratch_dir": str(self.scratch), "custom_profile": SMALL}
        return FaultyResource(**{**settings, **options})

    @property
    def unconditional(self) -> str:
        """URL of a store without conditional writes: a directory, as fsspec sees it."""
        return f"local://{self.home}/unconditional"

    def pipeline(self, **options: Any) -> ArtifactPipeline:
        settings: dict[str, Any] = {
            "exporter": DirectoryExporter(path=self.source),
            "importer": DirectoryImporter(path=self.home / "mirror"),
            "retry_policy": None,
        }
        return artifact_pipeline("orders", **{**settings, **options})

    def run(
        self,
        pipeline: ArtifactPipeline | None = None,
        resource: BlobflowResource | None = None,
        *,
        select: Sequence[dg.AssetKey] | None = None,
        partition_key: str | None = None,
        also: dg.Definitions | None = None,
    ) -> dg.ExecuteInProcessResult:
        """One run as the UI's Materialize button starts it."""
        defs = dg.Definitions.merge(
            (pipeline or self.pipeline()).definitions,
            dg.Definitions(resources={"blobflow": resource or self.resource()}),
            also or dg.Definitions(),
        )
        return defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance, raise_on_error=False, asset_selection=select, partition_key=partition_key
        )


def succeeded(result: dg.ExecuteInProcessResult) -> list[str]:
    """The steps that succeeded, in order."""
    return [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_SUCCESS and e.step_key]


def materialization(result: dg.ExecuteInProcessResult, key: dg.AssetKey) -> dg.AssetMaterialization | None:
    """The materialization of an asset in that run."""
    found = [
        event.step_materialization_data.materialization
        for event in result.all_events
        if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION and event.asset_key == key
    ]
    return found[0] if found else None


def facts(result: dg.ExecuteInProcessResult, key: dg.AssetKey) -> dict[str, Any]:
    """The metadata of an asset's materialization as plain values."""
    made = materialization(result, key)
    assert made is not None, f"{key.to_user_string()} was not materialized"
    return {label: value.value for label, value in made.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> tuple[str, str, dict[str, Any]]:
    """The step that failed, the message of its `dg.Failure`, and its metadata."""
    (event,) = (e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_FAILURE)
    data = event.step_failure_data
    assert data.user_failure_data is not None, data.error
    metadata = {label: value.value for label, value in data.user_failure_data.metadata.items()}
    return event.step_key or "", data.user_failure_data.description or "", metadata
