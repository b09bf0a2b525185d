"""A receiver and a push to it, over loopback: what both of them cost together.

blobflow_mirror.py PROGRAM DIR PUSH...: `PROGRAM mirror serve DIR`, then `PROGRAM PUSH... URL` until it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys


def main() -> None:
    """Serve, push, stop."""
    program, directory, *push = sys.argv[1:]
    os.environ["BLOBFLOW_MIRROR_TOKEN"] = "a token of the benchmarks"
    serve = [program, "--json", "mirror", "serve", directory, "--port", "0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            assert receiver.stdout is not None
            url = json.loads(receiver.stdout.readline())["url"]
            subprocess.run([program, *push, url, "--source", "bench", "--database", "bench"], check=True)
        finally:
            receiver.terminate()


main()
