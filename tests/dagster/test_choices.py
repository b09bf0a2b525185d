"""Arguments that are one of a few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blobflow import DirectoryExporter, DirectoryImporter, verify
from blobflow.dagster import artifact_mirror, artifact_pipeline, layer_assets, manifest_sensor
from blobflow.errors import UsageError
from blobflow.layers import LayerSync
from blobflow.stores.local.store import LocalStore
from blobflow.transport.cache import ArtifactCache

EXPORTER, IMPORTER = DirectoryExporter(path=Path("/source")), DirectoryImporter(path=Path("/target"))

WORDS: list[tuple[str, str, str, Callable[..., Any]]] = [
    ("verify_mode", "depp", "deep", lambda **word: artifact_pipeline("orders", EXPORTER, IMPORTER, **word)),
    ("announce", "Verified", "verified", lambda **word: manifest_sensor("orders", **word)),
    ("announce", "verifed", "verified", lambda **word: artifact_mirror("orders", IMPORTER, **word)),
    ("symlinks", "refuze", "refuse", lambda **word: layer_assets({"web": "/web"}, **word)),
    ("symlinks", "skp", "skip", lambda **word: LayerSync(LocalStore("/nowhere"), home="/nowhere", **word)),
    ("mode", "shalow", "shallow", lambda **word: verify(LocalStore("/nowhere"), "key", **word)),
    ("check", "sha-256", "sha256", lambda **word: ArtifactCache(Path("/nowhere"), **word)),
]


@pytest.mark.parametrize(("name", "given", "meant", "make"), WORDS)
def test_a_misspelt_word_is_refused(name: str, given: str, meant: str, make: Callable[..., Any]):
    """And the nearest is named: taken for another one, it would announce what nobody verified, or follow links."""
    with pytest.raises(UsageError) as refusal:
        make(**{name: given})
    assert refusal.value.message == f"{name}={given!r} is not known: did you mean {meant!r}?"
