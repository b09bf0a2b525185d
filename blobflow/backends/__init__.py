"""Exporters make artifacts from sources; importers turn artifacts into live mirrors."""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
