"""Tools for your tests: the contracts of stores and backends, a store with faults, directory trees as literals.

Nothing here imports pytest, so the package may be imported anywhere.
"""

from __future__ import annotations

from blobflow.testing.backend_contract import BackendContract
from blobflow.testing.faults import (
    CorruptRead,
    FailAfter,
    FailBefore,
    Fault,
    FaultyStore,
    Hook,
    Request,
    Truncate,
    random_faults,
    scripted_faults,
)
from blobflow.testing.store_contract import StoreContract
from blobflow.testing.trees import Executable, Fifo, Symlink, Tree, read_tree, write_tree

__all__ = [
    "BackendContract",
    "CorruptRead",
    "Executable",
    "FailAfter",
    "FailBefore",
    "Fault",
    "FaultyStore",
    "Fifo",
    "Hook",
    "Request",
    "StoreContract",
    "Symlink",
    "Tree",
    "Truncate",
    "random_faults",
    "read_tree",
    "scripted_faults",
    "write_tree",
]
