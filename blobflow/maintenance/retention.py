"""Retention: removes artifacts that have been kept long enough, but never one that a ref names.

```python
prune(store, "orders/", keep_last=7, keep_within_s=30 * 24 * 3600)
```

One process may name an artifact while another removes it, without a lock:

| | `name_artifact` | `prune` |
|---|---|---|
| 1 | moves the ref | removes the sibling manifest |
| 2 | checks the manifest; if it is gone, moves the ref back | checks the ref; if it names this one, restores the
manifest |

Whatever comes first, one of the two sees the other. So no ref remains that names a removed artifact.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from blobflow.artifact.limits import MAX_MANIFEST_BYTES
from blobflow.artifact.manifest import is_private
from blobflow.coordination.refs import read_ref
from blobflow.errors import ObjectNotFound, PreconditionFailed, TemporaryError, UsageError, setting
from blobflow.stores.base import PutMode, Store
from blobflow.transport import MANIFEST_SUFFIX, ArtifactEntry
from blobflow.transport.catalog import DAMAGED_SUFFIX, REF_SUFFIX
from blobflow.uploads.intent import SUFFIX as INTENT_SUFFIX

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneReport:
    """What was removed, or would be in a dry run."""

    dry_run: bool
    removed: list[str] = field(default_factory=list[str])
    """Keys of removed artifacts."""
    kept: int = 0
    """Artifacts that are young, or among the last ones."""
    named: list[str] = field(default_factory=list[str])
    """Keys of artifacts that stay only because a ref names them."""
    busy: list[str] = field(default_factory=list[str])
    """Keys with an upload under way, or with an old one that waits for `gc`; they stay."""
    failed: list[str] = field(default_factory=list[str])
    """Keys at which the store failed temporarily; the next run tries again."""


def prune(
    store: Store,
    prefix: str = "",
    *,
    keep_last: int | None = None,
    keep_within_s: float | None = None,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
) -> PruneReport:
    """Remove artifacts whose keys start with `prefix`, unless one of the rules keeps them.

    These are kept: the last `keep_last` of each directory (`orders/eu/` is one, `orders/us/` another), those younger
    than `keep_within_s`, and those that any ref of the store names. The age is that of the sibling manifest in the
    store; if the store does not report it, the artifact is kept. May be called again after a crash, and next to
    transfers: a reader of an artifact that is removed meanwhile gets `ArtifactNotFound`.

    Args:
        prefix: A plain string.
        keep_last: At least 1; None for no such rule.
        keep_within_s: Seconds; None for no such rule.
        dry_run: Find everything, change nothing.
        clock: Unix time in seconds.

    Raises:
        UsageError: there is no rule, or one that would keep nothing.
    """
    check_rules(keep_last, keep_within_s)
    report = PruneReport(dry_run)
    artifacts: list[ArtifactEntry] = []
    refs: list[str] = []
    intents: set[str] = set()
    damaged: set[str] = set()
    for meta in store.list():  # the whole store: a ref may name an artifact anywhere
        key = meta.key.removesuffix(MANIFEST_SUFFIX)
        if meta.key.endswith(REF_SUFFIX):
            refs.append(meta.key.removesuffix(REF_SUFFIX))
        elif meta.key.endswith(INTENT_SUFFIX):
            intents.add(meta.key.removesuffix(INTENT_SUFFIX))
        elif meta.key.endswith(DAMAGED_SUFFIX):
            damaged.add(meta.key.removesuffix(DAMAGED_SUFFIX))
        elif key != meta.key and key and not key.endswith("/") and key.startswith(prefix):
            artifacts.append(ArtifactEntry(key, meta.last_modified))
    due = _due(artifacts, keep_last, None if keep_within_s is None else clock() - keep_within_s)
    named = _named(store, refs) if due else set[str]()
    for key in due:
        if key in named:
            report.named.append(key)
        elif key in intents:
            report.busy.append(key)
        elif dry_run:
            report.removed.append(key)
        else:
            neighbours = [ref for ref in refs if _directory(ref) == _directory(key)]
            try:
                gone = _remove(store, key, neighbours)
                if gone and key in damaged:
                    store.delete(key + DAMAGED_SUFFIX)
                (report.removed if gone else report.named).append(key)
            except TemporaryError as error:
                _log.warning("prune.failed key=%s error=%s", key, error)
                report.failed.append(key)
    return replace(report, kept=len(artifacts) - len(due))


def check_rules(keep_last: int | None, keep_within_s: float | None) -> None:
    """Refuse rules that would keep nothing; see `prune`.

    Raises:
        UsageError: there is no rule, or one that would keep nothing.
    """
    if keep_last is None and keep_within_s is None:
        hint = f"give {setting('keep_last')}, {setting('keep_within_s')} or both"
        raise UsageError("no rule says what to keep", hint=hint)
    if keep_last is not None and keep_last < 1:
        raise UsageError(f"{setting('keep_last', keep_last)} keeps nothing", hint="give at least 1")
    if keep_within_s is not None and not keep_within_s > 0:
        given = setting("keep_within_s", keep_within_s)
        raise UsageError(f"{given} keeps nothing", hint="give a number of seconds above 0")


def _due(artifacts: Iterable[ArtifactEntry], keep_last: int | None, since: float | None) -> list[str]:
    """The artifacts that neither number nor age keeps, in key order."""
    directories: dict[str, list[tuple[float, str]]] = {}
    for entry in artifacts:
        modified = entry.last_modified.timestamp() if entry.last_modified else float("inf")
        directories.setdefault(_directory(entry.key), []).append((modified, entry.key))
    return sorted(
        key
        for entries in directories.values()
        for modified, key in sorted(entries, reverse=True)[keep_last or 0 :]
        if modified < (float("inf") if since is None else since)
    )


def _named(store: Store, refs: Iterable[str]) -> set[str]:
    """The keys that the refs name. An unreadable ref raises its error, because it must not cost an artifact."""
    states = [read_ref(store, name) for name in refs]
    return {state.key for state in states if state is not None}


def _remove(store: Store, key: str, neighbours: Sequence[str]) -> bool:
    """Remove an artifact. False if one of the refs beside it names it by now."""
    if key in _named(store, neighbours):
        return False
    try:
        payload = store.head(key)
        manifest = store.get(key + MANIFEST_SUFFIX, max_bytes=MAX_MANIFEST_BYTES).data
    except ObjectNotFound:
        return True  # another process has removed it
    # The manifest first: a reader that sees one can rely on the payload. A crash leaves a payload that no reader sees;
    # `gc --payloads` removes it.
    store.delete(key + MANIFEST_SUFFIX)
    is_named = True
    try:
        is_named = key in _named(store, neighbours)
    finally:
        if is_named:
            mode = PutMode.CREATE if store.capabilities().conditional else PutMode.OVERWRITE
            with suppress(PreconditionFailed):  # it was uploaded again
                store.put(
                    key + MANIFEST_SUFFIX,
                    manifest,
                    mode=mode,
                    content_type="application/json",
                    private=is_private(manifest),
                )
    if is_named:
        return False
    _log.info("prune.removed key=%s", key)
    with suppress(ObjectNotFound):
        # In the reverse order of an upload: a process that uploads it again now is seen in one of the three.
        uploaded = store.exists(key + INTENT_SUFFIX) or store.exists(key + MANIFEST_SUFFIX)
        if not uploaded and store.head(key).e_tag == payload.e_tag:
            store.delete(key)
    return True


def _directory(key: str) -> str:
    return key.rpartition("/")[0]
