"""Maintenance in Dagster: garbage collection and retention as jobs, and the probe as a job and as checks."""

import re
import time
from collections.abc import Collection, Sequence
from copy import copy
from typing import Any, Final

import dagster as dg
from pydantic import Field, create_model

from blobflow.dagster import metadata as md
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY, dagster_errors
from blobflow.errors import StoreUnavailable, UsageError
from blobflow.fields import KnownFields
from blobflow.maintenance.gc import DEFAULT_AGE_S, check_age, collect
from blobflow.maintenance.retention import check_rules, prune
from blobflow.stores import Store
from blobflow.stores.probe import Finding, ProbedStore, ProbeReport, probe
from blobflow.transport.catalog import REF_SUFFIX

CORRECTNESS: Final = ("create_only", "compare_and_swap", "reads_ranges")
"""Guarantees that correctness needs. Without them, two rounds may run at once and the last writer of a key wins, or
nothing can be stored at all. Without the others, transfers are slower or restart after a crash, and verifications read
more."""

RUNS_AGE_S: Final = 30 * 24 * 3600.0
"""Seconds after which a failed run is no longer continued from where it stopped."""

_ROWS: Final = 100
_UNFINISHED: Final = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]
_RUN_ID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


# No bounds in these classes: Dagster would check them where it retries. The core checks the bounds as well, and its
# errors are not retried.


class GcConfig(KnownFields, dg.Config):
    """Run config of garbage collection; see `blobflow gc`."""

    prefix: str = Field(default="", description="Prefix of the keys, a plain string.")
    older_than_s: float = Field(
        default=DEFAULT_AGE_S, description="Seconds without activity. 0 collects everything that is not in use now."
    )
    payloads: bool = Field(default=False, description="Also remove payloads without a manifest.")
    runs_older_than_s: float = Field(
        default=RUNS_AGE_S,
        description="Seconds after which values that steps of a finished run passed to each other are removed. Until"
        " then the run can be continued from where it failed.",
    )
    dry_run: bool = Field(default=False, description="Show what would be removed, and change nothing.")


class RetentionConfig(KnownFields, dg.Config):
    """Run config of retention; see `blobflow prune`."""

    prefix: str = Field(default="", description="Prefix of the keys, a plain string.")
    keep_last: int | None = Field(default=None, description="Number of artifacts to keep in each directory.")
    keep_within_s: float | None = Field(default=None, description="Seconds; younger artifacts are kept.")
    dry_run: bool = Field(default=False, description="Show what would be removed, and change nothing.")


class ProbeConfig(KnownFields, dg.Config):
    """Run config of the probe; see `blobflow probe`."""

    fresh: bool = Field(default=True, description="Probe again, and ignore an earlier report.")


def gc_job(
    name: str = "blobflow_gc",
    *,
    prefix: str = "",
    older_than_s: float = DEFAULT_AGE_S,
    payloads: bool = False,
    runs_older_than_s: float = RUNS_AGE_S,
    handoff: str = "handoff",
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
) -> dg.JobDefinition:
    """A job that removes leftovers of killed uploads, probes and finished runs from the store; safe at any time.

    Run it once a day: `dg.ScheduleDefinition(job=gc_job(), cron_schedule="0 3 * * *")`. The arguments are defaults that
    the Launchpad can change; there is also `dry_run`.

    Args:
        name: Name of the job.
        prefix: Prefix of the keys, a plain string.
        older_than_s: Seconds without activity.
        payloads: Also remove payloads without a manifest.
        runs_older_than_s: Seconds after which values that steps of finished runs passed to each other are removed.
            These are the values of `HandoffIOManager`, and the refs of `ArtifactIOManager` for outputs of ops. `prefix`
            does not apply to them.
        handoff: The `prefix` of the `HandoffIOManager`.
        retry_policy: Retries if an object cannot be removed at the moment.
        resource_key: Key of the `BlobflowResource` among the resources.

    Raises:
        UsageError: an age is below 0.
    """
    check_age(older_than_s)
    check_age(runs_older_than_s)
    node = f"{name}__collect"
    defaults = GcConfig(
        prefix=prefix, older_than_s=older_than_s, payloads=payloads, runs_older_than_s=runs_older_than_s
    )
    settings_of_run = _defaulting_to(defaults)

    @dg.op(name=node, required_resource_keys={resource_key}, retry_policy=retry_policy)
    def collect_garbage(
        context: dg.OpExecutionContext,
        config: settings_of_run,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        with dagster_errors(context, retry_policy):
            _collect(context, getattr(context.resources, resource_key).get_store(), config, handoff)

    @dg.job(
        name=name,
        description="Removes leftovers of killed uploads, probes and finished runs from the store.",
        config=dg.RunConfig(ops={node: defaults}),
    )
    def gc() -> None:
        collect_garbage()

    return gc


def _collect(context: dg.OpExecutionContext, store: Store, config: GcConfig, handoff: str) -> None:
    """Remove leftovers, and show them as metadata.

    Raises:
        StoreUnavailable: something could not be removed.
    """
    check_age(config.runs_older_than_s)
    report = collect(
        store,
        config.prefix,
        older_than_s=config.older_than_s,
        payloads=config.payloads,
        dry_run=config.dry_run,
    )
    runs = _runs_handed_on(context.instance, store, handoff, config.runs_older_than_s)
    if not config.dry_run:
        for key in (key for keys in runs.values() for key in keys):
            store.delete(key)
    found = [
        *(("upload", upload.key) for upload in report.uploads),
        *(("intent", key) for key in report.intents),
        *(("trial of a probe", key) for key in report.trials),
        *(("payload", key) for key in report.payloads),
        *(("handed on in a run", key) for keys in runs.values() for key in keys),
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
            md.GC_RUNS: len(runs),
            md.GC_FOUND: _table(("what", "key"), found[:_ROWS]),
        }
    )
    context.log.info(
        "gc.done dry_run=%s uploads=%d uploads_kept=%d intents=%d "
        "trials=%d payloads=%d runs=%d unreadable=%d failed=%d",
        *(report.dry_run, len(report.uploads), report.uploads_kept, len(report.intents)),
        *(len(report.trials), len(report.payloads), len(runs), len(report.unreadable), len(report.failed)),
    )
    _raise_if_any(report.failed)


def retention_job(
    name: str = "blobflow_retention",
    *,
    prefix: str = "",
    keep_last: int | None = None,
    keep_within_s: float | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
) -> dg.JobDefinition:
    """A job that removes artifacts that no rule keeps and no ref names. It is safe beside transfers.

    ```python
    keep = retention_job(prefix="orders/", keep_last=14, keep_within_s=30 * 24 * 3600)
    schedule = dg.ScheduleDefinition(job=keep, cron_schedule="30 3 * * *")
    ```

    The arguments are defaults that the Launchpad can change; there is also `dry_run`.

    Args:
        name: Name of the job.
        prefix: Prefix of the keys, a plain string.
        keep_last: Number of artifacts to keep in each directory. A pipeline has a directory for each partition.
        keep_within_s: Seconds; younger artifacts are kept.
        retry_policy: Retries if an object cannot be removed at the moment.
        resource_key: Key of the `BlobflowResource` among the resources.

    Raises:
        UsageError: no rule is given, or a rule would keep nothing.
    """
    check_rules(keep_last, keep_within_s)
    node = f"{name}__prune"
    defaults = RetentionConfig(prefix=prefix, keep_last=keep_last, keep_within_s=keep_within_s)
    settings_of_run = _defaulting_to(defaults)

    @dg.op(name=node, required_resource_keys={resource_key}, retry_policy=retry_policy)
    def prune_artifacts(
        context: dg.OpExecutionContext,
        config: settings_of_run,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        with dagster_errors(context, retry_policy):
            report = prune(
                getattr(context.resources, resource_key).get_store(),
                config.prefix,
                keep_last=config.keep_last,
                keep_within_s=config.keep_within_s,
                dry_run=config.dry_run,
            )
            found = [
                *(("removed", key) for key in report.removed),
                *(("kept, a ref names it", key) for key in report.named),
                *(("left alone, an upload is under way", key) for key in report.busy),
                *(("failed, left for the next time", key) for key in report.failed),
            ]
            context.add_output_metadata(
                {
                    md.PRUNE_DRY_RUN: report.dry_run,
                    md.PRUNE_REMOVED: len(report.removed),
                    md.PRUNE_KEPT: report.kept,
                    md.PRUNE_NAMED: len(report.named),
                    md.PRUNE_FOUND: _table(("what", "key"), found[:_ROWS]),
                }
            )
            context.log.info(
                "prune.done dry_run=%s removed=%d kept=%d named=%d busy=%d failed=%d",
                *(report.dry_run, len(report.removed), report.kept, len(report.named)),
                *(len(report.busy), len(report.failed)),
            )
            _raise_if_any(report.failed)

    @dg.job(
        name=name,
        description="Removes old artifacts, but none that a ref names.",
        config=dg.RunConfig(ops={node: defaults}),
    )
    def retention() -> None:
        prune_artifacts()

    return retention


def _defaulting_to(config: dg.Config) -> Any:
    """The class of `config`, with its values as defaults.

    The Launchpad shows the job's configuration. Without these defaults, a run that is given a part of it would lose
    the rest.
    """
    fields: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        own = copy(field)
        own.default = getattr(config, name)
        fields[name] = (field.annotation, own)
    return create_model(type(config).__name__, __base__=type(config), **fields)


def _runs_handed_on(
    instance: dg.DagsterInstance, store: Store, handoff: str, older_than_s: float
) -> dict[str, list[str]]:
    """The keys of values that steps passed to each other, by run, for runs that will not be continued."""
    under_way = {run.root_run_id or run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))}
    before = time.time() - older_than_s
    found: dict[str, list[str]] = {}
    values, refs = r"[^/]+\.json", "[^/]+/[^/]+" + re.escape(REF_SUFFIX)
    for prefix, what in ((f"{handoff}/runs/", values), ("runs/", refs)):
        # Not every key there: a pipeline may be named `runs`.
        pattern = re.compile(f"{re.escape(prefix)}({_RUN_ID})/(?:[^/]+/)+{what}")
        for meta in store.list(prefix):
            named = pattern.fullmatch(meta.key)
            if named and meta.last_modified is not None and meta.last_modified.timestamp() <= before:
                found.setdefault(named[1], []).append(meta.key)
    for run_id in list(found):
        run = instance.get_run_by_id(run_id)  # None: deleted, or of another Dagster; then only its age counts
        if ((run.root_run_id if run else None) or run_id) in under_way:
            del found[run_id]  # a retry may still read it
    return found


def _raise_if_any(failed: Sequence[str]) -> None:
    if failed:
        raise StoreUnavailable(
            f"{len(failed)} keys could not be removed, for example {failed[0]!r}",
            hint="run the job again; it continues with the keys that are left",
            operation="delete",
            key=failed[0],
        )


def probe_job(
    name: str = "blobflow_probe",
    *,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    resource_key: str = "blobflow",
) -> dg.JobDefinition:
    """A job that probes the store's server again.

    Run it after the server was updated, or after something was put in front of it. The run shows the findings as a
    table. The report is stored in the store. If it lacks a capability, other users and machines probe again. The job
    needs the permissions of an upload.

    Args:
        name: Name of the job.
        retry_policy: Retries after temporary errors.
        resource_key: Key of the `BlobflowResource` among the resources.
    """

    @dg.op(name=f"{name}__probe", required_resource_keys={resource_key}, retry_policy=retry_policy)
    def probe_store(context: dg.OpExecutionContext, config: ProbeConfig) -> None:
        with dagster_errors(context, retry_policy):
            report = _report(getattr(context.resources, resource_key).get_store(), fresh=config.fresh)
            rows = [
                (name.replace("_", " "), "yes" if finding.holds else "no", finding.evidence)
                for name, finding in report.findings.items()
            ]
            findings = _table(("capability", "holds", "evidence"), rows)
            context.add_output_metadata({**_about(report), md.FINDINGS: findings})
            lost = [name for name, finding in report.findings.items() if not finding.holds]
            context.log.info("probe.done store=%s software=%s lost=%s", report.store, report.software, ",".join(lost))

    @dg.job(name=name, description="Probes which capabilities the store's server has, and shows them.")
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
    """Asset checks, one for each guarantee of the store: whether it holds, and the evidence.

    If this user probed on this machine in the last 30 days, the checks show that report, which costs one request.
    Otherwise they probe.

    Args:
        asset: The asset that shows the checks: `pipeline.remote`, for example.
        errors: Guarantees whose loss is an error; the loss of others is a warning. The names are those of the fields
            of `ProbeReport`.
        name: Name of the op.
        retry_policy: Retries after temporary errors.
        resource_key: Key of the `BlobflowResource` among the resources.

    Raises:
        UsageError: a name in `errors` is not a guarantee.
    """
    guarantees = ProbeReport.guarantees()
    unknown = sorted(set(errors) - guarantees.keys())
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a guarantee", hint=f"the guarantees are: {', '.join(guarantees)}")

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
        for guarantee in guarantees:
            # A guarantee that was not tried passes, because nothing relies on it.
            finding = report.findings.get(guarantee, _NOT_TRIED)
            yield dg.AssetCheckResult(
                passed=finding.holds,
                check_name=guarantee,
                severity=dg.AssetCheckSeverity.ERROR if guarantee in errors else dg.AssetCheckSeverity.WARN,
                description=finding.evidence,
                metadata=_about(report),
            )

    return check


_NOT_TRIED: Final = Finding(holds=True, evidence="not tried: nothing depends on it on this server")


def _report(store: Store, *, fresh: bool) -> ProbeReport:
    """The probe report of a store; a store that is not a server is probed each time."""
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
