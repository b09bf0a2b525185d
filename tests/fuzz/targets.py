"""Every parser of bytes that a file or a peer gives, as a function of bytes: a value, or a `BlobflowError`.

`tests/unit/test_hostile_bytes.py` feeds them with Hypothesis and with the corpus; `make fuzz` with atheris.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from blobflow.artifact.index import Index, Member
from blobflow.artifact.index_parquet import decode_index, decode_origins, encode_index, encode_origins
from blobflow.artifact.landing import Landing, Stage, _Notes
from blobflow.artifact.manifest import BodyInfo, IndexInfo, Manifest
from blobflow.artifact.manifest_file import ManifestFile
from blobflow.backends.append_log import _records as log_records
from blobflow.backends.mirror_history import HISTORY_NAME, read_history
from blobflow.checksum import EMPTY_SHA256, crc32c
from blobflow.coordination.lease_store import LeaseState
from blobflow.coordination.records import read_record
from blobflow.coordination.refs import read_ref
from blobflow.errors import BlobflowError
from blobflow.layers.format import (
    FramePlan,
    LayerMeta,
    encode_seek_table,
    meta_of,
    parse_seek_table,
    plan_of,
)
from blobflow.layers.state import _parse as parse_layer_state
from blobflow.mirror import machine
from blobflow.mirror.client import MirrorClient
from blobflow.mirror.envelope import FrameDecoder, SnapshotEnvelope, SnapshotId
from blobflow.mirror.sending import Snapshot
from blobflow.stores.base import Body, PutMode
from blobflow.stores.local.store import LocalStore
from blobflow.stores.probe import ProbedStore
from blobflow.stores.s3 import xml as s3_xml
from blobflow.streams.checkpoint import TransferCheckpoint
from blobflow.transport.checkpoints import Checkpoint, LocalCheckpointStore
from blobflow.untrusted import read_json
from blobflow.uploads.intent import Intent
from blobflow.uploads.progress import TransferRecord

SCRATCH_VARIABLE: Final = "BLOBFLOW_FUZZ_SCRATCH"
"""Where the fuzzer's processes, which end without a word, make theirs: whoever starts them removes it."""
CORPUS: Final = Path(__file__).parent / "corpus"
_DIGEST: Final = "sha256:" + "ab" * 32
_WHEN: Final = "2026-11-30T12:00:00Z"


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: Raises nothing but a `BlobflowError`.
        seeds: What it takes as it should be; mutations begin here.
    """

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def quotes_too_much(error: BlobflowError, data: bytes, limit: int = 210) -> bool:
    """Whether an error shows more than 200 characters of what was read, in one place; ten may be its own words."""
    shown = [f"{error.message} {error.hint}", *map(str, error.to_dict().values())]
    for said in [text for text in shown if len(text) > limit]:
        for encoding in ("utf-8", "latin-1"):
            read = data.decode(encoding, "replace")
            if any(said[start : start + limit + 1] in read for start in range(len(said) - limit)):
                return True
    return False


@cache
def scratch() -> Path:
    """A directory of this process."""
    shared = os.environ.get(SCRATCH_VARIABLE) or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
    path = Path(tempfile.mkdtemp(prefix="blobflow-fuzz-", dir=shared))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _document(**values: Any) -> bytes:
    return json.dumps(values).encode()


# Artifacts


def _members() -> Index:
    index = Index()
    index.append(Member("a.txt", 5, 0o644, 1, bytes(range(32)), 7))
    index.append(Member("b/", 0, 0o755, 2, EMPTY_SHA256, 0))
    index.append(Member("c/d", 6, 0o755, 3, bytes(range(32)), 8))
    return index


@cache
def _manifest() -> bytes:
    index = _members()
    return Manifest(
        backend="directory",
        cursor={"at": [1, 2.5, None, "x"]},
        created_at=_WHEN,  # type: ignore[arg-type]
        producer="blobflow test",
        members=3,
        bytes=11,
        content_digest=index.content_digest(),
        executables_digest=index.executables_digest(),
        index=IndexInfo(size=1000, sha256="ab" * 32, crc32c=1),
        body=BodyInfo(size=5120, crc32c=2),
    ).encode()


def _index(data: bytes) -> object:
    return decode_index(data, members=3)


def _layer_meta() -> bytes:
    manifest_file = ManifestFile.parse(_manifest())
    plan = plan_of(manifest_file, 2048)
    return meta_of(manifest_file, "zstd", plan, [100] * len(plan)).encode()


_PLAN: Final = FramePlan(300, 1000, 200)


def _frame(data: bytes) -> None:
    from blobflow.layers.format import decompress

    decompress(data, memoryview(bytearray(1000)))


def _compressed() -> bytes:
    from blobflow.layers.format import Codec

    return Codec().compress(b"x" * 500 + bytes(500))


def _stage_journal(data: bytes) -> object:
    (journal := scratch() / "journal").write_bytes(data)
    notes = _Notes.read(journal)
    stage = Stage(scratch() / "dest", _DIGEST)
    stage.tree.mkdir(parents=True, exist_ok=True)
    stage.part_size, stage.done = notes.part_size, notes.done
    if stage.part_size is not None:
        from blobflow.artifact.tarmap import TarMap
        from blobflow.engine.plan import TransferPlan

        layout = TarMap(500, 1000, _members())
        plan = TransferPlan(layout.size - layout.data_start, stage.part_size, start=layout.data_start)
        return Landing(stage, layout, plan)
    return notes


# Records of a store


def _in_store(key: str, data: bytes) -> LocalStore:
    store = LocalStore(scratch() / "store")
    store.put(key, data, mode=PutMode.OVERWRITE)
    return store


def _ref(data: bytes) -> object:
    return read_ref(_in_store("name.ref.json", data), "name")


def _lease(data: bytes) -> object:
    return read_record(_in_store("name.lease.json", data), "name.lease.json", LeaseState)


def _probe_report(data: bytes) -> object:
    return ProbedStore(_in_store(".blobflow-probe.json", data))._remembered()


def _intent() -> bytes:
    return Intent(
        ManifestFile.parse(_manifest()), "id", 8 << 20, "owner", 3, 1.5, "w", {1: 5, 2: 6, 4: 7}, replaces=_DIGEST
    ).encode()


def _local_upload(data: bytes) -> object:
    """`upload.json` of a local store is `data`: nothing of the store fails for that."""
    store = LocalStore(scratch() / "uploads")
    upload_id = store.create_multipart("key", part_size=4)
    store.put_part("key", upload_id, 1, Body.of(b"abcd"))
    (scratch() / "uploads" / ".blobflow" / "uploads" / upload_id / "upload.json").write_bytes(data)
    try:
        return store.list_parts("key", upload_id)
    finally:
        store.list_uploads()
        store.abort_multipart("key", upload_id)


def _local_parts(data: bytes) -> object:
    store = LocalStore(scratch() / "parts")
    upload_id = store.create_multipart("key", part_size=4)
    (scratch() / "parts" / ".blobflow" / "uploads" / upload_id / "parts.jsonl").write_bytes(data)
    try:
        return store.list_parts("key", upload_id)
    finally:
        store.abort_multipart("key", upload_id)


# S3


def _xml(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        try:
            return read(data)
        except (s3_xml.MalformedResponse, s3_xml.ErrorResponse) as error:  # which S3's store translates
            too_long = len(str(error)) > 1200
        assert not too_long, "an error quotes too much"
        return None

    return run


def _s3_values(data: bytes) -> object:
    text = data.decode("latin-1")
    e_tag = s3_xml.quoted(text)
    assert not set(e_tag) & set("\r\n\0"), "an entity tag that is no header"
    time = s3_xml.read_time(text)
    return e_tag, time and (time.timestamp(), time.isoformat()), s3_xml.read_crc32c(text)


_OBJECTS: Final = b"""<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><IsTruncated>true</IsTruncated>
<NextContinuationToken>t</NextContinuationToken><EncodingType>url</EncodingType><Contents><Key>a%20b</Key>
<LastModified>9999-12-31T23:59:59.999999999Z</LastModified><ETag>&quot;x&#13;&quot;</ETag><Size>3</Size></Contents>
</ListBucketResult>"""
_UPLOADS: Final = b"""<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker>
<NextUploadIdMarker>m</NextUploadIdMarker><Upload><Key>a</Key><UploadId>u</UploadId>
<Initiated>2026-11-30T12:00:00.000Z</Initiated></Upload></ListMultipartUploadsResult>"""
_PARTS: Final = b"""<ListPartsResult><IsTruncated>false</IsTruncated><Part><PartNumber>1</PartNumber><Size>5</Size>
<ETag>"e"</ETag><ChecksumCRC32C>AAAAAA==</ChecksumCRC32C></Part></ListPartsResult>"""
_MADE: Final = b"""<CompleteMultipartUploadResult><ETag>"e-1"</ETag><ChecksumCRC32C>AAAAAA==</ChecksumCRC32C>
<ChecksumType>FULL_OBJECT</ChecksumType></CompleteMultipartUploadResult>"""
_ERROR: Final = b"<Error><Code>SlowDown</Code><Message>&lt;later&gt;</Message></Error>"


# Mirrors


_ID: Final = SnapshotId("there", "orders", 7, _DIGEST)


def _frames(data: bytes) -> object:
    decoder = FrameDecoder(1 << 20)
    for start in range(0, len(data), 100):
        for envelope in decoder.feed(data[start : start + 100]):
            state = machine.SessionState(envelope.id)
            machine.receive(state, envelope, checkpoint_bytes=1 << 20)
    return decoder.pending


def _mirror_journal(data: bytes) -> object:
    machine.identify(data)
    machine.restore(_ID, data, partial_bytes=None, committed=True)
    state, length = machine.restore(_ID, data, partial_bytes=100, committed=False)
    assert 0 <= state.offset <= 100, "the journal vouches for what is not there"
    assert length <= len(data)
    return str(state), state.status


def _sealed(data: bytes) -> object:
    """Lines with the right checksum, whatever they say: what a journal holds is not what `json` expects."""
    return _mirror_journal(b"".join(b"%08x %b\n" % (crc32c(line), line) for line in data.splitlines()))


def _journal() -> bytes:
    state = machine.SessionState(_ID, 10, crc32c(b"0123456789"), begun=True)
    checkpoint = machine._line({"offset": 4, "crc32c": 5, "first": [2, 3]})
    return machine._header(state) + checkpoint + machine._line({"following": {"at": 3}})


class _Client:
    """Answers every request with the same bytes."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self._body = body

    def send(self, *_: Any) -> _Client:
        return self

    def read(self, limit: int) -> bytes:
        return self._body[:limit]

    def close(self) -> None:
        pass

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _receiver(data: bytes) -> object:
    """The first byte is the status, the rest what a receiver answers to everything."""
    ticks = iter(range(1_000_000))
    client = MirrorClient(
        "http://receiver.invalid",
        token="x" * 16,
        patience_s=3,
        sleep=lambda _: None,
        clock=lambda: float(next(ticks)),
    )
    statuses = (200, 200, 200, 400, 401, 404, 409, 413, 422, 429, 500, 503)
    with closing(client._client):
        pass
    client._client = _Client(statuses[data[0] % len(statuses)] if data else 200, data[1:])  # type: ignore[assignment]
    (source := scratch() / "pushed").write_bytes(b"0123456789")
    snapshot = Snapshot.of_file(source, source="there", database="orders", position=7)
    for call in (lambda: client.status(_ID), client.snapshots, lambda: client.abort(_ID)):
        too_much = False
        try:
            call()
        except BlobflowError as error:
            too_much = quotes_too_much(error, data)
        assert not too_much, "an error quotes too much"
    return client.push(snapshot)


_STANDING: Final = {**_ID._asdict(), "status": "bootstrapping", "bytes_done": 3, "bytes_total": 10, "complete": False}


# Checkpoints, histories, tables


_RECORD: Final = TransferRecord(
    transfer_id="t",
    kind="upload",
    key="k",
    artifact_digest=_DIGEST,
    part_size=8,
    parts_total=3,
    parts_done=1,
    bytes_done=8,
    bytes_total=20,
    state="running",
)


def _local_home(data: bytes) -> object:
    (scratch() / "t.jsonl").write_bytes(data)
    text = LocalCheckpointStore(scratch()).read("t")
    checkpoint = Checkpoint.from_json(text) if text is not None else None
    return checkpoint and (checkpoint.bytes_per_s, checkpoint.to_json())


def _history(data: bytes) -> object:
    (scratch() / HISTORY_NAME).write_bytes(data)
    return [(entry.imported_at.isoformat(), entry.model_dump_json()) for entry in read_history(scratch())]


def _append_log(data: bytes) -> object:
    (scratch() / "log").write_bytes(data)
    with open(scratch() / "log", "rb") as stream:
        return list(log_records(stream))


def _log() -> bytes:
    lines = (
        b'{"log":1,"base":0,"records":1',
        b'{"seq":1,"key":"a","value":{"x":1}',
        b'{"seq":2,"key":"a","deleted":true',
    )
    return b"".join(b'%b,"crc32c":%d}\n' % (line, crc32c(line)) for line in lines)


def _log_values(data: bytes) -> object:
    """Lines with the right checksum, whatever they say."""
    lines = [line for line in data.splitlines() if line]
    return _append_log(b"".join(b'%b,"crc32c":%d}\n' % (line, crc32c(line)) for line in lines))


def _operations(data: bytes) -> object:
    from blobflow.batch.tables import _Source

    (path := scratch() / "batch.jsonl").write_bytes(data)
    return list(_Source(path))


def _operations_table(data: bytes) -> object:
    from blobflow.batch.tables import _Source

    (path := scratch() / "batch.parquet").write_bytes(data)
    return sum(1 for _ in _Source(path))


def _results_journal(data: bytes) -> object:
    from blobflow.batch.tables import _Journal

    results = scratch() / "results.parquet"
    results.unlink(missing_ok=True)
    (scratch() / "results.parquet.journal").write_bytes(data)
    with _Journal(results, "00", payloads=True, fresh=False) as journal:
        return journal.publish()


def _operations_of() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"op": ["insert", "get"], "key": ["a", "b"], "payload": ["x", None]}), sink)
    return sink.getvalue()


def _layer_state(data: bytes) -> object:
    return parse_layer_state("c", data.decode("utf-8", "surrogateescape"))


_STATE: Final = _document(
    container="c",
    path="/x",
    local_digest=_DIGEST,
    last_sync=_WHEN,
    restored=[{"path": "/x", "device": 1, "inode": 2, "digest": _DIGEST}],
)


@cache
def targets() -> dict[str, Target]:
    """All of them by name."""
    entry = {"key": "a", "manifest_sha256": _DIGEST, "generation": 1, "write_id": "w", "updated_at": _WHEN}
    checkpoint = Checkpoint(record=_RECORD, attempt=1, sequence=2, writer="w", began_at=1.0, saved_at=2.0).to_json()
    history = _document(imported_at=_WHEN, artifact_digest=_DIGEST, backend="directory", cursor=1, created_at=_WHEN)
    frame = SnapshotEnvelope(_ID, 4, crc32c(b"abcd"), 0, b"abcd", crc32c(b"abcd"), done=True).encode()
    lines = b"\n".join(line.partition(b" ")[2] for line in _journal().splitlines())
    result = b'{"format": "blobflow.batch-results/1", "operations_sha256": "00"}\n'
    row = b'{"index": 0, "kind": "get", "key": "a", "status": "done", "size": 1, "e_tag": "x", "payload": "eA=="}\n'
    return {
        "manifest": Target(Manifest.parse, (_manifest(),)),
        "index": Target(_index, (encode_index(_members()),)),
        "origins": Target(
            lambda data: decode_origins(data, members=2), (encode_origins(array("Q", [1, 2]), array("q", [3, 4])),)
        ),
        "layer_meta": Target(LayerMeta.parse, (_layer_meta(),)),
        "seek_table": Target(
            lambda data: parse_seek_table(data, _PLAN), (encode_seek_table([50] * len(_PLAN), _PLAN),)
        ),
        "frame": Target(_frame, (_compressed(),)),
        "stage_journal": Target(
            _stage_journal,
            (
                b'{"artifact": "x", "part_size": 512}\n{"boot": "b"}\n{"part": 1, "crc32c": 5}\n{"syncing": 1}\n',
                b'{"synced": 1}\n{"part": 2, "crc32c": 6}\n{"drop": 2}\n{"lanes": 2}\n',
            ),
        ),
        "ref": Target(_ref, (_document(**entry, round_number=1, history=[entry]),)),
        "lease": Target(
            _lease, (_document(generation=1, owner="o", expires_at=1.5, write_id="w", cursor={"a": 1}, ttl_s=60.0),)
        ),
        "probe_report": Target(_probe_report, (_document(format="blobflow.probe/1", reports=[]),)),
        "intent": Target(Intent.parse, (_intent(),)),
        "local_upload": Target(_local_upload, (_document(key="key", part_size=4, created=_WHEN),)),
        "local_parts": Target(_local_parts, (b'\n{"part": 1, "size": 4, "crc32c": 5}\n{"part": 1, "size": null}\n',)),
        "s3_objects": Target(_xml(s3_xml.read_objects), (_OBJECTS, _ERROR)),
        "s3_uploads": Target(_xml(s3_xml.read_uploads), (_UPLOADS,)),
        "s3_parts": Target(_xml(s3_xml.read_parts), (_PARTS,)),
        "s3_made": Target(_xml(s3_xml.read_made), (_MADE, b"<InitiateMultipartUploadResult/>")),
        "s3_upload_id": Target(_xml(s3_xml.read_upload_id), (b"<R><UploadId>u</UploadId></R>",)),
        "s3_error": Target(s3_xml.error_in, (_ERROR,)),
        "s3_values": Target(
            _s3_values,
            (b'"e"', b"9999-12-31T23:59:59.999999999Z", b"Mon, 30 Nov 2026 12:00:00 GMT", b"AAAAAA==", b'W/"\r"'),
        ),
        "frames": Target(_frames, (frame + frame,)),
        "mirror_journal": Target(_mirror_journal, (_journal(),)),
        "mirror_records": Target(_sealed, (lines,)),
        "receiver": Target(
            _receiver,
            (
                b"\0" + _document(**_STANDING),
                b"\0" + _document(snapshots=[_STANDING]),
                b"\x06" + _document(error={"type": "OffsetRegressionError", "message": "m", "hint": "h", "actual": 1}),
                b"\x09" + _document(error={"type": "SlowDown", "message": "m", "retry_after_s": "soon", "self": 1}),
            ),
        ),
        "checkpoint": Target(_local_home, (b"\n" + checkpoint.encode() + b"\n",)),
        "transfer_checkpoint": Target(
            lambda data: TransferCheckpoint.from_json(data).progress,
            (TransferCheckpoint.new("s", _DIGEST, 10).to_json().encode(),),
        ),
        "history": Target(_history, (history,)),
        "append_log": Target(_append_log, (_log(),)),
        "append_log_values": Target(_log_values, (b'{"log":1,"base":0,"records":1\n{"seq":1,"key":"a","value":3\n',)),
        "operations": Target(
            _operations,
            (
                b'{"op": "insert", "key": "a", "payload": "x", "metadata": {"a": "b"}}\n{"op": "get", "key": "a"}\n',
                b'{"op": "insert", "payload_base64": "eA=="}\n',
            ),
        ),
        "operations_table": Target(_operations_table, (_operations_of(),)),
        "results_journal": Target(_results_journal, (result + row,)),
        "layer_state": Target(_layer_state, (_STATE,)),
        "json": Target(lambda data: read_json(data, "document"), (b'{"a": [1, 2.5, null, true, "x"]}',)),
    }


__all__ = ["CORPUS", "SCRATCH_VARIABLE", "Target", "quotes_too_much", "scratch", "targets"]
