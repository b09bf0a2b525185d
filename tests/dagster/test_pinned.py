"""Mirrors that are held to a digest, whoever writes the bucket."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from blobflow import DirectoryImporter, move_ref, upload
from blobflow.dagster import artifact_mirror, metadata as md
from blobflow.testing import read_tree
from tests.dagster.kit import FOLLOWING, Place, facts, failure
from tests.kit import TREE, artifact_of


def publish(place: Place, name: str, tree: Any) -> str:
    """The digest of an artifact that takes the place of the one under the key, together with the ref."""
    artifact = artifact_of(place.home / name, tree)
    upload(place.store, "orders/it", artifact, overwrite=True)
    move_ref(place.store, "orders/latest", "orders/it", artifact.digest)
    return artifact.digest


def run(place: Place, *, digest: str | None = None, config: str | None = None, lanes: int = 1) -> Any:
    """The mirror's job, held to a digest by its definition or by the run's configuration."""
    importer = DirectoryImporter(path=place.home / "mirror")
    mirror = artifact_mirror("orders", importer, digest=digest, lanes=lanes, retry_policy=None)
    defs = dg.Definitions.merge(mirror.definitions, dg.Definitions(resources={"blobflow": place.resource()}))
    pinned: dict[str, Any] = {"config": {"digest": config}}
    download = pinned if lanes == 1 else {"ops": {"plan": pinned}}
    return defs.resolve_job_def("orders_mirror_job").execute_in_process(
        instance=place.instance,
        raise_on_error=False,
        run_config={"ops": {"mirrors__orders__mirror": {"ops": {"download": download}}}} if config else {},
    )


@pytest.mark.seed("W1.9")
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("how", ["digest", "config"])
def test_who_writes_the_bucket_cannot_pass_for_a_pinned_artifact(place: Place, how: str, lanes: int):
    """Payload, manifest and ref are forged and agree: a mirror that is held to a digest keeps what it shows."""
    right = publish(place, "right", TREE)
    held: dict[str, Any] = {how: right, "lanes": lanes}
    assert facts(run(place, **held), FOLLOWING)[md.ARTIFACT_DIGEST] == right
    forged = publish(place, "forged", {"forged": "file"})

    result = run(place, **held)

    _, message, told = failure(result)
    assert told[md.ERROR] == "DigestMismatch"
    assert f"is the artifact {forged}, not {right}" in message
    assert read_tree(place.current) == TREE
    # Who holds it to nothing has to believe the bucket.
    assert run(place, lanes=lanes).success
    assert read_tree(place.current) == {"forged": "file"}
