from blobflow.artifact.artifact import Artifact as Artifact
from blobflow.backends.registry import backend_classes as backend_classes
from blobflow.batch import BatchExecutor as BatchExecutor
from blobflow.batch.tables import run_batch_file as run_batch_file
from blobflow.config import ChunkProfile as ChunkProfile
from blobflow.coordination.refs import name_artifact as name_artifact, read_ref as read_ref
from blobflow.layers import LayerSync as LayerSync
from blobflow.maintenance.gc import collect as collect, collect_stages as collect_stages
from blobflow.maintenance.retention import prune as prune
from blobflow.mirror import (
    Following as Following,
    MirrorReceiver as MirrorReceiver,
    ReceivedStore as ReceivedStore,
    Snapshot as Snapshot,
    read_snapshots as read_snapshots,
)
from blobflow.mirror.client import MirrorClient as MirrorClient
from blobflow.mirror.door import Door as Door
from blobflow.mirror.server import MirrorServer as MirrorServer, read_senders as read_senders
from blobflow.mirror.status import mirror_status as mirror_status
from blobflow.mirror.update import update_mirror as update_mirror
from blobflow.stores.base import check_readable as check_readable
from blobflow.stores.open import open_store as open_store
from blobflow.stores.probe import ProbedStore as ProbedStore, probe as probe
from blobflow.transport import (
    PROOF_MEANS as PROOF_MEANS,
    check_artifact_key as check_artifact_key,
    copy_artifact as copy_artifact,
    download as download,
    list_artifacts as list_artifacts,
    read_manifest_file as read_manifest_file,
    upload as upload,
    verify as verify,
    verify_or_heal as verify_or_heal,
)
from blobflow.transport.remote import check_expected as check_expected
from blobflow.untrusted import plain as plain, quoted as quoted
