from blobflow.streams.checkpoint import (
    TransferCheckpoint as TransferCheckpoint,
)
from blobflow.streams.ends import (
    FileTarget as FileTarget,
    ObjectSource as ObjectSource,
    ObjectTarget as ObjectTarget,
)
from blobflow.streams.http_source import HttpSource as HttpSource
from blobflow.streams.transferring import (
    ReadableStream as ReadableStream,
    TransferResult as TransferResult,
    WritableStream as WritableStream,
    transfer as transfer,
)
