"""The contract suite, through fsspec, against servers that nobody here wrote."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blobflow.errors import InvalidKey
from blobflow.stores import Store
from blobflow.stores.fsspec.store import FsspecStore
from blobflow.testing import StoreContract
from tests.foreign.servers import FSSPEC, ForeignServer

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("server", FSSPEC, indirect=True)
class TestForeign(StoreContract):
    many_objects = 120

    @pytest.fixture
    def store(self, server: ForeignServer) -> Iterator[FsspecStore]:
        place = server.new_place()
        store = FsspecStore(place.url, **place.options)
        yield store
        store.close()

    def test_names_are_free_after_delete(self, store: Store) -> None:
        """Directories that became empty are kept, so a prefix never becomes a key again."""
        if _scheme(store) in ("sftp", "ftp", "webdav"):
            pytest.skip("not promised where there are real directories")
        super().test_names_are_free_after_delete(store)

    def test_keys_may_contain_anything_printable(self, store: Store) -> None:
        """Azure's file system gives some keys another name; they are refused, and not stored under that."""
        if _scheme(store) != "az":
            super().test_keys_may_contain_anything_printable(store)
            return
        for key in ("a?b#c", "a?versionid=1", "back\\slash"):
            for call in (lambda: store.put(key, b""), lambda: store.head(key), lambda: store.delete(key)):  # noqa: B023
                with pytest.raises(InvalidKey, match="another name"):
                    call()
        odd = ["a#b", "a#b?c", "a%23b", "a?b", "plus+percent%41", "quote'<tag>", "with space", "~!$()*,:@[]^`{|}"]
        for number, key in enumerate(odd):
            store.put(key, str(number).encode())
        for number, key in enumerate(odd):
            assert store.get(key, max_bytes=10).data == str(number).encode(), key
        assert [meta.key for meta in store.list()] == sorted(odd, key=str.encode)

    def test_directories_may_have_odd_names(self, store: Store) -> None:
        """What is odd in a name is so in the middle of a key as well, also when the object is replaced."""
        odd = ["a#b/k", "a%41/k", "a;b/k", "a#b/c d/k"] + ["a?b/k"] * (_scheme(store) != "az")
        for content in (b"first", b"second"):
            for key in odd:
                store.put(key, content + key.encode())
        for key in odd:
            assert store.get(key, max_bytes=100).data == b"second" + key.encode(), key
        assert [meta.key for meta in store.list()] == sorted(odd, key=str.encode)

    def test_a_put_replaces(self, store: Store) -> None:
        """The second content is the one that is read; whether it has another e_tag depends on the server's clock."""
        if _scheme(store) != "sftp":
            super().test_a_put_replaces(store)
        store.put("key", b"first of them")
        store.put("key", b"another one")
        assert store.get("key", max_bytes=20).data == b"another one"

    def test_a_pin_refuses_another_object(self, store: Store) -> None:
        _skip_where_seconds_are_all(store)
        super().test_a_pin_refuses_another_object(store)

    def test_readers_never_see_a_mixture(self, store: Store) -> None:
        _skip_where_seconds_are_all(store)
        super().test_readers_never_see_a_mixture(store)


def _scheme(store: Store) -> str:
    return store.url.partition("://")[0]


def _skip_where_seconds_are_all(store: Store) -> None:
    if _scheme(store) in ("sftp", "webdav"):
        pytest.skip(
            "these servers tell size and seconds; a file of that size, replaced within the second, looks the same"
        )
