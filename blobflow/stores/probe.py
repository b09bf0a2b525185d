"""The probe: what a server can really do, tried out and written down.

Servers that speak S3 differ where it hurts: some replace an object that a conditional put should have spared, some
repeat a checksum that they were told and never computed. None of them says so. So the first plan for a server is made
after a probe of some forty small requests, whose report lies in the store for all processes. What did not show is not
relied upon. Why it is done this way: docs/design/005-probe.md.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import override

from blobflow.checksum import Buffer, crc32c
from blobflow.errors import (
    BlobflowError,
    ChecksumMismatch,
    IntegrityError,
    NoSuchUpload,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StoreConfigurationError,
    StoreUnavailable,
    TemporaryError,
    Unsupported,
)
from blobflow.stores.base import Abilities, Body, ObjectMeta, PutMode, Store
from blobflow.stores.retry import RetryingStore

_log = logging.getLogger(__name__)

REPORT_KEY: Final = "blobflow-probe.json"
TRIAL_PREFIX: Final = "blobflow-probe/"
"""Below it every probe uses names of its own, and removes them; what a killed one left is `gc`'s."""
MAX_AGE_S: Final = 30 * 24 * 3600.0
"""Servers are updated, and change their minds."""

_MAX_REPORTS_BYTES: Final = 256 * 1024
_MAX_REPORTS: Final = 16
"""One server may have several names (from inside, from outside), and each has its report."""
_ONE_PAGE: Final = 1000
"""Parts that a listing without a second page tells."""


class Finding(BaseModel):
    """One ability, and what was seen of it."""

    model_config = ConfigDict(frozen=True)

    holds: bool
    evidence: str


class ProbeReport(BaseModel):
    """What a server can do; a finding that does not hold is not relied upon."""

    model_config = ConfigDict(frozen=True)

    store: str = Field(description="URL that was probed.")
    endpoint: str = Field(description="Scheme and host of the server; empty where there is none.")
    software: str = Field(description="What the server calls itself; empty if it does not say.")
    probed_at: AwareDatetime
    create_only: Finding = Field(description="A create-only put spares an object that is there.")
    compare_and_swap: Finding = Field(description="A put replaces the object with the given e_tag, and no other.")
    multipart: Finding = Field(description="Parts become an object when, and only when, they are completed.")
    pages_parts: Finding = Field(description="A listing of parts in pages tells each part once, and ends.")
    aborts_uploads: Finding = Field(description="An aborted upload is gone, and its parts with it.")
    pins_ranges: Finding = Field(description="A range of an object that was replaced is refused.")
    refuses_wrong_crc32c: Finding = Field(description="Bytes that do not have the declared CRC32C are refused.")
    attests_crc32c: Finding = Field(description="The CRC32C that HEAD tells was computed by the server itself.")
    refuses_wrong_md5: Finding | None = Field(
        default=None,
        description="Bytes that do not have the declared MD5 are refused; tried only where CRC32C is no help.",
    )

    @property
    def findings(self) -> dict[str, Finding]:
        """All that were tried, by name."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Finding)}

    def apply(self, declared: Abilities) -> Abilities:
        """What plans may rely upon: of the declared abilities those that hold, and what was proven beyond them."""
        return replace(
            declared,
            multipart=declared.multipart and self.multipart.holds,
            conditional=declared.conditional and self.create_only.holds and self.compare_and_swap.holds,
            max_parts=declared.max_parts if self.pages_parts.holds else min(declared.max_parts, _ONE_PAGE),
            attests_crc32c=self.attests_crc32c.holds,
        )


class _Reports(BaseModel):
    """The object in the store."""

    format: Literal["blobflow.probe/1"] = "blobflow.probe/1"
    reports: tuple[ProbeReport, ...]


def probe(store: Store, *, now: Callable[[], float] = time.time) -> ProbeReport:
    """Try out what `store` can do. Everything that is written for it has unique names and is removed at the end.

    Raises:
        StoreConfigurationError: these credentials may not do what has to be tried; nothing is known then.
        TemporaryError: the store failed for a passing reason; nothing is known then.
    """
    trial = _Trial(store)
    try:
        findings = trial.run()
    finally:
        trial.clean_up()
    server = store.server
    return ProbeReport(
        store=store.url,
        endpoint=server.endpoint,
        software=server.software,
        probed_at=datetime.fromtimestamp(now(), tz=timezone.utc),
        **findings,
    )


class ProbedStore(RetryingStore):
    """A retrying store whose `abilities` are found out when they are first asked for, and remembered in the store.

    Where a report is there already that costs one GET per process; whoever only reads, or uploads what is there
    already, does not ask at all. Credentials that may not try things out get the abilities without those that have to
    be proven. Two threads or processes may probe at the same time: they find the same.

    Args:
        store: The store that makes the attempts.
        now: Seconds since the epoch.
        retrying: See `RetryingStore`.
    """

    def __init__(self, store: Store, *, now: Callable[[], float] = time.time, **retrying: Any) -> None:
        super().__init__(store, **retrying)
        # For the probe's own requests, because `put` of this store asks for the abilities.
        self._trying = RetryingStore(store, **retrying)
        self._now = now
        self._abilities: Abilities | None = None

    @property
    @override
    def abilities(self) -> Abilities:
        if self._abilities is None:
            self._abilities = self._find_out()
        return self._abilities

    def _find_out(self) -> Abilities:
        try:
            return self.report().apply(self.store.abilities)
        except StoreConfigurationError as error:
            if not _is_forbidden(error):
                raise
            _log.warning(
                "probe.forbidden store=%s operation=%r hint=%r",
                self.url,
                error.fields.get("operation"),
                "nothing unproven is relied upon; run `blobflow probe` once with credentials that may write",
            )
            return replace(self.store.abilities, conditional=False, attests_crc32c=False)

    def report(self, *, fresh: bool = False) -> ProbeReport:
        """What the server can do: a report in the store that is not older than 30 days, else that of a probe.

        Args:
            fresh: Probe in any case, and replace the report in the store.

        Raises:
            StoreConfigurationError, TemporaryError: see `probe`.
        """
        endpoint = self.server.endpoint
        now = self._now()
        remembered = [r for r in self._remembered() if abs(now - r.probed_at.timestamp()) <= MAX_AGE_S]
        # A report belongs to the server that it was made of: buckets are copied, with all that is in them.
        mine = [report for report in remembered if report.endpoint == endpoint]
        if mine and not fresh:
            return mine[0]
        report = probe(self._trying, now=self._now)
        self._abilities = report.apply(self.store.abilities)
        self._remember([report, *(r for r in remembered if r.endpoint != endpoint)])
        return report

    def _remembered(self) -> tuple[ProbeReport, ...]:
        try:
            data = self._trying.get(REPORT_KEY, max_bytes=_MAX_REPORTS_BYTES).data
            return _Reports.model_validate_json(data).reports
        except ObjectNotFound:
            pass
        except (ValidationError, ObjectTooLarge):
            _log.warning("probe.report_damaged store=%s key=%s", self.url, REPORT_KEY)
        except StoreConfigurationError as error:
            if not _is_forbidden(error):  # without the right to list, what is absent looks forbidden
                raise
        return ()

    def _remember(self, reports: list[ProbeReport]) -> None:
        document = _Reports(reports=tuple(reports[:_MAX_REPORTS])).model_dump_json(indent=1)
        try:
            self._trying.put(REPORT_KEY, document.encode(), content_type="application/json")
        except BlobflowError as error:
            _log.warning("probe.not_remembered store=%s error=%s", self.url, error)

    @override
    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        content_type: str = "application/octet-stream",
    ) -> ObjectMeta:
        if mode is not PutMode.OVERWRITE and not self.abilities.conditional:
            raise Unsupported(
                f"{self.url} has no conditional writes that can be relied upon",
                hint="`blobflow probe` shows why",
                store=self.url,
                ability="conditional writes",
            )
        return super().put(key, body, mode=mode, e_tag=e_tag, content_type=content_type)


def _is_forbidden(error: BlobflowError) -> bool:
    """Whether it is about what these credentials may do, and says nothing of the server."""
    return error.fields.get("code") == "AccessDenied"


_FIRST: Final = b"first of two contents"
_SECOND: Final = b"second of the two"


class _Trial:
    """The requests of one probe, and what they left."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._prefix = f"{TRIAL_PREFIX}{uuid.uuid4().hex}/"
        self._keys: list[str] = []
        self._uploads: list[tuple[str, str]] = []

    def run(self) -> dict[str, Finding]:
        """All findings, by the names they have in the report."""
        # What fails here (no such bucket, wrong keys) fails everywhere, and is no finding.
        self._store.put(self._key("plain"), _FIRST)
        refuses_wrong = self._finding(self._refuses_wrong_crc32c)
        found = {
            "create_only": self._finding(self._create_only),
            "compare_and_swap": self._finding(self._compare_and_swap),
            "multipart": self._finding(self._multipart),
            "pages_parts": self._finding(self._pages_parts),
            "aborts_uploads": self._finding(self._aborts_uploads),
            "pins_ranges": self._finding(self._pins_ranges),
            "refuses_wrong_crc32c": refuses_wrong,
            # A server that lets wrong checksums in has them in its answers.
            "attests_crc32c": self._finding(self._attests_crc32c) if refuses_wrong.holds else refuses_wrong,
        }
        return found if refuses_wrong.holds else found | {"refuses_wrong_md5": self._finding(self._refuses_wrong_md5)}

    def clean_up(self) -> None:
        """Remove everything; failing at that must hide neither the report nor the error that is on its way."""
        for key, upload_id in self._uploads:
            self._try_to("abort", key, lambda key=key, upload_id=upload_id: self._store.abort_multipart(key, upload_id))
        for key in self._keys:
            self._try_to("delete", key, lambda key=key: self._store.delete(key))

    def _try_to(self, what: str, key: str, call: Callable[[], None]) -> None:
        try:
            call()
        except BlobflowError as error:
            _log.warning("probe.left_over store=%s operation=%s key=%s error=%s", self._store.url, what, key, error)

    @staticmethod
    def _finding(check: Callable[[], str]) -> Finding:
        """What a check found: it returns the evidence, and raises if the ability is not there."""
        try:
            return Finding(holds=True, evidence=check())
        except _No as no:
            return Finding(holds=False, evidence=str(no))
        except TemporaryError:
            raise
        except BlobflowError as error:
            if _is_forbidden(error):
                raise
            # Not the message: nobody knows what a server writes there.
            status = f", status {error.fields['status']}" if "status" in error.fields else ""
            return Finding(holds=False, evidence=f"refused with {type(error).__name__}{status}")

    def _key(self, name: str) -> str:
        key = self._prefix + name
        self._keys.append(key)
        return key

    def _begin(self, key: str) -> str:
        upload_id = self._store.create_multipart(key, part_size=len(_FIRST))
        self._uploads.append((key, upload_id))
        return upload_id

    def _content(self, key: str) -> bytes:
        return self._store.get(key, max_bytes=1024).data

    # The checks

    def _create_only(self) -> str:
        key = self._key("create-only")
        self._store.put(key, _FIRST, mode=PutMode.CREATE)
        try:
            self._store.put(key, _SECOND, mode=PutMode.CREATE)
        except PreconditionFailed:
            if self._content(key) == _FIRST:
                return "the second of two was refused"
        raise _No("the second of two replaced the first")

    def _compare_and_swap(self) -> str:
        key = self._key("compare-and-swap")
        old = self._store.put(key, _FIRST).e_tag
        new = self._store.put(key, _SECOND, mode=PutMode.UPDATE, e_tag=old).e_tag
        for name, e_tag, what in ((key, old, "an object with another e_tag"), (self._key("absent"), new, "no object")):
            try:
                self._store.put(name, _FIRST, mode=PutMode.UPDATE, e_tag=e_tag)
            except PreconditionFailed:
                continue
            raise _No(f"{what} was replaced")
        if self._content(key) != _SECOND:
            raise _No("a put that was refused took effect")
        return "the right e_tag was accepted; an outdated one, and one of an absent object, were refused"

    def _multipart(self) -> str:
        key = self._key("multipart")
        upload_id = self._begin(key)
        part = self._store.put_part(key, upload_id, 1, Body.of(_FIRST))
        if self._store.exists(key):
            raise _No("the object was there before the upload was completed")
        self._store.complete_multipart(key, upload_id, [part])
        if self._content(key) != _FIRST:
            raise _No("the object has other bytes than its part")
        return "the object appeared with complete"

    def _pages_parts(self) -> str:
        key = self._key("pages")
        upload_id = self._begin(key)
        for number, content in enumerate((_FIRST, _SECOND), start=1):
            self._store.put_part(key, upload_id, number, Body.of(content))
        try:
            listed = [(part.part_number, part.size) for part in self._store.list_parts_by(key, upload_id, 1)]
        except StoreUnavailable as error:
            raise _No("the second page did not come") from error
        if listed != [(1, len(_FIRST)), (2, len(_SECOND))]:
            raise _No(f"two parts were listed as {[number for number, _ in listed]}")
        return "two parts came in pages of one"

    def _aborts_uploads(self) -> str:
        key = self._key("abort")
        upload_id = self._begin(key)
        self._store.put_part(key, upload_id, 1, Body.of(_FIRST))
        if (key, upload_id) not in self._under_way(key):
            raise _No("an upload under way is not listed")
        self._store.abort_multipart(key, upload_id)
        with suppress(NoSuchUpload):
            if self._store.list_parts(key, upload_id):
                raise _No("its parts are still there")
        if (key, upload_id) in self._under_way(key):
            raise _No("it is still listed")
        return "upload and part were gone after abort"

    def _under_way(self, key: str) -> list[tuple[str, str]]:
        return [(upload.key, upload.upload_id) for upload in self._store.list_uploads(key)]

    def _pins_ranges(self) -> str:
        key = self._key("ranges")
        old = self._store.put(key, _FIRST).e_tag
        new = self._store.put(key, _SECOND).e_tag
        if self._store.get_range(key, 3, 7, e_tag=new) != _SECOND[3:10]:
            raise _No("a range has other bytes than the object there")
        try:
            self._store.get_range(key, 3, 7, e_tag=old)
        except ObjectChanged:
            return "the range of a replaced object was refused"
        raise _No("the range of another object was given")

    def _refuses_wrong_crc32c(self) -> str:
        # The right MD5 goes along, so that it is the server who finds out, whatever the store does by itself.
        wrong = Body(len(_FIRST), lambda: (_FIRST,), crc32c(_FIRST) ^ 1, md5=_md5(_FIRST))
        return self._refuses("CRC32C", wrong)

    def _refuses_wrong_md5(self) -> str:
        evidence = self._refuses("MD5", Body(len(_FIRST), lambda: (_FIRST,), crc32c(_FIRST), md5=_md5(_SECOND)))
        return f"{evidence}: use the option content_md5"

    def _refuses(self, checksum: str, wrong: Body) -> str:
        key = self._key(f"wrong-{checksum.lower()}")
        try:
            self._store.put(key, wrong)
        except ChecksumMismatch:
            pass
        else:
            raise _No(f"a put with a wrong {checksum} was accepted")
        if not self._store.abilities.multipart:
            return f"a put with a wrong {checksum} was refused"
        upload_id = self._begin(key)
        try:
            self._store.put_part(key, upload_id, 1, wrong)
        except ChecksumMismatch:
            return f"a put and a part with a wrong {checksum} were refused"
        raise _No(f"a part with a wrong {checksum} was accepted")

    def _attests_crc32c(self) -> str:
        """Complete says a wrong CRC32C of the whole; a server that computes it refuses, or tells the right one."""
        key = self._key("attest")
        right = crc32c(_FIRST)
        upload_id = self._begin(key)
        part = self._store.put_part(key, upload_id, 1, Body.of(_FIRST))
        try:
            self._store.complete_multipart(key, upload_id, [part._replace(crc32c=right ^ 1)])
            outcome = "corrected"
        except IntegrityError:
            outcome = "refused"
            self._store.complete_multipart(key, upload_id, [part._replace(crc32c=right)])
        told = self._store.head(key).crc32c
        if told is None:
            raise _No("HEAD tells no CRC32C of the whole object")
        if told != right:
            raise _No("HEAD repeats a wrong CRC32C")
        return f"a wrong CRC32C of the whole was {outcome}, HEAD tells the right one"


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


class _No(Exception):
    """The ability is not there; the message is the evidence."""
