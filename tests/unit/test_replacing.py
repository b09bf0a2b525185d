"""A file system that cannot rename onto what is there: objects are replaced all the same, and refs move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from blobflow import move_ref, open_store, read_ref, upload
from blobflow.errors import StoreUnavailable
from blobflow.stores.base import Store
from tests.kit import SMALL, artifact_of, keys


class Refusing(LocalFileSystem):
    """A local file system whose renames refuse to replace, as those of SMB and WebHDFS do."""

    protocol: ClassVar[Any] = "refusing"

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: Any = None, **more: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    registry: Any = fsspec
    registry.register_implementation("refusing", Refusing, clobber=True)
    store = open_store(f"refusing://{tmp_path}/store", patience_s=0)
    yield store
    store.close()


def test_an_object_is_replaced_where_renames_do_not_replace(store: Store) -> None:
    """A second put has the new bytes, and nothing else stays behind."""
    for content in (b"first", b"other", b"longer than before"):
        store.put("a/b", content)
        assert store.get("a/b", max_bytes=100).data == content
    assert keys(store) == ["a/b"]


def test_a_ref_moves_where_renames_do_not_replace(store: Store, tmp_path: Path) -> None:
    """A push, a second one over it, and a ref that is moved twice."""
    first = upload(store, "orders/1.tar", artifact_of(tmp_path / "one"), profile=SMALL)
    second = upload(store, "orders/1.tar", artifact_of(tmp_path / "two", {"x": "y"}), profile=SMALL, overwrite=True)
    for result in (first, second):
        move_ref(store, "orders/latest", result.key, result.artifact_digest)
        ref = read_ref(store, "orders/latest")
        assert ref is not None
        assert ref.manifest_sha256 == result.artifact_digest


def test_what_was_there_comes_back_if_it_cannot_be_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A put that fails half-way leaves the old object under its key."""
    store.put("a/ref.json", b"old")
    real = Refusing.mv
    failing = [str(tmp_path / "store" / "a" / "ref.json")]

    def mv(self: Refusing, path1: str, path2: str, **options: Any) -> None:
        if failing and str(path2).endswith(failing[0]) and not self.exists(path2):
            failing.clear()
            raise OSError("the connection broke")
        real(self, path1, path2, **options)

    monkeypatch.setattr(Refusing, "mv", mv)
    with pytest.raises(StoreUnavailable):
        store.put("a/ref.json", b"new")
    assert not failing
    assert store.get("a/ref.json", max_bytes=100).data == b"old"
