"""Streams: any source of bytes to any target, with checkpoints; the plan and the pool of `engine` are not used here."""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
