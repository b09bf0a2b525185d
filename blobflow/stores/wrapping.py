"""A store that wraps another store: the base of retries, limits and faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from typing_extensions import Unpack, override

from blobflow.checksum import Buffer
from blobflow.stores.base import Body, Capabilities, ObjectMeta, PartMeta, PutOptions, Store, StoredObject, UploadMeta
from blobflow.stores.optional import (
    HasClock,
    HasRoom,
    HasServer,
    ObjectAddress,
    Server,
    address_of,
    copy_from,
    free_bytes,
    server_of,
    server_time_s,
)

_T = TypeVar("_T")


class WrappingStore(Store, HasServer, HasClock, HasRoom):
    """Passes every call on to `store`; most go through `_call`, which a subclass may override.

    Attributes:
        store: The wrapped store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url

    def _call(self, operation: str, key: str, attempt: Callable[[], _T]) -> _T:
        del operation, key
        return attempt()

    @override
    def capabilities(self) -> Capabilities:
        return self.store.capabilities()

    @property
    @override
    def server(self) -> Server:
        return server_of(self.store)

    @override
    def server_time_s(self) -> float | None:
        return server_time_s(self.store)

    @override
    def free_bytes(self) -> int | None:
        return free_bytes(self.store)

    @override
    def put(self, key: str, body: Buffer | Body, **options: Unpack[PutOptions]) -> ObjectMeta:
        return self._call("put", key, lambda: self.store.put(key, body, **options))

    @override
    def get(self, key: str, *, max_bytes: int) -> StoredObject:
        return self._call("get", key, lambda: self.store.get(key, max_bytes=max_bytes))

    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        self._call("get_range", key, lambda: self.store.get_range_into(key, offset, buffer, e_tag=e_tag))

    @override
    def head(self, key: str) -> ObjectMeta:
        return self._call("head", key, lambda: self.store.head(key))

    @override
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectMeta]:
        return self.store.list(prefix, start_after=start_after)

    @override
    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.store.delete(key))

    @override
    def copy(self, source: str, target: str) -> ObjectMeta:
        return self._call("copy", source, lambda: self.store.copy(source, target))

    @override
    def address_of(self, key: str) -> ObjectAddress | None:
        return address_of(self.store, key)

    @override
    def copy_from(self, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
        return self._call("copy", target, lambda: copy_from(self.store, address, meta, target))

    @override
    def create_multipart(
        self,
        key: str,
        *,
        part_size: int,
        content_type: str = "application/octet-stream",
        private: bool = False,
    ) -> str:
        return self._call(
            "create_multipart",
            key,
            lambda: self.store.create_multipart(key, part_size=part_size, content_type=content_type, private=private),
        )

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        return self._call("put_part", key, lambda: self.store.put_part(key, upload_id, part_number, body))

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return self._call("list_parts", key, lambda: self.store.list_parts(key, upload_id))

    @override
    def list_uploads(self, prefix: str = "") -> list[UploadMeta]:
        return self._call("list_uploads", prefix, lambda: self.store.list_uploads(prefix))

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        return self._call("complete_multipart", key, lambda: self.store.complete_multipart(key, upload_id, parts))

    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        self._call("abort_multipart", key, lambda: self.store.abort_multipart(key, upload_id))

    @override
    def close(self) -> None:
        self.store.close()
