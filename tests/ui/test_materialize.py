"""The web UI, as a person at a browser sees it."""

from __future__ import annotations

import re

import pytest

from blobflow.testing import Symlink, read_tree, write_tree
from docs.tools.screenshots import Demo, browsing, find_browser

TREE = {"readme": "hello\n", "data": {"0.bin": bytes(100_000)}}


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_materialize_all_brings_the_source_to_the_mirror(tmp_path):
    """One click starts the run; its five steps succeed, the graph shows the passed check, and the mirror is alive."""
    if find_browser() is None:
        pytest.skip("needs a Chromium (Debian: chromium)")
    write_tree(tmp_path / "source", {**TREE, "link": Symlink("readme")})
    demo = Demo(tmp_path / "demo", tmp_path / "source")

    with demo.served() as server, browsing(server.url) as page:
        page.goto(server.lineage)
        page.get_by_role("button", name="Materialize all").click()
        page.get_by_text("1 / 1 Passed").wait_for(timeout=120_000)
        page.get_by_text("Materialized", exact=True).nth(2).wait_for(timeout=120_000)

        (run,) = server.runs()
        page.goto(f"/runs/{run['runId']}")
        page.get_by_text("RUN_SUCCESS").first.wait_for(timeout=120_000)
        page.get_by_placeholder("Filter…").fill("export.done")
        line = page.get_by_text(re.compile(r"export\.done")).first.text_content() or ""
        page.get_by_text("Succeeded (5)").wait_for()

    assert line.startswith("export.done status=exported members=2 bytes=100006 excluded=0 symlinks_skipped=1 ")
    assert read_tree(tmp_path / "demo" / "mirror" / "current") == TREE
