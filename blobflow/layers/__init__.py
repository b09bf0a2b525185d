"""Layers: directories in a bucket, compressed, named by their content, sent when they changed (docs/layers.md).

Names and format, with the codec; cutting compressed frames into parts; sending, scanning, restoring; the state of
containers; and `LayerSync`, which is all that somebody outside needs.
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
