"""Pipelines and mirrors that are written in YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox
from dagster.components.testing.utils import DefsFolderSandbox, component_defs
from pydantic import BaseModel

from blobflow.backends import DirectoryExporter, DirectoryImporter
from blobflow.coordination.refs import move_ref
from blobflow.dagster import ArtifactMirrorComponent, ArtifactPipelineComponent, BlobflowAssetProps, metadata as md
from blobflow.testing import Tree, read_tree, write_tree
from blobflow.transport import upload
from tests.dagster.kit import (
    FOLLOWED,
    FOLLOWING,
    MIRROR,
    REMOTE,
    SNAPSHOT,
    STEPS,
    Place,
    facts,
    failure,
    materialization,
    succeeded,
)
from tests.kit import TREE, artifact_of

PIPELINE, MIRRORED = (
    f"blobflow.dagster.{component.__name__}" for component in (ArtifactPipelineComponent, ArtifactMirrorComponent)
)
SECRET = "not-for-anybody"

pytestmark = [  # Dagster's own
    pytest.mark.filterwarnings("ignore:`parse_obj_as` is deprecated"),
    pytest.mark.filterwarnings("ignore:Class `\\w*CodeReference\\w*` is currently in beta"),
    pytest.mark.filterwarnings("ignore:Parameter `\\w+` of initializer `\\w*SensorDefinition.__init__`"),
]


@pytest.fixture
def sandbox() -> Iterator[DefsFolderSandbox]:
    with create_defs_folder_sandbox() as sandbox:
        yield sandbox


class Yaml:
    """A project with one component, as YAML describes it."""

    def __init__(self, sandbox: DefsFolderSandbox, place: Place) -> None:
        self.folder = sandbox.defs_folder_path / "orders"
        self.folder.mkdir()
        self._sandbox = sandbox
        self._place = place

    def pipeline(self, **attributes: Any) -> dict[str, Any]:
        """A pipeline between the place's source, store and mirror."""
        usual = {
            "name": "orders",
            "exporter": {"kind": "directory", "path": str(self._place.source)},
            "importer": {"kind": "directory", "path": str(self._place.home / "mirror")},
            "store": {
                "url": str(self._place.home / "store"),
                "scratch_dir": str(self._place.scratch),
                "profile": {"chunk_size": 4096, "checkpoint_interval": 1, "workers": 1},
            },
        }
        return {"type": PIPELINE, "attributes": {**usual, **attributes}}

    def mirror(self, **attributes: Any) -> dict[str, Any]:
        """The mirror of what the place's store holds."""
        usual = {
            "name": "orders",
            "importer": {"kind": "directory", "path": str(self._place.home / "mirror")},
            "store": str(self._place.home / "store"),
        }
        return {"type": MIRRORED, "attributes": {**usual, **attributes}}

    def load(self, document: dict[str, Any]) -> dg.Definitions:
        """The definitions that Dagster makes of it."""
        (self.folder / "defs.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        with self._sandbox.load_component_and_build_defs(defs_path=self.folder) as (_, defs):
            return defs

    def run(self, defs: dg.Definitions, **options: Any) -> dg.ExecuteInProcessResult:
        """One run through the implicit asset job."""
        job = defs.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(instance=self._place.instance, raise_on_error=False, **options)


@pytest.fixture
def written(sandbox: DefsFolderSandbox, place: Place) -> Yaml:
    return Yaml(sandbox, place)


def told(error: BaseException | None) -> str:
    """The error and what caused it, as Dagster shows them."""
    return f"{error}\n{told(error.__cause__ or error.__context__)}" if error else ""


def resource_of(defs: dg.Definitions) -> Any:
    return (defs.resources or {})["orders_blobflow"]


def test_a_pipeline_in_yaml_brings_a_tree_to_its_mirror(place, written):
    """The attributes are all that is needed: store and profile become a resource of the pipeline's own."""
    defs = written.load(written.pipeline(schedule="0 * * * *"))
    result = written.run(defs)

    assert succeeded(result) == STEPS
    assert read_tree(place.current) == TREE
    assert facts(result, REMOTE)[md.BYTES_SENT] > 4096
    schedule = defs.resolve_schedule_def("orders_schedule")
    assert (schedule.cron_schedule, schedule.job_name) == ("0 * * * *", "orders_job")
    assert resource_of(defs).get_profile().chunk_size == 4096


def test_each_partition_has_its_own_source_and_mirror(place, written):
    """`{{ partition_key }}` is one segment of a path, whatever the key contains."""
    names = ["eu", "us/west", ".."]
    for name, folder in zip(names, ("eu", "us%2Fwest", "%2E%2E"), strict=True):
        write_tree(place.home / "sources" / folder, {"name": name})
    defs = written.load(
        written.pipeline(
            partitions_def={"type": "static", "partition_keys": names},
            exporter={"kind": "directory", "path": f"{place.home}/sources/{{{{ partition_key }}}}"},
            importer={"kind": "directory", "path": f"{place.home}/mirrors/{{{{ partition_key }}}}"},
        )
    )
    results = [written.run(defs, partition_key=name) for name in names]

    assert [result.success for result in results] == [True] * 3
    shown = {path.name: read_tree(path / "current") for path in (place.home / "mirrors").iterdir()}
    assert shown == {"eu": {"name": "eu"}, "us%2Fwest": {"name": "us/west"}, "%2E%2E": {"name": ".."}}
    kinds = {key: defs.resolve_asset_graph().get(key).kinds for key in (SNAPSHOT, REMOTE, MIRROR)}
    assert kinds == {SNAPSHOT: {"blobflow", "directory"}, REMOTE: {"blobflow"}, MIRROR: {"blobflow", "directory"}}


@pytest.mark.parametrize(
    ("partitions", "expected"),
    [
        ({"type": "daily", "start_date": "2026-01-01"}, dg.DailyPartitionsDefinition("2026-01-01")),
        ({"type": "dynamic", "name": "regions"}, dg.DynamicPartitionsDefinition(name="regions")),
        ("{{ dg.HourlyPartitionsDefinition('2026-01-01-00:00') }}", dg.HourlyPartitionsDefinition("2026-01-01-00:00")),
    ],
    ids=["daily", "dynamic", "template"],
)
def test_partitions_are_those_of_dagster(written, partitions, expected):
    """Partitions by time, by name or added at run time, or what a template makes."""
    defs = written.load(written.pipeline(partitions_def=partitions))
    assert {defs.resolve_asset_graph().get(key).partitions_def for key in (SNAPSHOT, REMOTE, MIRROR)} == {expected}


def test_secrets_are_names_of_variables(written, monkeypatch):
    """`{{ env.NAME }}` is not rendered while the definitions are made: the resource holds the name alone."""
    monkeypatch.setenv("ORDERS_SECRET", SECRET)
    store = {
        "url": "{{ env.ORDERS_STORE }}",
        "access_key_id": "{{env.ORDERS_KEY}}",
        "secret_access_key": "{{ env.ORDERS_SECRET }}",
        "leases": "{{ env.ORDERS_LEASES }}",
    }
    defs = written.load(written.pipeline(store=store))

    resource = resource_of(defs)
    names = (resource.store, resource.access_key_id, resource.secret_access_key, resource.leases)
    assert all(isinstance(name, dg.EnvVar) for name in names)
    assert [name.env_var_name for name in names] == ["ORDERS_STORE", "ORDERS_KEY", "ORDERS_SECRET", "ORDERS_LEASES"]
    schema = defs.get_repository_def().get_top_level_resources()["orders_blobflow"].config_schema
    assert SECRET not in str(schema.default_value)
    assert {"env": "ORDERS_SECRET"} in schema.default_value.values()


@pytest.mark.parametrize("secret", [SECRET, "{{ env('ORDERS_SECRET') }}", f"{{{{ '{SECRET}' }}}}"])
def test_a_secret_in_the_file_is_refused_without_being_shown(written, monkeypatch, secret):
    """A secret that is written down, or would be rendered, stops the loading; the message does not repeat it."""
    monkeypatch.setenv("ORDERS_SECRET", SECRET)
    with pytest.raises(Exception, match="orders") as refusal:
        written.load(written.pipeline(store={"url": "s3://bucket", "secret_access_key": secret}))
    message = told(refusal.value)
    assert "store.secret_access_key: write '{{ env.NAME }}'" in message
    assert SECRET not in message


def test_assets_look_as_the_translation_says(place, written):
    """Keys, groups, owners and tags follow the stage, and what has no translation stays."""
    defs = written.load(
        written.pipeline(
            translation={
                "key_prefix": "backups",
                "group_name": "nightly",
                "owners": ["team:data"],
                "tags": {"stage": "{{ stage }}"},
                "description": "{{ spec.description }} Kept for a year.",
            }
        )
    )
    nodes = {key.to_user_string(): defs.resolve_asset_graph().get(key) for key in defs.resolve_all_asset_keys()}
    assert set(nodes) == {"backups/orders/snapshot", "backups/orders/remote", "backups/orders/mirror"}
    assert {(node.group_name, *node.owners) for node in nodes.values()} == {("nightly", "team:data")}
    assert {node.tags["stage"] for node in nodes.values()} == {"snapshot", "remote", "mirror"}
    assert all((node.description or "").endswith(". Kept for a year.") for node in nodes.values())
    assert succeeded(written.run(defs))[-1].endswith("mirror.import_")


def test_a_subclass_translates_in_python(place):
    """`get_asset_spec` may be overridden, and a component may be made in Python with backends of any kind."""

    class Ours(ArtifactPipelineComponent):
        def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
            return super().get_asset_spec(props).replace_attributes(owners=[f"{props.backend}@example.com"])

    component = Ours(
        name="orders",
        exporter=DirectoryExporter(path=place.source),
        importer=DirectoryImporter(path=place.home / "mirror"),
        store=place.resource(),
    )
    defs = component_defs(component=component)
    owners = {spec.key.path[-1]: spec.owners for spec in defs.resolve_all_asset_specs()}
    assert owners["snapshot"] == ["directory@example.com"]


def test_a_template_gives_what_python_made(place, written):
    """An exporter of the project's own joins without being known to blobflow, and so does a shared resource."""
    (written.folder / "__init__.py").touch()
    (written.folder / "ours.py").write_text(
        "import dagster as dg\n"
        "from blobflow.dagster import BlobflowResource, DirectoryExporter\n\n"
        "class Ours(DirectoryExporter):\n    pass\n\n"
        "@dg.template_var\ndef our_exporter():\n"
        f"    return Ours(path={str(place.source)!r}, exclude=('nested',))\n\n"
        "@dg.template_var\ndef our_store():\n"
        f"    return BlobflowResource(store={str(place.home / 'store')!r}, scratch_dir={str(place.scratch)!r})\n",
        encoding="utf-8",
    )
    document = written.pipeline(exporter="{{ our_exporter }}", store="{{ our_store }}")
    defs = written.load({**document, "template_vars_module": ".ours"})
    assert written.run(defs).success
    assert set(read_tree(place.current)) == set(TREE) - {"nested"}


def test_the_resource_may_be_the_code_locations(place, written):
    """Without a store the pipeline takes a resource that is configured elsewhere; both at once are refused."""
    document = written.pipeline(resource_key="shared")
    with pytest.raises(Exception, match="orders") as refusal:
        written.load(document)
    assert "has a store and a resource_key" in told(refusal.value)

    del document["attributes"]["store"]
    defs = dg.Definitions.merge(written.load(document), dg.Definitions(resources={"shared": place.resource()}))
    assert written.run(defs).success
    assert read_tree(place.current) == TREE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exporter": {"kind": "directory", "path": "data"}}, "exporter.path: 'data' is relative"),
        ({"store": "data"}, "store: 'data' is relative"),
        ({"exporter": {"kind": "tape", "path": "/data"}}, "directory"),
        ({"exporter": {"kind": "directory", "path": "/data", "symlinks": "ignore"}}, "symlinks"),
        ({"exporter": {"kind": "directory", "path": "/data", "exclude": ["{{ partition }}"]}}, "names partition,"),
        ({"exporter": "/data"}, "a mapping with a kind"),
        (
            {"exporter": {"kind": "directory", "path": "/data/{{ partition_key }}"}},
            "names partition_key, which does not exist here",
        ),
        ({"store": {"url": "s3://bucket", "profile": "fast"}}, "profile"),
        ({"store": {"url": "s3://bucket", "profile": {"chunk_size": 0}}}, "greater than 0"),
        ({"max_retries": -1}, "max_retries must be 0 or more"),
        ({"translation": {"partitions_def": {"type": "daily", "start_date": "2026-01-01"}}}, "has partitions"),
        ({"partitions_def": {"type": "static", "partition_keys": ["eu"]}, "schedule": "0 * * * *"}, "which partition"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused_while_loading(written, change, message):
    """A mistake stops the code location from loading and is named."""
    with pytest.raises(Exception, match="orders") as refusal:
        written.load(written.pipeline(**change))
    assert message in told(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shedule": SECRET}, "the component has no field 'shedule': did you mean 'schedule'?"),
        (
            {"exporter": {"kind": "directory", "path": "/data", "exlude": [SECRET]}},
            "exporter has no field 'exlude': did you mean 'exclude'?",
        ),
        (
            {"importer": {"kind": "sqlite", "path": "/data", "mode": SECRET}},
            "importer has no field 'mode': it has application_id, cursor_query, keep_versions,",
        ),
        ({"store": {"url": "s3://b", "secret_acces_key": SECRET}}, "did you mean 'secret_access_key'?"),
        (
            {"store": {"url": "s3://b", "profile": {"chunk_siez": SECRET}}},
            "store.profile has no field 'chunk_siez': did you mean 'chunk_size'?",
        ),
        ({"schedule": {"cron_shedule": SECRET}}, "schedule has no field 'cron_shedule'"),
        ({"freshness": {"fail_after": SECRET}}, "freshness has no field 'fail_after': did you mean 'fail_after_hours'"),
        (
            {"partitions_def": {"type": "dynamic", "nam": SECRET}},
            "partitions_def has no field 'nam': did you mean 'name'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_attribute_is_refused_with_the_one_that_was_meant(written, change, message):
    """One error, which names file and field and shows no value; not one for each kind of exporter that there is."""
    with pytest.raises(Exception, match="orders") as refusal:
        written.load(written.pipeline(**change))
    shown = told(refusal.value)
    assert message in shown
    assert "defs.yaml:" in shown
    assert "1 validation error for ArtifactPipelineComponent" in shown
    assert SECRET not in shown


def test_retries_and_schedule_settings_reach_the_definitions(written):
    """`max_retries: 0` means none; a schedule may say its time zone, and that it runs from the start."""
    schedule = {"cron_schedule": "15 6 * * *", "execution_timezone": "Europe/Berlin", "running": True}
    defs = written.load(written.pipeline(max_retries=0, schedule=schedule))
    made = defs.resolve_schedule_def("orders_schedule")
    assert (made.cron_schedule, made.execution_timezone) == ("15 6 * * *", "Europe/Berlin")
    assert made.default_status == dg.DefaultScheduleStatus.RUNNING
    ops = defs.resolve_job_def("orders_job").all_node_defs
    assert {op.retry_policy for op in ops if isinstance(op, dg.OpDefinition)} == {None}

    again = written.load(written.pipeline(max_retries="{{ 3 + 4 }}"))
    ops = again.resolve_job_def("orders_job").all_node_defs
    assert {op.retry_policy.max_retries for op in ops if isinstance(op, dg.OpDefinition) and op.retry_policy} == {7}


def test_the_components_of_the_docs_load(written):
    """The YAML that docs/components.md shows makes definitions, as it is."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "components.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(type: .*?)^```$", page, re.DOTALL | re.MULTILINE)
    pipeline, mirror = (written.load(yaml.safe_load(block)) for block in blocks)
    assert pipeline.resolve_schedule_def("orders_schedule").default_status == dg.DefaultScheduleStatus.RUNNING
    assert mirror.resolve_sensor_def("orders_latest_sensor").default_status == dg.DefaultSensorStatus.RUNNING


def described(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, str | None]]:
    """Each property of ours in a JSON schema, and what it says."""
    ours = {"Settings", "Schedule", "Partitions", "Component"}
    for name, model in {where: schema, **schema.get("$defs", {})}.items():
        title = model.get("title", name).replace(" ", "")
        if any(word in title for word in ours) and "Model" not in name:
            for field, told in model.get("properties", {}).items():
                yield f"{name}.{field}", told.get("description")


@pytest.mark.parametrize("component", [ArtifactPipelineComponent, ArtifactMirrorComponent])
def test_every_field_of_the_schema_says_what_it_means(component):
    """Editors and `dg` show a sentence for each attribute."""
    model: type[BaseModel] = component.model()
    fields = dict(described(model.model_json_schema(), component.__name__))
    assert {name.rpartition(".")[2] for name in fields} >= {"importer", "path", "keep_versions", "chunk_size", "url"}
    assert [name for name, told in fields.items() if not told and not name.endswith(".type")] == []


def test_the_scaffolders_write_what_works(sandbox, place):
    """A scaffolded pipeline and a scaffolded mirror load as they are; parameters land in the file."""
    usual = sandbox.scaffold_component(ArtifactPipelineComponent, "new-orders")
    params = {
        "name": "orders",
        "source": str(place.source),
        "target": "/srv/m",
        "store": "s3://b/p",
        "schedule": "@daily",
    }
    chosen = sandbox.scaffold_component(ArtifactPipelineComponent, "chosen", scaffold_params=params)
    mirror = sandbox.scaffold_component(ArtifactMirrorComponent, "copy", scaffold_params={"store": "s3://b/p"})

    written = {path.name: yaml.safe_load((path / "defs.yaml").read_text()) for path in (usual, chosen, mirror)}
    assert written["chosen"] == {
        "type": "blobflow.dagster.component.ArtifactPipelineComponent",
        "attributes": {
            "name": "orders",
            "exporter": {"kind": "directory", "path": str(place.source)},
            "importer": {"kind": "directory", "path": "/srv/m"},
            "store": "s3://b/p",
            "schedule": "@daily",
        },
    }
    assert written["new-orders"]["attributes"]["exporter"]["path"] == "{{ context.project_root }}/data/new_orders"
    with sandbox.build_all_defs() as defs:
        assert {key.path[0] for key in defs.resolve_all_asset_keys()} == {"orders", "new_orders", "mirrors"}


def publish(place: Place, name: str, tree: Tree) -> str:
    """Another deployment publishes a tree as `orders/<name>`, and moves the ref to it."""
    artifact = artifact_of(place.home / name, tree)
    digest = upload(place.store, f"orders/{name}", artifact.path).artifact_digest
    move_ref(place.store, "orders/latest", f"orders/{name}", digest)
    return digest


def test_a_mirror_follows_a_ref_of_another_deployment(place, written):
    """The mirror shows what the ref names, needs no upstream run, and says which artifact that is."""
    defs = written.load(written.mirror())
    assert "there is no ref 'orders/latest'" in failure(written.run(defs, asset_selection=[FOLLOWING]))[1]

    first = publish(place, "monday", {"day": "monday"})
    result = written.run(defs, asset_selection=[FOLLOWING])
    assert succeeded(result) == [f"mirrors__{step}" for step in STEPS[3:]]
    made = materialization(result, FOLLOWING)
    assert made is not None
    assert (made.tags or {})["dagster/data_version"] == first
    assert read_tree(place.current) == {"day": "monday"}

    publish(place, "tuesday", {"day": "tuesday"})
    assert written.run(defs, asset_selection=[FOLLOWING]).success
    assert read_tree(place.current) == {"day": "tuesday"}
    assert not defs.resolve_asset_graph().get(FOLLOWED).is_executable


def test_a_moved_ref_starts_one_run_of_the_mirror(place, written):
    """The sensor asks for a run when the ref has moved, and for none as long as it stays."""
    publish(place, "monday", {"day": "monday"})
    defs = written.load(written.mirror(minimum_interval_seconds=7, running=True))
    sensor = defs.resolve_sensor_def("orders_latest_sensor")
    assert (sensor.minimum_interval_seconds, sensor.default_status) == (7, dg.DefaultSensorStatus.RUNNING)
    assert [target.job_name for target in sensor.targets] == ["orders_mirror_job"]

    def tick(cursor: str | None) -> Any:
        with dg.build_sensor_context(
            instance=place.instance,
            repository_def=defs.get_repository_def(),
            resources={"orders_blobflow": resource_of(defs)},
            cursor=cursor,
        ) as context:
            return sensor.evaluate_tick(context)

    moved = tick(None)
    assert len(moved.run_requests or []) == 1
    assert [event.asset_key for event in moved.asset_events] == [FOLLOWED]
    assert tick(moved.cursor).run_requests == []


def test_without_a_ref_every_artifact_has_a_mirror_of_its_own(place, written):
    """Artifacts are partitions; each is brought to the directory that its key names."""
    publish(place, "monday", {"day": "monday"})
    publish(place, "tuesday", {"day": "tuesday"})
    importer = {"kind": "directory", "path": f"{place.home}/mirrors/{{{{ partition_key }}}}"}
    defs = written.load(written.mirror(ref=None, importer=importer))
    sensors = {sensor.name for sensor in defs.get_repository_def().sensor_defs}
    assert sensors == {"orders_manifest_sensor", "orders_mirror_automation"}

    keys = ["orders/monday", "orders/tuesday"]
    partitions = defs.resolve_asset_graph().get(FOLLOWING).partitions_def
    assert isinstance(partitions, dg.DynamicPartitionsDefinition)
    place.instance.add_dynamic_partitions(partitions.name or "", keys)
    for key in keys:
        assert written.run(defs, asset_selection=[FOLLOWING], partition_key=key).success
    assert read_tree(place.home / "mirrors" / "orders%2Fmonday" / "current") == {"day": "monday"}
    assert read_tree(place.home / "mirrors" / "orders%2Ftuesday" / "current") == {"day": "tuesday"}
    assert defs.resolve_asset_graph().get(FOLLOWING).automation_condition is not None


def test_the_download_of_a_mirror_may_have_lanes(place, written):
    """Lanes divide the download of a mirror that has no pipeline of its own."""
    publish(place, "monday", TREE)
    result = written.run(written.load(written.mirror(lanes=2)), asset_selection=[FOLLOWING])
    assert len([step for step in succeeded(result) if "lane_" in step]) == 2
    assert read_tree(place.current) == TREE


def test_a_pipeline_and_its_mirrors_have_keys_that_do_not_collide(place, written):
    """Two code locations of one deployment, the pipeline here and a mirror there; a third one says where it is."""
    documents = (written.pipeline(), written.mirror(), written.mirror(key_prefix=["berlin"]))
    keys = [{spec.key for spec in written.load(document).resolve_all_asset_specs()} for document in documents]
    assert keys[0] == {SNAPSHOT, REMOTE, MIRROR}
    assert keys[1] == {FOLLOWED, FOLLOWING}
    assert keys[2] == {dg.AssetKey(["berlin", "orders", stage]) for stage in ("remote", "mirror")}


def test_a_translated_mirror_follows_the_translated_asset(place, written):
    """With other keys the mirror still depends on the external asset that the sensor tells of."""
    publish(place, "monday", {"day": "monday"})
    defs = written.load(written.mirror(translation={"key": "copies/{{ stage }}"}))
    graph = defs.resolve_asset_graph()
    mirror = dg.AssetKey(["copies", "mirror"])
    assert graph.get(mirror).parent_keys == {dg.AssetKey(["copies", "remote"])}
    assert written.run(defs, asset_selection=[mirror]).success
    assert read_tree(place.current) == {"day": "monday"}


def test_backends_of_a_component_are_checked_for_paths_of_their_own(tmp_path: Path):
    """A home directory may be written as `~`: what matters is that every process means the same place."""
    component = ArtifactPipelineComponent.from_attributes_dict(
        attributes={
            "name": "orders",
            "exporter": {"kind": "directory", "path": "~/orders"},
            "importer": {"kind": "directory", "path": str(tmp_path)},
        }
    )
    assert component.exporter == DirectoryExporter(path=Path("~/orders"))


@pytest.mark.parametrize("kind", ["pipeline", "mirror"])
def test_the_mirrors_freshness_is_written_in_hours(written: Yaml, kind: str):
    """Both components give it to the mirror and to nothing else."""
    document = getattr(written, kind)(freshness={"fail_after_hours": 26, "warn_after_hours": 25.5})
    specs = {spec.key: spec.freshness_policy for spec in written.load(document).resolve_all_asset_specs()}
    policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=26), warn_window=timedelta(hours=25.5))
    assert specs.pop(MIRROR if kind == "pipeline" else FOLLOWING) == policy
    assert set(specs.values()) == {None}
