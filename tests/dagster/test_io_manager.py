"""`ArtifactIOManager`: what steps may return, what their consumers get, and under which names it is kept."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from blobflow.backends import export_artifact
from blobflow.coordination.lease import Lease
from blobflow.coordination.refs import move_ref, read_ref
from blobflow.coordination.rounds import take_token
from blobflow.dagster import ArtifactIOManager, ArtifactRef, BlobflowResource, metadata as md
from blobflow.dagster.checkpoints import TRANSFERS
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.testing import FailBefore, Fault, Request, Tree, read_tree, write_tree
from blobflow.transport import list_artifacts, upload, verify
from tests.dagster.kit import REMOTE, SMALL, SNAPSHOT, FaultyResource, Place, facts, failure, materialization, succeeded
from tests.kit import TREE, flip_a_byte, noise
from tests.servers import S3Endpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run is:DeprecationWarning"),  # of nested resources
    pytest.mark.filterwarnings("ignore:Parameter `backfill_policy`"),  # in beta
]

REGIONS = dg.StaticPartitionsDefinition(["eu/west", "us", ".."])


class Shop(Place):
    """A place whose instance is made when it is first needed: many tests do without one, which costs half a second."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.open = ExitStack()

    @cached_property
    def instance(self) -> dg.DagsterInstance:  # pyright: ignore[reportIncompatibleVariableOverride]
        (self.home / "instance").mkdir()
        return self.open.enter_context(
            dg.DagsterInstance.local_temp(str(self.home / "instance"), overrides={"telemetry": {"enabled": False}})
        )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A source already written and a store without faults."""
    FaultyResource.script(lambda _: None)
    shop = Shop(tmp_path)
    shop.write()
    with shop.open:
        yield shop


def manager(place: Place, **options: Any) -> ArtifactIOManager:
    return ArtifactIOManager(**{"blobflow": place.resource(), **options})


def definitions(place: Place, *assets: Any, **options: Any) -> dg.Definitions:
    return dg.Definitions(assets=assets, resources={"artifacts": manager(place, **options)})


def run(
    place: Place,
    *assets: Any,
    select: Sequence[str] | None = None,
    partition: str | None = None,
    tags: dict[str, str] | None = None,
    **options: Any,
) -> dg.ExecuteInProcessResult:
    """One run of assets, all of them or the selected ones."""
    job = definitions(place, *assets, **options).resolve_implicit_global_asset_job_def()
    selection = [dg.AssetKey.from_user_string(key) for key in select] if select else None
    return job.execute_in_process(
        instance=place.instance, raise_on_error=False, asset_selection=selection, partition_key=partition, tags=tags
    )


def returning(value: Any, **options: Any) -> Any:
    """The asset `team/model`, which returns `value`."""

    @dg.asset(key=["team", "model"], io_manager_key="artifacts", **options)
    def model():
        return value

    return model


def consuming(annotation: Any, seen: list[Any], **options: Any) -> dg.AssetsDefinition:
    """The asset `consumer`, which notes what it gets of `team/model`."""

    def consumer(model) -> None:
        seen.append(model)

    consumer.__annotations__["model"] = annotation
    return dg.asset(ins={"model": dg.AssetIn(["team", "model"], **options.pop("ins", {}))}, **options)(consumer)


def loaded_by(place: Place, annotation: Any, *assets: Any) -> Any:
    """What a consumer with that annotation gets, in a run of its own."""
    seen: list[Any] = []
    result = run(place, *assets, consuming(annotation, seen), select=["consumer"])
    assert result.success
    return seen[0]


def keep(
    place: Place,
    value: Any,
    *,
    region: str | None = None,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Store a value as the asset `team/model` without a run; the facts that were added to the output."""
    # An output or input context that nobody closes is closed whenever it is collected, and then brings back as current
    # whatever instance was so when it was made.
    with dg.build_output_context(
        asset_key=["team", "model"], definition_metadata=metadata, **(regions(region, region) if region else {})
    ) as context:
        manager(place, **options).handle_output(context, value)
        return {label: fact.value for label, fact in context.get_logged_metadata().items()}


def regions(first: str, last: str) -> dict[str, Any]:
    """Of a context: the asset is partitioned, and these partitions are meant."""
    return {"asset_partitions_def": REGIONS, "asset_partition_key_range": dg.PartitionKeyRange(first, last)}


def keep_regions(place: Place, *keys: str) -> None:
    """Store a tree that says so for each of the regions."""
    for number, key in enumerate(keys):
        write_tree(place.home / "trees" / str(number), {"region": key})
        keep(place, place.home / "trees" / str(number), region=key)


def load(place: Place, annotation: Any, **options: Any) -> Any:
    """Load the asset `team/model` without a run."""
    kind = dg.DagsterType(lambda _context, _value: True, name="Anything", typing_type=annotation)
    with dg.build_input_context(asset_key=["team", "model"], dagster_type=kind, **options) as context:
        return manager(place).load_input(context)


def refusal(call: Callable[[], object]) -> dg.Failure:
    with pytest.raises(dg.Failure) as refused:
        call()
    return refused.value


def keys(place: Place) -> list[str]:
    return [entry.key for entry in list_artifacts(place.store)]


# Values and annotations


def test_a_directory_comes_back_verified_and_apart(place: Place):
    """The consumer gets the same tree in another place; the original may be gone by then."""
    assert run(place, returning(place.source)).success
    write_tree(place.source, {"later": "x"})

    path = loaded_by(place, Path, returning(place.source))

    assert read_tree(path) == TREE
    assert path.is_relative_to(place.scratch)
    for annotation in (Path | None, Any, object):
        assert load(place, annotation) == path


def test_nothing_is_pickled_and_other_io_managers_go_on(place: Place):
    """Beside it, the default IO manager keeps what it always kept, and never a payload."""
    seen: list[Any] = []

    @dg.asset
    def note() -> str:
        return "a note"

    @dg.asset
    def consumer(model: Path, note: str) -> str:
        seen.append((read_tree(model), note))
        return "done"

    @dg.asset(io_manager_key="artifacts")
    def model() -> Path:
        return place.source

    assert run(place, model, note, consumer).success
    assert seen == [(TREE, "a note")]
    storage = Path(place.instance.storage_directory())
    assert sorted(path.name for path in storage.iterdir() if path.is_file()) == ["consumer", "note"]


def test_a_reference_is_got_without_a_download(place: Place):
    """`ArtifactRef` names key and digest, goes through JSON, and costs no byte of the payload."""
    made = keep(place, place.source)
    FaultyResource.script(lambda _: None)

    ref = loaded_by(place, ArtifactRef, returning(place.source))

    assert ref == ArtifactRef(made[md.KEY], made[md.ARTIFACT_DIGEST])
    assert ArtifactRef(**json.loads(json.dumps(ref.to_json_dict()))) == ref
    assert (FaultyResource.count("get_range"), FaultyResource.count("get")) == (0, 1)
    assert not (place.scratch / "inputs").exists()


def test_a_reference_may_be_returned(place: Place):
    """The ref of the asset is moved to what is in the store already; back to an older artifact, too."""
    keep(place, place.source)
    first = load(place, ArtifactRef)
    write_tree(place.source, {"new": "x"})
    keep(place, place.source)
    assert "new" in read_tree(load(place, Path))

    made = facts(run(place, returning(first)), dg.AssetKey(["team", "model"]))

    assert (made[md.STATUS], made[md.BYTES_SENT], made[md.MEMBERS]) == ("referenced", 0, 6)
    assert read_tree(load(place, Path)) == TREE


def test_a_reference_to_nothing_is_refused(place: Place):
    """A key that holds no artifact, or another one than the digest says, moves no ref."""
    made = keep(place, place.source)
    before = read_ref(place.store, "team/model/latest")
    for wrong in (ArtifactRef("nowhere", made[md.ARTIFACT_DIGEST]), ArtifactRef(made[md.KEY], "sha256:" + "0" * 64)):
        assert not refusal(lambda ref=wrong: keep(place, ref)).allow_retries
    assert read_ref(place.store, "team/model/latest") == before


def test_an_exported_artifact_is_uploaded_as_it_is(place: Place):
    """What `blobflow export` made keeps its identity: times, excluded files and all."""
    exported = export_artifact(place.source, place.home / "made", exclude=["empty"]).artifact
    assert keep(place, exported.path)[md.ARTIFACT_DIGEST] == exported.digest
    assert "empty" not in read_tree(load(place, Path))


def test_a_pattern_that_can_never_match_is_refused_before_anything_runs():
    """A manager with such a pattern is not made; its outputs would be computed in vain."""
    with pytest.raises(UsageError, match="can never match"):
        ArtifactIOManager(blobflow=BlobflowResource(), exclude=["../secret"])


def test_metadata_says_what_was_moved_and_where_it_is(place: Place):
    """The materialization tells place, identity, size and speed, under the labels of the pipeline's assets."""
    write_tree(place.source, {"skip.me": "x"})
    (place.source / "link").symlink_to("skip.me")
    made = keep(place, place.source, exclude=["./skip.me", "*.tpm"], symlinks="skip", verify_mode="deep")
    (key,) = keys(place)
    payload = place.home / "store" / key
    ref = read_ref(place.store, "team/model/latest")
    assert ref is not None
    assert (made[md.KEY], made[md.ARTIFACT_DIGEST]) == (ref.key, ref.manifest_sha256)
    assert made[md.URI] == payload.as_uri()
    assert made[md.SIZE] == made[md.BYTES_SENT] == payload.stat().st_size
    assert made[md.THROUGHPUT] > 0
    assert (made[md.BYTES_RESUMED], made[md.MEMBERS]) == (0, 6)
    assert (made[md.EXCLUDED], made[md.SYMLINKS_SKIPPED], made[md.VERIFY_MODE]) == (1, 1, "deep")
    assert made[md.EXCLUDE_UNMATCHED] == ["*.tpm"]
    assert (made[md.STATUS], made[md.REF]) == ("uploaded", "team/model/latest")
    assert made[md.LARGEST_MEMBERS].records[0].data == {"path": "big.bin", "bytes": 20_000}


def test_the_same_content_moves_nothing(place: Place):
    """A second run with files that were written anew sends no part, and its consumer fetches nothing."""
    seen: list[Path] = []
    assets = [returning(place.source), consuming(Path, seen)]
    assert run(place, *assets).success
    for path in place.source.rglob("*.bin"):
        path.write_bytes(path.read_bytes())
    FaultyResource.script(lambda _: None)

    again = run(place, *assets)

    made = facts(again, dg.AssetKey(["team", "model"]))
    assert (made[md.STATUS], made[md.BYTES_SENT]) == ("unchanged", 0)
    assert seen[0] == seen[1]
    assert FaultyResource.count("put_part") == 0
    assert len(keys(place)) == 1
    assert list((place.scratch / "outputs").iterdir()) == []


# What is refused


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        (lambda _: None, "returned NoneType", "-> None"),
        (lambda place: str(place.source), "returned str", "pathlib.Path"),
        (lambda _: {"a": 1}, "returned dict", "another io_manager_key"),
        (lambda _: b"payload", "returned bytes", "another io_manager_key"),
        (lambda place: place.source / "big.bin", "which is not a directory", "a separate directory"),
        (lambda place: place.home / "nowhere", "which does not exist", "return a directory"),
    ],
    ids=["None", "str", "dict", "bytes", "file", "nowhere"],
)
def test_other_values_are_refused_by_name(place: Place, value: Callable[[Place], Any], message: str, hint: str):
    """The failure names the asset, what it returned, and what to do; no retry could help, nothing is stored."""
    refused = refusal(lambda: keep(place, value(place)))
    assert "asset 'team/model'" in str(refused.description)
    assert message in str(refused.description)
    assert hint in str(refused.metadata[md.HINT].value)
    assert refused.metadata[md.ERROR].value == "UsageError"
    assert not refused.allow_retries
    assert keys(place) == []


@pytest.mark.parametrize("annotation", [str, bytes, dict[str, str], list[Path], Path | str], ids=str)
def test_other_annotations_are_refused_by_name(place: Place, annotation: Any):
    """An input that wants something else is told what there is; nothing is fetched for it."""
    keep(place, place.source)
    refused = refusal(lambda: load(place, annotation))
    assert "asset 'team/model' cannot be loaded as" in str(refused.description)
    assert "dict[str, ArtifactRef]" in str(refused.metadata[md.HINT].value)
    assert not (place.scratch / "inputs").exists()


def test_what_was_never_materialized_is_said(place: Place):
    """The failure names asset, ref and remedy."""
    refused = refusal(lambda: load(place, Path))
    assert "asset 'team/model' is not in" in str(refused.description)
    assert "team/model/latest" in str(refused.description)
    assert refused.metadata[md.ERROR].value == "NotMaterialized"
    assert "materialize it" in str(refused.metadata[md.HINT].value)


def test_a_damaged_payload_is_healed_by_the_next_materialization(place: Place, tmp_path: Path):
    """The same content is at hand, so it is uploaded again under the same key; what was found is kept and told."""
    tree = write_tree(tmp_path / "tree", TREE)
    before = keep(place, tree)
    flip_a_byte(place.store.root / before[md.KEY])
    after = keep(place, tree, verify_mode="deep")
    assert (after[md.STATUS], after[md.PROOF], after[md.KEY]) == ("healed", "proven", before[md.KEY])
    assert after[md.ARTIFACT_DIGEST] == before[md.ARTIFACT_DIGEST]
    assert "Mismatch" in after[md.DAMAGE]
    assert place.store.exists(f"{before[md.KEY]}.damaged.json")
    assert verify(place.store, before[md.KEY], mode="deep").proof == "proven"
    assert keep(place, tree, verify_mode="deep")[md.STATUS] == "unchanged"


def test_hostile_trees_are_refused_as_an_export_refuses_them(place: Place):
    """A symbolic link is named, with the way out."""
    (place.source / "link").symlink_to("/etc/passwd")
    refused = refusal(lambda: keep(place, place.source))
    assert "'link' cannot be exported" in str(refused.description)
    assert "symlinks: skip" in str(refused.metadata[md.HINT].value)


def test_the_consumer_is_pinned_to_what_the_ref_says(place: Place):
    """A ref that names a digest which its key does not hold is a refusal, not another artifact."""
    made = keep(place, place.source)
    move_ref(place.store, "team/model/latest", made[md.KEY], "sha256:" + "0" * 64)
    assert refusal(lambda: load(place, Path)).metadata[md.ERROR].value == "DigestMismatch"


# Partitions


def partitioned(place: Place, **options: Any) -> Any:
    @dg.asset(key=["team", "model"], io_manager_key="artifacts", partitions_def=REGIONS, **options)
    def model(context) -> Path:
        path = place.home / "trees" / str(len(list(place.home.glob("trees/*"))))
        write_tree(path, {"region": context.partition_key})
        return path

    return model


def test_each_partition_has_a_ref_and_a_path_of_its_own(place: Place):
    """Whatever a partition key looks like, its artifact is got by the same partition, and by no other."""
    seen: list[Path] = []
    every = REGIONS.get_partition_keys()
    keep_regions(place, *every[1:])
    assert run(place, partitioned(place), consuming(Path, seen, partitions_def=REGIONS), partition=every[0]).success
    seen += [load(place, Path, **regions(key, key)) for key in every[1:]]
    assert [read_tree(path) for path in seen] == [{"region": key} for key in every]
    names = ["team/model/eu%2Fwest", "team/model/us", "team/model/%2E%2E"]
    assert sorted(key.rpartition("/")[0] for key in keys(place)) == sorted(names)
    assert all(read_ref(place.store, f"{name}/latest") for name in names)


def test_many_partitions_are_a_dict(place: Place):
    """An unpartitioned consumer gets a path, or a reference, for each partition key."""
    every = REGIONS.get_partition_keys()
    keep_regions(place, *every)
    found = loaded_by(place, dict[str, Path], partitioned(place))
    assert {key: read_tree(path) for key, path in found.items()} == {key: {"region": key} for key in every}
    for annotation in (Any, dict, dict[str, Any]):
        assert load(place, annotation, **regions(every[0], every[-1])) == found
    refs = load(place, dict[str, ArtifactRef], **regions(every[0], every[-1]))
    assert {key: type(ref) for key, ref in refs.items()} == dict.fromkeys(every, ArtifactRef)


def test_the_annotation_decides_between_one_and_many(place: Place):
    """A dict is a dict even of one partition; one path for several partitions is refused, and a dict of none."""
    keep_regions(place, "eu/west", "us")
    assert list(load(place, dict[str, Path], **regions("us", "us"))) == ["us"]
    assert read_tree(load(place, Any, **regions("us", "us"))) == {"region": "us"}
    refused = refusal(lambda: load(place, Path, **regions("eu/west", "us")))
    assert "has 2 partitions" in str(refused.description)
    assert "dict[str, Path]" in str(refused.metadata[md.HINT].value)
    assert "has no partitions" in str(refusal(lambda: load(place, dict[str, Path])).description)


def test_missing_partitions_fail_unless_they_are_allowed(place: Place):
    """As with Dagster's own IO managers, `allow_missing_partitions` in the input's metadata skips them."""
    keep_regions(place, "us")
    refused = refusal(lambda: load(place, dict[str, Path], **regions("eu/west", "us")))
    assert "eu%2Fwest" in str(refused.description)
    allowing: dict[str, Any] = {"definition_metadata": {"allow_missing_partitions": True}}
    assert list(load(place, dict[str, Path], **regions("eu/west", "us"), **allowing)) == ["us"]


def test_a_multi_partition_key_is_one_name(place: Place):
    """Two dimensions make one key, the same for the step that stores and the one that loads."""
    both = dg.MultiPartitionsDefinition({"region": dg.StaticPartitionsDefinition(["eu"]), "day": REGIONS})
    key = dg.MultiPartitionKey({"region": "eu", "day": "us"})
    seen: list[Any] = []
    assets = [returning(place.source, partitions_def=both), consuming(Path, seen, partitions_def=both)]
    assert run(place, *assets, partition=key).success
    assert read_tree(seen[0]) == TREE
    assert read_ref(place.store, f"team/model/{key}/latest")


DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-01-06")
THREE_DAYS = {"dagster/asset_partition_range_start": "2026-01-02", "dagster/asset_partition_range_end": "2026-01-04"}


def daily(returned: Callable[[Sequence[str]], Any]) -> dg.AssetsDefinition:
    @dg.asset(
        key=["team", "model"],
        io_manager_key="artifacts",
        partitions_def=DAYS,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def model(context):
        return returned(context.partition_keys)

    return model


def test_one_run_may_materialize_many_partitions(place: Place):
    """A backfill in a single run returns one directory for each partition, and shows them all in a table."""

    def write(days: Sequence[str]) -> dict[str, Path]:
        return {day: write_tree(place.home / "trees" / day, {"day": day}) or place.home / "trees" / day for day in days}

    seen: list[Any] = []
    assets = [daily(write), consuming(dict[str, Path], seen, partitions_def=DAYS, backfill_policy=single())]
    result = run(place, *assets, tags=THREE_DAYS)
    assert result.success
    days = ["2026-01-02", "2026-01-03", "2026-01-04"]
    assert {key: read_tree(path) for key, path in seen[0].items()} == {day: {"day": day} for day in days}
    made = facts(result, dg.AssetKey(["team", "model"]))
    assert [record.data["partition"] for record in made[md.PARTITIONS].records] == days
    assert made[md.BYTES_SENT] == sum((place.home / "store" / key).stat().st_size for key in keys(place))
    assert md.SIZE not in made  # Dagster would plot the sum of all at each of them


def single() -> dg.BackfillPolicy:
    return dg.BackfillPolicy.single_run()


@pytest.mark.parametrize(
    ("returned", "message", "hint"),
    [
        (lambda place, days: place.source, "one value for 3 partitions", "BackfillPolicy.multi_run"),
        (
            lambda place, days: {days[0]: place.source, "2026-01-05": place.source},
            "missing ['2026-01-03', '2026-01-04'], unexpected ['2026-01-05']",
            "context.partition_keys",
        ),
        (lambda place, days: dict.fromkeys(days), "partition '2026-01-02', returned NoneType", "Path"),
    ],
    ids=["one", "others", "None"],
)
def test_a_run_of_many_partitions_stores_each_or_none(
    place: Place, returned: Callable[[Place, Sequence[str]], Any], message: str, hint: str
):
    """What does not cover exactly the partitions of the run is refused before anything is stored."""
    _, description, metadata = failure(run(place, daily(lambda days: returned(place, days)), tags=THREE_DAYS))
    assert message in description
    assert hint in metadata[md.HINT]
    assert keys(place) == []


# Ops


def artifact_job(place: Place, graph: Callable[[], Any], **options: Any) -> dg.JobDefinition:
    return dg.job(resource_defs={"io_manager": manager(place, **options)}, executor_def=dg.in_process_executor)(graph)


@pytest.mark.slow
def test_outputs_of_ops_belong_to_their_run(place: Place):
    """Two runs of a job each load what they made; equal contents are stored once, also by another run."""
    seen: list[Any] = []

    @dg.op(out=dg.Out(Path))
    def make() -> Path:
        return place.source

    @dg.op(out=dg.Out(dg.Nothing))
    def use(path: Path, ref: ArtifactRef):
        seen.append((read_tree(path), ref))

    def graph() -> None:
        made = make()
        use(made, made)

    runs = [artifact_job(place, graph).execute_in_process(instance=place.instance).run_id]
    write_tree(place.source, {"new": "x"})
    runs.append(artifact_job(place, graph).execute_in_process(instance=place.instance).run_id)
    (place.source / "new").unlink()
    runs.append(artifact_job(place, graph).execute_in_process(instance=place.instance).run_id)

    assert ["new" in tree for tree, _ in seen] == [False, True, False]
    refs = [read_ref(place.store, f"runs/{run_id}/make/result/latest") for run_id in runs]
    assert [ref.key for ref in refs if ref] == [ref.key for _, ref in seen]
    assert len(keys(place)) == 2
    assert all(key.startswith("ops/make/result/") for key in keys(place))


def test_dynamic_outputs_keep_apart(place: Place):
    """Each mapped step loads the output of its mapping key, and a collecting step loads them all."""
    mapped: list[Tree] = []
    collected: list[Tree] = []

    @dg.op(out=dg.DynamicOut(Path))
    def split():
        for name in ("a", "b"):
            write_tree(place.home / "parts" / name, {"name": name})
            yield dg.DynamicOutput(place.home / "parts" / name, mapping_key=name)

    @dg.op(out=dg.Out(Path))
    def pass_on(path: Path) -> Path:
        mapped.append(read_tree(path))
        return path

    @dg.op(out=dg.Out(dg.Nothing))
    def join(paths: list[Path]):
        collected.extend(map(read_tree, paths))

    def graph() -> None:
        join(split().map(pass_on).collect())

    assert artifact_job(place, graph).execute_in_process(instance=place.instance).success
    assert mapped == collected == [{"name": "a"}, {"name": "b"}]


def test_an_input_that_comes_from_nowhere_is_refused(place: Place):
    """An input that is loaded by this IO manager without any output before it says so."""

    @dg.op(ins={"path": dg.In(Path, input_manager_key="io_manager")}, out=dg.Out(dg.Nothing))
    def use(path):
        raise AssertionError("it must not run")

    def graph() -> None:
        use()

    result = artifact_job(place, graph).execute_in_process(instance=place.instance, raise_on_error=False)
    _, description, _ = failure(result)
    assert "input 'path' comes from no step and no asset" in description


def test_a_graph_asset_is_an_asset_outside_and_a_job_inside(place: Place):
    """Its last output has the asset's ref; what its ops hand to each other belongs to the run."""

    @dg.op(out=dg.Out(Path, io_manager_key="artifacts"))
    def make() -> Path:
        return place.source

    # A node on the default IO manager: without any, the implicit job does not know it, and cannot be run.
    @dg.op
    def count(path: Path) -> int:
        return len(list(path.iterdir()))

    @dg.op(out=dg.Out(Path, io_manager_key="artifacts"))
    def finish(path: Path, files: int) -> Path:
        target = place.home / "finished"
        write_tree(target, {**read_tree(path), "files": str(files)})
        return target

    @dg.graph_asset(key=["team", "model"])
    def model():
        made = make()
        return finish(made, count(made))

    seen: list[Any] = []
    result = run(place, model, consuming(Path, seen))
    assert result.success
    assert read_tree(seen[0]) == {**TREE, "files": "5"}
    assert read_ref(place.store, "team/model/latest")
    assert read_ref(place.store, f"runs/{result.run_id}/team__model.make/result/latest")


# Without a step before


def test_values_are_loaded_outside_of_runs(place: Place):
    """`Definitions.load_asset_value` gives a path or a reference, by partition too, and keeps the path."""
    keep_regions(place, "us")
    defs = definitions(place, partitioned(place))
    path = defs.load_asset_value(["team", "model"], python_type=Path, partition_key="us", instance=place.instance)
    ref = defs.load_asset_value(["team", "model"], python_type=ArtifactRef, partition_key="us", instance=place.instance)
    assert isinstance(path, Path)
    assert isinstance(ref, ArtifactRef)
    assert read_tree(path) == {"region": "us"}
    # A run that needs the room does not take it away.
    assert run(place, returning(place.source), consuming(Path, []), cache_max_bytes=0).success
    assert path.exists()


def test_an_external_asset_names_its_ref(place: Place):
    """What `blobflow push` and `blobflow ref set` put into the store is loaded by ref, as a directory."""
    stored = upload(place.store, "orders/today", export_artifact(place.source, place.home / "made").artifact)
    move_ref(place.store, "orders/latest", stored.key, stored.artifact_digest)
    outside = dg.AssetSpec(["team", "model"], metadata={md.REF: "orders/latest"}).with_io_manager_key("artifacts")
    assert read_tree(loaded_by(place, Path, outside)) == TREE


@pytest.mark.slow
def test_an_input_names_a_ref_of_another_io_managers_asset(place: Place):
    """A pipeline's `remote` asset, whose value another IO manager keeps, is loaded as a verified directory."""
    seen: list[Any] = []

    @dg.asset(
        ins={
            "tree": dg.AssetIn(["orders", "remote"], input_manager_key="artifacts", metadata={md.REF: "orders/latest"})
        }
    )
    def report(tree: Path) -> None:
        seen.append(read_tree(tree))

    also = dg.Definitions(assets=[report], resources={"artifacts": manager(place)})
    assert place.run(also=also, select=[SNAPSHOT, REMOTE, dg.AssetKey("report")]).success
    assert seen == [TREE]


def test_an_asset_may_publish_under_a_ref_of_its_choice(place: Place):
    """With the ref in its metadata, an asset is stored and loaded there; a partition stands before the last name."""
    given = {md.REF: dg.MetadataValue.text("models/prod/current")}
    keep(place, place.source, metadata=given)
    assert read_ref(place.store, "models/prod/current")
    assert read_tree(load(place, Path, definition_metadata=given)) == TREE

    assert run(place, partitioned(place, metadata=given), partition="us").success
    assert read_ref(place.store, "models/prod/us/current")

    refused = refusal(lambda: keep(place, place.source, metadata={md.REF: "current"}))
    assert "has the ref 'current'" in str(refused.description)


# Newest wins


def test_a_slow_step_does_not_move_the_ref_back(place: Place):
    """Of two runs at once the one that began later is the newest, whichever ends last; the other says `superseded`."""
    newer = place.home / "newer"
    write_tree(newer, {"new": "x"})

    def interrupted(request: Request) -> None:
        if request.operation == "put_part" and request.number == 3:
            FaultyResource.script(lambda _: None)
            keep(place, newer)

    FaultyResource.script(interrupted)

    assert keep(place, place.source)[md.STATUS] == "superseded"
    assert read_tree(load(place, Path)) == {"new": "x"}
    assert len(keys(place)) == 2  # nothing is lost


def test_a_round_under_the_same_name_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch):
    """While somebody holds the round, a step asks again; in the end it fails in a way that may be retried."""
    lease = Lease(place.store, "team/model/round")
    assert lease.try_acquire()
    asked = 0

    def release(request: Request) -> None:
        nonlocal asked
        if request.key.endswith(".lease.json") and request.operation == "get":
            asked += 1
            if asked == 2:
                lease.abandon()

    FaultyResource.script(release)
    keep(place, place.source)
    assert asked >= 2

    assert lease.try_acquire()
    monkeypatch.setattr("blobflow.dagster.io_manager.take_token", partial(take_token, ttl_s=0.01))
    refused = refusal(lambda: keep(place, place.source))
    assert (refused.metadata[md.ERROR].value, refused.allow_retries) == ("TransferBusy", True)
    assert "a round of 'team/model'" in str(refused.description)


def test_a_database_numbers_what_is_published(place: Place):
    """With the resource's `leases`, what is published into a store without conditional writes counts up as well."""
    resource = place.resource(store=place.unconditional, leases=f"sqlite:///{place.home}/leases.db")
    for number in (1, 2):
        keep(place, place.source, blobflow=resource)
        latest = read_ref(resource.get_store(), "team/model/latest")
        assert latest is not None
        assert latest.round_number == number


# Failures


def down_from_part(number: int, *, times: int = 1_000) -> Callable[[Request], Fault | None]:
    """The store is down from that part on, for so many requests."""
    left = times

    def faults(request: Request) -> Fault | None:
        nonlocal left
        if request.operation == "put_part" and request.number >= number and left:
            left -= 1
            return FailBefore(StoreUnavailable("the store is down", operation="put_part", key=request.key))
        return None

    return faults


def retries(result: dg.ExecuteInProcessResult) -> int:
    return sum(event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY for event in result.all_events)


def test_a_passing_failure_is_retried_by_the_steps_own_policy(place: Place):
    """The step runs again, writes its files anew, and the upload goes on behind the parts that are there."""
    FaultyResource.script(down_from_part(5, times=1))
    made: list[Path] = []

    @dg.asset(key=["team", "model"], io_manager_key="artifacts", retry_policy=dg.RetryPolicy(max_retries=1))
    def model() -> Path:
        made.append(place.home / f"attempt-{len(made)}")
        write_tree(made[-1], TREE)
        return made[-1]

    result = run(place, model)

    assert result.success
    assert (len(made), retries(result)) == (2, 1)
    facts_ = facts(result, dg.AssetKey(["team", "model"]))
    assert facts_[md.BYTES_RESUMED] == 4 * SMALL.chunk_size
    assert facts_[md.BYTES_SENT] + facts_[md.BYTES_RESUMED] == facts_[md.SIZE]


def test_a_passing_failure_without_a_policy_fails_and_says_what_to_do(place: Place):
    """The failure carries the error's facts; the next run, knowing nothing of this one, sends the rest."""
    FaultyResource.script(down_from_part(5))
    _, description, metadata = failure(run(place, returning(place.source)))
    assert "the store is down" in description
    assert metadata[md.ERROR] == "StoreUnavailable"
    assert metadata[md.HINT]
    assert read_ref(place.store, "team/model/latest") is None

    FaultyResource.script(lambda _: None)
    assert keep(place, place.source)[md.BYTES_RESUMED] == 4 * SMALL.chunk_size


def test_a_failed_download_is_continued(place: Place):
    """An input whose download failed is retried by the consumer's policy, and fetches only the rest."""
    keep(place, place.source)
    size = (place.home / "store" / keys(place)[0]).stat().st_size
    fetched = 0
    failed = False

    def faults(request: Request) -> Fault | None:
        nonlocal fetched, failed
        if request.operation == "get_range":
            fetched += 1
            if fetched == 6 and not failed:
                failed = True
                return FailBefore(StoreUnavailable("the store is down", operation="get_range", key=request.key))
        return None

    FaultyResource.script(faults)
    seen: list[Path] = []
    consumer = consuming(Path, seen, retry_policy=dg.RetryPolicy(max_retries=1))
    result = run(place, returning(place.source), consumer, select=["consumer"])
    assert result.success
    assert retries(result) == 1
    assert read_tree(seen[0]) == TREE
    (line,) = (e.user_message for e in place.instance.all_logs(result.run_id) if "input.done" in e.user_message)
    received, resumed = (int(word.partition("=")[2]) for word in line.split() if word.startswith("bytes_re"))
    assert resumed > 0
    assert received < size


def test_a_damaged_payload_reaches_nobody(place: Place):
    """A flipped bit in the store fails the consumer for good, and leaves no directory behind."""
    keep(place, place.source)
    payload = place.home / "store" / keys(place)[0]
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    refused = refusal(lambda: load(place, Path))
    assert (refused.metadata[md.ERROR].value, refused.allow_retries) == ("DigestMismatch", False)
    assert [path for path in (place.scratch / "inputs").iterdir() if not path.name.startswith(".")] == []


def test_an_interrupt_leaves_a_last_checkpoint(place: Place):
    """A step that is interrupted in the middle of its upload tells the journal how far it came, and is continued."""

    def stop(request: Request) -> None:
        if request.operation == "put_part" and request.number == 5:
            FaultyResource.script(lambda _: None)
            os.kill(os.getpid(), signal.SIGINT)

    FaultyResource.script(stop)
    # In a context of its own: interrupted, Dagster leaves behind what it has set in a context variable.
    assert not copy_context().run(run, place, returning(place.source)).success
    (newest,) = place.instance.fetch_observations(TRANSFERS, limit=1).records
    assert newest.asset_observation is not None
    metadata = newest.asset_observation.metadata
    assert metadata[md.STATUS].value == "failed"
    told: Any = metadata[md.BYTES_DONE].value
    facts_ = facts(run(place, returning(place.source)), dg.AssetKey(["team", "model"]))
    # The journal knows what was counted before the signal, the store what had arrived.
    assert told <= 4 * SMALL.chunk_size <= facts_[md.BYTES_RESUMED]


@pytest.mark.slow
def test_inputs_of_a_run_stay_until_it_ends(place: Place):
    """A cache without room keeps what steps of a run were given, and gives it up in the next run."""
    trees: list[Tree] = [{"f": noise(5_000, n)} for n in range(3)]
    paths: list[Path] = []

    def made(number: int) -> dg.AssetsDefinition:
        write_tree(place.home / str(number), trees[number])

        @dg.asset(name=f"made_{number}", io_manager_key="artifacts")
        def asset() -> Path:
            return place.home / str(number)

        return asset

    @dg.asset
    def first(made_0: Path, made_1: Path) -> None:
        paths.extend((made_0, made_1))

    @dg.asset(deps=[first])
    def second(made_2: Path) -> None:
        assert [read_tree(path) for path in (*paths, made_2)] == trees

    assets = [made(0), made(1), made(2), first, second]
    assert run(place, *assets, cache_max_bytes=0).success
    assert all(path.exists() for path in paths)
    write_tree(place.home / "0", {"f": "other"})
    assert run(place, assets[0], consuming_of("made_0"), cache_max_bytes=0).success
    assert not any(path.exists() for path in paths)


def consuming_of(name: str) -> dg.AssetsDefinition:
    @dg.asset(ins={"tree": dg.AssetIn(name)})
    def reader(tree: Path) -> None:
        assert tree.is_dir()

    return reader


# Configuration


def test_secrets_are_in_no_repr_and_in_no_event(place: Place, moto_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch):
    """With credentials from the environment a run works; neither events nor the manager's repr shows them."""
    secret = "s3cr3t-nobody-may-see"
    monkeypatch.setenv("MODELS_SECRET", secret)
    resource = place.resource(
        store=f"s3://{moto_s3.new_bucket()}/models",
        endpoint_url=moto_s3.endpoint_url,
        region=moto_s3.region,
        access_key_id="models",
        secret_access_key=dg.EnvVar("MODELS_SECRET"),
    )
    seen: list[Path] = []

    class Watched(ArtifactIOManager):
        def load_input(self, context: dg.InputContext) -> Any:
            assert secret not in repr(self) + str(self)
            return super().load_input(context)

    job = dg.Definitions(
        assets=[returning(place.source), consuming(Path, seen)], resources={"artifacts": Watched(blobflow=resource)}
    ).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=place.instance)
    assert read_tree(seen[0]) == TREE
    assert all(secret not in repr(event) for event in result.all_events)
    assert all(secret not in entry.to_json() for entry in place.instance.all_logs(result.run_id))


def test_the_manager_may_be_configured_at_launch(place: Place):
    """Fields take run config as those of any Dagster resource do."""
    blobflow = BlobflowResource(store=str(place.home / "store"), scratch_dir=str(place.scratch))
    configured = ArtifactIOManager.configure_at_launch(blobflow=blobflow)
    defs = dg.Definitions(assets=[returning(place.source)], resources={"blobflow": blobflow, "artifacts": configured})
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=place.instance, run_config={"resources": {"artifacts": {"config": {"ref": "newest"}}}}
    )
    assert result.success
    assert read_ref(place.store, "team/model/newest")


def test_every_step_of_a_run_says_what_it_did(place: Place):
    """One line for an output and one for an input; the materialization is in the run's log once."""
    result = run(place, returning(place.source), consuming(Path, []))
    assert succeeded(result) == ["team__model", "consumer"]
    assert materialization(result, dg.AssetKey(["team", "model"])) is not None
    lines = [entry.user_message.partition(" ")[0] for entry in place.instance.all_logs(result.run_id)]
    assert (lines.count("output.done"), lines.count("input.done")) == (1, 1)


def test_the_example_of_the_documentation_runs(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's code is a code location: it materializes, and its values are what the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "instance"))
    page = Path(__file__).resolve().parents[2] / "docs" / "io-manager.md"
    code = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```\n")[0]
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    result = names["defs"].resolve_implicit_global_asset_job_def().execute_in_process(instance=place.instance)
    assert result.output_for_node("scores") == 1_000_000
    made = facts(result, dg.AssetKey("model"))
    assert result.output_for_node("announcement") == {"key": made[md.KEY], "digest": made[md.ARTIFACT_DIGEST]}


@pytest.mark.parametrize("how", ["partition", "range"])
def test_a_partition_that_cannot_be_a_key_is_refused_before_the_asset_is_computed(place: Place, how: str):
    """Hours of computation are not lost to a name; Dagster says which rule it breaks."""
    computed: list[str] = []
    names = ["a", "p" * 300]

    @dg.asset(
        io_manager_key="artifacts",
        partitions_def=dg.StaticPartitionsDefinition(names),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def model() -> None:
        computed.append("model")

    tags = {"dagster/asset_partition_range_start": names[0], "dagster/asset_partition_range_end": names[1]}
    result = run(place, model, partition=names[1]) if how == "partition" else run(place, model, tags=tags)
    assert not result.success
    assert computed == []
    said = [str(event.event_specific_data) for event in result.all_events if event.is_failure or event.is_step_failure]
    assert any("a segment is longer than 255 bytes" in each for each in said)
