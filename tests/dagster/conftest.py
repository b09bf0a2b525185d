"""A Dagster instance of each test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.dagster.kit import FaultyResource, Place


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "instance").mkdir()
    with dg.DagsterInstance.local_temp(
        str(tmp_path / "instance"), overrides={"telemetry": {"enabled": False}}
    ) as instance:
        yield instance


@pytest.fixture
def place(tmp_path: Path, instance: dg.DagsterInstance) -> Place:
    """Everything of one pipeline, with a source already written and a store without faults."""
    FaultyResource.script(lambda _: None)
    place = Place(tmp_path, instance)
    place.write()
    return place
