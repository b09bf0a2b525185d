"""Batches: many small operations on a store, in a bounded window.

`operations` says what can be done, `stream` when, `runners` how: by coroutines where the store has them, by threads
everywhere, or in processes of their own. `tables` runs the operations of a file and keeps their results. Why it is
built this way: docs/design/016-batches.md.
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
