"""The probe: what servers really do, honest ones and liars, and what is made of it."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from blobflow import Lease, move_ref, open_store, read_ref, upload, verify
from blobflow.checksum import Buffer, combine_all, crc32c
from blobflow.cli import run
from blobflow.errors import (
    BlobflowError,
    IntegrityError,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
)
from blobflow.stores.base import Body, Capabilities, ObjectMeta, PartMeta, PutMode, Store
from blobflow.stores.local.store import LocalStore
from blobflow.stores.optional import HasServer, ObjectAddress, Server
from blobflow.stores.probe import (
    MAX_AGE_S,
    MAX_STUBBORN_AGE_S,
    PATIENCE_S,
    REPORT_KEY,
    ProbedStore,
    ProbeReport,
    probe,
)
from blobflow.stores.probe_memory import ProbeMemory
from blobflow.stores.retry import RetryingStore
from blobflow.testing import FailBefore, FaultyStore, Request, scripted_faults
from tests.clock import Clock
from tests.kit import SERIAL, SMALL, artifact_of, keys
from tests.servers import S3Endpoint
from tests.strict_s3 import StrictS3

NAMES = set(ProbeReport.guarantees())


def lacking(report: ProbeReport) -> set[str]:
    """The abilities that do not hold."""
    return {name for name, finding in report.findings.items() if not finding.holds}


def s3_options(endpoint: S3Endpoint) -> dict[str, Any]:
    return {
        "endpoint_url": endpoint.endpoint_url,
        "region": endpoint.region,
        "access_key_id": endpoint.access_key_id,
        "secret_access_key": endpoint.secret_access_key,
    }


@pytest.fixture
def strict() -> Iterator[StrictS3]:
    with StrictS3() as server:
        yield server
        server.endpoint.client.close()


# ------------------------------------------------------------------------------------------- what is known of real ones


def probed_s3(endpoint: S3Endpoint) -> tuple[ProbeReport, Capabilities]:
    """The report on a fresh bucket, which is as empty afterwards as before."""
    with closing(open_store(f"s3://{endpoint.new_bucket()}/team/blobs", **s3_options(endpoint))) as store:
        assert isinstance(store, ProbedStore)
        report = store.report()
        assert keys(store) == [REPORT_KEY]
        assert store.list_uploads() == []
        return report, store.capabilities()


def test_a_strict_s3_has_every_ability(strict: StrictS3) -> None:
    """Where AWS's rules hold, all of them are found, and the server's checksums are believed."""
    report, capabilities = probed_s3(strict.endpoint)
    assert lacking(report) == set()
    assert set(report.findings) == NAMES - {"refuses_wrong_md5"}
    assert (capabilities.conditional, capabilities.attests_crc32c, capabilities.max_parts) == (True, True, 10_000)


def test_moto_swallows_wrong_checksums(moto_s3: S3Endpoint) -> None:
    """Moto keeps conditions, and any checksum that it is told: its checksums are not believed."""
    report, capabilities = probed_s3(moto_s3)
    assert lacking(report) == {"refuses_wrong_crc32c", "attests_crc32c", "refuses_wrong_md5"}
    assert report.attests_crc32c.evidence == "a put with a wrong CRC32C was accepted"
    assert (capabilities.conditional, capabilities.attests_crc32c) == (True, False)


@pytest.mark.rgw
def test_ceph_swallows_wrong_checksums_and_compares_e_tags_in_its_own_spelling(rgw_s3: S3Endpoint) -> None:
    """Ceph 16 compares and swaps, if it is asked without quotes; its CRC32C is not believed, but it checks MD5."""
    report, capabilities = probed_s3(rgw_s3)
    assert lacking(report) == {"refuses_wrong_crc32c", "attests_crc32c"}
    assert report.refuses_wrong_md5 is not None
    assert report.refuses_wrong_md5.evidence.endswith("were refused: use the option content_md5")
    assert (capabilities.conditional, capabilities.attests_crc32c) == (True, False)


def test_a_local_store_keeps_its_promises(tmp_path: Path) -> None:
    """The local store holds everything that it declares, and attests nothing: files can be edited by anybody."""
    store = LocalStore(tmp_path)
    report = probe(store)
    assert lacking(report) == {"attests_crc32c"}
    assert report.apply(store.capabilities()) == store.capabilities()
    assert keys(store) == store.list_uploads() == []


def test_a_file_system_without_uploads_is_found_to_have_none() -> None:
    """What a store declares not to have is not found either."""
    store = open_store("memory://probed")
    report = probe(store)
    assert lacking(report) == {"multipart", "lists_parts", "pages_parts", "aborts_uploads", "attests_crc32c"}
    applied = report.apply(store.capabilities())
    assert (applied.multipart, applied.conditional, applied.attests_crc32c) == (False, True, False)
    assert keys(store) == []


# ---------------------------------------------------------------------------------------------------------------- liars


class Honest(LocalStore):
    """Tells the CRC32C of the bytes that it has."""

    @override
    def head(self, key: str) -> ObjectMeta:
        meta = super().head(key)
        return meta._replace(crc32c=crc32c(self.get(key, max_bytes=meta.size).data))


class IgnoresIfNoneMatch(LocalStore):
    @override
    def put(self, key: str, body: Buffer | Body, *, mode: PutMode = PutMode.OVERWRITE, **more: Any) -> ObjectMeta:
        return super().put(key, body, mode=PutMode.OVERWRITE if mode is PutMode.CREATE else mode, **more)


class IgnoresIfMatch(LocalStore):
    @override
    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        **more: Any,
    ) -> ObjectMeta:
        if mode is PutMode.UPDATE:
            mode, e_tag = PutMode.OVERWRITE, None
        return super().put(key, body, mode=mode, e_tag=e_tag, **more)


class BringsBackTheDead(LocalStore):
    """Compares e_tags, but of objects that are there only."""

    @override
    def put(
        self,
        key: str,
        body: Buffer | Body,
        *,
        mode: PutMode = PutMode.OVERWRITE,
        e_tag: str | None = None,
        **more: Any,
    ) -> ObjectMeta:
        if mode is PutMode.UPDATE and not self.exists(key):
            mode, e_tag = PutMode.OVERWRITE, None
        return super().put(key, body, mode=mode, e_tag=e_tag, **more)


def unchecked(body: Body) -> Body:
    return Body(body.size, lambda: body)


class SwallowsWrongParts(Honest):
    """Checks what is put, but not parts."""

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        return super().put_part(key, upload_id, part_number, unchecked(body))


class Parrot(LocalStore):
    """HEAD repeats what complete was told."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.told: dict[str, int | None] = {}

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        self.told[key] = combine_all((part.crc32c or 0, part.size) for part in parts)
        return super().complete_multipart(key, upload_id, parts)

    @override
    def head(self, key: str) -> ObjectMeta:
        return super().head(key)._replace(crc32c=self.told.get(key))


class StrictParrot(Parrot):
    """Repeats what it was told, and at the first word refuses what is wrong in the whole."""

    @override
    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[PartMeta]) -> ObjectMeta:
        if [part.crc32c for part in parts] != [part.crc32c for part in self.list_parts(key, upload_id)]:
            raise IntegrityError("BadDigest")
        return super().complete_multipart(key, upload_id, parts)


class KnowsOnePage(LocalStore):
    def list_parts_by(self, key: str, upload_id: str, page_size: int) -> list[PartMeta]:
        return self.list_parts(key, upload_id)[:page_size]


class StandsStill(LocalStore):
    def list_parts_by(self, key: str, upload_id: str, page_size: int) -> list[PartMeta]:
        raise Unsupported("the list of parts stands still", capability="conditional writes")


class ListsNoParts(LocalStore):
    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        raise Unsupported("405 MethodNotAllowed", capability="conditional writes")


class ListsEmptyParts(LocalStore):
    @override
    def list_parts(self, key: str, upload_id: str) -> list[PartMeta]:
        return []


class AbortsNothing(LocalStore):
    @override
    def abort_multipart(self, key: str, upload_id: str) -> None:
        pass


class ShowsTooEarly(LocalStore):
    """The object is there with its first part."""

    @override
    def put_part(self, key: str, upload_id: str, part_number: int, body: Body) -> PartMeta:
        self.put(key, b"".join(map(bytes, body)))
        return super().put_part(key, upload_id, part_number, body)


class PinsNothing(LocalStore):
    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        super().get_range_into(key, offset, buffer)


class IgnoresRanges(LocalStore):
    @override
    def get_range_into(self, key: str, offset: int, buffer: memoryview, *, e_tag: str | None = None) -> None:
        raise Unsupported("the server ignores ranges", capability="ranged GET")


@pytest.mark.parametrize(
    ("liar", "lacks"),
    [
        (Honest, set()),
        (StrictParrot, set()),
        (IgnoresIfNoneMatch, {"create_only", "attests_crc32c"}),
        (IgnoresIfMatch, {"compare_and_swap", "attests_crc32c"}),
        (BringsBackTheDead, {"compare_and_swap", "attests_crc32c"}),
        (SwallowsWrongParts, {"refuses_wrong_crc32c", "refuses_wrong_md5", "attests_crc32c"}),
        (Parrot, {"attests_crc32c"}),
        (KnowsOnePage, {"pages_parts", "attests_crc32c"}),
        (StandsStill, {"pages_parts", "attests_crc32c"}),
        (ListsNoParts, {"lists_parts", "pages_parts", "aborts_uploads", "attests_crc32c"}),
        (ListsEmptyParts, {"lists_parts", "pages_parts", "attests_crc32c"}),
        (AbortsNothing, {"aborts_uploads", "attests_crc32c"}),
        (ShowsTooEarly, {"multipart", "attests_crc32c"}),
        (PinsNothing, {"pins_ranges", "attests_crc32c"}),
        (IgnoresRanges, {"reads_ranges", "pins_ranges", "attests_crc32c"}),
    ],
)
def test_every_lie_is_found(tmp_path: Path, liar: Callable[[Path], Store], lacks: set[str]) -> None:
    """Each finding is false for a server without this ability, and for no other."""
    assert lacking(probe(liar(tmp_path))) == lacks


def test_what_does_not_hold_is_not_relied_upon(tmp_path: Path) -> None:
    """Capabilities are taken from a declared set; only the attested checksum is added."""
    report = probe(Honest(tmp_path))
    declared = Capabilities()
    assert report.apply(declared) == replace(declared, attests_crc32c=True)
    no = report.create_only.model_copy(update={"holds": False})
    effects = {
        "create_only": {"conditional": False},
        "compare_and_swap": {"conditional": False},
        "multipart": {"multipart": False},
        "lists_parts": {"multipart": False},
        "reads_ranges": {"ranges": False},
        "pages_parts": {"max_parts": 1000},
        "attests_crc32c": {"attests_crc32c": False},
    }
    for name, changes in effects.items():
        expected = replace(declared, **{"attests_crc32c": True, **changes})
        assert report.model_copy(update={name: no}).apply(declared) == expected
    assert not report.apply(replace(declared, conditional=False)).conditional


# --------------------------------------------------------------------------------------------------- what is made of it


def test_without_conditional_writes_leases_are_refused_and_uploads_overwrite(tmp_path: Path) -> None:
    """On a server that ignores conditions nothing is built on them, and what can do without works."""
    sent = FaultyStore(IgnoresIfMatch(tmp_path / "store"))
    store = ProbedStore(sent)
    with pytest.raises(Unsupported, match="conditional writes"):
        Lease(store, "orders/round")
    with pytest.raises(Unsupported, match="relied upon"):
        store.put("key", b"data", mode=PutMode.CREATE)
    result = upload(store, "orders/1.tar", artifact_of(tmp_path), profile=SMALL)
    move_ref(store, "orders/latest", result.key, result.artifact_digest)
    ref = read_ref(store, "orders/latest")
    assert ref is not None
    assert ref.manifest_sha256 == verify(store, "orders/1.tar").artifact_digest == result.artifact_digest


def test_one_page_of_parts_makes_larger_parts(tmp_path: Path) -> None:
    """Where a listing ends after its first page, an upload has no more parts than fit on it."""
    from blobflow.engine.plan import TransferPlan

    capabilities = ProbedStore(KnowsOnePage(tmp_path)).capabilities()
    limits = {name: getattr(capabilities, name) for name in ("min_part_size", "max_part_size", "max_parts")}
    assert len(TransferPlan.for_upload(5000 * 1024, 1024, **limits)) <= 1000


def damage(store: LocalStore, key: str) -> None:
    """Change the payload's last content byte and nothing else that can be seen."""
    path = store.root / key
    data = bytearray(path.read_bytes())
    data[-20_000] ^= 1
    path.write_bytes(data)


def test_a_proven_checksum_makes_verify_shallow(tmp_path: Path) -> None:
    """Where the server computes what HEAD tells, auto reads next to nothing, and finds damage all the same."""
    inner = Honest(tmp_path / "store")
    store = ProbedStore(inner)
    upload(store, "a.tar", artifact_of(tmp_path), profile=SMALL)
    result = verify(store, "a.tar")
    assert result.mode_used == "shallow"
    assert result.bytes_read < result.bytes_total / 5
    damage(inner, "a.tar")
    with pytest.raises(IntegrityError, match="attests"):
        verify(store, "a.tar")


def test_a_repeated_checksum_makes_verify_deep(tmp_path: Path) -> None:
    """A server that only repeats checksums attests damaged bytes: auto reads every byte and finds the damage."""
    inner = Parrot(tmp_path / "store")
    store = ProbedStore(inner)
    upload(store, "a.tar", artifact_of(tmp_path), profile=SMALL)
    assert store.head("a.tar").crc32c is not None
    assert verify(store, "a.tar").mode_used == "deep"
    damage(inner, "a.tar")
    with pytest.raises(IntegrityError):
        verify(store, "a.tar")


def test_a_checksum_that_is_not_attested_refuses_nothing(tmp_path: Path) -> None:
    """What an unproven server says of a payload does not condemn one whose every byte is right."""
    inner = Parrot(tmp_path / "store")
    store = ProbedStore(inner)
    upload(store, "a.tar", artifact_of(tmp_path), profile=SMALL)
    inner.told["a.tar"] = 0
    assert verify(store, "a.tar").mode_used == "deep"
    assert verify(store, "a.tar", mode="shallow").mode_used == "shallow"


# ---------------------------------------------------------------------------------------------------- when it is asked

SINCE_EPOCH_S = 1_800_000_000.0


class Named(LocalStore, HasServer):
    """A local store behind a server's name."""

    def __init__(self, root: Path, name: str = "https://one.example") -> None:
        super().__init__(root)
        self.name = name

    @property
    @override
    def server(self) -> Server:
        return Server(self.name, "TestServer/1")

    @override
    def address_of(self, key: str) -> ObjectAddress | None:
        raise NotImplementedError

    @override
    def copy_from(self, address: ObjectAddress, meta: ObjectMeta, target: str) -> ObjectMeta:
        raise NotImplementedError


def test_the_report_costs_later_processes_one_get(tmp_path: Path) -> None:
    """The first process probes and leaves a report, the next one reads it, once."""
    ProbedStore(LocalStore(tmp_path)).capabilities()
    sent = FaultyStore(LocalStore(tmp_path))
    store = ProbedStore(sent)
    assert sent.log == []
    assert store.capabilities().conditional
    assert store.capabilities().multipart
    assert sent.log == [Request("get", REPORT_KEY, 1)]


def test_an_unchanged_push_does_not_ask(tmp_path: Path) -> None:
    """Uploading what is there already sends what it always sent; so does reading it."""
    artifact = artifact_of(tmp_path)
    upload(ProbedStore(LocalStore(tmp_path / "store")), "a.tar", artifact, profile=SMALL)
    plain, probed = FaultyStore(LocalStore(tmp_path / "store")), FaultyStore(LocalStore(tmp_path / "store"))
    for store in (RetryingStore(plain), ProbedStore(probed)):
        assert upload(store, "a.tar", artifact, profile=SERIAL).status == "unchanged"
        verify(store, "a.tar", profile=SERIAL)
    assert probed.log == plain.log


def test_what_was_found_is_good_for_a_month(tmp_path: Path) -> None:
    """What was found is good for 30 days; one that is older, or comes from the future, is made anew."""
    clock = Clock(SINCE_EPOCH_S)

    def probed_at() -> float:
        return ProbedStore(LocalStore(tmp_path), now=clock).report().probed_at.timestamp()

    began = probed_at()
    clock.now += MAX_AGE_S
    assert probed_at() == began
    clock.now += 1
    assert probed_at() == clock.now
    clock.now -= 10 * MAX_AGE_S
    assert probed_at() == clock.now


def test_a_report_is_renewed_on_demand(tmp_path: Path) -> None:
    """`fresh` does not look at the report that is there, and replaces it for everybody."""
    clock = Clock(SINCE_EPOCH_S)
    store = ProbedStore(LocalStore(tmp_path), now=clock)
    store.report()
    clock.now += 60
    fresh = store.report(fresh=True)
    assert fresh.probed_at.timestamp() == clock.now
    assert ProbedStore(LocalStore(tmp_path), now=clock).report() == fresh


def test_a_copied_bucket_does_not_bring_its_report_along(tmp_path: Path) -> None:
    """A report counts for the server that it was made of; both servers' reports stay."""
    first = ProbedStore(Named(tmp_path)).report()
    elsewhere = ProbedStore(FaultyStore(Named(tmp_path, "https://two.example")))
    second = elsewhere.report()
    assert (first.endpoint, second.endpoint) == ("https://one.example", "https://two.example")
    assert second.software == "TestServer/1"
    for name, report in (("https://one.example", first), ("https://two.example", second)):
        sent = FaultyStore(Named(tmp_path, name))
        assert ProbedStore(sent).report() == report
        assert len(sent.log) == 1


@pytest.mark.parametrize("damaged", [b"", b"{}", b'{"format": "blobflow.probe/1", "reports": []}', bytes(300_000)])
def test_a_damaged_report_is_replaced(tmp_path: Path, damaged: bytes) -> None:
    """A report that cannot be read counts as none."""
    inner = LocalStore(tmp_path)
    inner.put(REPORT_KEY, damaged)
    report = ProbedStore(LocalStore(tmp_path)).report()
    document = json.loads(inner.get(REPORT_KEY, max_bytes=100_000).data)
    assert document["format"] == "blobflow.probe/2"
    assert [ProbeReport.model_validate(found) for found in document["reports"]] == [report]


def test_two_probes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Probes share no name: many at a time find the same and leave nothing."""
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda _: probe(LocalStore(tmp_path)), range(8)))
    assert [lacking(report) for report in reports] == [{"attests_crc32c"}] * 8
    assert keys(LocalStore(tmp_path)) == LocalStore(tmp_path).list_uploads() == []


# --------------------------------------------------------------------------------------------------------- who says it


def plant(store: Store, report: ProbeReport, holds: bool | None = None, **changes: Any) -> None:
    """Put a report into the bucket, as anybody who may write there can."""
    findings = {name: f.model_copy(update={"holds": holds}) for name, f in report.findings.items() if holds is not None}
    planted = report.model_copy(update=findings | changes)
    store.put(
        REPORT_KEY, json.dumps({"format": "blobflow.probe/2", "reports": [planted.model_dump(mode="json")]}).encode()
    )


@pytest.mark.parametrize("server", [Parrot, IgnoresIfMatch, IgnoresRanges, KnowsOnePage, ListsNoParts])
def test_a_planted_report_enables_nothing(tmp_path: Path, server: Callable[[Path], Store]) -> None:
    """Whatever a report in the bucket promises, a server is relied upon only for what this user saw."""
    truth = probe(server(tmp_path))
    declared = server(tmp_path).capabilities()
    plant(server(tmp_path), truth, holds=True, probed_at=datetime.now(timezone.utc))
    store = ProbedStore(server(tmp_path))
    assert store.capabilities() == truth.apply(declared)
    plant(server(tmp_path), truth, holds=True, probed_at=datetime.now(timezone.utc))
    assert ProbedStore(server(tmp_path)).capabilities() == truth.apply(declared)


def test_a_planted_report_makes_no_verification_shallow(tmp_path: Path) -> None:
    """On a server that repeats checksums `auto` reads every byte, and finds the damage, whatever the bucket says."""
    inner = Parrot(tmp_path / "store")
    upload(inner, "a.tar", artifact_of(tmp_path), profile=SMALL)
    plant(inner, probe(inner), holds=True, probed_at=datetime.now(timezone.utc))
    assert verify(ProbedStore(inner), "a.tar").mode_used == "deep"
    damage(inner, "a.tar")
    with pytest.raises(IntegrityError):
        verify(ProbedStore(inner), "a.tar")


def test_a_newer_report_that_misses_something_makes_us_look_again(tmp_path: Path) -> None:
    """A server that was changed is noticed as soon as anybody probed it; a report that lies costs one probe."""
    clock = Clock(SINCE_EPOCH_S)
    assert ProbedStore(Honest(tmp_path), now=clock).capabilities().attests_crc32c
    clock.now += 60
    plant(LocalStore(tmp_path), probe(Parrot(tmp_path), now=clock))
    changed = ProbedStore(Parrot(tmp_path), now=clock)
    assert not changed.capabilities().attests_crc32c
    clock.now += 60
    report = changed.report(fresh=True)
    clock.now += 60
    plant(LocalStore(tmp_path), report, holds=False, probed_at=datetime.fromtimestamp(clock(), timezone.utc))
    assert ProbedStore(Honest(tmp_path), now=clock).capabilities().conditional
    sent = FaultyStore(Honest(tmp_path))
    assert ProbedStore(sent, now=clock).capabilities().conditional
    assert sent.log == [Request("get", REPORT_KEY, 1)]


@pytest.mark.parametrize("seconds", [-60.0, 3600.0])
def test_an_older_report_and_one_of_tomorrow_cost_nothing(tmp_path: Path, seconds: float) -> None:
    """Only what was seen between our own probe and now is a reason to probe again: a planted date wears nobody out."""
    clock = Clock(SINCE_EPOCH_S)
    report = ProbedStore(LocalStore(tmp_path), now=clock).report()
    moment = datetime.fromtimestamp(clock() + seconds, timezone.utc)
    plant(LocalStore(tmp_path), report, holds=False, probed_at=moment)
    sent = FaultyStore(LocalStore(tmp_path))
    assert ProbedStore(sent, now=clock).report() == report
    assert len(sent.log) == 1


def test_a_server_of_another_name_is_another_server(tmp_path: Path) -> None:
    """At an endpoint where another software answers now, what was found of the old one counts no more."""

    class Renamed(Named):
        @property
        @override
        def server(self) -> Server:
            return Server(self.name, "TestServer/2")

    ProbedStore(Named(tmp_path)).report()
    assert ProbedStore(Renamed(tmp_path)).report().software == "TestServer/2"


def memory_files(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "blobflow" / "probes").iterdir())


def test_what_was_found_is_remembered_for_this_user_alone(tmp_path: Path) -> None:
    """The memory is a directory of the user's own, in which files are private."""
    ProbedStore(LocalStore(tmp_path / "store"), memory=ProbeMemory(tmp_path / "cache")).report()
    (file,) = memory_files(tmp_path / "cache")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("spoil", ["link", "link to a directory", "damage", "another place", "too large", "a file"])
def test_a_memory_that_is_not_ours_is_not_believed(tmp_path: Path, spoil: str) -> None:
    """Links, damage, and what belongs to another store count as nothing found, and cost a probe each; nothing fails."""
    cache = tmp_path / "cache"
    ProbedStore(Honest(tmp_path / "store"), memory=ProbeMemory(cache)).report()
    (file,) = memory_files(cache)
    match spoil:
        case "link":
            file.rename(tmp_path / "elsewhere.json")
            file.symlink_to(tmp_path / "elsewhere.json")
        case "link to a directory":
            file.parent.rename(tmp_path / "elsewhere")
            file.parent.symlink_to(tmp_path / "elsewhere")
        case "damage":
            file.write_bytes(b"{}")
        case "another place":
            file.write_text(file.read_text().replace(str(tmp_path), str(tmp_path / "other")))
        case "too large":
            file.write_text(file.read_text() + " " * 100_000)
        case _:
            shutil.rmtree(file.parent)
            file.parent.write_bytes(b"")
    store = ProbedStore(sent := FaultyStore(Parrot(tmp_path / "store")), memory=ProbeMemory(cache))
    assert not store.capabilities().attests_crc32c
    assert len(sent.log) > 10


def test_without_a_home_every_process_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be remembered nothing fails."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    for _ in range(2):
        sent = FaultyStore(LocalStore(tmp_path))
        assert ProbedStore(sent).capabilities().conditional
        assert len(sent.log) > 10


# -------------------------------------------------------------------------------------------------- when it cannot be


def denied(*operations: str) -> Callable[[Request], FailBefore | None]:
    """Credentials that may do everything but these operations."""
    refusal = StoreConfigurationError("403 AccessDenied", operation="put", status=403, code="AccessDenied")
    return lambda request: FailBefore(refusal) if request.operation in operations else None


def test_readers_without_the_right_to_write_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who may only read verifies deeply, and relies on nothing that was not proven."""
    upload(LocalStore(tmp_path / "store"), "a.tar", artifact_of(tmp_path), profile=SMALL)
    store = ProbedStore(FaultyStore(Honest(tmp_path / "store"), denied("put", "create_multipart", "delete")))
    with caplog.at_level(logging.WARNING):
        assert verify(store, "a.tar").mode_used == "deep"
    assert "probe.forbidden" in caplog.text
    assert not store.capabilities().conditional


def test_who_may_only_read_believes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report in the store says to another user what holds; one who cannot look for himself reads every byte."""
    upload(ProbedStore(Honest(tmp_path / "store")), "a.tar", artifact_of(tmp_path), profile=SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    store = ProbedStore(FaultyStore(Honest(tmp_path / "store"), denied("put", "create_multipart", "delete")))
    assert verify(store, "a.tar").mode_used == "deep"


def test_an_absent_report_that_looks_forbidden_is_absent(tmp_path: Path) -> None:
    """Without the right to list, AWS answers 403 for what is absent; the probe is made all the same."""
    faults = scripted_faults({("get", 1): denied("get")(Request("get", "", 1)) or FailBefore()})
    assert ProbedStore(FaultyStore(Honest(tmp_path), faults)).capabilities().attests_crc32c


def test_a_right_that_is_missing_says_nothing_of_the_server(tmp_path: Path) -> None:
    """Half a probe is no report: nothing is written down for others."""
    sent = FaultyStore(LocalStore(tmp_path), denied("create_multipart"))
    with pytest.raises(StoreConfigurationError):
        ProbedStore(sent).report()
    assert keys(sent.store) == []


def test_a_wrong_bucket_is_reported_as_such(tmp_path: Path) -> None:
    """A configuration that is wrong is an error, and not a server without abilities."""
    error = StoreConfigurationError("404 NoSuchBucket", operation="put", status=404, code="NoSuchBucket")
    store = ProbedStore(FaultyStore(LocalStore(tmp_path), lambda _: FailBefore(error)))
    with pytest.raises(StoreConfigurationError, match="NoSuchBucket"):
        Lease(store, "orders/round")


def waiting_by(clock: Clock) -> dict[str, Any]:
    """Options of a store that waits by this clock only."""
    return {"sleep": clock.sleep, "clock": clock, "now": clock}


def test_a_passing_failure_is_no_finding(tmp_path: Path) -> None:
    """A server that does not answer at all has not shown that it cannot: nothing is remembered."""
    inner, clock = LocalStore(tmp_path), Clock(SINCE_EPOCH_S)
    down = False

    def faults(request: Request) -> FailBefore | None:
        nonlocal down
        down = down or request.operation == "put_part"
        return FailBefore() if down else None

    with pytest.raises(StoreUnavailable):
        ProbedStore(FaultyStore(inner, faults), **waiting_by(clock)).report()
    assert not inner.exists(REPORT_KEY)
    assert lacking(ProbedStore(inner, now=clock).report()) == {"attests_crc32c"}


def test_a_server_that_asks_for_patience_shows_nothing(tmp_path: Path) -> None:
    """SlowDown says that there is too much to do, whatever was asked: it is the error of the call, and no finding."""
    clock = Clock(SINCE_EPOCH_S)
    busy = FaultyStore(
        LocalStore(tmp_path), lambda r: FailBefore(SlowDown("503", operation="get")) if r.operation == "head" else None
    )
    with pytest.raises(SlowDown):
        probe(busy, **waiting_by(clock))


@pytest.mark.parametrize(
    ("error", "evidence"),
    [
        (
            StoreUnavailable("500", status=500, operation="get"),
            "failed again and again with StoreUnavailable, status 500",
        ),
        (TimedOut("no byte for 120 s", operation="get"), "was not answered"),
    ],
)
def test_one_stubborn_trial_costs_that_ability_only(tmp_path: Path, error: BlobflowError, evidence: str) -> None:
    """A request that fails for ever costs what needs it and 20 s in all, leaves nothing, and is soon tried again."""
    inner, clock = LocalStore(tmp_path), Clock(SINCE_EPOCH_S)
    stubborn = FaultyStore(inner, lambda r: FailBefore(error) if r.operation == "list_parts" else None)
    began = clock.now
    report = ProbedStore(stubborn, **waiting_by(clock)).report()
    assert clock.now - began <= PATIENCE_S
    assert lacking(report) == {"lists_parts", "pages_parts", "aborts_uploads", "attests_crc32c"}
    assert report.lists_parts.evidence == f"{evidence}, while other requests succeeded"
    assert keys(inner) == [REPORT_KEY]
    assert inner.list_uploads() == []
    clock.now += MAX_STUBBORN_AGE_S / 2
    assert lacking(ProbedStore(inner, now=clock).report()) == lacking(report)
    clock.now += MAX_STUBBORN_AGE_S
    assert lacking(ProbedStore(inner, now=clock).report()) == {"attests_crc32c"}


def test_a_silent_request_is_waited_for_once(tmp_path: Path) -> None:
    """A trial that ran into its idle timeout is not repeated: that has taken long enough."""
    silent = FaultyStore(
        LocalStore(tmp_path),
        lambda r: FailBefore(TimedOut("no byte", operation="get")) if r.operation == "complete_multipart" else None,
    )
    assert not probe(silent).multipart.holds
    completed = [r.key for r in silent.log if r.operation == "complete_multipart"]
    assert len(completed) == len(set(completed)) > 0


class BeginsUnseen(LocalStore):
    """Begins uploads, and answers in a way that cannot be understood."""

    @override
    def create_multipart(self, key: str, *, part_size: int, **more: Any) -> str:
        super().create_multipart(key, part_size=part_size, **more)
        raise Unsupported("the answer cannot be understood", capability="conditional writes")


def test_an_upload_that_began_unseen_is_aborted(tmp_path: Path) -> None:
    """A server whose answer to create cannot be understood keeps no open upload of the probe's."""
    store = BeginsUnseen(tmp_path)
    assert not probe(store).multipart.holds
    assert keys(store) == store.list_uploads() == []


def test_what_cannot_be_removed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the right to delete the probe is made all the same, and says what it left."""
    inner = LocalStore(tmp_path)
    report = probe(FaultyStore(inner, denied("delete")))
    assert lacking(report) == {"attests_crc32c"}
    left = keys(inner)
    assert left
    assert all(f"key={key}" in caplog.text for key in left)


def test_a_report_that_cannot_be_written_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The process that probed knows, even if it cannot tell the others."""

    def faults(request: Request) -> FailBefore | None:
        return denied("put")(request) if request.key == REPORT_KEY else None

    assert ProbedStore(FaultyStore(Honest(tmp_path), faults)).capabilities().attests_crc32c
    assert "probe.not_told" in caplog.text


# --------------------------------------------------------------------------------------------------- secrets, the shell


def test_the_report_holds_no_credentials(strict: StrictS3) -> None:
    """The object in the store shows no secret; an endpoint cannot hold one."""
    endpoint = strict.endpoint
    with closing(open_store(f"s3://{endpoint.new_bucket()}", **s3_options(endpoint))) as store:
        assert store.capabilities().conditional
        document = store.get(REPORT_KEY, max_bytes=100_000).data.decode()
    assert endpoint.endpoint_url in document
    assert endpoint.secret_access_key not in document
    assert f'"{endpoint.access_key_id}"' not in document
    with pytest.raises(StoreConfigurationError, match="contains credentials") as refusal:
        open_store("s3://bucket", endpoint_url="http://user:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(refusal.value)


def test_the_command_shows_the_report(
    moto_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`blobflow probe` shows each ability with its evidence; it probes again only if it is told to."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto_s3.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto_s3.secret_access_key)
    url = f"s3://{moto_s3.new_bucket()}"

    def call(*arguments: str) -> str:
        assert run(["--store", url, "--endpoint-url", moto_s3.endpoint_url, "probe", *arguments]) == 0
        return capsys.readouterr().out

    document = json.loads(call("--json"))
    assert document["status"] == "probed"
    assert document["endpoint"] == moto_s3.endpoint_url
    assert document["create_only"]["holds"]
    assert not document["attests_crc32c"]["holds"]
    assert json.loads(call("--json")) == document
    assert json.loads(call("--json", "--fresh"))["probed_at"] > document["probed_at"]
    assert "compare and swap\tyes\t" in (shown := call())
    assert "attests crc32c\tno\ta put with a wrong CRC32C was accepted" in shown


def test_the_command_probes_a_local_store_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A local store has nothing to find out, so no report is kept; the checks are made and shown."""
    assert run(["--store", str(tmp_path), "--json", "probe"]) == 0
    assert json.loads(capsys.readouterr().out)["compare_and_swap"]["holds"]
    assert keys(LocalStore(tmp_path)) == []
