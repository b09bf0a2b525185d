"""Mirrors: snapshots that are pushed from one place to another and arrive whole, whatever breaks on the way.

| module | knows |
|---|---|
| `envelope` | the frames on the wire |
| `machine` | the rules of receiving, without I/O |
| `receiver` | the files, the locks |
| `received` | a receiver's directory as a store that is read |
| `sending` | where the chunks come from |
| `server`, `client` | HTTP; the server needs the extra `blobflow[mirror]` |
"""

from __future__ import annotations

from blobflow.mirror.envelope import SnapshotEnvelope, SnapshotId
from blobflow.mirror.machine import Bootstrapping, Following, ReceiverStatus
from blobflow.mirror.received import ReceivedStore
from blobflow.mirror.receiver import Committed, MirrorReceiver, Pending, read_snapshots
from blobflow.mirror.sending import Snapshot

__all__ = [
    "Bootstrapping",
    "Committed",
    "Following",
    "MirrorReceiver",
    "Pending",
    "ReceivedStore",
    "ReceiverStatus",
    "Snapshot",
    "SnapshotEnvelope",
    "SnapshotId",
    "read_snapshots",
]
