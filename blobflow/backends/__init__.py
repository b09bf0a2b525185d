"""Exporters make artifacts out of sources, importers bring them back to life."""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
