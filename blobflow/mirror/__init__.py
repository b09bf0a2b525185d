"""Mirrors: snapshots that are pushed from one place to another and arrive whole, whatever breaks on the way.

| module | knows |
|---|---|
| `envelope` | the frames on the wire |
| `machine` | the rules of receiving, without I/O |
| `receiver` | the files, the locks |
| `sending` | where the chunks come from |
| `server`, `client` | HTTP; the server needs the extra `blobflow[mirror]` |
"""

from __future__ import annotations

from blobflow.mirror.envelope import SnapshotEnvelope, SnapshotId
from blobflow.mirror.machine import Bootstrapping, Following, ReceiverStatus
from blobflow.mirror.receiver import Committed, MirrorReceiver, Pending, read_snapshots
from blobflow.mirror.sending import Snapshot

__all__ = [
    "Bootstrapping",
    "Committed",
    "Following",
    "MirrorReceiver",
    "Pending",
    "ReceiverStatus",
    "Snapshot",
    "SnapshotEnvelope",
    "SnapshotId",
    "read_snapshots",
]
