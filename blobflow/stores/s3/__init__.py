"""The S3 store: AWS and every server that speaks the S3 protocol (Ceph, MinIO, R2 ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blobflow import moved

if not TYPE_CHECKING:
    __getattr__ = moved.attach(__name__)
