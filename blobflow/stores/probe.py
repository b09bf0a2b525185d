"""The probe: finds out which capabilities a server really has, and keeps the result outside of the store.

S3 servers differ in ways that matter. Some replace an object that a conditional put should have kept; some repeat a
checksum that the client sent and never compute it. They do not report this. So the first plan for a server is made
after a probe of about seventy small requests, and only capabilities that it has shown are relied upon. The result is
kept in a directory of this user (`blobflow.stores.probe_memory`). A report in the store shows it to other users, who do
not trust it but probe themselves. The reasons are in docs/design/005-probe.md.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, Final, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Unpack, override

from blobflow.backoff import DEFAULT_PATIENCE_S
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
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TemporaryError,
    TimedOut,
    Unsupported,
)
from blobflow.stores.base import Body, Capabilities, ObjectMeta, PartMeta, PutMode, PutOptions, Store
from blobflow.stores.optional import server_of
from blobflow.stores.probe_memory import ProbeMemory
from blobflow.stores.retry import RetryingStore
from blobflow.stores.wrapping import WrappingStore

_log = logging.getLogger(__name__)

REPORT_KEY: Final = "blobflow-probe.json"
TRIAL_PREFIX: Final = "blobflow-probe/"
"""Prefix of the keys of probes. Each probe uses unique keys and removes them; `gc` removes those of killed probes."""
MAX_AGE_S: Final = 30 * 24 * 3600.0
"""Seconds for which a report is valid. Servers are updated, and their behavior changes."""
MAX_STUBBORN_AGE_S: Final = 600.0
"""Seconds for which a report is valid if the server failed now and then; the next one may find more."""
PATIENCE_S: Final = 20.0
"""Seconds for the retries of all trials of a probe together. An attempt without a response ends at its idle timeout."""

_MAX_REPORTS_BYTES: Final = 256 * 1024
_MAX_REPORTS: Final = 16
"""Most reports in a store. A server may have several names (internal, external), each with a report."""
_ONE_PAGE: Final = 1000
"""Parts that a listing without a second page reports."""

_T = TypeVar("_T")


_ABOUT: Final = frozenset({"store", "endpoint", "software", "probed_at", "stubborn"})
"""The fields of a report that are not findings."""


class Finding(BaseModel):
    """One ability, and what was seen of it."""

    model_config = ConfigDict(frozen=True)

    holds: bool
    evidence: str


class ProbeReport(BaseModel):
    """The findings of a probe; a capability whose finding does not hold is not relied upon."""

    model_config = ConfigDict(frozen=True)

    store: str = Field(description="URL that was probed.")
    endpoint: str = Field(description="Scheme and host of the server; empty where there is none.")
    software: str = Field(description="What the server calls itself; empty if it does not say.")
    probed_at: AwareDatetime
    create_only: Finding = Field(description="A create-only put spares an object that is there.")
    compare_and_swap: Finding = Field(description="A put replaces the object with the given e_tag, and no other.")
    multipart: Finding = Field(description="Parts become an object when, and only when, they are completed.")
    lists_parts: Finding = Field(description="The parts of an upload under way are listed.")
    pages_parts: Finding = Field(description="A listing of parts in pages reports each part once, and ends.")
    aborts_uploads: Finding = Field(description="An aborted upload is gone, and its parts with it.")
    reads_ranges: Finding = Field(description="A range of an object is given, and not the whole object.")
    pins_ranges: Finding = Field(description="A range of an object that was replaced is refused.")
    refuses_wrong_crc32c: Finding = Field(description="Bytes that do not have the declared CRC32C are refused.")
    attests_crc32c: Finding = Field(description="The CRC32C that HEAD reports was computed by the server itself.")
    refuses_wrong_md5: Finding | None = Field(
        default=None,
        description="Bytes that do not have the declared MD5 are refused; tried only if refuses_wrong_crc32c does not"
        " hold.",
    )

    stubborn: bool = Field(
        default=False, description="A trial failed temporarily, so the report is valid for only ten minutes."
    )

    @classmethod
    def guarantees(cls) -> dict[str, str]:
        """The names of all findings, with the meaning of each."""
        return {name: field.description or "" for name, field in cls.model_fields.items() if name not in _ABOUT}

    @property
    def findings(self) -> dict[str, Finding]:
        """All findings that were tried, by name."""
        found = ((name, getattr(self, name)) for name in self.guarantees())
        return {name: finding for name, finding in found if finding is not None}

    def has(self, name: str) -> bool:
        """Whether the finding of that name was tried, and holds."""
        finding = self.findings.get(name)
        return finding is not None and finding.holds

    def apply(self, declared: Capabilities) -> Capabilities:
        """The capabilities that plans may rely on: the declared ones that hold, and further ones that were found."""
        return replace(
            declared,
            # Without a list of parts, an upload can be neither verified nor continued.
            multipart=declared.multipart and self.multipart.holds and self.lists_parts.holds,
            conditional=declared.conditional and self.create_only.holds and self.compare_and_swap.holds,
            max_parts=declared.max_parts if self.pages_parts.holds else min(declared.max_parts, _ONE_PAGE),
            ranges=declared.ranges and self.reads_ranges.holds,
            attests_crc32c=self.attests_crc32c.holds,
        )

    def is_good(self, now_s: float) -> bool:
        """Whether the report is neither too old nor from the future."""
        age_s = now_s - self.probed_at.timestamp()
        return abs(age_s) <= (MAX_STUBBORN_AGE_S if self.stubborn else MAX_AGE_S)


class _Reports(BaseModel):
    """The object in the store that holds the reports."""

    format: Literal["blobflow.probe/2"] = "blobflow.probe/2"
    reports: tuple[ProbeReport, ...]


def probe(store: Store, *, now: Callable[[], float] = time.time, **retrying: Any) -> ProbeReport:
    """Try out what `store` can do. Everything that is written for it has unique names and is removed at the end.

    A trial that fails temporarily is repeated, for at most 20 s in all trials together. If the server still
    answers other requests then, it costs that ability only.

    Args:
        now: Seconds since the epoch.
        retrying: See `RetryingStore`.

    Raises:
        StoreConfigurationError: the credentials do not allow the trials, or the store's settings are wrong. There is
            no report then.
        TemporaryError: the store failed temporarily. There is no report then.
    """
    trial = _Trial(store.store if isinstance(store, RetryingStore) else store, retrying)
    try:
        findings = trial.run()
    finally:
        trial.clean_up()
    server = server_of(store)
    return ProbeReport(
        store=store.url,
        endpoint=server.endpoint,
        software=server.software,
        probed_at=datetime.fromtimestamp(now(), tz=timezone.utc),
        stubborn=trial.stubborn,
        **findings,
    )


class ProbedStore(RetryingStore):
    """A retrying store whose capabilities a probe finds out when they are first asked for.

    An earlier report of this user is used for 30 days, after a check of the report in the store, which costs one GET
    per process. A process that only reads, or finds its uploads already stored, does not ask for capabilities at all.
    Credentials that do not allow a probe get only the capabilities that need none. Two threads or processes may probe
    at the same time: they find the same.

    A report in the store can have been put there by anybody who may write to it. It is never believed; but a newer one
    that misses an ability makes this process probe again.

    Args:
        store: The store that makes the attempts.
        memory: Earlier reports of this user; by default in the user's cache directory.
        now: Seconds since the epoch.
        retrying: See `RetryingStore`.
    """

    def __init__(
        self,
        store: Store,
        *,
        memory: ProbeMemory | None = None,
        now: Callable[[], float] = time.time,
        **retrying: Any,
    ) -> None:
        super().__init__(store, **retrying)
        # For the requests about the report, because `put` of this store asks for the capabilities.
        self._plain = RetryingStore(store, **retrying)
        self._retrying = retrying
        self._memory = memory or ProbeMemory()
        self._now = now
        self._found: Capabilities | None = None

    @override
    def capabilities(self) -> Capabilities:
        if self._found is None:
            self._found = self._find_out()
        return self._found

    def _find_out(self) -> Capabilities:
        try:
            return self.report().apply(self.store.capabilities())
        except StoreConfigurationError as error:
            if not _is_forbidden(error):
                raise
            _log.warning(
                "probe.forbidden store=%s operation=%r hint=%r",
                self.url,
                error.operation,
                "nothing that was not found out is relied upon; the probe needs the rights of an upload",
            )
            return replace(self.store.capabilities(), conditional=False, attests_crc32c=False)

    def report(self, *, fresh: bool = False) -> ProbeReport:
        """What the server can do: what this user found in the last 30 days, else what a probe finds now.

        Args:
            fresh: Probe in any case.

        Raises:
            StoreConfigurationError, TemporaryError: see `probe`.
        """
        mine = None if fresh else self._remembered()
        told = self._told()
        if mine is not None and not self._is_outdated(mine, told):
            return mine
        report = probe(self.store, now=self._now, **self._retrying)
        self._found = report.apply(self.store.capabilities())
        self._memory.keep(self._place, report.model_dump_json().encode())
        self._tell([report, *(r for r in told if r.endpoint != report.endpoint)])
        return report

    @property
    def _place(self) -> str:
        return f"{self.server.endpoint} {self.url}"

    def _remembered(self) -> ProbeReport | None:
        """This user's valid report about this server and bucket; None if there is none."""
        data = self._memory.recall(self._place)
        if data is None:
            return None
        try:
            report = ProbeReport.model_validate_json(data)
        except ValidationError:
            return None
        is_mine = (report.endpoint, report.store) == (self.server.endpoint, self.url)
        return report if is_mine and report.is_good(self._now()) else None

    def _is_outdated(self, mine: ProbeReport, told: Sequence[ProbeReport]) -> bool:
        """Whether to look again: the server calls itself something else, or somebody says that it lost an ability."""
        if self.server.software != mine.software:
            return True
        return any(
            report.endpoint == mine.endpoint
            and mine.probed_at < report.probed_at
            and report.probed_at.timestamp() <= self._now()
            and any(mine.has(name) for name, finding in report.findings.items() if not finding.holds)
            for report in told
        )

    def _told(self) -> tuple[ProbeReport, ...]:
        """The reports in the store, written by any user."""
        try:
            data = self._plain.get(REPORT_KEY, max_bytes=_MAX_REPORTS_BYTES).data
            return _Reports.model_validate_json(data).reports
        except (ObjectNotFound, ValidationError, ObjectTooLarge):
            return ()
        except StoreConfigurationError as error:
            if not _is_forbidden(error):  # without permission to list, a missing object is reported as forbidden
                raise
            return ()

    def _tell(self, reports: list[ProbeReport]) -> None:
        document = _Reports(reports=tuple(reports[:_MAX_REPORTS])).model_dump_json(indent=1)
        try:
            self._plain.put(REPORT_KEY, document.encode(), content_type="application/json")
        except BlobflowError as error:
            _log.warning("probe.not_told store=%s error=%s", self.url, error)

    @override
    def put(self, key: str, body: Buffer | Body, **options: Unpack[PutOptions]) -> ObjectMeta:
        if options.get("mode", PutMode.OVERWRITE) is not PutMode.OVERWRITE and not self.capabilities().conditional:
            raise Unsupported(
                f"{self.url} has no conditional writes that can be relied upon",
                hint="`blobflow probe` shows why",
                store=self.url,
                capability="conditional writes",
            )
        return super().put(key, body, **options)


def _is_forbidden(error: BlobflowError) -> bool:
    """Whether the error is about the permissions of the credentials, and says nothing about the server."""
    return isinstance(error, StoreConfigurationError) and error.code == "AccessDenied"


_FIRST: Final = b"first of two contents"
_SECOND: Final = b"second of the two"


class _Once(WrappingStore):
    """Does not repeat a request that hangs for a whole idle timeout, which is long enough for a trial."""

    @override
    def _call(self, operation: str, key: str, attempt: Callable[[], _T]) -> _T:
        try:
            return attempt()
        except TimedOut as error:
            raise _Silent(error.message, operation=error.operation, key=error.key) from error


@runtime_checkable
class _ListsPartsByPage(Protocol):
    """A store that lists parts in pages of any size."""

    def list_parts_by(self, key: str, upload_id: str, page_size: int) -> list[PartMeta]:
        """`Store.list_parts` in pages of at most `page_size`."""
        ...


class _PagesOfOne(WrappingStore):
    """Lists one part per page, if the store has pages, to find out whether the pages end."""

    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        inner = self.store
        while isinstance(inner, WrappingStore):
            inner = inner.store
        if isinstance(inner, _ListsPartsByPage):
            return inner.list_parts_by(key, upload_id, 1)
        return super().list_parts(key, upload_id)


class _Silent(TemporaryError):
    """No byte arrived during a whole idle timeout."""


class _Trial:
    """The requests of one probe, and the objects and uploads that it must remove."""

    def __init__(self, store: Store, retrying: Mapping[str, Any]) -> None:
        self._plain_store = store
        self._once = _Once(store)
        self._retrying = dict(retrying)
        self._clock: Callable[[], float] = retrying.get("clock", time.monotonic)
        self._patience_s = min(PATIENCE_S, self._retrying.pop("patience_s", DEFAULT_PATIENCE_S))
        self._store = self._patient()
        self._prefix = f"{TRIAL_PREFIX}{uuid.uuid4().hex}/"
        self._keys: list[str] = []
        self._uploads: list[tuple[str, str]] = []
        self._begun_unseen = False
        """Whether an upload may have begun whose id is unknown."""
        self.stubborn = False

    def _patient(self, store: Store | None = None) -> Store:
        return RetryingStore(store or self._once, patience_s=self._patience_s, **self._retrying)

    def run(self) -> dict[str, Finding]:
        """All findings, by their names in the report."""
        # An error here (no such bucket, wrong keys) would fail everywhere, and is not a finding.
        self._plain = self._key("plain")
        self._store.put(self._plain, _FIRST)
        refuses_wrong = self._finding(self._refuses_wrong_crc32c)
        lists_parts = self._finding(self._lists_parts)
        reads_ranges = self._finding(self._reads_ranges)
        found = {
            "create_only": self._finding(self._create_only),
            "compare_and_swap": self._finding(self._compare_and_swap),
            "multipart": self._finding(self._multipart),
            "lists_parts": lists_parts,
            "pages_parts": self._finding(self._pages_parts) if lists_parts.holds else lists_parts,
            "aborts_uploads": self._finding(self._aborts_uploads),
            "reads_ranges": reads_ranges,
            "pins_ranges": self._finding(self._pins_ranges) if reads_ranges.holds else reads_ranges,
            "refuses_wrong_crc32c": refuses_wrong,
            # A server that accepts wrong checksums also reports them.
            "attests_crc32c": self._finding(self._attests_crc32c) if refuses_wrong.holds else refuses_wrong,
        }
        return found if refuses_wrong.holds else found | {"refuses_wrong_md5": self._finding(self._refuses_wrong_md5)}

    def clean_up(self) -> None:
        """Remove everything. A failure here must hide neither the report nor an error of the probe."""
        self._patience_s = 0.0
        self._store = self._patient()
        uploads = self._uploads
        if self._begun_unseen:
            with suppress(BlobflowError):
                uploads = uploads + [upload for upload in self._under_way(self._prefix) if upload not in uploads]
        for key, upload_id in uploads:
            self._try_to("abort", key, lambda key=key, upload_id=upload_id: self._store.abort_multipart(key, upload_id))
        for key in self._keys:
            self._try_to("delete", key, lambda key=key: self._store.delete(key))

    def _try_to(self, what: str, key: str, call: Callable[[], None]) -> None:
        try:
            call()
        except BlobflowError as error:
            _log.warning("probe.left_over store=%s operation=%s key=%s error=%s", self._store.url, what, key, error)

    def _finding(self, check: Callable[[], str]) -> Finding:
        """What a check found: it returns the evidence, and raises if the ability is not there."""
        began = self._clock()
        try:
            return Finding(holds=True, evidence=check())
        except _No as no:
            return Finding(holds=False, evidence=str(no))
        except SlowDown:
            raise  # says only that the server is overloaded
        except TemporaryError as error:
            # If only this request fails, the others need not wait for it again.
            self._patience_s = max(0.0, self._patience_s - (self._clock() - began))
            self._store.get(self._plain, max_bytes=len(_FIRST))
            self._store = self._patient()
            self.stubborn = True
            what = "was not answered" if isinstance(error, _Silent) else f"failed again and again with {_kind(error)}"
            return Finding(holds=False, evidence=f"{what}, while other requests succeeded")
        except BlobflowError as error:
            if _is_forbidden(error):
                raise
            return Finding(holds=False, evidence=f"refused with {_kind(error)}")

    def _key(self, name: str) -> str:
        key = self._prefix + name
        self._keys.append(key)
        return key

    def _begin(self, key: str) -> str:
        try:
            upload_id = self._store.create_multipart(key, part_size=len(_FIRST))
        except BlobflowError:
            self._begun_unseen = self._store.capabilities().multipart
            raise
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
        self._uploads.remove((key, upload_id))
        if self._content(key) != _FIRST:
            raise _No("the object has other bytes than its part")
        return "the object appeared with complete"

    def _lists_parts(self) -> str:
        key = self._key("parts")
        upload_id = self._begin(key)
        self._store.put_part(key, upload_id, 1, Body.of(_FIRST))
        listed = [(part.part_number, part.size) for part in self._store.list_parts(key, upload_id)]
        if listed != [(1, len(_FIRST))]:
            raise _No(f"one part was listed as {listed[:3]}")
        return "a part was listed with its size"

    def _pages_parts(self) -> str:
        key = self._key("pages")
        upload_id = self._begin(key)
        for number, content in enumerate((_FIRST, _SECOND), start=1):
            self._store.put_part(key, upload_id, number, Body.of(content))
        pages = self._patient(_Once(_PagesOfOne(self._plain_store)))
        listed = [(part.part_number, part.size) for part in pages.list_parts(key, upload_id)]
        if listed != [(1, len(_FIRST)), (2, len(_SECOND))]:
            raise _No(f"two parts were listed as {[number for number, _ in listed[:3]]}")
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

    def _reads_ranges(self) -> str:
        key = self._key("range")
        self._store.put(key, _FIRST)
        if self._store.get_range(key, 3, 7) != _FIRST[3:10]:
            raise _No("a range has other bytes than the object there")
        return "a range has the bytes of the object there"

    def _pins_ranges(self) -> str:
        key = self._key("pinned")
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
        # The right MD5 is sent along, so that the server must detect the error, and not the store's client.
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
        if not self._store.capabilities().multipart:
            return f"a put with a wrong {checksum} was refused"
        upload_id = self._begin(key)
        try:
            self._store.put_part(key, upload_id, 1, wrong)
        except ChecksumMismatch:
            return f"a put and a part with a wrong {checksum} were refused"
        raise _No(f"a part with a wrong {checksum} was accepted")

    def _attests_crc32c(self) -> str:
        """Complete with a wrong CRC32C of the whole; a server that computes it refuses, or reports the right one."""
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
        self._uploads.remove((key, upload_id))
        told = self._store.head(key).crc32c
        if told is None:
            raise _No("HEAD reports no CRC32C of the whole object")
        if told != right:
            raise _No("HEAD repeats a wrong CRC32C")
        return f"a wrong CRC32C of the whole was {outcome}, HEAD reports the right one"


def _kind(error: BlobflowError) -> str:
    """The error's type and status, without its message, in which a server may write anything."""
    status = error.status if isinstance(error, StoreUnavailable | StoreConfigurationError) else None
    return type(error).__name__ if status is None else f"{type(error).__name__}, status {status}"


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


class _No(Exception):
    """The ability is not there; the message is the evidence."""
