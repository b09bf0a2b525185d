"""The public names: listed once, loaded when used, and found in their old places until 0.3."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import blobflow
from blobflow import lazy, moved

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("backends", "batch", "lanes", "layers", "mirror", "streams")

# What `blobflow` and its modules had in 0.1, with the place that has it now.
TOP_LEVEL_OF_0_1 = """
    backends: AppendLog AppendLogExporter AppendLogImporter ParquetExporter ParquetImporter SqliteExporter
    backends: SqliteImporter
    batch: BatchExecutor BatchResult Delete Deleted Get Got Insert Inserted
    lanes: DownloadTicket LaneResult UploadTicket begin_download begin_upload commit_upload fetch_lane send_parts
    layers: LayerRestoreResult LayerSync LayerSyncResult
    mirror: MirrorReceiver MirrorStatus Snapshot SnapshotEnvelope SnapshotId mirror_history mirror_status
    streams: FileTarget HttpSource ObjectSource ObjectTarget TransferCheckpoint TransferResult transfer
"""
STILL_AT_TOP_LEVEL = """
    Artifact ArtifactEntry BlobflowError ChunkProfile CopyResult DirectoryExporter DirectoryImporter DownloadResult
    ExportResult Exporter ImportResult Importer Lease Manifest ProgressEvent RefState RoundResult Store TransferRecord
    UploadResult VerifyResult copy_artifact download export_artifact import_artifact list_artifacts move_ref open_store
    read_manifest read_ref run_export_round upload verify
"""
NEW_AT_TOP_LEVEL = "LeaseStore LocalCheckpointStore ObjectLeaseStore SqlLeaseStore TransferJournal __version__"
RENAMED_OR_IN_MODULES_OF_0_1 = {
    "blobflow.Leases": "blobflow.LeaseStore",
    "blobflow.StoreLeases": "blobflow.ObjectLeaseStore",
    "blobflow.SqlLeases": "blobflow.SqlLeaseStore",
    "blobflow.cache.ArtifactCache": "blobflow.transport.cache.ArtifactCache",
    "blobflow.checkpoints.Home": "blobflow.transport.checkpoints.CheckpointStore",
    "blobflow.checkpoints.LocalHome": "blobflow.LocalCheckpointStore",
    "blobflow.checkpoints.TransferJournal": "blobflow.TransferJournal",
    "blobflow.backends.history.HistoryEntry": "blobflow.backends.mirror_history.HistoryEntry",
    "blobflow.backends.versions.VersionedImporter": "blobflow.backends.versioned_importer.VersionedImporter",
    "blobflow.engine.checkpoint.TransferCheckpoint": "blobflow.streams.TransferCheckpoint",
    "blobflow.engine.checkpoint.TransferRecord": "blobflow.TransferRecord",
    "blobflow.engine.ends.FileTarget": "blobflow.streams.FileTarget",
    "blobflow.engine.ends.PinnedSource": "blobflow.streams.ends.PinnedSource",
    "blobflow.engine.http_source.HttpSource": "blobflow.streams.HttpSource",
    "blobflow.engine.transfer.transfer": "blobflow.streams.transfer",
    "blobflow.follow.MirrorStatus": "blobflow.mirror.MirrorStatus",
    "blobflow.follow.mirror_status": "blobflow.mirror.mirror_status",
    "blobflow.gc.GcReport": "blobflow.maintenance.gc.GcReport",
    "blobflow.gc.collect": "blobflow.maintenance.gc.collect",
    "blobflow.intent.Intent": "blobflow.uploads.intent.Intent",
    "blobflow.lease.Lease": "blobflow.Lease",
    "blobflow.lease.LeaseMachine": "blobflow.coordination.lease.LeaseMachine",
    "blobflow.lease.LeaseState": "blobflow.coordination.lease_store.LeaseState",
    "blobflow.lease.Leases": "blobflow.LeaseStore",
    "blobflow.lease.fence_ref": "blobflow.coordination.refs.fence_ref",
    "blobflow.lease.move_ref": "blobflow.move_ref",
    "blobflow.lease_sql.SqlLeases": "blobflow.SqlLeaseStore",
    "blobflow.retention.name_artifact": "blobflow.coordination.refs.name_artifact",
    "blobflow.retention.prune": "blobflow.maintenance.retention.prune",
    "blobflow.rounds.content_key": "blobflow.coordination.rounds.content_key",
    "blobflow.rounds.run_export_round": "blobflow.run_export_round",
    "blobflow.stores.Abilities": "blobflow.stores.Capabilities",
    "blobflow.stores.fsspec_store.FsspecStore": "blobflow.stores.fsspec.store.FsspecStore",
    "blobflow.stores.local.LocalStore": "blobflow.stores.local.store.LocalStore",
    "blobflow.stores.s3.S3Store": "blobflow.stores.s3.store.S3Store",
    "blobflow.stores.s3_options.S3Options": "blobflow.stores.s3.options.S3Options",
    "blobflow.streams.transfer.ReadableStream": "blobflow.streams.ReadableStream",
}


def moved_names() -> Iterator[tuple[str, str]]:
    """Every old place and its new one."""
    for line in TOP_LEVEL_OF_0_1.strip().splitlines():
        namespace, names = line.split(":")
        yield from ((f"blobflow.{name}", f"blobflow.{namespace.strip()}.{name}") for name in names.split())
    yield from RENAMED_OR_IN_MODULES_OF_0_1.items()


def public_names(module: str) -> list[str]:
    """What `blobflow` or a namespace lists in its stub."""
    return sorted(lazy.public_names(module))


def resolve(place: str) -> object:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("old", "new"), list(moved_names()))
def test_an_old_place_works_and_a_warning_names_the_new_one(old: str, new: str):
    """Code written for 0.1 runs until 0.3, and says which line to change, and to what."""
    module, _, name = old.rpartition(".")
    scope: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="the old name goes in blobflow 0.3") as seen:
        exec(compile(f"from {module} import {name}", "user_code.py", "exec"), scope)
    assert scope[name] is resolve(new)
    assert {str(w.message) for w in seen} == {f"{old} is now {new}; the old name goes in blobflow 0.3"}
    assert {w.filename for w in seen} == {"user_code.py"}


def test_what_never_was_is_an_attribute_error():
    """Old modules and the package answer as Python's own do for a name that they never had."""
    for module in ("blobflow", "blobflow.lease", "blobflow.stores", "blobflow.streams"):
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
            _ = importlib.import_module(module).nothing


@pytest.mark.parametrize("module", ["blobflow", *(f"blobflow.{name}" for name in NAMESPACES)])
def test_every_public_name_is_there(module: str):
    """Each listed name loads, without a warning, from where users are told to import it."""
    for name in public_names(module):
        assert resolve(f"{module}.{name}") is not None


def test_the_top_level_has_few_names():
    """`blobflow` itself holds the life of an artifact; subjects beside it have their namespaces."""
    names = set(public_names("blobflow"))
    assert {*STILL_AT_TOP_LEVEL.split(), *NEW_AT_TOP_LEVEL.split()} == names
    assert set(dir(blobflow)) == names


def test_every_row_of_the_tables_is_needed():
    """The tables of `moved` hold nothing that this file does not try."""
    tried = dict(moved_names())
    listed = {f"{old}.{name}" for old, homes in moved.NAMES.items() for names in homes.values() for name in names}
    assert listed <= tried.keys()
    assert {old.rpartition(".")[0] for old in tried} == moved.NAMES.keys() | moved.MODULES.keys()
    assert moved.RENAMED.keys() <= {old.rpartition(".")[2] for old in tried}


def test_nothing_of_ours_uses_an_old_place():
    """Package, tests, examples and pages import from where things are."""
    modules = "|".join(re.escape(name) for name in moved.MODULES)
    names = "|".join(moved.RENAMED.keys() - {"Home", "Leases"})
    old = re.compile(rf"(?:from|import) (?:{modules})\b(?!\.)|\b(?:{names})\b")
    files = [path for pattern in ("*.py", "*.pyi", "*.md", "*.yaml") for path in ROOT.glob(f"[!.]*/**/{pattern}")]
    ours = [p for p in [*files, ROOT / "README.md", ROOT / "definitions.py"] if "site" not in p.parts]
    but = {ROOT / "blobflow" / "moved.py", Path(__file__)}
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in ours
        if path not in but
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if old.search(line)
    ]
    assert found == []


def test_the_first_use_of_a_name_loads_its_module_only():
    """A worker that only copies streams does not pay for SQL, Parquet or layers."""
    code = "import sys, blobflow; blobflow.ChunkProfile; print(*(n for n in sys.modules if n.startswith('blobflow')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "blobflow.config" in loaded
    assert [name for name in loaded if name.startswith(("blobflow.transport", "blobflow.backends"))] == []


def test_a_star_import_takes_the_public_names():
    """`from blobflow import *` in a notebook brings what the stub lists, and no warning."""
    scope: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from blobflow import *", scope)
    assert public_names("blobflow") == sorted(name for name in scope if name != "__builtins__")


def test_the_api_page_describes_every_public_name_once():
    """What is promised is on one page: no name is missing there, and none is promised twice."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^### ::: (\S+)$", page, re.MULTILINE)
    top = set(public_names("blobflow")) - {"__version__", "BlobflowError"}  # the errors have a section
    beside = {
        f"blobflow.{space}.{name}" for space in NAMESPACES for name in set(public_names(f"blobflow.{space}")) - top
    }
    assert sorted(described) == sorted({f"blobflow.{name}" for name in top} | beside)
