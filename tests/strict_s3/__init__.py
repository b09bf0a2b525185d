"""A strict S3 in this process, with faults on demand.

It keeps AWS's rules where other servers for tests are lenient (checksums are checked, told and demanded; conditions
hold for Complete too; pages end; parts have a minimum size; signatures are verified), and it refuses with 501 whatever
it does not know, so that no test passes because a header was ignored. Everything is held in memory.

Rules: https://docs.aws.amazon.com/AmazonS3/latest/API/Welcome.html and, for checksums,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html. Left out: versions, ACLs, tags,
metadata, encryption, delimiters, presigned URLs, chunked signatures, and checksums other than CRC32C.
"""

from __future__ import annotations

from tests.strict_s3.errors import S3Error
from tests.strict_s3.faults import (
    Exchange,
    FailAfter,
    FailBefore,
    Fault,
    Hook,
    Late,
    Refuse,
    Response,
    Tamper,
    Throttle,
)
from tests.strict_s3.operations import operation_of
from tests.strict_s3.server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, StrictS3
from tests.strict_s3.signatures import REGION
from tests.strict_s3.state import Limits

__all__ = [
    "ACCESS_KEY_ID",
    "REGION",
    "SECRET_ACCESS_KEY",
    "Exchange",
    "FailAfter",
    "FailBefore",
    "Fault",
    "Hook",
    "Late",
    "Limits",
    "Refuse",
    "Response",
    "S3Error",
    "StrictS3",
    "Tamper",
    "Throttle",
    "operation_of",
]
