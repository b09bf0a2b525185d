from blobflow.batch.operations import (
    BatchResult as BatchResult,
    Delete as Delete,
    Deleted as Deleted,
    Get as Get,
    Got as Got,
    Insert as Insert,
    Inserted as Inserted,
    Operation as Operation,
    Payload as Payload,
    Permission as Permission,
    Response as Response,
)
from blobflow.batch.stream import (
    AsyncBatchStream as AsyncBatchStream,
    BatchExecutor as BatchExecutor,
    BatchStream as BatchStream,
)
