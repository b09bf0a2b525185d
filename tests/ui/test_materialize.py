"""The web UI, as a person at a browser sees it."""

from __future__ import annotations

import re

import pytest

from blobflow.testing import Symlink, read_tree, write_tree
from docs.tools.screenshots import (
    DEMO_GRAPH,
    DEMO_MIRROR,
    REGIONS_GRAPH,
    Project,
    backfill,
    browsing,
    demo,
    find_browser,
    gated_regions,
    kill_worker,
    materialize,
    re_execute_from_failure,
)

TREE = {"readme": "hello\n", "data": {"0.bin": bytes(100_000)}}
SIZE = 60_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_browser() is None, reason="needs a Chromium (Debian: chromium)"),
]


def warnings(project: Project) -> list[str]:
    """What web server, daemon, code server and run workers warned of, but for what a fresh daemon always says."""
    log = (project.home / "webserver.log").read_text(encoding="utf-8", errors="replace")
    return [line for line in log.splitlines() if "warn" in line.lower() and "No cursor for event type" not in line]


def test_materialize_all_brings_the_source_to_the_mirror(tmp_path):
    """One click starts the run; its five steps succeed, the graph shows the passed check, and the mirror is alive."""
    write_tree(tmp_path / "source", {**TREE, "link": Symlink("readme")})
    project = demo(tmp_path / "demo", tmp_path / "source")

    with project.served() as server, browsing(server.url) as page:
        page.goto(DEMO_GRAPH)
        page.get_by_role("button", name="Materialize all").click()
        page.get_by_text("1 / 1 Passed").wait_for(timeout=300_000)
        page.get_by_text("Materialized", exact=True).nth(2).wait_for(timeout=300_000)

        page.goto(DEMO_MIRROR)
        page.get_by_text("Fails if more than 26 hours since last materialization").wait_for()

        (run,) = server.runs()
        page.goto(f"/runs/{run['runId']}")
        page.get_by_text("RUN_SUCCESS").first.wait_for(timeout=300_000)
        page.get_by_placeholder("Filter…").fill("export.done")
        line = page.get_by_text(re.compile(r"export\.done")).first.text_content() or ""
        page.get_by_text("Succeeded (5)").wait_for()

    assert warnings(project) == []
    assert line.startswith("export.done status=exported members=2 bytes=100006 excluded=0 symlinks_skipped=1 ")
    assert read_tree(tmp_path / "demo" / "mirror" / "current") == TREE


def test_a_killed_run_is_continued_and_a_backfill_brings_the_rest(tmp_path):
    """Re-executed from failure, an upload goes on behind the parts that arrived; a backfill fills all partitions.

    The person materializes one partition, watches its progress until the worker is killed, continues the run, and
    then asks for all partitions.
    """
    home = tmp_path / "project"
    project = gated_regions(home, SIZE)
    mirrors, data = project.root / "mirror", project.root / "data"

    with project.served() as server, browsing(server.url) as page:
        page.goto(REGIONS_GRAPH)
        killed = materialize(page, "eu")
        page.goto(f"/runs/{killed}")
        page.get_by_text(re.compile(r"upload\.progress percent=\d+")).first.wait_for(timeout=300_000)
        kill_worker(server, killed)
        page.get_by_text("RUN_FAILURE").first.wait_for(timeout=300_000)
        assert not mirrors.exists()

        (home / "gate").unlink()
        continued = re_execute_from_failure(page)
        page.get_by_text("RUN_SUCCESS").first.wait_for(timeout=300_000)
        page.get_by_text("Succeeded (4)").wait_for()
        (upload,) = (line for line in server.messages(continued) if line.startswith("upload.done "))
        numbers = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)\b", upload)}
        assert numbers["bytes_resumed"] == 3 * 4096
        assert numbers["bytes_sent"] > SIZE - 3 * 4096
        assert [path.name for path in mirrors.iterdir()] == ["eu"]

        page.goto(REGIONS_GRAPH)
        backfill(page)
        page.goto(REGIONS_GRAPH)
        page.get_by_text("100% filled").nth(2).wait_for(timeout=600_000)

    assert warnings(project) == []
    regions = ["asia", "eu", "us"]
    assert sorted(path.name for path in mirrors.iterdir()) == regions
    assert all(read_tree(mirrors / name / "current") == read_tree(data / name) for name in regions)
