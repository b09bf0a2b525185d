"""Layers: directories in a bucket, compressed, named by their content, sent when they change (docs/layers.md).

The modules: names and format, with the codec; cutting compressed frames into parts; sending, scanning, restoring; the
state of containers; and `LayerSync`, the public entry point.
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
