"""Upload and download in lanes: each is a graph of a few steps instead of one op, fixed when the code location loads.

Each lane moves every K-th part.

| graph | nodes | what the last node proves |
|---|---|---|
| upload | plan, lane_0 ... lane_K-1, commit | every part is in the store, and together they are the payload |
| download | plan, lane_0 ... lane_K-1, assemble | the same of the files, by their checksums |

Any executor may spread the lanes over machines. Lanes are ordinary steps: each is retried separately, and a retry from
failure runs the unfinished lanes again. Steps mapped over a dynamic output would not do: steps that had not started
when the run died are skipped in the retry, and the run succeeds without them.

The outputs of the lanes are only for people to read: an executor may lose them (Dask's loses all). The last step relies
on the ticket, the store and the disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dagster as dg

from blobflow.dagster import metadata as md
from blobflow.dagster.handles import PIN, RemoteHandle, SnapshotHandle, StagedHandle, UploadHandle
from blobflow.dagster.resource import BlobflowResource
from blobflow.dagster.spec import PipelineSpec, resource_of, step_op
from blobflow.dagster.steps import Step, digest_if_gone, find_remote, find_snapshot, open_step, snapshot_facts, stage
from blobflow.mirror.update import shown
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


@dataclass(frozen=True)
class LaneHandle:
    """The result of a lane, and the run that it belongs to."""

    lane: int
    run_id: str
    parts: int
    bytes_moved: int
    bytes_resumed: int
    seconds: float


# -------------------------------------------------------------------------------------------------------------- upload


def upload_graph(spec: PipelineSpec, waits: Sequence[str]) -> dg.GraphDefinition:
    """The step `upload_snapshot` as a graph of `spec.lanes` lanes; it ends with an `UploadHandle`.

    Args:
        waits: Names of the inputs without data that the first step waits for.
    """

    @step_op(spec, "upload_plan", waits=waits, out={"snapshot": dg.Out(SnapshotHandle), "ticket": dg.Out(UploadTicket)})
    def begin(context: dg.OpExecutionContext):
        return begin_upload_lanes(context, spec, resource_of(context, spec))

    def lane_op(lane: int) -> dg.OpDefinition:
        @step_op(spec, f"upload_lane_{lane}", pool=True)
        def send(context: dg.OpExecutionContext, snapshot: SnapshotHandle, ticket: UploadTicket) -> LaneHandle:
            return upload_lane(context, spec, resource_of(context, spec), snapshot, ticket, lane)

        return send

    @step_op(spec, "upload_commit")
    def commit(
        context: dg.OpExecutionContext, snapshot: SnapshotHandle, ticket: UploadTicket, sent: list[LaneHandle]
    ) -> UploadHandle:
        return commit_upload_lanes(context, spec, resource_of(context, spec), snapshot, ticket, sent)

    def upload(**after: Any):
        snapshot, ticket = begin.alias("plan")(**after)
        sent = [lane_op(lane).alias(f"lane_{lane}")(snapshot, ticket) for lane in range(spec.lanes)]
        return commit.alias("commit")(snapshot, ticket, sent)

    return _graph(f"{spec.name}__upload", upload, waits)


def begin_upload_lanes(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource
) -> tuple[SnapshotHandle, UploadTicket]:
    """The newest snapshot, and the upload that its lanes share."""
    with open_step(context, spec, blobflow) as step:
        snapshot = find_snapshot(step)
        digest = digest_if_gone(step, snapshot)
        if digest is not None:
            return snapshot, UploadTicket(snapshot.key, "", digest, 0, 0, 0)
        ticket = begin_upload(step.store, snapshot.key, snapshot.path, profile=blobflow.get_profile())
        context.log.info(
            "upload.begun key=%s upload_id=%s parts=%d part_size=%d lanes=%d",
            *(ticket.key, ticket.upload_id, ticket.parts, ticket.part_size, spec.lanes),
        )
        return snapshot, ticket


def upload_lane(
    context: dg.OpExecutionContext,
    spec: PipelineSpec,
    blobflow: BlobflowResource,
    snapshot: SnapshotHandle,
    ticket: UploadTicket,
    lane: int,
) -> LaneHandle:
    """Send the parts of one lane."""
    with open_step(context, spec, blobflow) as step:
        if not ticket.upload_id or digest_if_gone(step, snapshot) is not None:
            return _done(step, lane, _NOTHING)
        numbers = ticket.numbers(lane, spec.lanes)
        return _done(step, lane, send_parts(step.store, ticket, snapshot.path, numbers, **step.transfer))


def commit_upload_lanes(
    context: dg.OpExecutionContext,
    spec: PipelineSpec,
    blobflow: BlobflowResource,
    snapshot: SnapshotHandle,
    ticket: UploadTicket,
    sent: list[LaneHandle],
) -> UploadHandle:
    """Check that all parts are in the store, and publish the artifact."""
    with open_step(context, spec, blobflow) as step:
        store, journal = step.store, step.journal
        metadata = snapshot_facts(store, snapshot)
        digest = digest_if_gone(step, snapshot) if ticket.upload_id else ticket.artifact_digest
        status, seconds, sent_again = "unchanged", 0.0, 0
        if digest is None:
            result = commit_upload(store, ticket, snapshot.path, lanes=spec.lanes, **step.transfer)
            digest, status = result.artifact_digest, result.status
            seconds, sent_again = result.seconds, result.bytes_sent
        if status == "unchanged":
            journal.done(transfer_id(store, snapshot.key, digest, "upload"))
        metadata |= {md.STATUS: status, md.UPLOAD_SECONDS: round(_slowest(sent) + seconds, 3)}
        metadata |= journal.metadata()
        if len(sent) == spec.lanes:
            metadata |= _lane_facts(context, sent, md.BYTES_SENT)
            metadata[md.BYTES_SENT] += sent_again
        else:
            metadata.pop(md.BYTES_RESUMED, None)
        metadata.pop(md.PARTS, None)  # the last step found all parts done, which says nothing
        context.log.info(
            "upload.done status=%s key=%s lanes=%d told=%d bytes_sent=%s bytes_resumed=%s",
            *(status, snapshot.key, spec.lanes, len(sent)),
            *(metadata.get(label, "unknown") for label in (md.BYTES_SENT, md.BYTES_RESUMED)),
        )
        context.add_output_metadata(metadata)
        return UploadHandle.of(snapshot, digest, status, metadata)


# ------------------------------------------------------------------------------------------------------------ download


def download_graph(spec: PipelineSpec, waits: Sequence[str]) -> dg.GraphDefinition:
    """The step `download_remote` as a graph of `spec.lanes` lanes; it ends with a `StagedHandle`.

    Args:
        waits: Names of the inputs without data that the first step waits for.
    """

    @step_op(
        spec,
        "download_plan",
        waits=waits,
        config_schema=PIN,
        out={"remote": dg.Out(RemoteHandle), "ticket": dg.Out(DownloadTicket)},
    )
    def begin(context: dg.OpExecutionContext):
        return begin_download_lanes(context, spec, resource_of(context, spec))

    def lane_op(lane: int) -> dg.OpDefinition:
        @step_op(spec, f"download_lane_{lane}", pool=True)
        def land(context: dg.OpExecutionContext, ticket: DownloadTicket) -> LaneHandle:
            return download_lane(context, spec, resource_of(context, spec), ticket, lane)

        return land

    @step_op(spec, "download_assemble")
    def assemble(context: dg.OpExecutionContext, remote: RemoteHandle, landed: list[LaneHandle]) -> StagedHandle:
        return assemble_download(context, spec, resource_of(context, spec), remote, landed)

    def download(**after: Any):
        remote, ticket = begin.alias("plan")(**after)
        landed = [lane_op(lane).alias(f"lane_{lane}")(ticket) for lane in range(spec.lanes)]
        return assemble.alias("assemble")(remote, landed)

    return _graph(f"{spec.name}__download", download, waits)


def begin_download_lanes(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource
) -> tuple[RemoteHandle, DownloadTicket]:
    """The artifact that the mirror must show, and the download that its lanes share."""
    with open_step(context, spec, blobflow) as step:
        remote = find_remote(step)
        importer = step.importer
        if shown(importer, remote.digest):
            return remote, DownloadTicket(remote.key, remote.digest, spec.lanes, 0, 0, 0)
        ticket = begin_download(
            step.store,
            remote.key,
            importer.staging(remote.digest),
            lanes=spec.lanes,
            profile=blobflow.get_profile(),
            expected_digest=remote.digest,
        )
        context.log.info(
            "download.begun key=%s parts=%d part_size=%d lanes=%d",
            *(ticket.key, ticket.parts, ticket.part_size, spec.lanes),
        )
        return remote, ticket


def download_lane(
    context: dg.OpExecutionContext, spec: PipelineSpec, blobflow: BlobflowResource, ticket: DownloadTicket, lane: int
) -> LaneHandle:
    """Fetch the parts of one lane."""
    with open_step(context, spec, blobflow) as step:
        importer = step.importer
        if not ticket.parts or shown(importer, ticket.artifact_digest):
            return _done(step, lane, _NOTHING)
        staging = importer.staging(ticket.artifact_digest)
        return _done(step, lane, fetch_lane(step.store, ticket, staging, lane, **step.transfer))


def assemble_download(
    context: dg.OpExecutionContext,
    spec: PipelineSpec,
    blobflow: BlobflowResource,
    remote: RemoteHandle,
    landed: list[LaneHandle],
) -> StagedHandle:
    """Fetch missing parts, verify the parts that the lanes fetched, and assemble the artifact."""
    with open_step(context, spec, blobflow) as step:
        metadata = stage(step, remote.key, remote.digest)
        if not shown(step.importer, remote.digest):
            own_bytes = metadata[md.BYTES_RECEIVED]
            if len(landed) == spec.lanes:
                metadata |= _lane_facts(context, landed, md.BYTES_RECEIVED)
                metadata[md.BYTES_RECEIVED] += own_bytes
            metadata.pop(md.PARTS, None)
            metadata[md.DOWNLOAD_SECONDS] = round(_slowest(landed) + metadata.get(md.DOWNLOAD_SECONDS, 0.0), 3)
        context.add_output_metadata(metadata)
        return StagedHandle(remote.key, remote.digest, metadata, remote.round_number)


# ---------------------------------------------------------------------------------------------------------------- both


def _graph(name: str, compose: Callable[..., Any], inputs: Sequence[str]) -> dg.GraphDefinition:
    return dg.graph(name=name, ins={each: dg.GraphIn() for each in inputs})(compose)


_NOTHING: Final = LaneResult("unchanged", bytes_total=0, seconds=0.0)


def _done(step: Step, lane: int, result: LaneResult) -> LaneHandle:
    step.log.info(
        "lane.done lane=%d status=%s parts=%d bytes_moved=%d bytes_resumed=%d seconds=%.1f",
        *(lane, result.status, result.parts, result.bytes_moved, result.bytes_resumed, result.seconds),
    )
    step.context.add_output_metadata(step.journal.metadata())
    seconds = round(result.seconds, 3)
    return LaneHandle(lane, step.context.run_id, result.parts, result.bytes_moved, result.bytes_resumed, seconds)


def _slowest(lanes: Sequence[LaneHandle]) -> float:
    return max((lane.seconds for lane in lanes), default=0.0)


def _lane_facts(context: dg.OpExecutionContext, lanes: Sequence[LaneHandle], moved_key: str) -> dict[str, Any]:
    """Metadata of what the lanes moved in this run; lanes of earlier runs count as found done."""
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
