"""The pipeline as Dagster runs it: through the implicit asset job, as the UI does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.backends import ImportResult
from blobflow.coordination.lease import Lease
from blobflow.coordination.refs import read_ref
from blobflow.dagster import (
    BlobflowAssetProps,
    BlobflowTranslator,
    DirectoryExporter,
    DirectoryImporter,
    PipelineSpec,
    build_pipeline,
    metadata as md,
    steps,
)
from blobflow.dagster.handles import PIN
from blobflow.dagster.pipeline import artifact_pipeline
from blobflow.errors import PermissionMissing, StoreUnavailable, TransferBusy, UsageError
from blobflow.testing import FailBefore, Fault, Hook, Request, read_tree, write_tree
from blobflow.transport import list_artifacts
from tests.dagster.kit import (
    MIRROR,
    REMOTE,
    SNAPSHOT,
    STEPS,
    FaultyResource,
    Place,
    facts,
    failure,
    materialization,
    succeeded,
)
from tests.kit import TREE, flip_a_byte


def keys(place: Place) -> list[str]:
    return [entry.key for entry in list_artifacts(place.store)]


def fails_from_part(number: int):
    """The store refuses part `number` and all parts after it."""

    def faults(request: Request) -> Fault | None:
        if request.operation == "put_part" and request.number >= number:
            return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))
        return None

    return faults


def test_five_steps_bring_a_tree_to_its_mirror(place):
    """One run exports, uploads, verifies, downloads and imports, and the mirror shows the source's tree."""
    result = place.run()

    assert result.success
    assert succeeded(result) == STEPS
    assert read_tree(place.current) == TREE
    (key,) = keys(place)
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert ref.key == key


def test_the_three_assets_share_one_data_version(place):
    """Snapshot, remote and mirror carry the artifact's digest as their data version."""
    result = place.run()
    made = [materialization(result, asset) for asset in (SNAPSHOT, REMOTE, MIRROR)]
    versions = {m.tags["dagster/data_version"] for m in made if m and m.tags}
    ref = read_ref(place.store, "orders/latest")
    assert ref is not None
    assert versions == {ref.manifest_sha256}
    assert len([m for m in made if m]) == 3


def test_metadata_says_what_happened(place):
    """Sizes, counts, places and digests stand in the materializations, under labels that Dagster plots."""
    write_tree(place.source, {"skip.me": "x"})
    (place.source / "link").symlink_to("skip.me")
    pipeline = place.pipeline(
        exporter=DirectoryExporter(path=place.source, exclude=("/skip.*", "*.tpm"), symlinks="skip"),
        verify_mode="deep",
    )
    result = place.run(pipeline)

    snapshot, remote, mirror = (facts(result, asset) for asset in (SNAPSHOT, REMOTE, MIRROR))
    (key,) = keys(place)
    payload = place.home / "store" / key
    content = sum(path.stat().st_size for path in place.current.rglob("*") if path.is_file())
    assert (snapshot[md.EXCLUDED], snapshot[md.SYMLINKS_SKIPPED]) == (1, 1)
    assert snapshot[md.EXCLUDE_UNMATCHED] == ["*.tpm"]
    log = [entry.user_message for entry in place.instance.all_logs(result.run_id)]
    assert "exclude.unmatched pattern='*.tpm'" in log
    assert snapshot[md.MEMBERS] == mirror[md.MEMBERS] == 6
    assert snapshot[md.SIZE] == mirror[md.SIZE] == content
    table = [(record.data["path"], record.data["bytes"]) for record in snapshot[md.LARGEST_MEMBERS].records]
    assert table[:2] == [("big.bin", 20_000), ("nested/deep/other", 5_000)]
    assert remote[md.URI] == payload.as_uri()
    assert remote[md.SIZE] == payload.stat().st_size == remote[md.BYTES_SENT]
    assert remote[md.THROUGHPUT] > 0
    assert remote[md.BYTES_RESUMED] == 0
    assert (mirror[md.MIRROR_STATUS], mirror[md.MIRROR_PATH]) == ("Following", str(place.current))
    (check,) = result.get_asset_check_evaluations()
    assert (check.passed, check.metadata[md.VERIFY_MODE].value) == (True, "deep")
    assert [facts_[md.STATUS] for facts_ in (snapshot, remote, mirror)] == ["exported", "uploaded", "imported"]


def test_what_is_unchanged_is_not_moved_again(place):
    """A second run sends, fetches and imports nothing, and says `unchanged` everywhere."""
    first = place.run()
    before = place.current.readlink()
    FaultyResource.script(lambda _: None)
    second = place.run()

    assert second.success
    assert [facts(second, asset)[md.STATUS] for asset in (SNAPSHOT, REMOTE, MIRROR)] == ["unchanged"] * 3
    assert FaultyResource.count("put_part") == 0
    assert facts(second, REMOTE)[md.BYTES_SENT] == facts(second, MIRROR)[md.BYTES_RECEIVED] == 0
    assert place.current.readlink() == before
    for asset in (SNAPSHOT, REMOTE, MIRROR):
        one, two = (materialization(result, asset) for result in (first, second))
        assert one is not None
        assert two is not None
        assert (one.tags or {})["dagster/data_version"] == (two.tags or {})["dagster/data_version"]


@pytest.mark.parametrize("change", ["content", "executable bit"])
def test_what_has_changed_travels(place, change):
    """Other bytes, or another executable bit, make another artifact, and the mirror follows."""
    place.run()
    file = place.source / "nested" / "deep" / "file.txt"
    if change == "content":
        file.write_text("HELLO\n")
    else:
        file.chmod(0o755)
    result = place.run()

    assert result.success
    assert facts(result, REMOTE)[md.STATUS] == "uploaded"
    assert read_tree(place.current) == read_tree(place.source)
    assert len(keys(place)) == 2


def damaging_before_verify(place: Place) -> Callable[[Request], Fault | None]:
    """Damages the payload when verify begins: the third step to open the store begins with a look at the payload."""
    left = [place]

    def damage(request: Request) -> None:
        left.pop()
        flip_a_byte(place.home / "store" / request.key)

    def faults(request: Request) -> Fault | None:
        verifies = len(FaultyResource.opened) == 3 and request.operation == "head" and request.key.endswith(".tar")
        return Hook(damage) if left and verifies else None

    return faults


def test_a_payload_damaged_on_its_way_is_never_materialized(place: Place):
    """Its content is not at hand any more: the check fails, nothing is materialized, neither ref nor mirror move."""
    place.run()
    before = read_ref(place.store, "orders/latest")
    write_tree(place.source, {"new": "file"})

    FaultyResource.script(damaging_before_verify(place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blobflow.dagster.scratch.artifact_in", lambda _: None)
        result = place.run()

    step, message, metadata = failure(result)
    assert step == "orders__remote.verify"
    assert "damaged in storage or on the way" in message
    assert metadata[md.ERROR] in {"DigestMismatch", "ChecksumMismatch"}
    assert "restore it" in metadata[md.HINT]
    (check,) = result.get_asset_check_evaluations()
    assert (check.passed, check.severity, check.check_name) == (False, dg.AssetCheckSeverity.ERROR, "verified")
    assert "materialize orders/snapshot and orders/remote in one run" in (check.description or "")
    assert materialization(result, REMOTE) is None
    assert materialization(result, MIRROR) is None
    assert read_ref(place.store, "orders/latest") == before
    assert read_tree(place.current) == TREE


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_damaged_payload_does_not_wedge_its_pipeline(place: Place, lanes: int):
    """Damage at rest is found by the next run, which holds the same content and heals it; then all is quiet."""
    pipeline = place.pipeline(lanes=lanes)
    assert place.run(pipeline).success
    before = read_ref(place.store, "orders/latest")
    (key,) = keys(place)
    flip_a_byte(place.home / "store" / key)

    healing = place.run(pipeline)
    assert healing.success
    remote = facts(healing, REMOTE)
    assert remote[md.STATUS] == "healed"
    assert "Mismatch" in remote[md.DAMAGE]
    assert remote[md.BYTES_SENT] == remote[md.SIZE]
    (check,) = healing.get_asset_check_evaluations()
    assert check.passed
    assert "it was damaged" in (check.description or "")
    after = read_ref(place.store, "orders/latest")
    assert before is not None
    assert after is not None
    assert (after.key, after.manifest_sha256) == (before.key, before.manifest_sha256)
    assert place.store.exists(key + ".damaged.json")

    assert facts(place.run(pipeline), REMOTE)[md.STATUS] == "unchanged"
    assert read_tree(place.current) == TREE


def test_damage_on_the_way_is_healed_in_the_same_run(place: Place):
    """What was just sent does not arrive whole: sent once more, verified, mirrored."""
    FaultyResource.script(damaging_before_verify(place))
    result = place.run()
    assert result.success
    assert facts(result, REMOTE)[md.STATUS] == "healed"
    assert read_tree(place.current) == TREE


def test_damage_without_the_content_is_only_reported(place: Place):
    """The remote asset alone, its scratch directory gone: the check fails, and what is there stays as evidence."""
    place.run()
    (key,) = keys(place)
    flip_a_byte(place.home / "store" / key)
    result = place.run(select=[REMOTE])
    step, message, told = failure(result)
    assert step == "orders__remote.verify"
    (check,) = result.get_asset_check_evaluations()
    assert not check.passed
    for said in (message, check.description or "", told[md.HINT]):
        assert "materialize orders/snapshot and orders/remote in one run" in said
    assert (told[md.ERROR_FIELD + "key"], told[md.ERROR_FIELD + "store"]) == (key, place.store.url)
    assert keys(place) == [key]
    assert not place.store.exists(key + ".damaged.json")
    assert facts(place.run(select=[SNAPSHOT, REMOTE]), REMOTE)[md.STATUS] == "healed"  # the hint is right


def test_a_refused_key_says_nothing_of_the_artifact(place: Place):
    """Who may not read in the store does not know whether the artifact is whole: the check is not evaluated."""
    left = [PermissionMissing("the store refuses the key", operation="get", permission="delete")]

    def faults(request: Request) -> Fault | None:
        reads = len(FaultyResource.opened) == 3 and request.operation == "get_range"  # the third step is verify
        return FailBefore(left.pop()) if left and reads else None

    FaultyResource.script(faults)
    result = place.run(place.pipeline(verify_mode="deep"))
    assert failure(result)[0] == "orders__remote.verify"
    assert result.get_asset_check_evaluations() == []


def test_the_local_artifact_lives_until_the_remote_one_is_verified(place):
    """A failed upload keeps it for the retry; a verified one leaves nothing behind."""
    FaultyResource.script(fails_from_part(2))
    failed = place.run()
    (manifest,) = place.scratch.rglob("MANIFEST.json")
    assert failed.run_id in manifest.parts

    FaultyResource.script(lambda _: None)
    assert place.run().success
    assert [path for path in place.scratch.rglob("*") if path.is_file()] == []


def test_a_failed_export_leaves_nothing(place):
    """An export that refuses its source leaves no scratch directory, holds no lease, and is not retried."""
    (place.source / "link").symlink_to("nowhere")
    result = place.run(place.pipeline(retry_policy=dg.RetryPolicy(max_retries=3)))
    step, message, metadata = failure(result)
    assert step == "orders__snapshot.export"
    assert "symbolic link" in message
    assert metadata[md.ERROR_FIELD + "path"] == "link"
    assert list(place.scratch.rglob("*.parquet")) == []
    assert Lease(place.store, "orders/round").try_acquire()


def test_an_error_that_passes_is_retried_and_sends_only_the_rest(place):
    """The step asks Dagster for a retry, and the next attempt continues behind the parts that were acknowledged."""
    FaultyResource.script(fails_from_part(4))
    outage = FaultyResource.faults
    attempts: list[int] = []

    def faults(request: Request) -> Fault | None:
        if request.operation == "put_part" and request.number == 4 and not attempts:
            attempts.append(1)
            return outage(request)
        return None

    FaultyResource.script(faults)
    result = place.run(place.pipeline(retry_policy=dg.RetryPolicy(max_retries=2)))

    assert result.success
    assert [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_RESTARTED] == [
        "orders__remote.upload"
    ]
    remote = facts(result, REMOTE)
    assert remote[md.BYTES_RESUMED] == 3 * 4096
    assert remote[md.BYTES_SENT] + remote[md.BYTES_RESUMED] == remote[md.SIZE]
    assert read_tree(place.current) == TREE


def test_a_round_that_another_run_holds_is_left_to_it(place):
    """While somebody outside of this Dagster exports the same thing, this run exports nothing and says why."""
    lease = Lease(place.store, "orders/round")
    assert lease.try_acquire()
    step, message, metadata = failure(place.run())
    assert step == "orders__snapshot.export"
    assert "another process is exporting 'orders'" in message
    assert metadata[md.ERROR] == "TransferBusy"
    assert keys(place) == []

    lease.abandon()
    assert place.run().success


def test_a_store_without_conditional_writes_needs_no_lease(place: Place):
    """Where no lease can be held, the pipeline works without one."""
    resource = place.resource(store=place.unconditional)
    assert not resource.get_store().capabilities().conditional
    assert place.run(resource=resource).success
    assert read_tree(place.current) == TREE


def test_the_remote_asset_alone_proves_what_is_stored(place):
    """Materializing only the remote asset needs no local artifact: what is stored is verified again."""
    place.run()
    result = place.run(select=[REMOTE])
    assert succeeded(result) == STEPS[1:3]
    assert facts(result, REMOTE)[md.STATUS] == "unchanged"

    (key,) = keys(place)
    for suffix in ("", ".manifest.json"):
        place.store.delete(key + suffix)
    step, message, _ = failure(place.run(select=[REMOTE]))
    assert step == "orders__remote.upload"
    assert "materialize orders/snapshot again" in message


def test_an_import_that_lost_its_artifact_fetches_it_again(place):
    """An import that died after it had taken the artifact is repeated without help."""

    class Interrupted(DirectoryImporter):
        def import_artifact(self, artifact, *, consume=False, on_progress=None, key=None) -> ImportResult:
            if artifact.path.parent.name == ".incoming" and not (self.path / "died").exists():
                (self.path / "died").touch()
                shutil.rmtree(artifact.path)
                raise TransferBusy("the import died")
            return super().import_artifact(artifact, consume=consume, on_progress=on_progress, key=key)

    pipeline = place.pipeline(
        importer=Interrupted(path=place.home / "mirror"), retry_policy=dg.RetryPolicy(max_retries=1)
    )
    result = place.run(pipeline)
    assert result.success
    assert (place.home / "mirror" / "died").exists()
    assert read_tree(place.current) == TREE


def test_partitions_have_keys_refs_and_mirrors_of_their_own(place):
    """With partitions, `<name>/<partition>` stands for `<name>`; exporter and importer may depend on the partition."""
    names = ["eu", "us/west"]
    for number, name in enumerate(names):
        write_tree(place.home / "sources" / name, {"n": str(number)})
    pipeline = place.pipeline(
        partitions_def=dg.StaticPartitionsDefinition(names),
        exporter=lambda partition: DirectoryExporter(path=place.home / "sources" / partition),
        importer=lambda partition: DirectoryImporter(path=place.home / "mirrors" / partition),
    )
    results = [place.run(pipeline, partition_key=name) for name in names]

    assert [result.success for result in results] == [True, True]
    for number, name in enumerate(names):
        assert read_tree(place.home / "mirrors" / name / "current") == {"n": str(number)}
    refs = [read_ref(place.store, f"orders/{segment}/latest") for segment in ("eu", "us%2Fwest")]
    assert [ref and ref.key for ref in refs] == keys(place)
    made = [materialization(result, MIRROR) for result in results]
    assert [m and m.partition for m in made] == names

    again = place.run(pipeline, partition_key="eu")
    assert facts(again, MIRROR)[md.STATUS] == "unchanged"


def test_a_partition_that_cannot_be_a_key_is_refused_before_the_export(place):
    """The run fails at once, names the rule, and neither exporter nor store has seen anything of it."""
    partition = "p" * 300
    exported: list[str] = []

    def exporter(key: str) -> DirectoryExporter:
        exported.append(key)
        return DirectoryExporter(path=place.source)

    pipeline = place.pipeline(partitions_def=dg.StaticPartitionsDefinition([partition]), exporter=exporter)
    result = place.run(pipeline, partition_key=partition)
    assert not result.success
    assert "a segment is longer than 255 bytes" in failure(result)[1]
    assert exported == []
    assert keys(place) == []


@pytest.mark.parametrize("partition", ["..", ".", "%2F", "-"])
def test_no_partition_key_leaves_the_scratch_directory(place, partition):
    """Partition keys are data: none of them becomes a path of its own choosing."""
    pipeline = place.pipeline(partitions_def=dg.StaticPartitionsDefinition([partition]))
    assert place.run(pipeline, partition_key=partition).success
    assert all(key.count("/") == 2 for key in keys(place))
    assert {path.name for path in place.scratch.iterdir()} == {"orders"}


def test_a_translator_decides_how_assets_look(place):
    """Keys, groups, owners, tags and metadata come from the translator, and its deps are waited for."""
    order: list[str] = []

    @dg.asset
    def loaded() -> None:
        order.append("loaded")

    class Ours(BlobflowTranslator):
        def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
            spec = super().get_asset_spec(props).replace_attributes(key=["ours", props.stage], owners=["team:data"])
            return spec.merge_attributes(deps=["loaded"]) if props.stage == "mirror" else spec

    pipeline = place.pipeline(translator=Ours(), group_name="backups", deps=["loaded"])
    result = place.run(pipeline, also=dg.Definitions(assets=[loaded]))

    assert result.success
    specs = {spec.key.to_user_string(): spec for asset in pipeline.assets for spec in asset.specs}
    assert set(specs) == {"ours/snapshot", "ours/remote", "ours/mirror"}
    assert all(spec.group_name == "backups" and spec.owners == ["team:data"] for spec in specs.values())
    assert specs["ours/snapshot"].kinds == {"blobflow", "directory"}
    waits = {name: {dep.asset_key.to_user_string() for dep in spec.deps} for name, spec in specs.items()}
    assert waits == {
        "ours/snapshot": {"loaded"},
        "ours/remote": {"ours/snapshot"},
        "ours/mirror": {"ours/remote", "loaded"},
    }
    assert succeeded(result)[0] == "loaded"


def test_pipelines_share_a_code_location(place):
    """Two pipelines run in one job without getting into each other's way."""
    other = artifact_pipeline(
        "invoices",
        exporter=DirectoryExporter(path=place.source),
        importer=DirectoryImporter(path=place.home / "invoices"),
    )
    result = place.run(also=other.definitions)
    assert result.success
    assert len(succeeded(result)) == 10
    assert read_tree(place.home / "invoices" / "current") == TREE


def test_the_job_materializes_all_three(place):
    """The pipeline's own job runs the same five steps."""
    pipeline = place.pipeline()
    defs = dg.Definitions.merge(pipeline.definitions, dg.Definitions(resources={"blobflow": place.resource()}))
    result = defs.resolve_job_def("orders_job").execute_in_process(instance=place.instance)
    assert succeeded(result) == STEPS


def test_no_ref_is_moved_if_none_is_wanted(place):
    """With `ref=None` the artifact is stored and verified, and nothing names it."""
    assert place.run(place.pipeline(ref=None)).success
    assert read_ref(place.store, "orders/latest") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "or-ders"}, "invalid pipeline name"),
        ({"exporter": lambda _: DirectoryExporter(path=Path("/nowhere"))}, "needs a partitions_def"),
        ({"partitions_def": dg.StaticPartitionsDefinition(["a"]), "schedule": "0 * * * *"}, "which partition"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(place, arguments, message):
    """A mistake shows when the code location is loaded, not at night."""
    settings = {
        "name": "orders",
        "exporter": DirectoryExporter(path=place.source),
        "importer": DirectoryImporter(path=place.home / "mirror"),
    }
    with pytest.raises(UsageError, match=message):
        artifact_pipeline(**{**settings, **arguments})


def test_a_spec_makes_the_pipeline_that_the_arguments_make(place):
    """`build_pipeline` of a `PipelineSpec` makes what `artifact_pipeline` makes of the same arguments."""
    ends: dict[str, Any] = {
        "exporter": DirectoryExporter(path=place.source),
        "importer": DirectoryImporter(path=place.home / "mirror"),
        "lanes": 2,
        "deps": ["raw"],
        "group_name": "ours",
    }
    spec = PipelineSpec("orders", **ends)
    made, other = build_pipeline(spec), artifact_pipeline("orders", **ends)

    assert [list(asset.specs) for asset in made.assets] == [list(asset.specs) for asset in other.assets]
    assert made.job.name == other.job.name == "orders_job"
    with pytest.raises(FrozenInstanceError):
        spec.lanes = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(spec, name="invoices").snapshot.key == dg.AssetKey(["invoices", "snapshot"])
    with pytest.raises(UsageError, match="lanes must be 1 to 64, not 0"):
        replace(spec, lanes=0)


def test_the_five_steps_are_functions_that_an_op_may_call(place):
    """An op of one's own that calls the five steps one after the other brings a tree to its mirror."""
    spec = PipelineSpec(
        "orders", DirectoryExporter(path=place.source), DirectoryImporter(path=place.home / "mirror"), retry_policy=None
    )

    @dg.op(required_resource_keys={"blobflow"}, config_schema=PIN)
    def all_at_once(context):
        blobflow = context.resources.blobflow
        exported = steps.export_snapshot(context, spec, blobflow)
        assert exported is not None
        uploaded = steps.upload_snapshot(context, spec, blobflow)
        (verified,) = steps.verify_remote(context, spec, blobflow, uploaded)
        assert isinstance(verified, dg.MaterializeResult)
        staged = steps.download_remote(context, spec, blobflow)
        mirrored = steps.import_mirror(context, spec, blobflow, staged)
        assert exported.data_version == verified.data_version == mirrored.data_version
        return staged.key

    @dg.job(resource_defs={"blobflow": place.resource()})
    def whole():
        all_at_once()

    result = whole.execute_in_process(instance=place.instance)

    assert [result.output_for_node("all_at_once")] == keys(place)
    assert read_tree(place.current) == TREE
