"""The local store: a directory in which every object is a plain file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blobflow import moved

if not TYPE_CHECKING:
    __getattr__ = moved.attach(__name__)
