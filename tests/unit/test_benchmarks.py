"""The benchmarks themselves: that they measure what they say, with blobflow alone and at the smallest size."""

from __future__ import annotations

import http.client
import json
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.endpoints import BUCKET, CheapServer, cheap_server
from benchmarks.measure import Command, CommandFailed, run
from benchmarks.workload import MIB, difference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


needs_openssl = pytest.mark.skipif(
    not Path("/usr/include/openssl/ssl.h").exists() or shutil.which("openssl") is None,
    reason="needs libssl-dev, openssl",
)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_openssl)], ids=["http", "https"])
def server(request: pytest.FixtureRequest):
    with cheap_server(warm_bytes=0, limit_bytes=64 * MIB, tls=request.param) as server:
        yield server


def ask(server: CheapServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, str]:
    """Status, body and ETag of one request."""
    parts = urlsplit(server.url)
    if parts.scheme == "https":
        tls = ssl.create_default_context(cafile=server.environment["SSL_CERT_FILE"])
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=20, context=tls)
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/{BUCKET}/{path}", body=body, headers=names)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("etag", "")
    finally:
        connection.close()


def entry(contestant: str, wall_s: float, **more: Any) -> dict[str, Any]:
    """One measured run of `one-up`."""
    figures = {"wall_s": wall_s, "cpu_s": wall_s, "peak_rss_bytes": MIB}
    return {"scenario": "one-up", "tool": contestant.partition(",")[0], "contestant": contestant, **figures, **more}


@pytest.mark.slow
@needs_compiler
def test_the_smallest_run_fills_the_whole_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Every scenario gives blobflow a row with its costs, and the table and the JSON file tell the same."""
    smallest = ["--size", "16MiB", "--files", "50", "--runs", "1", "--peers", "none", "--no-install"]
    assert main([*smallest, "--results", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("*.json")
    document = json.loads(stored.read_text(encoding="utf-8"))
    rows = {(scenario, name) for scenario, cells in document["summary"].items() for name in cells}
    assert rows == {
        ("one-up", "blobflow"),
        ("one-up", "blobflow, exported before"),
        ("one-down", "blobflow"),
        ("one-down", "blobflow, without SHA-256"),
        ("resume-up", "blobflow"),
        ("resume-down", "blobflow"),
        ("many-up", "blobflow"),
        ("many-up", "blobflow, exported before"),
        ("many-down", "blobflow"),
        ("many-down", "blobflow, without SHA-256"),
        ("layers-up", "blobflow, layer"),
        ("layers-up", "blobflow, layer, hashed before"),
        ("layers-down", "blobflow, layer"),
        ("layers-codec", "blobflow, layer, codec alone"),
        ("batch", "blobflow, BatchExecutor"),
        ("start", "blobflow, --version"),
        ("start", "blobflow, push, first use of a store"),
        ("start", "blobflow, push, nothing changed"),
        ("mirror", "blobflow, mirror push"),
        ("mirror", "blobflow, mirror push --file"),
    }
    assert document["summary"]["mirror"]["blobflow, mirror push"]["cpu_s_per_gb"] > 0
    one_up = document["summary"]["one-up"]["blobflow"]
    assert one_up["wall_s"] > 0 < one_up["cpu_s"]
    assert 16 * MIB < one_up["bytes_in"] < 17 * MIB
    assert document["summary"]["resume-up"]["blobflow"]["moved_again_bytes"] < 16 * MIB
    assert document["summary"]["resume-up"]["blobflow"]["left_over"] == 0
    assert "| **blobflow, exported before** |" in capsys.readouterr().out


@needs_compiler
def test_the_cheap_server_honours_conditions_and_ranges(server: CheapServer):
    """Create-only and compare-and-swap decide by the stored ETag, and a pinned range gives the bytes asked for."""
    status, _, e_tag = ask(server, "PUT", "a", b"first", If_None_Match="*")
    assert status == 200
    assert ask(server, "PUT", "a", b"second", If_None_Match="*")[0] == 412
    assert ask(server, "PUT", "a", b"second", If_Match='"other"')[0] == 412
    assert ask(server, "HEAD", "a")[2] == e_tag
    assert ask(server, "GET", "a", Range="bytes=1-3", If_Match=e_tag)[:2] == (206, b"irs")
    assert ask(server, "PUT", "a", b"second", If_Match=e_tag)[0] == 200
    assert ask(server, "GET", "a", Range="bytes=1-3", If_Match=e_tag)[0] == 412


@needs_compiler
def test_the_cheap_server_keeps_large_bodies_whole(server: CheapServer):
    """A body that fills several of its blocks, in parts of odd sizes, comes back byte by byte; it is counted once."""
    first, second = bytes(range(256)) * 20_001, b"tail" * 100_000
    _, answer, _ = ask(server, "POST", "big?uploads")
    upload = answer.partition(b"<UploadId>")[2].partition(b"<")[0].decode()
    server.reset()
    tags = [
        ask(server, "PUT", f"big?partNumber={number}&uploadId={upload}", part)[2]
        for number, part in enumerate((first, second), start=1)
    ]
    assert server.traffic().bytes_in == len(first) + len(second)
    parts = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{tag}</ETag></Part>" for n, tag in enumerate(tags, 1))
    assert server.holds("big").uploads == 1
    assert ask(server, "POST", f"big?uploadId={upload}", parts.encode())[0] == 200
    assert ask(server, "GET", "big")[1] == first + second
    assert server.holds("big").uploads == 0


@needs_compiler
def test_a_command_is_charged_for_its_children(tmp_path: Path):
    """CPU seconds spent in a grandchild, and its memory, are in the cost of the command."""
    burn = "import time; kept = bytearray(64 << 20)\nwhile time.process_time() < 0.3: pass"
    arguments = ("/bin/sh", "-c", f'{sys.executable} -c "{burn}"; true')
    cost = run(Command(arguments, {"PATH": "/usr/bin:/bin"}), log=tmp_path / "log")
    assert cost.cpu_s >= 0.3
    assert cost.wall_s >= 0.3
    assert cost.peak_rss_bytes > 64 * MIB


@needs_compiler
def test_a_command_that_fails_has_no_cost(tmp_path: Path):
    """A failed command is an error that quotes what it said, never a fast time."""
    with pytest.raises(CommandFailed, match=r"exit code 3\n.*out of luck"):
        run(Command(("/bin/sh", "-c", "echo out of luck >&2; exit 3"), {}, "sh"), log=tmp_path / "log")


def test_medians_leave_out_who_failed():
    """The table shows medians; a contestant that failed once has no row."""
    runs = [entry("s5cmd", wall) for wall in (3.0, 1.0, 2.0)]
    runs += [entry("rclone", 1.0), {"scenario": "one-up", "tool": "rclone", "contestant": "rclone", "error": "no"}]
    summary = report.summarise(runs)
    assert list(summary["one-up"]) == ["s5cmd"]
    assert (summary["one-up"]["s5cmd"]["wall_s"], summary["one-up"]["s5cmd"]["runs"]) == (2.0, 3)


def test_calls_are_joined_only_if_they_compare():
    """One table of several calls keeps every measurement; other sizes, or a scenario twice, are refused."""
    options = {"size": 1, "files": 1, "runs": 1, "patience": 1.0}

    def call(scenario: str, **changed: int) -> dict[str, Any]:
        return {
            "started": "2026-11-28",
            "options": options | changed,
            "seconds": 2.0,
            "scenarios": [scenario],
            "runs": [{"scenario": scenario}],
            "commands": {scenario: {}},
            "versions": {scenario: "1"},
        }

    document = report.joined([call("one-down"), call("one-up")])
    assert document["scenarios"] == ["one-up", "one-down"]
    assert [entry["scenario"] for entry in document["runs"]] == ["one-down", "one-up"]
    assert (document["seconds"], set(document["commands"])) == (4.0, {"one-up", "one-down"})
    for other in (call("one-up"), call("start", size=2)):
        with pytest.raises(SystemExit, match="--join takes results"):
            report.joined([call("one-up"), other])


def test_targets_are_held_against_the_best_variant_of_a_peer():
    """A tuned peer counts where it is faster than its default; what was not measured is not claimed."""
    runs = [entry("blobflow, exported before", 1.0), entry("s5cmd", 4.0), entry("s5cmd, tuned", 2.0)]
    checked = report.check_targets(report.summarise(runs))
    walls = [(target["against"], target["reached"], target["met"]) for target in checked if "wall" in target["words"]]
    assert walls == [("s5cmd, tuned", 0.5, False)]


def test_a_lost_file_and_a_wrong_byte_are_noticed(tmp_path: Path):
    """A download that is not equal to its source is told from one that is."""
    for name in ("source", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"content")
    assert difference(tmp_path / "source", tmp_path / "copy", contents=True) == ""
    (tmp_path / "copy" / "file").write_bytes(b"cOntent")
    assert difference(tmp_path / "source", tmp_path / "copy", contents=True) == "file differs"
    (tmp_path / "copy" / "file").unlink()
    assert "0 files" in difference(tmp_path / "source", tmp_path / "copy", contents=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_dagster_adds_is_measured():
    """One command, both ways, and the difference between them."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--files", "3", "--size", "1", "--runs", "1"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {line[:13].strip(): float(line[13:].split()[0]) for line in done.stdout.splitlines()}
    assert list(figures) == ["command line", "dg launch", "Dagster adds"]
    assert figures["Dagster adds"] == pytest.approx(figures["dg launch"] - figures["command line"], abs=0.02)
