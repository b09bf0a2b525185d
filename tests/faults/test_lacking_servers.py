"""Servers that lack an ability: what the probe found is consulted before the first byte of a payload."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from blobflow import copy_artifact, download, open_store, upload, verify
from blobflow.cli import run
from blobflow.errors import Unsupported
from blobflow.lanes import begin_upload
from blobflow.layers import LayerSync
from blobflow.maintenance.gc import collect
from blobflow.stores.base import Capabilities, Store
from blobflow.stores.local.store import LocalStore
from blobflow.stores.probe import TRIAL_PREFIX
from blobflow.stores.wrapping import WrappingStore
from blobflow.streams import ObjectTarget, transfer
from tests.kit import SMALL, artifact_of, keys
from tests.strict_s3 import Limits, StrictS3


@contextmanager
def opened(rules: Limits) -> Generator[tuple[StrictS3, Store], None, None]:
    """A server and a store in it, whose other keys are the probe's report alone."""
    with StrictS3(rules) as server, closing(open_store(_url(server), **_options(server))) as store:
        yield server, store
        server.endpoint.client.close()


def _url(server: StrictS3) -> str:
    return f"s3://{server.endpoint.new_bucket()}/team"


def _options(server: StrictS3) -> dict[str, Any]:
    endpoint = server.endpoint
    return {
        "endpoint_url": endpoint.endpoint_url,
        "region": endpoint.region,
        "access_key_id": endpoint.access_key_id,
        "secret_access_key": endpoint.secret_access_key,
    }


def sent(server: StrictS3) -> list[tuple[str, str]]:
    """Operation and key of every request that brought bytes, but for those of the probe."""
    return [
        (exchange.operation, exchange.key.removeprefix("team/"))
        for exchange in server.log
        if exchange.method in ("PUT", "POST") and exchange.key and "blobflow-probe" not in exchange.key
    ]


NO_PARTS = Limits(lists_parts=False, min_part_size=1000)
NO_RANGES = Limits(gives_ranges=False, min_part_size=1000)


def test_without_a_list_of_parts_an_artifact_goes_in_one_request(tmp_path: Path) -> None:
    """What cannot be proven part by part is sent whole, from the beginning, and all else works as anywhere."""
    with opened(NO_PARTS) as (server, store):
        result = upload(store, "orders/1.tar", artifact_of(tmp_path), profile=SMALL)
        assert sent(server) == [("PutObject", "orders/1.tar"), ("PutObject", "orders/1.tar.manifest.json")]
        assert verify(store, "orders/1.tar").artifact_digest == result.artifact_digest
        assert download(store, "orders/1.tar", tmp_path / "dest").artifact_digest == result.artifact_digest
        copy_artifact(store, "orders/1.tar", store, "orders/2.tar")
        assert collect(store, older_than_s=0, payloads=True).failed == []
        assert verify(store, "orders/2.tar", mode="deep").artifact_digest == result.artifact_digest


def test_without_a_list_of_parts_too_large_an_artifact_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    """Where one request is all there is, its largest size counts; the message has both sizes."""
    artifact = artifact_of(tmp_path)
    with opened(NO_PARTS) as (server, store):
        store.capabilities()  # to find out, with the usual limits
        limited = _Limited(store, artifact.payload_size - 1)
        with pytest.raises(Unsupported, match=f"{artifact.payload_size} bytes.* at most {artifact.payload_size - 1}"):
            upload(limited, "orders/1.tar", artifact, profile=SMALL)
        assert sent(server) == []


def test_without_a_list_of_parts_a_layer_goes_in_one_request(tmp_path: Path) -> None:
    """Layers, too, consult what the server can do."""
    source = tmp_path / "layer"
    source.mkdir()
    (source / "file").write_bytes(bytes(range(256)) * 400)
    with opened(NO_PARTS) as (server, store):
        sync = LayerSync(store, home=tmp_path / "home")
        sync.sync("dev/box", source)
        assert {operation for operation, _ in sent(server)} == {"PutObject"}
        sync.restore("dev/box", tmp_path / "restored")
    assert (tmp_path / "restored" / "file").read_bytes() == (source / "file").read_bytes()


def test_lanes_and_streams_that_need_parts_say_so(tmp_path: Path) -> None:
    """What only works with multipart uploads is refused, with what can be done instead."""
    with opened(NO_PARTS) as (server, store):
        with pytest.raises(Unsupported, match="multipart") as lanes:
            begin_upload(store, "orders/1.tar", artifact_of(tmp_path), profile=SMALL)
        assert "one lane" in lanes.value.hint
        with pytest.raises(Unsupported, match="multipart"):
            transfer(BytesIO(b"data"), ObjectTarget(store, "stream"))
        assert sent(server) == []


@pytest.mark.parametrize(
    "push",
    [
        lambda store, path: upload(store, "orders/1.tar", artifact_of(path), profile=SMALL),
        lambda store, path: begin_upload(store, "orders/1.tar", artifact_of(path), profile=SMALL),
        lambda store, path: copy_artifact(_elsewhere(path), "a.tar", store, "orders/1.tar"),
        lambda store, path: LayerSync(store, home=path / "home").sync(
            "dev/box", artifact_of(path).path.parent / "source"
        ),
        lambda store, _: transfer(BytesIO(b"data"), ObjectTarget(store, "stream")),
    ],
    ids=["upload", "lanes", "copy", "layer", "transfer"],
)
def test_a_server_that_ignores_ranges_gets_nothing(tmp_path: Path, push: Callable[[Store, Path], object]) -> None:
    """What nobody could read is refused before its first byte is sent."""
    with opened(NO_RANGES) as (server, store):
        with pytest.raises(Unsupported, match="could not be verified or fetched") as refusal:
            push(store, tmp_path)
        assert refusal.value.capability == "ranged GET"
        assert sent(server) == []
        assert store.list_uploads() == []
        assert [key for key in keys(store) if key.startswith(TRIAL_PREFIX)] == []


def test_the_command_refuses_before_it_hashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`push` to a server that ignores ranges ends at once, whatever the size of the source."""
    monkeypatch.setattr("blobflow.backends.directory.DirectoryExporter.export", _never)
    with StrictS3(NO_RANGES) as server:
        endpoint = server.endpoint
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", endpoint.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", endpoint.secret_access_key)
        monkeypatch.setenv("AWS_REGION", endpoint.region)
        arguments = ["--store", _url(server), "--endpoint-url", endpoint.endpoint_url, "push", str(tmp_path), "k"]
        assert run(arguments) == Unsupported.exit_code
        endpoint.client.close()
    assert "blobflow probe" in capsys.readouterr().err


class _Limited(WrappingStore):
    """A store that takes only so much in a request."""

    def __init__(self, store: Store, max_put_size: int) -> None:
        super().__init__(store)
        self._max_put_size = max_put_size

    @override
    def capabilities(self) -> Capabilities:
        return replace(self.store.capabilities(), max_put_size=self._max_put_size)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be exported")


def _elsewhere(path: Path) -> Store:
    store = LocalStore(path / "elsewhere")
    upload(store, "a.tar", artifact_of(path), profile=SMALL)
    return store
