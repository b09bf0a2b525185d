"""Layers as assets: what was synced, what was skipped, and what a retry continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.dagster import layer_assets, layer_restore_job
from blobflow.dagster.checkpoints import TRANSFERS
from blobflow.errors import UsageError
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FailBefore, read_tree, write_tree
from tests.dagster.kit import SMALL, FaultyResource, facts, failure, materialization
from tests.kit import TREE, noise

WEB = dg.AssetKey(["layers", "web-1"])
COPY = dg.AssetKey(["layers", "web-2"])


class LayerPlace:
    """Two containers of the same content, a store, and runs."""

    def __init__(self, home: Path, instance: dg.DagsterInstance) -> None:
        self.home = home
        self.instance = instance
        self.sources = [write_tree(home / name, TREE) for name in ("web-1", "web-2")]

    def resource(self) -> FaultyResource:
        return FaultyResource(store=str(self.home / "store"), custom_profile=SMALL)

    def definitions(self, **options: Any) -> dg.Definitions:
        assets = layer_assets(
            {path.name: path for path in self.sources}, home=self.home / "state", **{"retry_policy": None, **options}
        )
        restore = layer_restore_job(home=self.home / "elsewhere", retry_policy=None)
        return dg.Definitions(assets=assets, jobs=[restore], resources={"blobflow": self.resource()})

    def run(self, *keys: dg.AssetKey, **options: Any) -> dg.ExecuteInProcessResult:
        job = self.definitions(**options).resolve_implicit_global_asset_job_def()
        return job.execute_in_process(instance=self.instance, raise_on_error=False, asset_selection=keys)

    def restore(self, **config: Any) -> dg.ExecuteInProcessResult:
        job = self.definitions().resolve_job_def("blobflow_layer_restore")
        run_config = {"ops": {"blobflow_layer_restore__restore": {"config": config}}}
        return job.execute_in_process(instance=self.instance, raise_on_error=False, run_config=run_config)


@pytest.fixture
def layer_place(tmp_path: Path, instance: dg.DagsterInstance) -> LayerPlace:
    FaultyResource.script(lambda _: None)
    return LayerPlace(tmp_path, instance)


def test_one_asset_per_container_and_skips_are_seen(layer_place: LayerPlace):
    """Uploaded, shared by the second container, unchanged the next time: one data version for one content."""
    first, shared, again = layer_place.run(WEB), layer_place.run(COPY), layer_place.run(WEB)
    seen = [facts(first, WEB), facts(shared, COPY), facts(again, WEB)]
    assert [one["blobflow/status"] for one in seen] == ["uploaded", "shared", "unchanged"]
    assert [one["blobflow/bytes_sent"] > 0 for one in seen] == [True, False, False]
    assert len({one["blobflow/layer_digest"] for one in seen}) == 1
    assert (seen[0]["dagster/size_bytes"], seen[0]["blobflow/parts"]) == (seen[1]["dagster/size_bytes"], 7)
    made = materialization(again, WEB)
    assert made is not None
    assert (made.tags or {})["dagster/data_version"] == seen[0]["blobflow/layer_digest"]
    (layer_place.sources[0] / "more").write_text("more")
    assert facts(layer_place.run(WEB), WEB)["blobflow/status"] == "uploaded"


def test_a_failed_sync_is_continued_by_the_next_run(layer_place: LayerPlace):
    """The failure says how far it had come; the journal of transfers keeps both attempts."""
    (layer_place.sources[0] / "large").write_bytes(noise(9 << 20))
    FaultyResource.script(
        lambda request: FailBefore() if request.operation == "put_part" and request.number > 1000 else None
    )
    step, message, metadata = failure(layer_place.run(WEB, retry_policy=None))
    assert (step, "put_part" in message) == ("layers__web_1", True)
    assert metadata["blobflow/bytes_done"] > 0
    FaultyResource.script(lambda _: None)
    seen = facts(layer_place.run(WEB), WEB)
    assert seen["blobflow/status"] == "uploaded"
    assert seen["blobflow/resumed_from_bytes"] >= 900 * 4096
    assert FaultyResource.count("put_part") == seen["blobflow/parts"] - seen["blobflow/resumed_from_bytes"] // 4096
    assert seen["blobflow/retries"] == 1
    observations = layer_place.instance.fetch_observations(TRANSFERS, limit=100).records
    states = [o.asset_observation.metadata["blobflow/status"].value for o in observations if o.asset_observation]
    assert {"failed", "done"} <= set(states)


def test_a_restore_is_a_job(layer_place: LayerPlace, tmp_path: Path):
    """Container and path are configuration; a second one changes nothing; what is in the way is named."""
    layer_place.run(WEB)
    back = tmp_path / "back"
    assert layer_place.restore(container="web-1", path=str(back)).success
    assert read_tree(back) == read_tree(layer_place.sources[0])
    assert layer_place.restore(container="web-1", path=str(back)).success
    (back / "mine").write_text("mine")
    _, message, metadata = failure(layer_place.restore(container="web-1", path=str(back)))
    assert "was changed since" in message
    assert metadata["blobflow/error"] == "DestinationNotEmpty"
    assert layer_place.restore(container="web-1", path=str(back), overwrite=True).success
    assert read_tree(back) == read_tree(layer_place.sources[0])
    assert LocalStore(tmp_path / "store").list_uploads() == []


def test_deps_of_nobody_are_refused(tmp_path: Path):
    """A typing error in a container's name."""
    with pytest.raises(UsageError, match="'wbe'"):
        layer_assets({"web": tmp_path}, deps={"wbe": ["a"]})
