"""Layer syncs and restores, killed without warning, and taken up by hosts that know nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from blobflow import ChunkProfile, read_ref
from blobflow.layers import LayerSync, LayerSyncResult
from blobflow.layers.names import container_ref, layer_key
from blobflow.layers.remote import RemoteLayer
from blobflow.maintenance.gc import collect
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, Request, write_tree
from tests.crash.machines import LocalPlace, Machine, kill_when
from tests.crash.storm import fingerprint
from tests.faults.clients import Stores
from tests.kit import Killed, noise, sized
from tests.servers import S3Endpoint
from tests.strict_s3 import Limits, StrictS3

PARTS = 2500
PART_SIZE = 2048
FRAME_SIZE = 5000
CONTAINERS = ("web-1", "web-2")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose layer has more parts than two pages of a listing."""
    return write_tree(
        tmp_path_factory.mktemp("many") / "source", {"large": noise(PARTS * PART_SIZE), "small": "hello\n"}
    )


def dies_at_part(number: int) -> Callable[[Request], None]:
    dead = False

    def faults(request: Request) -> None:
        nonlocal dead
        dead = dead or (request.operation == "put_part" and request.number > number)
        if dead:
            raise Killed

    return faults


def sync(store: Store, home: Path, source: Path, **options: Any) -> LayerSyncResult:
    profile = ChunkProfile.custom(PART_SIZE, 100, workers=4)
    return LayerSync(store, home=home, profile=profile, frame_size=FRAME_SIZE, **options).sync("web-1", source)


def killed_and_continued_elsewhere(make: Callable[[], Store], source: Path, path: Path, killed_at: int) -> None:
    """Killed among its parts, continued on a host with an empty home and no database: the bytes of an unbroken one."""
    unbroken = LocalStore(path / "unbroken")
    expected = sync(unbroken, path / "home 0", source)
    assert expected.parts >= PARTS
    with pytest.raises(Killed):
        sync(FaultyStore(make(), dies_at_part(killed_at)), path / "home 1", source)
    other = path / "copy"
    shutil.copytree(source, other)
    watched = FaultyStore(make())
    result = sync(watched, path / "home 2", other)
    assert (result.status, result.digest, result.layer, result.parts) == (
        *("uploaded", expected.digest, expected.layer, expected.parts),
    )
    assert result.bytes_sent + result.bytes_resumed == expected.layer.object_size
    # A part that was in flight when the process died may have arrived.
    assert expected.parts - killed_at - 4 <= watched.count("put_part") <= expected.parts - killed_at
    data = make().get(result.key, max_bytes=1 << 30).data
    assert data == unbroken.get(result.key, max_bytes=1 << 30).data
    assert make().list_uploads() == []
    LayerSync(make(), home=path / "home 3").restore("web-1", path / "back")
    assert fingerprint(path / "back") == fingerprint(source)


@pytest.mark.seed("W3.1", "3.18", "3.6")
@pytest.mark.parametrize("where", ["local", pytest.param("strict", marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_2500_parts_continued_on_another_host(where: str, many: Path, stores: Stores, tmp_path: Path):
    """Also where ListParts has pages."""
    if where == "local":
        killed_and_continued_elsewhere(lambda: LocalStore(tmp_path / "store"), many, tmp_path, 1700)
    else:
        with StrictS3(Limits(min_part_size=1)) as server:
            killed_and_continued_elsewhere(lambda: stores(server), many, tmp_path, 1700)
            assert len(server.requests("ListParts")) >= 2 + 3
            (created,) = {exchange.headers.get("content-type") for exchange in server.requests("CreateMultipartUpload")}
            assert created == "application/zstd"
            stores.close()


@pytest.mark.rgw
@pytest.mark.slow
@pytest.mark.seed("W3.1", "W3.6")
@pytest.mark.timeout(600)
def test_2500_parts_continued_on_ceph(many: Path, fine_grained_rgw: S3Endpoint, stores: Stores, tmp_path: Path):
    """Pages of a real server, which tells no checksums: the e_tags are MD5s."""
    killed_and_continued_elsewhere(lambda: stores(fine_grained_rgw), many, tmp_path, 1700)


@pytest.mark.seed("3.11", "3.6")
def test_a_killed_command_is_continued_by_another_machine(tmp_path: Path):
    """Real processes, SIGKILL in the middle; the second machine has an empty home."""
    source = write_tree(tmp_path / "source", {"large": noise(40 << 20), "small": "hello\n"})
    place = LocalPlace(tmp_path / "store")
    options = ("--chunk-size", "64KiB", "--workers", "2")
    first, second = (Machine(tmp_path / name, place, *options) for name in ("first", "second"))
    key: list[str] = []

    def underway() -> bool:
        key[:] = [path.name.removesuffix(".upload.json") for path in place.root.glob("*.upload.json")]
        return bool(key) and len(place.parts(key[0])) > 100

    assert kill_when(underway, first.start("layer", "sync", source, "web-1")), "it was too quick to be killed"
    held = len(place.parts(key[0]))
    document = second.run("layer", "sync", source, "web-1")
    assert document["status"] == "uploaded"
    assert document["bytes_resumed"] + document["bytes_sent"] == document["layer_bytes"] == place.size(key[0])
    assert held <= document["parts_resumed"] <= held + 2
    assert place.leftovers() == []
    back = tmp_path / "back"
    second.run("layer", "restore", "web-1", back)
    assert fingerprint(back) == fingerprint(source)


class LayerProcesses:
    """Children that sync and restore, and can be killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.layer_processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, order: dict[str, Any], kill_after_s: float | None = None) -> int:
        """The exit code of a child, which is killed if it still runs after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**order, "kill_after_s": kill_after_s}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.mark.seed("3.11", "3.14", "W3.4", "W3.5")
@pytest.mark.timeout(1800)
def test_random_kills_leave_no_wrong_state(tmp_path: Path):
    """Whatever is killed when: who says that a container is synced is right, and the next sync ends well."""
    kills, seed = sized(1000, 60), random.SystemRandom().randrange(1 << 32)
    print(f"seed={seed}")
    dice = random.Random(seed)
    sources = [
        write_tree(
            tmp_path / f"tree {i}", {"big": noise(300_000 + 40_000 * i, i), "d": {"f": f"{i}"}, "same": noise(9000)}
        )
        for i in range(4)
    ]
    prints = {fingerprint(source) for source in sources}
    store = LocalStore(tmp_path / "store")
    hosts = [tmp_path / f"host {i}" for i in range(3)]
    order: dict[str, Any] = {"store": str(store.root), "chunk_size": 16_384, "frame_size": 20_000}
    order["expected"] = ["TransferBusy", "NotFoundError", "UploadInterrupted", "StoreUnavailable"]
    codes: Counter[int] = Counter()
    took = 0.2
    with closing(LayerProcesses()) as processes:
        while codes[-signal.SIGKILL] < kills:
            if dice.random() < 0.1:
                shutil.rmtree(dice.choice(hosts), ignore_errors=True)
            what = "restore" if dice.random() < 0.2 else "sync"
            container, home = dice.choice(CONTAINERS), dice.choice(hosts)
            path = dice.choice(sources) if what == "sync" else tmp_path / f"back {container}"
            now = order | {"what": what, "container": container, "home": str(home), "path": str(path)}
            started = time.monotonic()
            code = processes.run(now, dice.uniform(0, took))
            codes[code] += 1
            # About the time that one takes, so that kills fall everywhere.
            seconds = 1.5 * (time.monotonic() - started)
            took = 0.9 * took + 0.1 * seconds if code == 0 else min(2.0, took * 1.01)
            assert code in {0, 1, -signal.SIGKILL}
            _assert_truthful(store, hosts)
            for name in CONTAINERS:
                back = tmp_path / f"back {name}"
                assert not back.exists() or fingerprint(back) in prints
        for number, container in enumerate(CONTAINERS):
            for source in (sources[number], sources[number + 1]):
                done = order | {"what": "sync", "container": container, "home": str(hosts[0]), "path": str(source)}
                assert processes.run(done) == 0
            _assert_truthful(store, hosts)
            back = tmp_path / f"last {container}"
            assert processes.run(done | {"what": "restore", "home": str(tmp_path / "empty"), "path": str(back)}) == 0
            assert fingerprint(back) == fingerprint(sources[number + 1])
    print(f"codes={dict(codes)}")
    collect(store, older_than_s=0, payloads=True)
    assert store.list_uploads() == []
    # Nothing is left but layers, their metadata, and the refs.
    names = {meta.key for meta in store.list()}
    assert {name for name in names if name.endswith(".tar.zst")} == {
        name.replace(".layer.json", ".tar.zst") for name in names if name.endswith(".layer.json")
    }
    assert not any(name.endswith(".upload.json") for name in names)


def _assert_truthful(store: LocalStore, hosts: list[Path]) -> None:
    """What a ref or a database calls synced is a complete layer."""
    for container in CONTAINERS:
        ref = read_ref(store, container_ref(container))
        assert ref is None or RemoteLayer.find(store, ref.key) is not None
    for host in hosts:
        if not (host / "state.db").exists():
            continue
        for state in LayerSync(store, home=host)._table.load_all().values():
            digest = state.remote_digest
            assert digest is None or RemoteLayer.find(store, layer_key(digest)) is not None
