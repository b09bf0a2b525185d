"""Lanes: one upload or download shared by several processes or machines (docs/lanes.md)."""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
