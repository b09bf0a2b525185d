"""Batches: many small operations on a store, in a bounded window.

`operations` defines what can be done, `stream` decides when, and `runners` execute: coroutines if the store has them,
threads everywhere, or separate processes. `tables` runs the operations of a file and keeps their results. The design
and its reasons: docs/design/016-batches.md.
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
