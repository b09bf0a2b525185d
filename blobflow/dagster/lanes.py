"""Transfers in lanes: a few steps, fixed when the code location loads, each of which moves every K-th part.

| graph | nodes | what the last one proves |
|---|---|---|
| upload | plan, lane_0 ... lane_K-1, commit | every part is in the store, and together they are the payload |
| download | plan, lane_0 ... lane_K-1, assemble | the same of the files, by their checksums |

Any executor may spread the lanes over machines. They are steps like any other: each is retried by itself, and a retry
from failure runs the lanes again that did not end. (Steps that are mapped over a dynamic output are not: those that had
not started when the run died are skipped in the retry, and the run succeeds without them.)

What the lanes hand to the last step is for people to read: an executor may lose it (Dask's does, all of it). What the
last step goes by is the ticket, the store and the disk.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import dagster as dg

from blobflow.backends import Importer
from blobflow.dagster import metadata as md
from blobflow.dagster.checkpoints import StepJournal
from blobflow.dagster.handles import PIN, RemoteHandle, SnapshotHandle, StagedHandle, UploadHandle
from blobflow.dagster.resource import BlobflowResource
from blobflow.stores import Store
from blobflow.transport import (
    DownloadTicket,
    LaneResult,
    UploadTicket,
    begin_download,
    begin_upload,
    commit_upload,
    fetch_lane,
    send_parts,
)
from blobflow.uploads.progress import transfer_id

MAX_LANES: Final = 64
"""More steps than that in one asset are no picture any more, and each costs seconds of processor time."""


class Steps(Protocol):
    """What the lanes take from the pipeline that they belong to."""

    @property
    def name(self) -> str: ...

    def op(
        self, node: str, *, waits: Iterable[str] = (), pool: bool = False, **options: Any
    ) -> Callable[[Callable[..., Any]], dg.OpDefinition]:
        """The decorator of a step."""
        ...

    def step(self, context: dg.OpExecutionContext) -> AbstractContextManager[tuple[BlobflowResource, StepJournal]]:
        """Gives the resource and the step's journal, and raises the core's errors as Dagster's."""
        ...


@dataclass(frozen=True)
class LaneHandle:
    """What a lane did, and in which run."""

    lane: int
    run_id: str
    parts: int
    bytes_moved: int
    bytes_resumed: int
    seconds: float


def upload_in_lanes(
    steps: Steps,
    lanes: int,
    waits: Sequence[str],
    found: Callable[[dg.OpExecutionContext, BlobflowResource, Store], SnapshotHandle],
    stored: Callable[[dg.OpExecutionContext, Store, SnapshotHandle], str | None],
    facts: Callable[[Store, SnapshotHandle], dict[str, Any]],
) -> dg.GraphDefinition:
    """The graph `upload` of a pipeline, which ends with an `UploadHandle`.

    Args:
        waits: Names of the inputs, none of which has data, for which the first step waits.
        found: The snapshot.
        stored: The digest under which the store has the snapshot, if its artifact is gone from the disk; None if it is
            at hand.
        facts: What is known of the snapshot, for the materialization.
    """

    @steps.op("upload_plan", waits=waits, out={"snapshot": dg.Out(SnapshotHandle), "ticket": dg.Out(UploadTicket)})
    def begin(context: dg.OpExecutionContext):
        with steps.step(context) as (blobflow, _):
            store = blobflow.get_store()
            snapshot = found(context, blobflow, store)
            digest = stored(context, store, snapshot)
            if digest is not None:
                return snapshot, UploadTicket(snapshot.key, "", digest, 0, 0, 0)
            ticket = begin_upload(store, snapshot.key, snapshot.path, profile=blobflow.get_profile())
            context.log.info(
                "upload.begun key=%s upload_id=%s parts=%d part_size=%d lanes=%d",
                *(ticket.key, ticket.upload_id, ticket.parts, ticket.part_size, lanes),
            )
            return snapshot, ticket

    def send_of(lane: int) -> dg.OpDefinition:
        @steps.op(f"upload_lane_{lane}", pool=True)
        def send(context: dg.OpExecutionContext, snapshot: SnapshotHandle, ticket: UploadTicket) -> LaneHandle:
            with steps.step(context) as (blobflow, journal):
                store = blobflow.get_store()
                if not ticket.upload_id or stored(context, store, snapshot) is not None:
                    return _done(context, journal, lane, _NOTHING)
                sent = send_parts(
                    store,
                    ticket,
                    snapshot.path,
                    ticket.numbers(lane, lanes),
                    profile=blobflow.get_profile(),
                    on_progress=journal.progress,
                    on_checkpoint=journal.save,
                )
                return _done(context, journal, lane, sent)

        return send

    @steps.op("upload_commit")
    def commit(
        context: dg.OpExecutionContext, snapshot: SnapshotHandle, ticket: UploadTicket, sent: list[LaneHandle]
    ) -> UploadHandle:
        with steps.step(context) as (blobflow, journal):
            store = blobflow.get_store()
            metadata = facts(store, snapshot)
            digest = ticket.artifact_digest if not ticket.upload_id else stored(context, store, snapshot)
            status, seconds, sent_again = "unchanged", 0.0, 0
            if digest is None:
                result = commit_upload(
                    store,
                    ticket,
                    snapshot.path,
                    lanes=lanes,
                    profile=blobflow.get_profile(),
                    on_progress=journal.progress,
                    on_checkpoint=journal.save,
                )
                digest, status = result.artifact_digest, result.status
                seconds, sent_again = result.seconds, result.bytes_sent
            if status == "unchanged":
                journal.done(transfer_id(store, snapshot.key, digest, "upload"))
            metadata |= {md.STATUS: status, md.UPLOAD_SECONDS: round(_slowest(sent) + seconds, 3)}
            metadata |= journal.metadata()
            if len(sent) == lanes:
                metadata |= _lane_facts(context, sent, md.BYTES_SENT)
                metadata[md.BYTES_SENT] += sent_again
            else:
                metadata.pop(md.BYTES_RESUMED, None)
            metadata.pop(md.PARTS, None)  # how the last step saw them: all done
            context.log.info(
                "upload.done status=%s key=%s lanes=%d told=%d bytes_sent=%s bytes_resumed=%s",
                *(status, snapshot.key, lanes, len(sent)),
                *(metadata.get(label, "unknown") for label in (md.BYTES_SENT, md.BYTES_RESUMED)),
            )
            context.add_output_metadata(metadata)
            return UploadHandle.of(snapshot, digest, status, metadata)

    def upload(**after: Any):
        snapshot, ticket = begin.alias("plan")(**after)
        sent = [send_of(lane).alias(f"lane_{lane}")(snapshot, ticket) for lane in range(lanes)]
        return commit.alias("commit")(snapshot, ticket, sent)

    return _graph(f"{steps.name}__upload", upload, waits)


def download_in_lanes(
    steps: Steps,
    lanes: int,
    waits: Sequence[str],
    found: Callable[[dg.OpExecutionContext, Store], RemoteHandle],
    importer_of: Callable[[dg.OpExecutionContext], Importer],
    fetch: Callable[[dg.OpExecutionContext, BlobflowResource, StepJournal, Importer, str, str], dict[str, Any]],
) -> dg.GraphDefinition:
    """The graph `download` of a pipeline: from a `RemoteHandle` to a `StagedHandle`.

    Args:
        waits: Names of the inputs without data for which the first step waits.
        fetch: Lands an artifact, by key and digest, where the importer takes it from; gives facts for the
            materialization.
    """

    def is_alive(importer: Importer, digest: str) -> bool:
        alive = importer.current()
        return alive is not None and alive.digest == digest

    @steps.op(
        "download_plan",
        waits=waits,
        config_schema=PIN,
        out={"remote": dg.Out(RemoteHandle), "ticket": dg.Out(DownloadTicket)},
    )
    def begin(context: dg.OpExecutionContext):
        with steps.step(context) as (blobflow, _):
            store = blobflow.get_store()
            remote = found(context, store)
            importer = importer_of(context)
            if is_alive(importer, remote.digest):
                return remote, DownloadTicket(remote.key, remote.digest, lanes, 0, 0, 0)
            ticket = begin_download(
                store,
                remote.key,
                importer.staging(remote.digest),
                lanes=lanes,
                profile=blobflow.get_profile(),
                expected_digest=remote.digest,
            )
            context.log.info(
                "download.begun key=%s parts=%d part_size=%d lanes=%d",
                *(ticket.key, ticket.parts, ticket.part_size, lanes),
            )
            return remote, ticket

    def fetch_of(lane: int) -> dg.OpDefinition:
        @steps.op(f"download_lane_{lane}", pool=True)
        def land(context: dg.OpExecutionContext, ticket: DownloadTicket) -> LaneHandle:
            with steps.step(context) as (blobflow, journal):
                importer = importer_of(context)
                if not ticket.parts or is_alive(importer, ticket.artifact_digest):
                    return _done(context, journal, lane, _NOTHING)
                landed = fetch_lane(
                    blobflow.get_store(),
                    ticket,
                    importer.staging(ticket.artifact_digest),
                    lane,
                    profile=blobflow.get_profile(),
                    on_progress=journal.progress,
                    on_checkpoint=journal.save,
                )
                return _done(context, journal, lane, landed)

        return land

    @steps.op("download_assemble")
    def assemble(context: dg.OpExecutionContext, remote: RemoteHandle, landed: list[LaneHandle]) -> StagedHandle:
        with steps.step(context) as (blobflow, journal):
            importer = importer_of(context)
            if is_alive(importer, remote.digest):
                metadata: dict[str, Any] = {md.STATUS: "unchanged", md.BYTES_RECEIVED: 0, md.BYTES_RESUMED: 0}
            else:
                metadata = fetch(context, blobflow, journal, importer, remote.key, remote.digest)
                itself = metadata[md.BYTES_RECEIVED]
                if len(landed) == lanes:
                    metadata |= _lane_facts(context, landed, md.BYTES_RECEIVED)
                    metadata[md.BYTES_RECEIVED] += itself
                metadata.pop(md.PARTS, None)
                metadata[md.DOWNLOAD_SECONDS] = round(_slowest(landed) + metadata[md.DOWNLOAD_SECONDS], 3)
            context.add_output_metadata(metadata)
            return StagedHandle(remote.key, remote.digest, metadata, remote.round_number)

    def download(**after: Any):
        remote, ticket = begin.alias("plan")(**after)
        landed = [fetch_of(lane).alias(f"lane_{lane}")(ticket) for lane in range(lanes)]
        return assemble.alias("assemble")(remote, landed)

    return _graph(f"{steps.name}__download", download, waits)


def _graph(name: str, compose: Callable[..., Any], inputs: Iterable[str]) -> dg.GraphDefinition:
    return dg.graph(name=name, ins={each: dg.GraphIn() for each in inputs})(compose)


_NOTHING: Final = LaneResult("unchanged", parts=0, bytes_moved=0, bytes_resumed=0, seconds=0.0)


def _done(context: dg.OpExecutionContext, journal: StepJournal, lane: int, result: LaneResult) -> LaneHandle:
    context.log.info(
        "lane.done lane=%d status=%s parts=%d bytes_moved=%d bytes_resumed=%d seconds=%.1f",
        *(lane, result.status, result.parts, result.bytes_moved, result.bytes_resumed, result.seconds),
    )
    context.add_output_metadata(journal.metadata())
    return LaneHandle(
        lane, context.run_id, result.parts, result.bytes_moved, result.bytes_resumed, round(result.seconds, 3)
    )


def _slowest(lanes: Sequence[LaneHandle]) -> float:
    return max((lane.seconds for lane in lanes), default=0.0)


def _lane_facts(context: dg.OpExecutionContext, lanes: Sequence[LaneHandle], moved_key: str) -> dict[str, Any]:
    """What the lanes moved in this run; a lane that ended in an earlier one is what was found done."""
    moved = sum(lane.bytes_moved for lane in lanes if lane.run_id == context.run_id)
    found = sum(lane.bytes_resumed + lane.bytes_moved for lane in lanes) - moved
    rows = [
        {
            "lane": lane.lane,
            "parts": lane.parts,
            "bytes": lane.bytes_moved,
            "found done": lane.bytes_resumed,
            "seconds": lane.seconds,
        }
        for lane in sorted(lanes, key=lambda lane: lane.lane)
    ]
    schema = dg.TableSchema(
        [dg.TableColumn(name, "float" if name == "seconds" else "int") for name in rows[0]] if rows else []
    )
    return {
        moved_key: moved,
        md.BYTES_RESUMED: found,
        md.LANES: dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema),
        **md.throughput(moved, _slowest(lanes)),
    }
