"""The keys of layers' objects."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

from blobflow.stores.base import key_segment

LAYER_SUFFIX: Final = ".tar.zst"
META_SUFFIX: Final = ".layer.json"
CONTAINERS: Final = "containers/"
"""Prefix of the containers' refs."""


def layer_key(digest: str) -> str:
    """The key of the layer."""
    return digest.removeprefix("sha256:") + LAYER_SUFFIX


def meta_key(key: str) -> str:
    """The key of the metadata of the layer `key`."""
    return key.removesuffix(LAYER_SUFFIX) + META_SUFFIX


def container_ref(name: str) -> str:
    """The ref that names a container's layer."""
    return CONTAINERS + key_segment(name)


def container_name(ref: str) -> str | None:
    """The container of a ref, the inverse of `container_ref`; None if the ref is not a container's."""
    name = unquote(ref.removeprefix(CONTAINERS))
    return name if container_ref(name) == ref else None
