"""Secrets that are spoiled, misplaced or in use: cleaned or refused by name, and left nowhere."""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blobflow import download, upload
from blobflow.cli import run
from blobflow.coordination.sql_lease_store import SqlLeaseStore
from blobflow.credentials import cleaned, endpoint_fault, header_value
from blobflow.errors import BlobflowError, StoreConfigurationError, UsageError
from blobflow.mirror.client import MirrorClient
from blobflow.stores import open_store
from blobflow.stores.base import Body
from blobflow.stores.coroutines import RetryingCoroutines
from blobflow.stores.optional import coroutines_of
from blobflow.stores.s3.store import S3Options, S3Store
from blobflow.streams.http_source import HttpSource
from blobflow.testing import read_tree
from tests.kit import TREE, artifact_of
from tests.servers import Peer, scripted_server
from tests.strict_s3 import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, StrictS3

PLANTED = "pl4nted-s3cret"
SPOILED = [f"{PLANTED}\nrest-of-it", f"{PLANTED}\r\nX-Evil: 1", f"{PLANTED}\x00", f"{PLANTED}\u20ac"]
SPOILED_IN_ENVIRONMENT = [each for each in SPOILED if "\0" not in each]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No trace of the machine's own configuration, and the log as it was."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "BLOBFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("HOME", str(tmp_path))
    package = logging.getLogger("blobflow")
    before = package.handlers, package.level
    yield
    package.handlers, package.level = before


def everything(error: BaseException) -> str:
    """All that a log may show of an error: message, repr, fields, and the traceback with its causes."""
    shown = "".join(traceback.format_exception(error)) + repr(error)
    return shown + (repr(error.to_dict()) if isinstance(error, BlobflowError) else "")


@pytest.mark.parametrize("value", SPOILED)
def test_a_spoiled_secret_is_refused_by_name_without_its_value(value: str):
    """The message names what it is; neither it nor its traceback shows a character of the value."""
    for clean in (lambda: cleaned(value, "session token"), lambda: header_value("Authorization", value)):
        with pytest.raises(UsageError, match=r"session token|Authorization") as refusal:
            clean()
        assert PLANTED not in everything(refusal.value)
        assert not refusal.value.retryable


def test_white_space_around_a_secret_is_taken_off():
    """The newline at the end of a secret file is no part of the secret."""
    assert cleaned(" key\n", "key") == "key"
    assert cleaned(None, "key") is None
    assert header_value("X", "Bearer token\r\n") == "Bearer token"
    assert header_value("X", "caf\xe9") == "caf\xe9"


@pytest.mark.parametrize("place", ["options", "environment", "credentials file"])
def test_secrets_with_a_newline_at_the_end_work(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever they come from, a server that checks signatures takes them; a push leaves no secret in the store."""
    secrets = {"access_key_id": ACCESS_KEY_ID, "secret_access_key": SECRET_ACCESS_KEY}
    spoiled = {name: f"{value}\n" for name, value in secrets.items()}
    given: dict[str, Any] = {}
    if place == "options":
        given = spoiled
    elif place == "environment":
        for name, value in spoiled.items():
            monkeypatch.setenv(f"AWS_{name.upper()}", value)
    else:
        lines = "".join(f"aws_{name} = {value}  \n" for name, value in secrets.items())
        (tmp_path / "credentials").write_text(f"[default]\n{lines}")
    with StrictS3() as server:
        bucket = server.new_bucket()
        store = open_store(f"s3://{bucket}/x", endpoint_url=server.url, region=REGION, **given)
        upload(store, "k", artifact_of(tmp_path))
        download(store, "k", tmp_path / "out")
        assert read_tree(tmp_path / "out" / "data") == TREE
        for meta in store.list():
            assert SECRET_ACCESS_KEY.encode() not in store.get(meta.key, max_bytes=1 << 20).data
        store.close()


@pytest.mark.parametrize(
    ("configured", "says"),
    [
        (f"credential_process = sh -c 'echo {PLANTED} >&2; exit 3'", "no credentials from custom-process"),
        (f"credential_process = echo {PLANTED}", "connect to"),
        ("role_arn = arn:aws:iam::1:role/x\nweb_identity_token_file = /absent/token", "/absent/token: No such file"),
    ],
)
def test_what_gives_credentials_is_named_and_not_repeated(configured: str, says: str, tmp_path: Path):
    """A credential process that fails, or a token file that is missing: an error of ours, without what was printed."""
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\n{configured}\n")
    store = S3Store(S3Options(bucket="bucket", endpoint_url="http://127.0.0.1:1"))
    with pytest.raises(BlobflowError, match=says) as failure:
        store.head("key")
    assert PLANTED not in str(failure.value.to_dict()) + repr(failure.value)
    store.close()


CALLS: list[tuple[str, Callable[[str], object]]] = [
    ("access key id", lambda value: S3Options(bucket="bucket", access_key_id=value, secret_access_key=SecretStr("x"))),
    ("secret access key", lambda value: open_store("s3://bucket", access_key_id="x", secret_access_key=value)),
    (
        "session token",
        lambda value: open_store("s3://bucket", access_key_id="x", secret_access_key="x", session_token=value),
    ),
    ("token of the receiver", lambda value: MirrorClient("http://127.0.0.1:1", token=value)),
    (
        "Authorization",
        lambda value: HttpSource("http://127.0.0.1:1/x", headers={"Authorization": f"Bearer {value}"}).pin(),
    ),
]


@pytest.mark.parametrize("value", SPOILED)
@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
def test_no_library_shows_what_it_could_not_send(name: str, call: Callable[[str], object], value: str):
    """A secret that no header can hold is refused at once, by its name alone, and not tried again."""
    with pytest.raises(UsageError, match=name) as refusal:
        call(value)
    assert PLANTED not in everything(refusal.value)


def test_keys_that_do_not_belong_together_are_not_shown():
    """Pydantic shows its input; here that is all the credentials."""
    with pytest.raises(Exception, match="belong together") as refusal:  # whatever its type
        S3Options(bucket="bucket", access_key_id=PLANTED)
    assert PLANTED not in everything(refusal.value)


URLS = [
    ("endpoint_url", f"http://127.0.0.1:1/?x={PLANTED}"),
    ("endpoint_url", f"http://user:{PLANTED}@127.0.0.1:1"),
    ("endpoint_url", f"127.0.0.1:1/{PLANTED}?"),
    ("AWS_ENDPOINT_URL", f"http://127.0.0.1:1/?x={PLANTED}"),
    ("AWS_ENDPOINT_URL_S3", f"http://user:{PLANTED}@127.0.0.1:1"),
    ("config", f"http://127.0.0.1:1/?x={PLANTED}"),
    ("services", f"http://user:{PLANTED}@[::1"),
    ("store", f"user:{PLANTED}@host"),
    ("store", f"user:{PLANTED}@host/path?x=y"),
    ("store", f"s3://user:{PLANTED}@bucket"),
    ("store", f"sftp://user:{PLANTED}@host/x"),
    ("store", f"https://user:{PLANTED}@host/x"),
    ("store", f"https://host/x?sig={PLANTED}"),
    ("state", f"sqlite:////tmp/no/such/x.db?password={PLANTED}"),
    ("state", f"nosuch://user:{PLANTED}@host/x"),
    ("state", f"postgresql://user:{PLANTED}@127.0.0.1:no/x"),
    ("receiver", f"http://user:{PLANTED}@127.0.0.1:1"),
    ("receiver", f"http://127.0.0.1:1/?token={PLANTED}"),
]


@pytest.mark.parametrize("flags", [(), ("--json",), ("-vv",)], ids=["plain", "json", "verbose"])
@pytest.mark.parametrize(("place", "url"), URLS)
def test_a_secret_in_a_url_is_shown_by_no_command(
    place: str,
    url: str,
    flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Wherever a URL can be given: the command fails as a matter of usage, and shows nothing that may be secret."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("BLOBFLOW_MIRROR_TOKEN", "0123456789abcdef")
    command = ["--store", "s3://bucket", "ls"]
    if place == "endpoint_url":
        command = ["--endpoint-url", url, *command]
    elif place == "store":
        command = ["--store", url, "ls"]
    elif place == "state":
        command = ["--store", str(tmp_path / "store"), "layer", "ls", "--state", url]
    elif place == "receiver":
        (tmp_path / "file").write_text("x")
        command = ["mirror", "push", str(tmp_path / "file"), url, "--file", "--source", "a", "--database", "b"]
    elif place == "config":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {url}\n")
    elif place == "services":
        (tmp_path / "config").write_text(f"[default]\nservices = a\n[services a]\ns3 =\n  endpoint_url = {url}\n")
    else:
        monkeypatch.setenv(place, url)
    code = run([*flags, *command])
    shown = "".join(capsys.readouterr())
    assert code == UsageError.exit_code, shown
    assert PLANTED not in shown
    assert all(PLANTED.encode() not in path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())


@pytest.mark.parametrize("value", SPOILED_IN_ENVIRONMENT)
@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "BLOBFLOW_MIRROR_TOKEN"]
)
def test_a_spoiled_secret_in_the_environment_is_shown_by_no_command(
    name: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    """Sender, receiver and S3: it ends at once, with exit code 2, and nobody says more of it than its name."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv(name, value)
    (tmp_path / "file").write_text("x")
    commands = [["--store", "s3://bucket", "--endpoint-url", "http://127.0.0.1:1", "ls"]]
    if name == "BLOBFLOW_MIRROR_TOKEN":
        names = ["--source", "a", "--database", "b"]
        commands = [
            ["mirror", "push", str(tmp_path / "file"), "http://127.0.0.1:1", "--file", *names],
            ["mirror", "serve", str(tmp_path / "mirror"), "--port", "0"],
        ]
    with caplog.at_level(logging.DEBUG):
        for command in commands:
            for flags in ((), ("--json",), ("-vv",)):
                assert run([*flags, *command]) == UsageError.exit_code
    shown = "".join(capfd.readouterr()) + caplog.text
    assert PLANTED not in shown
    assert shown.count("its value is not shown here") == 3 * len(commands)


def test_nothing_that_was_made_shows_a_secret():
    """Not by `repr`, not by `str`: stores, options, clients, sources and leases."""
    keys: dict[str, Any] = dict.fromkeys(("access_key_id", "secret_access_key", "session_token"), PLANTED)
    shown: list[object] = [
        open_store("s3://bucket", endpoint_url="http://127.0.0.1:1", **keys),
        S3Options(bucket="bucket", **keys),
        MirrorClient("http://127.0.0.1:1", token=PLANTED),
        HttpSource(f"http://user:{PLANTED}@127.0.0.1:1/?sig={PLANTED}", headers={"Authorization": PLANTED}),
        SqlLeaseStore(f"postgresql+psycopg2://user:{PLANTED}@host/db?sslpassword={PLANTED}"),
    ]
    for each in shown:
        assert PLANTED not in f"{each!r} {each}"


def test_a_spoiled_token_ends_batches_as_well(monkeypatch: pytest.MonkeyPatch):
    """The wire of the event loop refuses what it cannot send as the other one does."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{PLANTED}\nx")

    async def put() -> None:
        store = open_store("s3://bucket", endpoint_url="http://127.0.0.1:1")
        found = coroutines_of(store)
        assert isinstance(found, RetryingCoroutines)
        await found.put("k", Body.of(b"x"))

    with pytest.raises(StoreConfigurationError, match="session token") as refusal:
        asyncio.run(put())
    assert PLANTED not in everything(refusal.value)


@pytest.mark.parametrize(
    ("url", "is_right"),
    [
        ("http://127.0.0.1:9000", True),
        ("https://[::1]:9000/base/", True),
        ("https://s3.example.test", True),
        ("http://host:99999", False),
        ("http://host/\n", False),
        ("http://", False),
        ("ftp://host", False),
        ("http://host#x", False),
        ("http://host?", False),
        ("http://@host", False),
    ],
)
def test_an_endpoint_is_a_server_s_address_and_nothing_else(url: str, is_right: bool):
    """What could hide a secret has no place in it."""
    assert (endpoint_fault(url) is None) == is_right


def test_a_redirect_of_a_source_shows_no_signature():
    """Not even when the connection fails in the middle of it."""

    def redirects(peer: Peer) -> None:
        peer.request()
        peer.answer(302, location=f"http://127.0.0.1:1/x?sig={PLANTED}")

    with scripted_server(redirects) as url, pytest.raises(BlobflowError) as refusal:
        HttpSource(url, patience_s=0, sleep=lambda _: None).pin()
    assert PLANTED not in everything(refusal.value)
