"""Garbage collection: removes what killed uploads, probes and downloads left, once nobody will resume it.

It is safe at any time, next to running transfers, and may run often. Age and the intents decide (docs/format.md);
uploads renew their intents while they work. An upload that is resumed before the limit finds all of its parts. If it
is resumed at the very moment of the collection, it starts from the beginning; nothing wrong is ever published.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from blobflow.artifact.leftovers import remove_stages
from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import MANIFEST_NAME
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.artifact.tarmap import manifest_entry
from blobflow.errors import (
    ArtifactInvalid,
    InvalidKey,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    TemporaryError,
    Unsupported,
    UsageError,
)
from blobflow.layers.names import LAYER_SUFFIX, META_SUFFIX, meta_key
from blobflow.stores.base import ObjectMeta, Store, UploadMeta
from blobflow.stores.probe import TRIAL_PREFIX
from blobflow.transport import MANIFEST_SUFFIX
from blobflow.transport.catalog import DAMAGED_SUFFIX, LEASE_SUFFIX, REF_SUFFIX
from blobflow.uploads.intent import SUFFIX as INTENT_SUFFIX, Intent, IntentKeeper

_log = logging.getLogger(__name__)

DEFAULT_AGE_S: Final = 24 * 3600.0
"""Long enough for a crashed nightly upload to be resumed the next night."""

_FIRST_BLOBFLOW: Final = datetime(2026, 1, 1, tzinfo=timezone.utc)
"""An earlier date comes from another tool, or the server made it up (moto says 2010)."""
_TRIAL: Final = re.compile(re.escape(TRIAL_PREFIX) + r"[0-9a-f]{32}/[a-z0-9-]+")
_LAYER: Final = re.compile(r"(?:.*/)?[0-9a-f]{64}" + re.escape(LAYER_SUFFIX))
_BLOCK: Final = 512
"""Payloads are tars, so their sizes are multiples of it; this excludes nearly everything else without a request."""


@dataclass(frozen=True)
class GcReport:
    """What was collected, or would be in a dry run."""

    dry_run: bool
    uploads: list[UploadMeta] = field(default_factory=list[UploadMeta])
    """Multipart uploads that were aborted."""
    intents: list[str] = field(default_factory=list[str])
    """Keys whose intents were removed."""
    trials: list[str] = field(default_factory=list[str])
    """Objects of killed probes that were removed."""
    payloads: list[str] = field(default_factory=list[str])
    """Keys of payloads and layers without manifest (metadata) and intent; removed only if requested."""
    uploads_kept: int = 0
    """Multipart uploads that are young, or that may be resumed."""
    unreadable: list[str] = field(default_factory=list[str])
    """Keys with intents that this version cannot read; they and their uploads stay."""
    failed: list[str] = field(default_factory=list[str])
    """Keys at which the store failed temporarily; the next run tries again."""


def collect(
    store: Store,
    prefix: str = "",
    *,
    older_than_s: float = DEFAULT_AGE_S,
    payloads: bool = False,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
) -> GcReport:
    """Remove leftovers under keys that start with `prefix`.

    * Multipart uploads that no intent names, if they were begun at least `older_than_s` ago. One whose age the store
      does not report, or makes up, counts as new, so only a limit of 0 collects it.
    * Intents that expired at least `older_than_s` ago, together with their uploads. An intent also counts as expired if
      its owner was a process of this machine that no longer exists. A later upload of the same content sends all of it.
    * Objects that a killed probe left.
    * With `payloads`: payloads without manifest and intent, and layers without metadata and intent, of the same age.
      They are found in any case. Readers cannot see them, and only an upload of their content can publish them. A layer
      with metadata stays, whether a container's ref names it or not: the next sync of that content shares it.

    Args:
        prefix: A plain string prefix; everything below it belongs to blobflow, except unknown objects.
        older_than_s: Seconds. 0 collects everything that no process works on now.
        dry_run: Find everything, change nothing.
        clock: Unix time in seconds.

    Raises:
        UsageError: the age is below 0.
    """
    check_age(older_than_s)
    return _Collection(store, older_than_s, payloads, dry_run, clock).run(prefix)


def check_age(older_than_s: float) -> None:
    """Return if the age is valid.

    Raises:
        UsageError: it is below 0, or not a number.
    """
    if not older_than_s >= 0:
        raise UsageError(f"an age of {older_than_s:g} seconds is not valid", hint="give 0 or more")


class _Collection:
    def __init__(
        self, store: Store, older_than_s: float, payloads: bool, dry_run: bool, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._older_than_s = older_than_s
        self._payloads = payloads
        self._clock = clock
        self._report = GcReport(dry_run)

    def run(self, prefix: str) -> GcReport:
        uploads = self._uploads_under_way(prefix)
        manifests: set[str] = set()
        intents: list[str] = []
        trials: list[str] = []
        suspects: list[ObjectMeta] = []
        for meta in self._store.list(prefix):
            if meta.key.endswith(MANIFEST_SUFFIX):
                manifests.add(meta.key.removesuffix(MANIFEST_SUFFIX))
            elif meta.key.endswith(META_SUFFIX):
                manifests.add(meta.key.removesuffix(META_SUFFIX) + LAYER_SUFFIX)
            elif meta.key.endswith(INTENT_SUFFIX):
                intents.append(meta.key.removesuffix(INTENT_SUFFIX))
            elif meta.key.endswith((LEASE_SUFFIX, REF_SUFFIX, DAMAGED_SUFFIX)):
                continue
            elif _TRIAL.fullmatch(meta.key):
                trials += [meta.key] if self._is_old(meta.last_modified) else []
            elif (_LAYER.fullmatch(meta.key) or (meta.size and meta.size % _BLOCK == 0)) and self._is_old(
                meta.last_modified
            ):
                suspects.append(meta)
        for upload in uploads.values():
            with self._going_on_after_failure(upload.key):
                self._collect_upload(upload)
        for key in intents:
            with self._going_on_after_failure(key):
                self._collect_intent(key, uploads)
        for key in trials:
            with self._going_on_after_failure(key):
                self._change(lambda key=key: self._store.delete(key))
                self._report.trials.append(key)
        for meta in suspects:
            if meta.key not in manifests:
                with self._going_on_after_failure(meta.key):
                    self._collect_payload(meta)
        collected = len(self._report.uploads)
        return replace(self._report, uploads_kept=len(uploads) - collected)

    def _uploads_under_way(self, prefix: str) -> dict[tuple[str, str], UploadMeta]:
        try:
            return {(upload.key, upload.upload_id): upload for upload in self._store.list_uploads(prefix)}
        except Unsupported:
            return {}

    def _collect_upload(self, upload: UploadMeta) -> None:
        """Abort an upload that no intent names; other uploads are removed with their intents."""
        # The intent is written right after the upload is begun, so it is read after the uploads were listed.
        try:
            intent = self._intent(upload.key)
        except _Unreadable:
            return
        if (intent is None or intent.upload_id != upload.upload_id) and self._is_old(upload.initiated):
            self._abort(upload)

    def _collect_intent(self, key: str, uploads: dict[tuple[str, str], UploadMeta]) -> None:
        try:
            intent = self._intent(key)
        except _Unreadable:
            self._report.unreadable.append(key)
            return
        now = self._clock()
        if intent is None or intent.is_alive(now) or max(0.0, now - intent.expires_at) < self._older_than_s:
            return
        upload = uploads.get((key, intent.upload_id))
        if upload is not None:
            self._abort(upload)
        # A process that resumed the upload in between has rewritten the intent.
        again = self._intent(key)
        if again is not None and again.write_id == intent.write_id:
            self._change(lambda: self._store.delete(key + INTENT_SUFFIX))
            self._report.intents.append(key)
            _log.info("gc.intent_removed key=%s upload_id=%s owner=%s", key, intent.upload_id, intent.owner)

    def _collect_payload(self, meta: ObjectMeta) -> None:
        """Record, and if requested remove, a payload or layer of ours without a manifest and an intent."""
        key = meta.key
        is_layer = _LAYER.fullmatch(key) is not None
        if not is_layer and not self._is_payload(meta):
            return
        sibling = meta_key(key) if is_layer else key + MANIFEST_SUFFIX
        # In the reverse order of an upload: something published meanwhile is seen in one of the three.
        if key not in self._report.intents and self._store.exists(key + INTENT_SUFFIX):
            return
        if self._store.exists(sibling) or self._store.head(key).e_tag != meta.e_tag:
            return
        if self._payloads:
            self._change(lambda: self._store.delete(key))
            _log.info("gc.payload_removed key=%s size=%d", key, meta.size)
        self._report.payloads.append(key)

    def _is_payload(self, meta: ObjectMeta) -> bool:
        """Whether the object begins with a manifest that describes an object of this size."""
        try:
            block = self._store.get_range(meta.key, 0, _BLOCK, e_tag=meta.e_tag)
            name, size = block[:100].rstrip(b"\0"), int(block[124:135], 8)
            if name != MANIFEST_NAME.encode() or not size <= min(meta.size - _BLOCK, MAX_MANIFEST_BYTES):
                return False
            manifest_bytes = self._store.get_range(meta.key, _BLOCK, size, e_tag=meta.e_tag)
            begins = block + manifest_bytes == manifest_entry(manifest_bytes)[: _BLOCK + size]
            return begins and ManifestFile.parse(manifest_bytes).payload_size == meta.size
        except (ValueError, ArtifactInvalid, ObjectNotFound, ObjectChanged):
            return False

    def _intent(self, key: str) -> Intent | None:
        """The intent of a key; None if there is none.

        Raises:
            _Unreadable: the intent is damaged, or of a later version.
        """
        keeper = IntentKeeper(self._store, key, clock=self._clock)
        try:
            intent = keeper.load()
            if intent is None and self._store.exists(key + INTENT_SUFFIX):
                raise _Unreadable
        except InvalidKey:
            return None  # another tool's upload: its key leaves no room for the suffix
        except ObjectTooLarge:
            raise _Unreadable from None
        return intent

    def _abort(self, upload: UploadMeta) -> None:
        self._change(lambda: self._store.abort_multipart(upload.key, upload.upload_id))
        self._report.uploads.append(upload)
        _log.info("gc.upload_aborted key=%s upload_id=%s", upload.key, upload.upload_id)

    def _change(self, call: Callable[[], None]) -> None:
        if not self._report.dry_run:
            call()

    def _is_old(self, moment: datetime | None) -> bool:
        believed = moment is not None and moment >= _FIRST_BLOBFLOW
        age_s = max(0.0, self._clock() - moment.timestamp()) if moment is not None and believed else 0.0
        return age_s >= self._older_than_s

    @contextmanager
    def _going_on_after_failure(self, key: str) -> Generator[None]:
        """Continue after a key that cannot be collected now, so that it does not block the others."""
        try:
            yield
        except TemporaryError as error:
            _log.warning("gc.failed key=%s error=%s", key, error)
            self._report.failed.append(key)


class _Unreadable(Exception):
    """An intent that must stay."""


def collect_stages(
    directory: str | os.PathLike[str],
    *,
    older_than_s: float = DEFAULT_AGE_S,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
) -> list[Path]:
    """Remove stages of downloads into `directory` that no process holds, if idle for `older_than_s` seconds.

    Returns:
        The stages that were removed, or would be in a dry run. Those of other users stay.

    Raises:
        UsageError: the age is below 0.
    """
    check_age(older_than_s)
    return remove_stages(Path(directory), idle_since=clock() - older_than_s, dry_run=dry_run)
