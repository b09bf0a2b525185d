"""Takes the pictures of docs/images: the demo's assets and one of its runs in Dagster's web UI.

`python docs/tools/screenshots.py` runs the demo in a temporary directory and drives a headless Chromium
(Debian: chromium fonts-dejavu-core). Nothing of the checkout's own .blobflow is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT: Final = Path(__file__).resolve().parents[2]
IMAGES: Final = ROOT / "docs" / "images"
BINARIES: Final = Path(sys.executable).parent
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
_FLAGS: Final = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_START_S: Final = 120.0


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Demo:
    """The demo with everything below one directory: instance, store and mirror."""

    home: Path
    source: Path | None = None

    def __post_init__(self) -> None:
        (self.home / "dagster").mkdir(parents=True)
        config = (ROOT / "docs" / "dagster.yaml").read_text(encoding="utf-8")
        (self.home / "dagster" / "dagster.yaml").write_text(config + "\nnux:\n  enabled: false\n", encoding="utf-8")

    @cached_property
    def environment(self) -> dict[str, str]:
        """For the programs of the environment, as in an activated shell."""
        own = {"BLOBFLOW_SOURCE": str(self.source)} if self.source else {}
        return {
            **os.environ,
            "VIRTUAL_ENV": str(BINARIES.parent),
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            "DAGSTER_HOME": str(self.home / "dagster"),
            "BLOBFLOW_STORE": str(self.home / "store"),
            "BLOBFLOW_MIRROR": str(self.home / "mirror"),
            **own,
        }

    def launch(self) -> None:
        """One run, as `make demo` makes it."""
        command = [str(BINARIES / "dg"), "launch", "--assets", '+key:"demo/mirror"']
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the demo failed:\n{done.stdout.decode(errors='replace')[-4000:]}")

    @contextmanager
    def served(self) -> Iterator[Server]:
        """The web UI as `make ui` starts it, daemon included, on a free loopback port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.home / "webserver.log"
        command = [str(BINARIES / "dg"), "dev", "--no-check-yaml", "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)
        try:
            server = Server(f"http://127.0.0.1:{port}")
            give_up = time.monotonic() + _START_S
            while not server.is_up():
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"the web server did not start:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.2)
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # it ends its children: web server, daemon, code server
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Server:
    """A running web server."""

    url: str
    lineage: str = field(init=False, default="/locations/blobflow/asset-groups/demo/lineage")

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/server_info", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def query(self, graphql: str) -> Any:
        """The `data` of a GraphQL answer."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": graphql}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def runs(self) -> list[dict[str, str]]:
        """Id and status of the runs, newest first."""
        found = self.query("{ runsOrError { ... on Runs { results { runId status } } } }")
        return found["runsOrError"]["results"]


@contextmanager
def browsing(url: str, *, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """A page of a fresh headless browser."""
    from playwright.sync_api import sync_playwright

    executable = find_browser()
    if executable is None:
        raise RuntimeError(f"no browser here: one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS))
        try:
            context = browser.new_context(
                base_url=url, viewport={"width": width, "height": height}, color_scheme="light", locale="en-GB"
            )
            page = context.new_page()
            page.set_default_timeout(60_000)
            yield page
        finally:
            browser.close()


def main() -> None:
    """Write docs/images/asset-graph.png and docs/images/run.png."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="blobflow-docs-") as home:
        demo = Demo(Path(home) / "demo")
        demo.launch()
        with demo.served() as server, browsing(server.url) as page:
            page.set_viewport_size({"width": 1600, "height": 560})
            page.goto(server.lineage)
            page.get_by_text("1 / 1 Passed").wait_for()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=IMAGES / "asset-graph.png")

            page.set_viewport_size({"width": 1600, "height": 720})
            page.goto(f"/runs/{server.runs()[0]['runId']}")
            page.get_by_text("RUN_SUCCESS").first.wait_for()
            page.get_by_placeholder("Filter…").fill(".done")
            page.get_by_text("RUN_SUCCESS").wait_for(state="detached")
            page.wait_for_load_state("networkidle")
            page.screenshot(path=IMAGES / "run.png")


if __name__ == "__main__":
    main()
