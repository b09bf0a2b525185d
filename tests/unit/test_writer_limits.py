"""The writer obeys the reader's limits: what could never be read again is refused before a byte is sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow import DirectoryExporter, Lease, export_artifact, upload
from blobflow.backends.files import export_files
from blobflow.errors import KeyConflict, Unsupported, UnsupportedSource
from blobflow.lanes import begin_upload
from blobflow.layers import LayerSync
from blobflow.stores.s3.options import S3Options, largest_object
from blobflow.testing import FaultyStore, Hook, Request, write_tree
from tests.kit import SMALL, artifact_of, declare, keys, local_store, noise

KEY = "a.tar"


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("MAX_MEMBERS", 3, "more than 3 members"),
        ("MAX_PATHS_BYTES", 10, "more than 10 bytes in its paths"),
        ("MAX_TOTAL_BYTES", 7, "more than 7 bytes"),
    ],
)
@pytest.mark.parametrize("surface", ["scan", "export", "files", "layer"])
def test_what_no_reader_takes_is_refused_at_the_scan(
    limit: str, value: int, words: str, surface: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """More members, bytes of paths or bytes than an artifact may have: refused with the limit, and nothing is left."""
    source = write_tree(tmp_path / "source", {"a": "12", "b": "34", "c": "56", "long name": "78"})
    store = FaultyStore(local_store(tmp_path))
    monkeypatch.setattr(f"blobflow.artifact.limits.{limit}", value)
    made: dict[str, Callable[[], object]] = {
        "scan": lambda: DirectoryExporter(path=source).scan(),
        "export": lambda: export_artifact(source, tmp_path / "artifact"),
        "files": lambda: export_files(tmp_path / "artifact", backend="x", write=copy),
        "layer": lambda: LayerSync(store, home=tmp_path / "home").sync("web", source),
    }
    with pytest.raises(UnsupportedSource, match=words) as refusal:
        made[surface]()
    assert refusal.value.limit == value
    assert not (tmp_path / "artifact").exists()
    assert {request.operation for request in store.log} <= {"get", "head", "list"}


def copy(data: Path) -> None:
    """An exporter that makes files."""
    write_tree(data, {"a": "12", "b": "34", "c": "56", "long name": "78"})


def test_an_index_that_no_reader_takes_is_refused_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """How long the index becomes is known once every file has been read."""
    monkeypatch.setattr("blobflow.artifact.artifact.MAX_INDEX_BYTES", 100)
    with pytest.raises(UnsupportedSource, match="more than 100 bytes in its index"):
        artifact_of(tmp_path)
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("surface", ["upload", "lanes", "one request"])
def test_an_object_above_the_largest_of_its_provider_is_refused_before_sending(surface: str, tmp_path: Path):
    """Both sizes are named; not a byte was sent, and no upload was begun."""
    artifact = artifact_of(tmp_path)
    store = local_store(tmp_path)
    declare(store, max_object_size=artifact.payload_size - 1, multipart=surface != "one request")
    send: Callable[..., object] = begin_upload if surface == "lanes" else upload
    with pytest.raises(Unsupported, match=rf"{artifact.payload_size} bytes.*at most {artifact.payload_size - 1}"):
        send(store, KEY, artifact, profile=SMALL)
    assert keys(store) == []
    assert store.list_uploads() == []
    declare(store, max_object_size=artifact.payload_size)
    assert upload(store, KEY, artifact, profile=SMALL).status == "uploaded"


@pytest.mark.parametrize(
    ("endpoint", "size"),
    [
        (None, None),
        ("http://127.0.0.1:9000", None),
        ("https://x.r2.cloudflarestorage.com", 5 * 1024**4 - 5 * 1024**3),
        ("https://storage.googleapis.com", 5 * 1024**4),
        ("https://notstorage.googleapis.com.example.org", None),
    ],
)
def test_providers_are_known_by_their_address(endpoint: str | None, size: int | None):
    """Others can be told: `max_object_size` is an option of the store."""
    assert largest_object(endpoint) == size
    assert S3Options(bucket="b", max_object_size=7).max_object_size == 7


def test_a_cursor_that_fits_in_a_manifest_fits_in_a_lease(tmp_path: Path):
    """Otherwise the round that recorded it would be the last one that anybody can hold."""
    store = local_store(tmp_path)
    for cursor in ("x" * 1_000_000, "y"):
        lease = Lease(store, "orders/round")
        assert lease.try_acquire()
        lease.complete(cursor)


def test_what_was_published_during_an_upload_in_one_request_is_not_replaced(tmp_path: Path):
    """Without multipart uploads the payload appears when its request ends: the key is looked at once more before."""
    one, other = artifact_of(tmp_path / "one", {"f": noise(20_000)}), artifact_of(tmp_path / "other", {"g": "other"})
    store = local_store(tmp_path)
    declare(store, multipart=False)

    def publish_other(_: Request) -> None:
        upload(store, KEY, other, profile=SMALL)

    def meanwhile(request: Request) -> Hook | None:
        return Hook(publish_other) if (request.operation, request.key) == ("put", KEY) else None

    with pytest.raises(KeyConflict, match=r"published under 'a.tar' meanwhile"):
        upload(FaultyStore(store, meanwhile), KEY, one, profile=SMALL)
    assert store.head(KEY).size == other.payload_size
