"""The configuration for Kubernetes that the documentation shows."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from blobflow.dagster import DirectoryExporter, DirectoryImporter, artifact_pipeline

FILE = Path(__file__).resolve().parents[2] / "docs" / "kubernetes.yaml"
LANES = 6

EXECUTOR = {
    *("enable_owner_references", "env_config_maps", "env_secrets", "env_vars", "image_pull_policy"),
    *("image_pull_secrets", "job_image", "job_namespace", "kubeconfig_file", "labels", "load_incluster_config"),
    *("max_concurrent", "per_step_k8s_config", "resources", "retries", "scheduler_name", "security_context"),
    *("service_account_name", "step_dependency_config", "step_k8s_config", "tag_concurrency_limits", "volume_mounts"),
    "volumes",
}
"""Fields of the executor, of dagster-k8s 0.29."""
STEP = {
    *("container_config", "pod_template_spec_metadata", "pod_spec_config", "job_config", "job_metadata"),
    *("job_spec_config", "deployment_metadata", "service_metadata", "merge_behavior"),
}
CONTAINER = {"env", "env_from", "image", "resources", "security_context", "volume_mounts", "working_dir"}
POD_SPEC = {
    *("affinity", "node_selector", "security_context", "service_account_name", "termination_grace_period_seconds"),
    *("tolerations", "topology_spread_constraints", "volumes"),
}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")


@pytest.fixture
def document() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def steps_of_kubernetes(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [document["step_k8s_config"], *document["per_step_k8s_config"].values()]


def test_every_field_is_known(document: dict[str, Any]):
    """No field is misspelled: the executor would refuse it, or Kubernetes would."""
    assert document.keys() <= EXECUTOR
    for step in steps_of_kubernetes(document):
        assert step.keys() <= STEP
        assert step["container_config"].keys() <= CONTAINER
        assert step.get("pod_spec_config", {}).keys() <= POD_SPEC
        for kind in ("requests", "limits"):
            for quantity in step["container_config"]["resources"].get(kind, {}).values():
                assert QUANTITY.fullmatch(str(quantity)), quantity


def test_what_is_mounted_exists(document: dict[str, Any]):
    """Every mount has its volume, and a lane has room for the payload that it holds and for Python."""
    step = document["step_k8s_config"]
    volumes = {volume["name"] for volume in step["pod_spec_config"]["volumes"]}
    assert {mount["name"] for mount in step["container_config"]["volume_mounts"]} == volumes
    assert document["max_concurrent"] >= LANES


def test_the_named_steps_are_steps_of_the_pipeline(document: dict[str, Any], tmp_path: Path):
    """A step that does not exist would be configured in vain."""
    pipeline = artifact_pipeline(
        "orders",
        exporter=DirectoryExporter(path=tmp_path),
        importer=DirectoryImporter(path=tmp_path / "mirror"),
        lanes=LANES,
    )
    definitions = dg.Definitions.merge(pipeline.definitions, dg.Definitions(resources={"blobflow": object()}))
    job = definitions.resolve_job_def("orders_job")
    with dg.DagsterInstance.ephemeral() as instance:
        plan = instance.create_run_for_job(job)
        snapshot = instance.get_execution_plan_snapshot(plan.execution_plan_snapshot_id or "")
    keys = {step.key for step in snapshot.steps}
    assert keys >= set(document["per_step_k8s_config"])
    assert {key for key in keys if ".lane_" in key} == {
        f"orders__{stage}.lane_{lane}" for stage in ("remote.upload", "mirror.download") for lane in range(LANES)
    }
    (constraint,) = document["step_k8s_config"]["pod_spec_config"]["topology_spread_constraints"]
    assert constraint["label_selector"]["match_labels"] == {"dagster/job": pipeline.job.name}


if find_spec("dagster_k8s") is not None:  # no dependency; without it the tests above have to do

    def test_the_executor_takes_it(document: dict[str, Any]):
        """The executor's own schema, and Kubernetes's models, decide."""
        from dagster_k8s import k8s_job_executor  # pyright: ignore[reportMissingImports]
        from dagster_k8s.models import k8s_model_from_dict  # pyright: ignore[reportMissingImports]
        from kubernetes import client  # pyright: ignore[reportMissingImports]

        job = dg.GraphDefinition(name="empty").to_job(executor_def=k8s_job_executor)
        assert dg.validate_run_config(job, {"execution": {"config": document}})
        for step in steps_of_kubernetes(document):
            k8s_model_from_dict(client.V1Container, {**step["container_config"], "name": "lane"})
            k8s_model_from_dict(client.V1PodSpec, {**step.get("pod_spec_config", {}), "containers": []})
