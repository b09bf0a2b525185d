from blobflow.backends.append_log import (
    AppendLog as AppendLog,
    AppendLogExporter as AppendLogExporter,
    AppendLogImporter as AppendLogImporter,
    read_records as read_records,
)
from blobflow.backends.base import (
    Exporter as Exporter,
    ExportResult as ExportResult,
    Importer as Importer,
    ImportResult as ImportResult,
    OnBytes as OnBytes,
)
from blobflow.backends.directory import (
    DirectoryExporter as DirectoryExporter,
    DirectoryImporter as DirectoryImporter,
)
from blobflow.backends.parquet import (
    ParquetExporter as ParquetExporter,
    ParquetImporter as ParquetImporter,
)
from blobflow.backends.registry import (
    export_artifact as export_artifact,
    import_artifact as import_artifact,
)
from blobflow.backends.sqlite import (
    SqliteExporter as SqliteExporter,
    SqliteImporter as SqliteImporter,
)
from blobflow.backends.versioned_importer import VersionedImporter as VersionedImporter
