"""`blobflow mirror`: a receiver and a sender, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobflow import DirectoryImporter, import_artifact, move_ref, upload
from blobflow.cli import run
from blobflow.mirror import read_snapshots
from tests.kit import artifact_of, local_store, noise

PROGRAM = Path(sys.executable).with_name("blobflow")
TOKEN = "a token for the tests"
NAMES = ("--source", "east", "--database", "orders")


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOBFLOW_MIRROR_TOKEN", TOKEN)


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`blobflow mirror serve`."""
    command = [PROGRAM, "--json", "mirror", "serve", tmp_path / "mirror", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def url(receiver: subprocess.Popen[str]) -> str:
    """Where it listens."""
    assert receiver.stdout is not None
    document = json.loads(receiver.stdout.readline())
    assert document["status"] == "listening"
    return document["url"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """One command: its exit code and its document."""
    code = run(["--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_an_artifact_and_a_file_are_pushed_and_seen(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is pushed arrives byte for byte; the status shows it; a second push sends nothing."""
    store = local_store(tmp_path)
    upload(store, "orders/1", artifact_of(tmp_path))
    code, pushed = call(capsys, "--store", store.url, "mirror", "push", "orders/1", url, *NAMES)
    assert (code, pushed["status"], pushed["bytes_sent"]) == (0, "pushed", pushed["bytes_total"])
    assert call(capsys, "--store", store.url, "mirror", "push", "orders/1", url, *NAMES)[1]["status"] == "unchanged"

    (tmp_path / "file").write_bytes(noise(5000))
    command = ("mirror", "push", "--file", tmp_path / "file", url, *NAMES, "--position", 1)
    assert call(capsys, *command)[1]["bytes_sent"] == 5000

    code, found = call(capsys, "mirror", "status", tmp_path / "mirror")
    assert [(one["position"], one["bytes_done"]) for one in found["snapshots"]] == [
        (1, 5000),
        (pushed["position"], pushed["bytes_total"]),
    ]
    arrived = sorted((tmp_path / "mirror").rglob("*.snapshot"))
    assert [path.read_bytes() for path in arrived] == [noise(5000), store.get("orders/1", max_bytes=1 << 20).data]
    assert run(["mirror", "status", str(tmp_path / "mirror")]) == 0
    assert "orders\t1\teast\tbootstrapping, 4.9 KiB of 4.9 KiB" in capsys.readouterr().out


def test_a_mirror_of_imports_says_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What was imported last, from which key, and whether the ref names something newer."""
    store = local_store(tmp_path)
    mirror = tmp_path / "mirror"
    first = artifact_of(tmp_path / "first", {"a": "1"}, mode="copy")
    upload(store, "orders/1", first)
    move_ref(store, "orders/latest", "orders/1", first.digest)
    import_artifact(first, DirectoryImporter(path=mirror), key="orders/1")
    command = ("--store", store.url, "mirror", "status", mirror, "--ref", "orders/latest")
    code, document = call(capsys, *command)
    assert (code, document["status"], document["key"], document["behind"]) == (0, "following", "orders/1", False)
    second = artifact_of(tmp_path / "second", {"a": "2"})
    upload(store, "orders/2", second)
    move_ref(store, "orders/latest", "orders/2", second.digest)
    document = call(capsys, *command)[1]
    assert (document["behind"], document["offered_key"], document["artifact_digest"]) == (
        True,
        "orders/2",
        first.digest,
    )
    assert run(["mirror", "status", str(mirror)]) == 0
    assert capsys.readouterr().out == "Following{None}\n"


def test_a_receiver_that_is_told_to_end_ends(receiver: subprocess.Popen[str], url: str, tmp_path: Path):
    """SIGTERM ends it by the house's rules, and its directory can be used again."""
    assert url
    receiver.send_signal(signal.SIGTERM)
    assert receiver.wait(60) == 128 + signal.SIGTERM
    assert read_snapshots(tmp_path / "mirror") == {}


def test_without_a_token_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Neither side runs without the common secret; a short one is refused."""
    monkeypatch.setenv("BLOBFLOW_MIRROR_TOKEN", "short")
    code, document = call(capsys, "mirror", "serve", tmp_path / "mirror", "--port", "0")
    assert (code, document["error"]["message"]) == (2, "the token has fewer than 16 characters")
    monkeypatch.delenv("BLOBFLOW_MIRROR_TOKEN")
    for command in (("serve", tmp_path / "mirror"), ("push", "--file", __file__, "http://127.0.0.1:1", *NAMES)):
        code, document = call(capsys, "mirror", *command)
        assert (code, document["error"]["message"]) == (2, "no token: set BLOBFLOW_MIRROR_TOKEN")


def test_a_wrong_token_is_an_error_of_usage(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The exit code says that the configuration is to be corrected."""
    monkeypatch.setenv("BLOBFLOW_MIRROR_TOKEN", "not the right token")
    code, document = call(capsys, "mirror", "push", "--file", __file__, url, *NAMES)
    assert (code, document["error"]["type"]) == (2, "StoreConfigurationError")


def test_what_was_received_is_imported_and_followed(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`mirror import` while the receiver serves: the newest artifact is shown, and its snapshot is Following."""
    store = local_store(tmp_path)
    for position in (1, 2, 3):
        artifact = artifact_of(tmp_path / str(position), {"number": str(position)})
        upload(store, f"orders/{position}", artifact)
        command = ("--store", store.url, "mirror", "push", f"orders/{position}", url, *NAMES, "--position", position)
        assert call(capsys, *command, "--digest", artifact.digest)[0] == 0
    shown = tmp_path / "shown"
    command = ("mirror", "import", tmp_path / "mirror", "orders", "directory", shown)
    code, done = call(capsys, *command)
    assert (code, done["status"], done["position"], done["cursor"], done["removed"]) == (0, "imported", 3, 3, [1])
    assert (shown / "current" / "number").read_text() == "3"
    code, again = call(capsys, *command, "--keep", 1)
    assert (code, again["status"], again["bytes_received"], again["removed"]) == (0, "unchanged", 0, [2])
    code, status = call(capsys, "mirror", "status", tmp_path / "mirror")
    assert [(each["position"], each["status"], each["cursor"]) for each in status["snapshots"]] == [(3, "following", 3)]
    code, refusal = call(capsys, "mirror", "import", tmp_path / "mirror", "users", "directory", shown)
    assert (code, refusal["error"]["type"]) == (4, "NotFoundError")
    code, refusal = call(capsys, "mirror", "import", tmp_path / "mirror", "orders", "sqlite", tmp_path / "db")
    assert (code, refusal["error"]["type"]) == (5, "RefusedError")


@pytest.mark.seed("W1.9")
def test_only_the_artifact_that_was_meant_is_pushed(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With --digest, another one under the key is not sent on."""
    store = local_store(tmp_path)
    upload(store, "orders/1", artifact_of(tmp_path))
    wrong = ("mirror", "push", "orders/1", url, *NAMES, "--digest", "sha256:" + "0" * 64)
    assert call(capsys, "--store", store.url, *wrong)[0] == 3
    assert read_snapshots(tmp_path / "mirror") == {}
