"""What was private stays private: who can read what, after everything that puts content on a disk."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from blobflow import DirectoryImporter
from blobflow.artifact.artifact import Artifact
from blobflow.artifact.manifest import artifact_digest
from blobflow.backends.directory import DirectoryExporter
from blobflow.backends.sqlite import SqliteExporter, SqliteImporter
from blobflow.checksum import crc32c
from blobflow.layers import LayerSync
from blobflow.mirror import MirrorReceiver, SnapshotEnvelope, SnapshotId
from blobflow.stores.local.store import LocalStore
from blobflow.testing import FaultyStore, write_tree
from blobflow.transport import download, read_manifest_bytes, upload
from blobflow.transport.cache import ArtifactCache
from tests.kit import SERIAL, Killed, dies_before, noise

PUBLIC = {"public.txt": "for everybody", "open": {"a": "also for everybody"}, "large.bin": noise(20_000, 1)}
SECRET = b"nobody else's business"


def private_tree(path: Path) -> Path:
    """A tree of public files, of files that others may not read, and of one in a directory that they may not enter."""
    write_tree(path, {**PUBLIC, "mixed": {"secret": SECRET, "b": "for everybody"}, "closed": {"inside": SECRET}})
    write_tree(path, {"for the group": SECRET, "run.sh": SECRET, "empty secret": ""})
    modes = {"mixed/secret": 0o600, "closed": 0o700, "for the group": 0o640, "run.sh": 0o700, "empty secret": 0o600}
    for name, mode in modes.items():
        (path / name).chmod(mode)
    return path


READABLE = {"public.txt", "open/a", "large.bin", "mixed/b"}
"""What others can read of `private_tree`."""


@contextmanager
def umask(mask: int) -> Generator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def others_reach(root: Path) -> Iterator[Path]:
    """The files that anybody but their owner can read: a bit of group or others, and a way there."""
    for read, search in ((stat.S_IRGRP, stat.S_IXGRP), (stat.S_IROTH, stat.S_IXOTH)):
        for directory, names, files in os.walk(root):
            names[:] = [name for name in names if os.lstat(os.path.join(directory, name)).st_mode & search]
            for name in files:
                status = os.lstat(os.path.join(directory, name))
                if stat.S_ISREG(status.st_mode) and status.st_mode & read:
                    yield Path(directory, name)


class Place(NamedTuple):
    """Where one case works; only `made` counts."""

    source: Path
    made: Path
    """Everything that the case puts on the disk."""
    work: Path

    def store(self) -> LocalStore:
        return LocalStore(self.made / "store")

    def artifact(self) -> Artifact:
        """By reference, as a push makes it."""
        return DirectoryExporter(path=self.source).export(self.work / "artifact").artifact

    def pushed(self) -> tuple[LocalStore, str]:
        """A store elsewhere that holds it."""
        store = LocalStore(self.work / "store")
        upload(store, "tree", self.artifact(), profile=SERIAL)
        return store, "tree"


def push(place: Place) -> set[str]:
    """A local store: the payload holds private members, so it is private as a whole."""
    upload(place.store(), "tree", place.artifact(), profile=SERIAL)
    return set()


def killed_push(place: Place) -> set[str]:
    with pytest.raises(Killed):
        upload(FaultyStore(place.store(), dies_before("complete_multipart")), "tree", place.artifact(), profile=SERIAL)
    return set()


def copied_in_the_store(place: Place) -> set[str]:
    store = place.store()
    upload(store, "tree", place.artifact(), profile=SERIAL)
    store.copy("tree", "another")
    return set()


def pull(place: Place) -> set[str]:
    download(*place.pushed(), place.made / "dest", profile=SERIAL)
    return {f"dest/data/{name}" for name in READABLE}


def killed_pull(place: Place) -> set[str]:
    """A stage is nobody else's, whatever it holds."""
    store, key = place.pushed()
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_before("get_range", 4)), key, place.made / "dest", profile=SERIAL)
    return set()


def export_copy(place: Place) -> set[str]:
    DirectoryExporter(path=place.source, mode="copy").export(place.made / "artifact")
    return {f"artifact/data/{name}" for name in READABLE}


def export_link(place: Place) -> set[str]:
    """Hard links have the modes of their files, so nobody else comes to them."""
    DirectoryExporter(path=place.source, mode="link").export(place.made / "artifact")
    return set()


def import_copy(place: Place) -> set[str]:
    artifact = download(*place.pushed(), place.work / "dest", profile=SERIAL).path
    DirectoryImporter(path=place.made / "mirror").import_artifact(Artifact.open(artifact))
    return _mirrored(place)


def import_consume(place: Place) -> set[str]:
    importer = DirectoryImporter(path=place.made / "mirror")
    store, key = place.pushed()
    landed = download(
        store, key, importer.staging(artifact_digest(read_manifest_bytes(store, key))), profile=SERIAL
    ).path
    importer.import_artifact(Artifact.open(landed), consume=True)
    return _mirrored(place)


def import_reference(place: Place) -> set[str]:
    """Straight from the source, whose files were never copied before."""
    DirectoryImporter(path=place.made / "mirror").import_artifact(place.artifact())
    return _mirrored(place)


def _mirrored(place: Place) -> set[str]:
    (version,) = (place.made / "mirror" / "versions").iterdir()
    return {f"mirror/versions/{version.name}/data/{name}" for name in READABLE}


def layer_sync(place: Place) -> set[str]:
    """The layer, the state and the stat cache."""
    LayerSync(place.store(), home=place.made / "home", profile=SERIAL).sync("web", place.source)
    return set()


def layer_restore(place: Place) -> set[str]:
    store = LocalStore(place.work / "store")
    LayerSync(store, home=place.work / "home", profile=SERIAL).sync("web", place.source)
    layers = LayerSync(store, home=place.made / "home", profile=SERIAL)
    layers.restore("web", place.made / "dest")
    assert layers.restore("web", place.made / "dest").status == "unchanged"
    return {f"dest/{name}" for name in READABLE}


def cache(place: Place) -> set[str]:
    store, key = place.pushed()
    kept = ArtifactCache(place.made / "cache")
    kept.get(store, key, artifact_digest(read_manifest_bytes(store, key)), profile=SERIAL)
    kept.close()
    return set()


def receive(place: Place) -> set[str]:
    """A receiver knows nothing of what it gets, so all of it is its own: also what is not complete yet."""
    with MirrorReceiver(place.made / "received") as receiver:
        for position, done in ((1, True), (2, False)):
            snapshot = SnapshotId("east", "orders", position, f"sha256:{position:064x}")
            size = len(SECRET) + (not done)
            receiver.handle(
                SnapshotEnvelope(
                    snapshot,
                    offset=0,
                    data=SECRET,
                    done=done,
                    total_bytes=size,
                    total_crc32c=crc32c(SECRET),
                    crc32c=crc32c(SECRET),
                )
            )
    return set()


def sqlite(place: Place) -> set[str]:
    database = place.work / "db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE secrets AS SELECT ? AS secret", (SECRET.decode(),))
        connection.commit()
    database.chmod(0o600)
    artifact = SqliteExporter(path=database).export(place.made / "artifact").artifact
    store = place.store()
    upload(store, "db", artifact, profile=SERIAL)
    landed = download(store, "db", place.made / "dest", profile=SERIAL).path
    SqliteImporter(path=place.made / "copied").import_artifact(Artifact.open(landed))
    SqliteImporter(path=place.made / "moved").import_artifact(Artifact.open(landed), consume=True)
    return set()


CASES: list[Callable[[Place], set[str]]] = [
    push,
    killed_push,
    copied_in_the_store,
    pull,
    killed_pull,
    export_copy,
    export_link,
    import_copy,
    import_consume,
    import_reference,
    layer_sync,
    layer_restore,
    cache,
    receive,
    sqlite,
]
ABOUT = {"history.jsonl", ".lock", "web.ref.json"}
"""What names an artifact, and holds nothing of it."""


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077], ids=["000", "022", "077"])
@pytest.mark.parametrize("case", CASES)
def test_nobody_reads_what_was_private(tmp_path: Path, case: Callable[[Place], set[str]], mask: int) -> None:
    """Others read the public files of a tree, where these are files again and the umask allows it, and nothing else."""
    with umask(0o022):
        place = Place(private_tree(tmp_path / "source"), tmp_path / "made", tmp_path / "work")
        place.work.mkdir()
        place.made.mkdir()
    with umask(mask):
        expected = case(place)
    reached = set(others_reach(place.made))
    assert [path for path in reached if SECRET in path.read_bytes()] == []
    found = {str(path.relative_to(place.made)) for path in reached if path.name not in ABOUT}
    assert found == (set() if mask == 0o077 else expected)


def test_what_is_public_stays_public(tmp_path: Path) -> None:
    """Of a tree without private files everything is for others to read, in a local store and after a pull."""
    with umask(0o022):
        write_tree(tmp_path / "source", PUBLIC)
        place = Place(tmp_path / "source", tmp_path / "made", tmp_path / "work")
        place.work.mkdir()
        upload(place.store(), "tree", place.artifact(), profile=SERIAL)
        download(place.store(), "tree", place.made / "dest", profile=SERIAL)
    found = {str(path.relative_to(place.made)) for path in others_reach(place.made)}
    names = {"INDEX.parquet", "MANIFEST.json", "data/public.txt", "data/open/a", "data/large.bin"}
    assert found == {"store/tree", "store/tree.manifest.json", *(f"dest/{name}" for name in names)}


def test_another_user_cannot_read_it(tmp_path: Path) -> None:
    """The same asked of the kernel, by a process of another user, where this one may start it."""
    with tempfile.TemporaryDirectory() as directory, umask(0o022):
        root = Path(directory)
        root.chmod(0o755)
        place = Place(private_tree(root / "source"), root / "made", tmp_path / "work")
        (root / "made").mkdir()
        place.work.mkdir()
        push(place)
        expected = pull(Place(place.source, place.made, tmp_path / "pull"))
        nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        command = ["find", str(place.made), "-type", "f", "-readable", "-printf", "%P\n"]
        # It fails at every directory that is closed.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **nobody)
        found = set(done.stdout.splitlines())
        # The owner reads everything; the other user what is public.
        assert found == expected if nobody else found > expected
