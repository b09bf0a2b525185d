"""A run of its own process, to be frozen in its export: `python -m tests.dagster.frozen_run HOME TTL_S`.

It says that it exports by making `HOME/exporting`, and goes on when `HOME/go-on` is there. What came of it stands in
`HOME/outcome`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dagster as dg

from blobflow import DirectoryExporter, ExportResult
from tests.dagster.kit import Place, failure
from tests.processes import wait_for


class Gated:
    """Exports the directory `source` once it may, and meanwhile says nothing."""

    backend = "directory"

    def __init__(self, home: Path) -> None:
        self._home = home

    def export(self, dest: Path, **options: object) -> ExportResult:
        (self._home / "exporting").touch()
        wait_for((self._home / "go-on").exists)
        return DirectoryExporter(path=self._home / "source").export(dest)


def main(home: Path, ttl_s: float) -> None:
    (home / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(home / "instance"), overrides={"telemetry": {"enabled": False}}) as instance:
        place = Place(home, instance)
        store = str(home.parent / "store")
        result = place.run(place.pipeline(exporter=Gated(home), ttl_s=ttl_s), place.resource(store=store))
        told = "success" if result.success else " ".join(map(str, failure(result)[:2]))
        (home / "outcome").write_text(told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
