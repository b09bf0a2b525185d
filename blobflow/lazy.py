"""Packages whose names load on first use.

A package lists its public names once, as imports in its `__init__.pyi`. Type checkers read that stub, and so does
`attach`, so that `import blobflow` loads no name before it is used.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from blobflow import moved


@functools.cache
def public_names(package: str) -> dict[str, str]:
    """Every name in the stub of `package`, with the module that it comes from."""
    # Imported here, so that only code that uses a name pays for these.
    import ast
    import pkgutil

    stub = pkgutil.get_data(package, "__init__.pyi")
    assert stub is not None, package
    imports = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names if node.module}


def attach(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package with an `__init__.pyi`; names that moved away warn (see `moved`)."""

    def load(name: str) -> Any:
        names = public_names(package)
        if name == "__all__":
            return sorted(names)
        if name not in names:
            return moved.find(package, name)
        value = getattr(importlib.import_module(names[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
