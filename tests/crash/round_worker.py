"""One worker of the rounds storm: tries to do the next round, for ever; what comes of it goes to a file."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import uuid
from pathlib import Path

from blobflow import DirectoryExporter, ExportResult, open_store, run_export_round
from blobflow.errors import BlobflowError


class Snapshots:
    """Exports something else every time, slowly enough to be frozen in between."""

    backend = "directory"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def export(self, dest: Path, **options: object) -> ExportResult:
        source = dest.parent / "source"
        source.mkdir()
        (source / "snapshot").write_text(uuid.uuid4().hex * 500)
        time.sleep(random.uniform(0, 0.1))
        return DirectoryExporter(path=source).export(dest)


def main(url: str, ttl_s: float, journal: Path, scratch: Path, leases: str) -> None:
    """Work until killed."""
    store = open_store(url, endpoint_url=os.environ.get("AWS_ENDPOINT_URL") if url.startswith("s3:") else None)
    with open(journal, "ab", buffering=0) as log:

        def note(**record: object) -> None:
            log.write(json.dumps({"pid": os.getpid(), **record}).encode() + b"\n")

        while True:
            try:
                done = run_export_round(
                    store, "orders", Snapshots(scratch), scratch_dir=scratch, ttl_s=ttl_s, leases=leases or None
                )
            except BlobflowError as error:
                note(error=type(error).__name__, text=str(error))
                continue
            if done is None:
                time.sleep(random.uniform(0.1, 0.4))
                continue
            assert done.ref is not None
            note(round=done.generation, ref=done.ref.generation, key=done.upload.key)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
