"""Where names and modules of 0.1 moved: until 0.3 the old places work, with a DeprecationWarning.

Only `blobflow/lazy.py` and packages that lost a name call this module. It is removed in 0.3, with its test.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

NAMES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "blobflow": {
        "blobflow": ("Leases", "SqlLeases", "StoreLeases"),
        "blobflow.backends": (
            "AppendLog",
            "AppendLogExporter",
            "AppendLogImporter",
            "ParquetExporter",
            "ParquetImporter",
            "SqliteExporter",
            "SqliteImporter",
        ),
        "blobflow.batch": ("BatchExecutor", "BatchResult", "Delete", "Deleted", "Get", "Got", "Insert", "Inserted"),
        "blobflow.lanes": (
            "DownloadTicket",
            "LaneResult",
            "UploadTicket",
            "begin_download",
            "begin_upload",
            "commit_upload",
            "fetch_lane",
            "send_parts",
        ),
        "blobflow.layers": ("LayerRestoreResult", "LayerSync", "LayerSyncResult"),
        "blobflow.mirror": (
            "MirrorReceiver",
            "MirrorStatus",
            "Snapshot",
            "SnapshotEnvelope",
            "SnapshotId",
            "mirror_history",
            "mirror_status",
        ),
        "blobflow.streams": (
            "FileTarget",
            "HttpSource",
            "ObjectSource",
            "ObjectTarget",
            "TransferCheckpoint",
            "TransferResult",
            "transfer",
        ),
    },
    "blobflow.stores": {"blobflow.stores": ("Abilities",)},
    "blobflow.stores.local": {"blobflow.stores.local.store": ("LocalStore",)},
    "blobflow.stores.s3": {"blobflow.stores.s3.store": ("S3Store",)},
}
"""Names that left a module that still exists: old module, then new module, then names."""

MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "blobflow.backends.history": ("blobflow.backends.mirror_history",),
    "blobflow.backends.versions": ("blobflow.backends.versioned_importer",),
    "blobflow.cache": ("blobflow.transport.cache",),
    "blobflow.checkpoints": ("blobflow", "blobflow.transport.checkpoints"),
    "blobflow.engine.checkpoint": ("blobflow.streams", "blobflow", "blobflow.streams.checkpoint"),
    "blobflow.engine.ends": ("blobflow.streams", "blobflow.streams.ends"),
    "blobflow.engine.http_source": ("blobflow.streams", "blobflow.streams.http_source"),
    "blobflow.engine.transfer": ("blobflow.streams", "blobflow.streams.transferring"),
    "blobflow.follow": ("blobflow.mirror", "blobflow.mirror.status"),
    "blobflow.gc": ("blobflow.maintenance.gc",),
    "blobflow.intent": ("blobflow.uploads.intent",),
    "blobflow.lease": (
        "blobflow",
        "blobflow.coordination.lease_store",
        "blobflow.coordination.refs",
        "blobflow.coordination.lease",
    ),
    "blobflow.lease_sql": ("blobflow", "blobflow.coordination.sql_lease_store"),
    "blobflow.retention": ("blobflow.maintenance.retention", "blobflow.coordination.refs"),
    "blobflow.rounds": ("blobflow", "blobflow.coordination.rounds"),
    "blobflow.stores.fsspec_store": ("blobflow.stores.fsspec.store",),
    "blobflow.stores.s3_options": ("blobflow.stores.s3.options",),
    "blobflow.streams.transfer": ("blobflow.streams", "blobflow.streams.transferring"),
}
"""Modules that no longer exist, and the modules that have their names now; the first with a name is the one to use."""

RENAMED: Final[Mapping[str, str]] = {
    "Abilities": "Capabilities",
    "Home": "CheckpointStore",
    "Leases": "LeaseStore",
    "LocalHome": "LocalCheckpointStore",
    "SqlLeases": "SqlLeaseStore",
    "StoreLeases": "ObjectLeaseStore",
}
"""Old name to new name."""


def find(module: str, name: str) -> Any:
    """The value of `module.name`, with a DeprecationWarning for the line that asked.

    Raises:
        AttributeError: there never was such a name.
    """
    homes = [home for home, names in NAMES.get(module, {}).items() if name in names] or MODULES.get(module, ())
    new = RENAMED.get(name, name)
    for home in homes if not name.startswith("__") else ():
        found = getattr(importlib.import_module(home), new, None)
        if found is not None:
            message = f"{module}.{name} is now {home}.{new}; the old name goes in blobflow 0.3"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            return found
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def attach(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that lost names."""
    return lambda name: find(module, name)


class _Finder:
    """Makes `import blobflow.lease` work: the module is empty and looks its names up in their new modules."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG004
        # importlib.abc, whose Loader the type expects, costs 15 ms.
        return ModuleSpec(name, _Finder()) if name in MODULES else None  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python create the module."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = attach(module.__name__)


sys.meta_path.append(_Finder)  # the last one: asked only for modules that no other finder knows
