"""From URLs to stores, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from blobflow.errors import InvalidKey, InvalidStoreUrl, UsageError
from blobflow.stores import Store, open_store
from blobflow.stores.fsspec.store import FsspecStore
from blobflow.stores.limited import LimitedStore
from blobflow.stores.local.store import LocalStore
from blobflow.stores.retry import RetryingStore
from blobflow.stores.s3.store import S3Store

SECRET = "wJalrXUtnFEMI/K7MDENG"


def inner(store: Store) -> Store:
    assert isinstance(store, RetryingStore)
    return store.store


@pytest.mark.seed("1.11")
def test_a_path_is_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute and relative paths, `~`, Path objects and file URLs lead to one directory, which is not made yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    target = tmp_path / "my store"
    urls = (
        target,
        str(target),
        "my store",
        "./my store",
        "~/my store",
        f"file://{target}",
        target.as_uri(),
        f"file://localhost{target}",
        f"FILE://{target}/",
    )
    for url in urls:
        store = inner(open_store(url))
        assert isinstance(store, LocalStore)
        assert store.root == target
        assert store.url == target.as_uri()
    assert not target.exists()


def test_a_path_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is resolved once, so that changing the directory does not move the store."""
    monkeypatch.chdir(tmp_path)
    store = open_store("store")
    monkeypatch.chdir("/")
    store.put("key", b"1")
    assert (tmp_path / "store" / "key").exists()


def test_s3_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bucket and prefix come from the URL, the rest from options; the retries are set around it."""
    store = open_store(
        "s3://backups/orders/eu/",
        endpoint_url="http://127.0.0.1:9000",
        region="eu-central-1",
        access_key_id="AKIA",
        secret_access_key=SECRET,
        session_token=None,
        addressing_style="path",
        verify=False,
        idle_timeout=7.5,
        patience_s=3,
    )
    s3 = inner(store)
    assert isinstance(s3, LimitedStore)
    assert isinstance(s3.store, S3Store)
    s3 = s3.store
    assert (s3.options.bucket, s3.options.prefix) == ("backups", "orders/eu")
    assert s3.options.endpoint_url == "http://127.0.0.1:9000"
    assert s3.options.secret_access_key == SecretStr(SECRET)
    assert (s3.options.verify, s3.options.idle_timeout, s3.options.session_token) == (False, 7.5, None)
    assert store.url == s3.url == "s3://backups/orders/eu"
    assert SECRET not in repr(store) + repr(s3) + repr(s3.options)


def test_other_schemes_go_through_fsspec() -> None:
    """What fsspec knows is a store, without promises it cannot keep."""
    store = inner(open_store("memory://place/below"))
    assert isinstance(store, FsspecStore)
    assert store.url == "memory://place/below"
    assert not store.capabilities().multipart


@pytest.mark.seed("1.12")
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a\0b", "NUL"),
        ("s3://", "bucket is missing"),
        ("s3:///prefix", "bucket is missing"),
        ("s3://under score", "not the name of a bucket"),
        ("s3:bucket/prefix", "'//' is missing"),
        ("file:/tmp/x", "'//' is missing"),
        ("file://relative/path", "not absolute"),
        ("file://", "not absolute"),
        ("https://s3.example.org/bucket", "https is not a store"),
        ("s3a://bucket", "s3a is not a store"),
        ("nosuch://bucket", "unknown scheme"),
        ("s3://bucket/prefix?region=eu", "query"),
        ("s3://bucket/prefix#x", "fragment"),
        ("simplecache::s3://bucket", "'//' is missing"),
    ],
)
def test_nonsense_is_refused_with_a_hint(url: str, reason: str) -> None:
    """A URL that is none says what is wrong with it and what to write instead."""
    with pytest.raises(InvalidStoreUrl, match="invalid store url") as refusal:
        open_store(url)
    assert reason in refusal.value.message
    assert refusal.value.hint
    assert refusal.value.exit_code == 2


def test_a_prefix_must_be_one() -> None:
    """A prefix in an S3 URL follows the rules of keys."""
    with pytest.raises(InvalidKey):
        open_store("s3://bucket/a/../b")


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAKEY:{SECRET}@bucket/prefix",
        f"s3://{SECRET.replace('/', '')}@bucket/prefix",
        f"s3://AKIAKEY:{SECRET}",
        f"s3://bucket/p?X-Amz-Signature={SECRET}",
        f"sftp://user:{SECRET}@host/path",
        f"https://user:{SECRET}@host/path",
        f"file://user:{SECRET}@host/path",
        f"nosuch://user:{SECRET}@host",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    """A URL with something secret in it is refused by an error that does not show it."""
    with pytest.raises(InvalidStoreUrl) as refusal:
        open_store(url)
    shown = (
        f"{refusal.value} {refusal.value!r} {refusal.value.hint} {refusal.value.to_dict()} {refusal.value.__cause__}"
    )
    for part in SECRET.split("/"):
        assert part not in shown


@pytest.mark.parametrize("url", ["/somewhere", "memory://x", "s3://bucket"])
def test_unknown_options_are_named(url: str) -> None:
    """An option that the store does not know is refused by its name, not ignored."""
    with pytest.raises(UsageError, match="no option 'enpoint_url'") as refusal:
        open_store(url, enpoint_url="http://127.0.0.1:9000")
    assert refusal.value.hint


def test_wrong_options_do_not_show_their_values() -> None:
    """An option of the wrong kind is named; what was given may be a secret and is not shown."""
    with pytest.raises(UsageError, match="secret_access_key") as refusal:
        open_store("s3://bucket", access_key_id="AKIA", secret_access_key={"value": SECRET})
    assert SECRET not in repr(refusal.value)
    assert refusal.value.__cause__ is None
    with pytest.raises(UsageError, match="belong together"):
        open_store("s3://bucket", secret_access_key=SECRET)


def test_opening_a_local_store_imports_no_client() -> None:
    """Start-up time: a local store needs neither botocore nor fsspec."""
    code = (
        "import sys; from blobflow.stores import open_store; open_store('/nowhere');"
        "print([m for m in ('botocore', 'fsspec', 's3fs', 'pyarrow', 'dagster', 'pytest') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
