"""blobflow moves large artifacts between directories, stores and machines, whole or not at all.

The names of the core are listed in `__init__.pyi` and load when they are first used, so that `import blobflow` costs
nothing. Subjects beside artifacts have namespaces: `blobflow.backends`, `.batch`, `.lanes`, `.layers`, `.mirror` and
`.streams`. The Dagster integration is `blobflow.dagster`.
"""

from __future__ import annotations

from blobflow import lazy
from blobflow.version import __version__ as __version__

__getattr__ = lazy.attach(__name__)


def __dir__() -> list[str]:
    return [*lazy.public_names(__name__)]
