"""Stores: a local directory, S3 and its relatives, or any other fsspec file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blobflow import moved
from blobflow.stores.base import (
    Body,
    Capabilities,
    ObjectMeta,
    PartMeta,
    PutMode,
    Reader,
    Store,
    StoredObject,
    UploadMeta,
    check_key,
)
from blobflow.stores.open import open_store

__all__ = [
    "Body",
    "Capabilities",
    "ObjectMeta",
    "PartMeta",
    "PutMode",
    "Reader",
    "Store",
    "StoredObject",
    "UploadMeta",
    "check_key",
    "open_store",
]

if not TYPE_CHECKING:
    __getattr__ = moved.attach(__name__)
