"""Takes the pictures of docs/images that show Dagster's web UI, and drives it for the tests.

`python docs/tools/screenshots.py` runs the demo and the example project in a temporary directory and drives a headless
Chromium (Debian: chromium fonts-dejavu-core). Nothing of the checkout's own .blobflow is touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from playwright.sync_api import Page, Response

ROOT: Final = Path(__file__).resolve().parents[2]
IMAGES: Final = ROOT / "docs" / "images"
BINARIES: Final = Path(sys.executable).parent
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
_FLAGS: Final = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DEMO_GRAPH: Final = "/locations/blobflow/asset-groups/demo/lineage"
DEMO_MIRROR: Final = "/assets/demo/mirror"
REGIONS_GRAPH: Final = "/locations/regions/asset-groups/orders/lineage"
_START_S: Final = 120.0


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Project:
    """A Dagster project and an instance of its own: everything that it makes lies below `home`."""

    home: Path
    root: Path
    """Where the project's pyproject.toml lies."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""
    instance_yaml: str = (ROOT / "examples" / "dagster.yaml").read_text(encoding="utf-8")

    def __post_init__(self) -> None:
        (self.home / "dagster").mkdir(parents=True)
        config = self.instance_yaml + "\nnux:\n  enabled: false\n"
        (self.home / "dagster" / "dagster.yaml").write_text(config, encoding="utf-8")

    @cached_property
    def environment(self) -> dict[str, str]:
        """For the programs of the environment, as in an activated shell."""
        return {
            **os.environ,
            "VIRTUAL_ENV": str(BINARIES.parent),
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DAGSTER_HOME": str(self.home / "dagster"),
            **self.variables,
        }

    def launch(self, *arguments: str) -> None:
        """One run."""
        done = subprocess.run(
            [str(BINARIES / "dg"), "launch", *arguments],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the run failed:\n{done.stdout.decode(errors='replace')[-4000:]}")

    @contextmanager
    def served(self) -> Iterator[Server]:
        """The web UI as `make ui` starts it, daemon included, on a free loopback port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.home / "webserver.log"
        command = [str(BINARIES / "dg"), "dev", "--no-check-yaml", "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
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
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of them: a shell's background job ignores SIGINT
            process.wait()


def demo(home: Path, source: Path | None = None) -> Project:
    """The demo, with store and mirror below `home`."""
    own = {"BLOBFLOW_STORE": str(home / "store"), "BLOBFLOW_MIRROR": str(home / "mirror")}
    return Project(home, ROOT, {**own, "BLOBFLOW_SOURCE": str(source)} if source else own)


def regions(home: Path, **options: Any) -> Project:
    """A copy of the example project below `home`, where its store and its mirrors lie as well."""
    made = shutil.ignore_patterns("store", "mirror", "__pycache__")
    return Project(home, shutil.copytree(ROOT / "examples" / "regions", home / "regions", ignore=made), **options)


def gated_regions(home: Path, size: int) -> Project:
    """The example project with `size` bytes more in its partition eu, and a store that stops uploads at a gate.

    As long as the named pipe `<home>/gate` is there, an upload waits for it at its fourth part. No run is retried by
    itself.
    """
    project = regions(home, variables={"GATE": str(home / "gate")}, instance_yaml="telemetry:\n  enabled: false\n")
    shutil.copy(ROOT / "tests" / "ui" / "gated_store.py", project.root / "regions" / "defs" / "store.py")
    (project.root / "data" / "eu" / "archive.bin").write_bytes(os.urandom(size))
    os.mkfifo(home / "gate")
    return project


@dataclass(frozen=True)
class Server:
    """A running web server."""

    url: str

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/server_info", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def query(self, graphql: str, **variables: str) -> Any:
        """The `data` of a GraphQL answer."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": graphql, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def runs(self) -> list[dict[str, str]]:
        """Id and status of the runs, newest first."""
        found = self.query("{ runsOrError { ... on Runs { results { runId status } } } }")
        return found["runsOrError"]["results"]

    def messages(self, run_id: str) -> list[str]:
        """The lines of a run's log so far."""
        found = self.query(
            "query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection {"
            " events { ... on MessageEvent { message } } } } }",
            id=run_id,
        )
        return [event["message"] for event in found["logsForRun"]["events"] if event]


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


def materialize(page: Page, partition: str) -> str:
    """Ask for one partition of all assets of the graph that is shown; the id of the run."""
    page.get_by_role("button", name="Materialize all").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Select a partition or create one").click()
    page.get_by_role("menuitem").filter(has=page.get_by_text(partition, exact=True)).click()
    with page.expect_response(_operation("LaunchPipelineExecution")) as answer:
        dialog.get_by_role("button", name="Launch 1 run").click()
    return answer.value.json()["data"]["launchPipelineExecution"]["run"]["id"]


def backfill(page: Page) -> None:
    """Ask for all partitions of all assets of the graph that is shown."""
    page.get_by_role("button", name="Materialize all").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("All", exact=True).click()
    with page.expect_response(_operation("launchPartitionBackfill")):
        dialog.get_by_role("button", name="Launch").click()


def re_execute_from_failure(page: Page) -> str:
    """Continue the failed run that is shown; the id of the new run, which is shown then."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    item = page.get_by_role("menuitem").filter(has_text="From failure")
    last = 3
    for attempt in range(last + 1):
        page.get_by_role("button", name="Re-execute all").locator("xpath=following::button[1]").click()
        try:
            with page.expect_request(
                lambda request: "LaunchPipelineReexecution" in (request.post_data or ""), timeout=15_000
            ) as asked:
                item.click()
        except PlaywrightTimeout:  # the page renders the menu again when events arrive; that click sent nothing
            if attempt == last:
                raise
            page.keyboard.press("Escape")
            continue
        answer = asked.value.response()
        assert answer is not None
        run_id: str = answer.json()["data"]["launchPipelineReexecution"]["run"]["id"]
        page.wait_for_url(re.compile(run_id))
        return run_id
    raise AssertionError("the last attempt returns or raises")


def _operation(name: str) -> Callable[[Response], bool]:
    return lambda response: name in (response.request.post_data or "")


def kill_worker(server: Server, run_id: str) -> None:
    """SIGKILL to the process that executes a run; the run's log names it."""
    pids = {int(pid) for line in server.messages(run_id) for pid in re.findall(r"in process \(pid: (\d+)\)", line)}
    (worker,) = pids
    os.kill(worker, signal.SIGKILL)


def main() -> None:
    """Write the pictures of docs/images that come from the web UI."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="blobflow-docs-") as home:
        _picture_the_demo(demo(Path(home) / "demo"))
        _picture_the_mirror(Path(home) / "mirror")
        _picture_the_regions(Path(home) / "regions")


def _picture_the_demo(project: Project) -> None:
    project.launch("--assets", '+key:"demo/mirror"')
    with project.served() as server, browsing(server.url, height=560) as page:
        page.goto(DEMO_GRAPH)
        page.get_by_text("1 / 1 Passed").wait_for()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=IMAGES / "asset-graph.png")


def _picture_the_mirror(home: Path) -> None:
    """After four runs, each with more to move: its state, and what Dagster plots of it."""
    source = home / "source"
    source.mkdir(parents=True)
    project = demo(home / "demo", source)
    for number in range(1, 5):
        (source / f"{number}.bin").write_bytes(os.urandom(number * 3_000_000))
        project.launch("--assets", '+key:"demo/mirror"')
    with project.served() as server, browsing(server.url, height=740) as page:
        page.goto(DEMO_MIRROR)
        page.get_by_text("Passing").nth(1).wait_for()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=IMAGES / "freshness.png")
        page.set_viewport_size({"width": 1600, "height": 1500})
        page.get_by_text("Plots", exact=True).click()
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(1000)  # the plots grow into their places
        page.screenshot(path=IMAGES / "plots.png")


def _picture_the_regions(home: Path) -> None:
    with gated_regions(home, 60_000).served() as server, browsing(server.url, height=720) as page:
        page.goto(REGIONS_GRAPH)
        killed = materialize(page, "eu")
        page.goto(f"/runs/{killed}")
        page.get_by_text(re.compile("upload.progress percent=")).first.wait_for()
        page.screenshot(path=IMAGES / "progress.png")

        kill_worker(server, killed)
        page.get_by_text("RUN_FAILURE").first.wait_for()
        (home / "gate").unlink()
        re_execute_from_failure(page)
        page.get_by_text("RUN_SUCCESS").first.wait_for()
        # Other lines name directories of this machine.
        page.get_by_placeholder("Filter…").fill("upload.")
        page.get_by_text("RUN_SUCCESS").wait_for(state="detached")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=IMAGES / "run.png")

        page.goto(REGIONS_GRAPH)
        backfill(page)
        page.set_viewport_size({"width": 1600, "height": 560})
        page.goto(REGIONS_GRAPH)
        page.get_by_text("100% filled").nth(2).wait_for(timeout=300_000)
        page.wait_for_load_state("networkidle")
        page.screenshot(path=IMAGES / "partitions.png")


if __name__ == "__main__":
    main()
