"""The names of the core that commands use, loaded when they are first used.

Start-up time is part of the interface of the command line: `blobflow --help` loads click and little else, and a command
loads only what it needs. So commands write `core.upload(...)`, and import nothing themselves.
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
