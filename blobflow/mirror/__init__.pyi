from blobflow.backends.mirror_history import HistoryEntry as HistoryEntry
from blobflow.mirror.client import MirrorClient as MirrorClient
from blobflow.mirror.envelope import (
    SnapshotEnvelope as SnapshotEnvelope,
    SnapshotId as SnapshotId,
)
from blobflow.mirror.machine import (
    Bootstrapping as Bootstrapping,
    Following as Following,
    ReceiverStatus as ReceiverStatus,
)
from blobflow.mirror.received import ReceivedStore as ReceivedStore
from blobflow.mirror.receiver import (
    Committed as Committed,
    MirrorReceiver as MirrorReceiver,
    Pending as Pending,
    read_snapshots as read_snapshots,
)
from blobflow.mirror.sending import Snapshot as Snapshot
from blobflow.mirror.server import (
    MirrorServer as MirrorServer,
    mirror_app as mirror_app,
)
from blobflow.mirror.status import (
    MirrorStatus as MirrorStatus,
    mirror_history as mirror_history,
    mirror_status as mirror_status,
)
from blobflow.mirror.update import (
    MirrorUpdate as MirrorUpdate,
    stage_artifact as stage_artifact,
    update_mirror as update_mirror,
)
