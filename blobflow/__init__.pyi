from blobflow.artifact.artifact import Artifact as Artifact
from blobflow.artifact.manifest import Manifest as Manifest
from blobflow.backends.base import (
    Exporter as Exporter,
    ExportResult as ExportResult,
    Importer as Importer,
    ImportResult as ImportResult,
)
from blobflow.backends.directory import (
    DirectoryExporter as DirectoryExporter,
    DirectoryImporter as DirectoryImporter,
)
from blobflow.backends.registry import (
    export_artifact as export_artifact,
    import_artifact as import_artifact,
)
from blobflow.config import ChunkProfile as ChunkProfile
from blobflow.coordination.lease import Lease as Lease
from blobflow.coordination.lease_store import (
    LeaseStore as LeaseStore,
    ObjectLeaseStore as ObjectLeaseStore,
)
from blobflow.coordination.refs import (
    RefState as RefState,
    move_ref as move_ref,
    read_ref as read_ref,
)
from blobflow.coordination.rounds import (
    RoundResult as RoundResult,
    run_export_round as run_export_round,
)
from blobflow.coordination.sql_lease_store import SqlLeaseStore as SqlLeaseStore
from blobflow.errors import BlobflowError as BlobflowError
from blobflow.stores.base import Store as Store
from blobflow.stores.open import open_store as open_store
from blobflow.transport import (
    ArtifactEntry as ArtifactEntry,
    CopyResult as CopyResult,
    DownloadResult as DownloadResult,
    ProgressEvent as ProgressEvent,
    UploadResult as UploadResult,
    VerifyResult as VerifyResult,
    copy_artifact as copy_artifact,
    download as download,
    list_artifacts as list_artifacts,
    read_manifest as read_manifest,
    upload as upload,
    verify as verify,
)
from blobflow.transport.checkpoints import (
    LocalCheckpointStore as LocalCheckpointStore,
    TransferJournal as TransferJournal,
)
from blobflow.uploads.progress import TransferRecord as TransferRecord
from blobflow.version import __version__ as __version__
