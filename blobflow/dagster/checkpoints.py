"""Checkpoints of transfers as observations of the asset `blobflow/transfers`, one partition per transfer.

The partition is named after kind and key (`upload-orders_monday_tar-<32 digits>`), and each description names the key.

An observation is stored when it is logged (10 ms) and is never overwritten. It shows in the run's log and in the
asset's plots. Any later run finds it by the transfer's id (3 ms): a retry in the same run, a re-execution from failure,
a run after a killed worker, and a run that knows nothing of the earlier one.

```python
journal = transfer_journal(context)
upload(store, key, artifact, on_progress=journal.progress, on_checkpoint=journal.save)
context.add_output_metadata(journal.metadata())
```
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import dagster as dg

from blobflow.dagster import metadata as md
from blobflow.dagster.failures import dagster_errors
from blobflow.dagster.fencing import RunFence
from blobflow.errors import UsageError
from blobflow.transport import ProgressEvent
from blobflow.transport.checkpoints import Checkpoint, TransferJournal
from blobflow.uploads.progress import TransferRecord

TRANSFERS: Final = dg.AssetKey(["blobflow", "transfers"])
"""Asset key of the journal. It needs no definition and no partitions: an observation may name any partition."""
LIVE_S: Final = 30.0
"""Seconds without a checkpoint after which a transfer records its progress."""
_LINE_S: Final = 10.0
_LINE_SHARE: Final = 0.1
_MIN_LINE_S: Final = 1.0

StepContext: TypeAlias = dg.OpExecutionContext | dg.AssetExecutionContext | dg.OutputContext | dg.InputContext


def transfer_journal(
    context: StepContext, *, instance: dg.DagsterInstance | None = None, run_id: str | None = None
) -> "StepJournal":
    """The journal of the transfers of one step.

    Args:
        context: Context of an op, of an asset, or of an IO manager's output or input.
        instance: Required with an `OutputContext`, which does not have it. An IO manager finds it as `context.instance`
            in `setup_for_execution`.
        run_id: Needed with an `InputContext`, which does not have it (`context.run.run_id` in `setup_for_execution`).
            Without it, the step does not notice the end of its run. Observations of inputs belong to no run.

    Raises:
        UsageError: `context` has no instance, and none is given.
    """
    write: Callable[[dg.AssetObservation], None]
    if isinstance(context, dg.InputContext):
        instance = instance or context.instance
        write = instance.report_runless_asset_event
    elif isinstance(context, dg.OutputContext):
        if instance is None:
            raise UsageError(
                "an OutputContext does not have the Dagster instance",
                hint="keep `context.instance` in setup_for_execution, and pass it as `instance`",
            )
        run_id = run_id or context.run_id
        write = context.log_event
    else:
        if isinstance(context, dg.AssetExecutionContext):
            context = context.op_execution_context
        instance = instance or context.instance
        run_id = run_id or context.run_id
        write = context.log_event
    return StepJournal(
        ObservationCheckpoints(instance, write), RunFence(instance, run_id), context.log.info, writer=run_id
    )


@contextmanager
def step_journal(context: dg.OpExecutionContext, retry_policy: dg.RetryPolicy | None) -> Iterator["StepJournal"]:
    """Yields the journal of a step; raises the core's errors as Dagster's, with the step's progress as metadata."""
    journal = transfer_journal(context)
    with dagster_errors(context, retry_policy, journal.metadata, fence=journal.fence):
        yield journal


class ObservationCheckpoints:
    """Keeps checkpoints as observations of `TRANSFERS`.

    Args:
        write: Stores an observation before it returns.
    """

    def __init__(self, instance: dg.DagsterInstance, write: Callable[[dg.AssetObservation], None]) -> None:
        self._instance = instance
        self._write = write

    def read(self, transfer_id: str) -> str | None:
        wanted = dg.AssetRecordsFilter(asset_key=TRANSFERS, asset_partitions=[transfer_id])
        for record in self._instance.fetch_observations(wanted, limit=1).records:
            observation = record.asset_observation
            value = observation.metadata.get(md.CHECKPOINT) if observation else None
            if isinstance(value, dg.JsonMetadataValue):
                return json.dumps(value.data)
        return None

    def append(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        self._write(
            dg.AssetObservation(
                TRANSFERS,
                partition=record.transfer_id,
                description=f"{record.kind} of {record.key!r} {record.state}, {_percent(record):.0f} %",
                metadata={
                    md.STATUS: record.state,
                    **transfer_facts(checkpoint),
                    md.CHECKPOINT: dg.MetadataValue.json(json.loads(checkpoint.to_json())),
                },
            )
        )


class StepJournal(TransferJournal):
    """The journal of one step: it also shows progress, and ends the step when its run is over.

    Args:
        checkpoints: Where the checkpoints are kept.
        fence: Fence of the step's run.
        write: Writes a line to the step's log.
    """

    def __init__(
        self,
        checkpoints: ObservationCheckpoints,
        fence: RunFence,
        write: Callable[[str], None],
        *,
        writer: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(checkpoints, writer=writer, clock=clock)
        self.fence = fence
        self._line = write
        self._lines: dict[str, ProgressLog] = {}
        self._record: TransferRecord | None = None

    def save(self, record: TransferRecord) -> Checkpoint | None:
        """`on_checkpoint` of uploads, downloads and verifications.

        Raises:
            StepOrphaned: the run is over. The last record of a failing transfer is still written.
        """
        if record.state == "running":
            self.fence.check()
        first = self.written(record.transfer_id) is None
        self._record = record
        checkpoint = super().save(record)
        if checkpoint is not None and first and checkpoint.continues:
            self._line(
                f"{record.kind}.resumed attempt={checkpoint.attempt} after={checkpoint.continues}"
                f" resumed_from_bytes={record.bytes_resumed} parts={record.parts_resumed}/{record.parts_total}"
            )
        return checkpoint

    def progress(self, event: ProgressEvent) -> None:
        """`on_progress` of uploads, downloads and verifications.

        Raises:
            StepOrphaned: the run is over.
        """
        self.watch(event.phase)(event.bytes_done, event.bytes_total, event.bytes_resumed)
        record = self._record
        if record is None or record.state != "running":
            return
        shown = self.written(record.transfer_id)
        if shown is not None and self._clock() - shown.saved_at >= LIVE_S:
            super().save(_advanced(record, event.bytes_done))

    def watch(self, phase: str) -> Callable[..., None]:
        """`on_progress` of exports and imports: takes the bytes done, all bytes, and the bytes resumed."""
        lines = self._lines.setdefault(phase, ProgressLog(self._line, phase))

        def watch(done: int, total: int, resumed: int = 0) -> None:
            self.fence.check()
            lines.bytes(done, total, resumed)

        return watch

    def metadata(self) -> dict[str, Any]:
        """Facts of the step's last transfer for its materialization or failure; empty without a transfer."""
        checkpoint = self.written(self._record.transfer_id) if self._record else None
        if checkpoint is None:
            return {}
        facts = transfer_facts(checkpoint)
        facts.pop(md.SIZE)
        return facts | md.parts_table(checkpoint.record)


def transfer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as metadata: numbers under constant labels, so that Dagster plots them."""
    record = checkpoint.record
    facts: dict[str, Any] = {
        md.BYTES_DONE: record.bytes_done,
        md.SIZE: record.bytes_total,
        md.PERCENT: round(_percent(record), 1),
        md.PARTS_DONE: record.parts_done,
        md.BYTES_RESUMED: record.bytes_resumed,
        md.THROUGHPUT: round(checkpoint.bytes_per_s / 1e6, 3),
        md.RETRIES: checkpoint.attempt - 1,
    }
    if checkpoint.continues:
        # A process outside of Dagster names itself by host and pid.
        is_run = "/" not in checkpoint.continues
        facts[md.CONTINUES] = dg.MetadataValue.dagster_run(checkpoint.continues) if is_run else checkpoint.continues
    return facts


def _percent(record: TransferRecord) -> float:
    return 100 * record.bytes_done / record.bytes_total if record.bytes_total else 100.0


def _advanced(record: TransferRecord, bytes_done: int) -> TransferRecord:
    """A copy of `record` with the progress since its checkpoint."""
    more = max(0, bytes_done - record.bytes_done)
    parts = record.parts_done + -(-more // record.part_size)
    return record.model_copy(update={"bytes_done": record.bytes_done + more, "parts_done": parts})


# ------------------------------------------------------------------------------------------------ progress in the log


class ProgressLog:
    """Writes a line every 10 s, or after every 10 %, but at most one a second.

    Args:
        write: Writes a line to the log.
        phase: Name of the work, such as `upload`; lines begin with it.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, write: Callable[[str], None], phase: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._phase = phase
        self._clock = clock
        self._started = self._shown = clock()
        self._shown_bytes = 0

    def transfer(self, event: ProgressEvent) -> None:
        """`on_progress` of uploads, downloads and verifications."""
        self.bytes(event.bytes_done, event.bytes_total, event.bytes_resumed)

    def bytes(self, done: int, total: int, resumed: int = 0) -> None:
        """`on_progress` of exports and imports."""
        now = self._clock()
        silence = now - self._shown
        if silence < _LINE_S and (silence < _MIN_LINE_S or done - self._shown_bytes < _LINE_SHARE * total):
            return
        self._shown, self._shown_bytes = now, done
        speed = (done - resumed) / 1e6 / (now - self._started)
        percent = 100 * done / total if total else 100.0
        self._write(f"{self._phase}.progress percent={percent:.0f} bytes={done} of={total} mb_per_s={speed:.1f}")


def count_log(
    write: Callable[[str], None], phase: str, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """An `on_progress` that counts items instead of bytes: a line every 10 s."""
    shown = clock()

    def count(done: int, total: int) -> None:
        nonlocal shown
        if clock() - shown >= _LINE_S:
            shown = clock()
            write(f"{phase}.progress percent={100 * done / max(total, 1):.0f} done={done} of={total}")

    return count
