"""What an operator wants done now and then: garbage collection, and the probe of the store as a job and as checks."""

from collections.abc import Collection, Sequence
from typing import Any, Final

import dagster as dg
from pydantic import Field

from blobflow.dagster import metadata as md
from blobflow.dagster.failures import dagster_errors
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.gc import DEFAULT_AGE_S, collect
from blobflow.stores import Store
from blobflow.stores.probe import ProbedStore, ProbeReport, probe

CORRECTNESS: Final = ("create_only", "compare_and_swap")
"""Guarantees without which two rounds may run at once and the last writer of a key wins. Without the others, transfers
are slower or begin anew after a crash, and verifications read more."""

DEFAULT_RETRY_POLICY: Final = dg.RetryPolicy(max_retries=3, delay=30, backoff=dg.Backoff.EXPONENTIAL)

_ROWS: Final = 100


class GcConfig(dg.Config):
    """What to collect; see `blobflow gc`."""

    prefix: str = Field(default="", description="Of the keys, a plain string.")
    older_than_s: float = Field(
        default=DEFAULT_AGE_S, ge=0, description="Seconds without a sign of life. 0: all that nobody works on now."
    )
    payloads: bool = Field(default=False, description="Also remove payloads whose manifest never came.")
    dry_run: bool = Field(default=False, description="Show what would go, change nothing.")


class ProbeConfig(dg.Config):
    """How to probe; see `blobflow probe`."""

    fresh: bool = Field(default=True, description="Try everything out again, whatever the report in the store says.")


def gc_job(
    name: str = "blobflow_gc",
    *,
    prefix: str = "",
    older_than_s: float = DEFAULT_AGE_S,
    payloads: bool = False,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
) -> dg.JobDefinition:
    """A job that removes what killed uploads and probes left in the store; safe at any time, next to transfers.

    Run it once a day: `dg.ScheduleDefinition(job=gc_job(), cron_schedule="0 3 * * *")`. The arguments are defaults that
    the Launchpad can change; there is also `dry_run`.

    Args:
        name: Of the job.
        prefix: Of the keys, a plain string.
        older_than_s: Seconds without a sign of life.
        payloads: Also remove payloads whose manifest never came.
        retry_policy: For what could not be removed at the moment.
        resource_key: Under which the `BlobflowResource` is found.
    """
    node = f"{name}__collect"

    @dg.op(name=node, required_resource_keys={resource_key}, retry_policy=retry_policy)
    def collect_garbage(context: dg.OpExecutionContext, config: GcConfig) -> None:
        with dagster_errors(context, retry_policy):
            store = getattr(context.resources, resource_key).get_store()
            report = collect(
                store,
                config.prefix,
                older_than_s=config.older_than_s,
                payloads=config.payloads,
                dry_run=config.dry_run,
            )
            found = [
                *(("upload", upload.key) for upload in report.uploads),
                *(("intent", key) for key in report.intents),
                *(("trial of a probe", key) for key in report.trials),
                *(("payload", key) for key in report.payloads),
                *(("unreadable intent, left alone", key) for key in report.unreadable),
                *(("failed, left for the next time", key) for key in report.failed),
            ]
            context.add_output_metadata(
                {
                    md.GC_DRY_RUN: report.dry_run,
                    md.GC_UPLOADS: len(report.uploads),
                    md.GC_UPLOADS_KEPT: report.uploads_kept,
                    md.GC_INTENTS: len(report.intents),
                    md.GC_TRIALS: len(report.trials),
                    md.GC_PAYLOADS: len(report.payloads),
                    md.GC_FOUND: _table(("what", "key"), found[:_ROWS]),
                }
            )
            context.log.info(
                "gc.done dry_run=%s uploads=%d uploads_kept=%d intents=%d "
                "trials=%d payloads=%d unreadable=%d failed=%d",
                *(report.dry_run, len(report.uploads), report.uploads_kept, len(report.intents)),
                *(len(report.trials), len(report.payloads), len(report.unreadable), len(report.failed)),
            )
            if report.failed:
                raise StoreUnavailable(
                    f"{len(report.failed)} of the keys could not be collected, for example {report.failed[0]!r}",
                    hint="run the job again; what was removed is removed",
                    key=report.failed[0],
                )

    defaults = GcConfig(prefix=prefix, older_than_s=older_than_s, payloads=payloads)

    @dg.job(
        name=name,
        description="Removes what killed uploads and probes left in the store.",
        config=dg.RunConfig(ops={node: defaults}),
    )
    def gc() -> None:
        collect_garbage()

    return gc


def probe_job(
    name: str = "blobflow_probe",
    *,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
) -> dg.JobDefinition:
    """A job that tries out anew what the store's server can do, and leaves the report in the store for everybody.

    For the day on which the server was updated, or something was put in front of it. The run shows the findings as a
    table. It needs the rights of an upload.

    Args:
        name: Of the job.
        retry_policy: For errors that pass.
        resource_key: Under which the `BlobflowResource` is found.
    """

    @dg.op(name=f"{name}__probe", required_resource_keys={resource_key}, retry_policy=retry_policy)
    def probe_store(context: dg.OpExecutionContext, config: ProbeConfig) -> None:
        with dagster_errors(context, retry_policy):
            report = _report(getattr(context.resources, resource_key).get_store(), fresh=config.fresh)
            rows = [
                (name.replace("_", " "), "yes" if finding.holds else "no", finding.evidence)
                for name, finding in report.findings.items()
            ]
            context.add_output_metadata({**_about(report), md.FINDINGS: _table(("ability", "holds", "evidence"), rows)})
            lost = [name for name, finding in report.findings.items() if not finding.holds]
            context.log.info("probe.done store=%s software=%s lost=%s", report.store, report.software, ",".join(lost))

    @dg.job(name=name, description="Tries out what the store's server can do, and leaves the report in the store.")
    def probe_the_store() -> None:
        probe_store()

    return probe_the_store


def probe_check(
    asset: dg.AssetsDefinition | dg.AssetSpec | dg.AssetKey | Sequence[str] | str,
    *,
    errors: Collection[str] = CORRECTNESS,
    name: str = "blobflow_probe_check",
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
) -> dg.AssetChecksDefinition:
    """Checks of an asset, one for each guarantee of its store: does it hold, and what was seen of it?

    The report in the store is used if there is one of the last 30 days, which costs one request.

    Args:
        asset: The asset that shows them: `pipeline.remote`, for example.
        errors: Guarantees whose loss is an error; that of the others is a warning. The names are those of the fields
            of `ProbeReport`.
        name: Of the op.
        retry_policy: For errors that pass.
        resource_key: Under which the `BlobflowResource` is found.

    Raises:
        UsageError: `errors` names no guarantee.
    """
    guarantees = {n: field.description or "" for n, field in ProbeReport.model_fields.items() if n not in _ABOUT}
    unknown = sorted(set(errors) - guarantees.keys())
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no guarantee", hint=f"there are: {', '.join(guarantees)}")

    key = asset.key if isinstance(asset, dg.AssetSpec) else asset

    @dg.multi_asset_check(
        name=name,
        specs=[dg.AssetCheckSpec(n, asset=key, description=text) for n, text in guarantees.items()],
        required_resource_keys={resource_key},
        retry_policy=retry_policy,
    )
    def check(context: dg.AssetCheckExecutionContext):
        with dagster_errors(context.op_execution_context, retry_policy):
            report = _report(getattr(context.resources, resource_key).get_store(), fresh=False)
        for guarantee, finding in report.findings.items():
            is_error = guarantee in errors
            yield dg.AssetCheckResult(
                passed=finding.holds,
                check_name=guarantee,
                severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
                description=finding.evidence,
                metadata=_about(report),
            )

    return check


_ABOUT: Final = ("store", "endpoint", "software", "probed_at")


def _report(store: Store, *, fresh: bool) -> ProbeReport:
    """What a store can do; those that are no servers are tried out whenever somebody asks."""
    return store.report(fresh=fresh) if isinstance(store, ProbedStore) else probe(store)


def _about(report: ProbeReport) -> dict[str, Any]:
    return {
        md.URI: report.store,
        md.SOFTWARE: report.software or "none",
        md.PROBED_AT: dg.MetadataValue.timestamp(report.probed_at),
    }


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> dg.TableMetadataValue:
    records = [dg.TableRecord(dict(zip(columns, row, strict=True))) for row in rows]
    return dg.MetadataValue.table(records, dg.TableSchema([dg.TableColumn(column) for column in columns]))
