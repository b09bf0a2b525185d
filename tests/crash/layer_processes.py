"""Syncs and restores layers in children that are killed: an order, a line of JSON, is answered by an exit code.

The parent has everything imported and no threads, so that a child costs a fork; it kills what it has not waited for, so
that no other process can have the pid.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from typing import Any

from blobflow import ChunkProfile
from blobflow.errors import BlobflowError
from blobflow.layers import LayerSync
from blobflow.stores.local.store import LocalStore


def work(order: dict[str, Any]) -> int:
    """Do what the order says; 0 if it is done, 1 if it was refused for a reason that the order expects."""
    layers = LayerSync(
        LocalStore(order["store"]),
        home=order["home"],
        profile=ChunkProfile.custom(order["chunk_size"], 2, workers=2),
        frame_size=order["frame_size"],
    )
    try:
        if order["what"] == "sync":
            layers.sync(order["container"], order["path"])
        else:
            layers.restore(order["container"], order["path"], overwrite=True)
    except BlobflowError as error:
        if type(error).__name__ in order["expected"]:
            return 1
        traceback.print_exc()
        return 2
    return 0


def main() -> None:
    """Serve orders until standard input ends."""
    import blobflow.artifact.index_parquet
    import blobflow.layers.sync  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            code = 3
            try:
                code = work(order)
            finally:
                sys.stderr.flush()
                os._exit(code)
        descriptor = os.pidfd_open(child)
        if not select.select([descriptor], [], [], order["kill_after_s"])[0]:
            os.kill(child, signal.SIGKILL)
        os.close(descriptor)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
