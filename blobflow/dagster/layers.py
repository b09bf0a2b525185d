"""`layer_assets`: the directories of containers as assets, each a layer in the store; and a job that restores them.

| asset | materialized means |
|---|---|
| `[*key_prefix, container]` | the directory, as it was then, is a complete layer, and the container's ref names it |

A sync that found nothing to send materializes as well; its `blobflow/status` is `unchanged` or `shared`. The data
version is the digest of the content, so downstream assets see only real changes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from blobflow.backends.directory import Symlinks
from blobflow.backends.patterns import ExcludePatterns
from blobflow.dagster import metadata as md
from blobflow.dagster.checkpoints import step_journal
from blobflow.dagster.failures import DEFAULT_RETRY_POLICY
from blobflow.dagster.resource import BlobflowResource
from blobflow.errors import UsageError
from blobflow.fields import KnownFields, check_choice
from blobflow.layers.names import CONTAINERS


class LayerRestoreConfig(KnownFields, dg.Config):
    """Run config of a restore: which layer, and where to; see `blobflow layer restore`."""

    container: str = Field(description="Container whose layer is restored.")
    path: str = Field(description="Absolute path of the directory to restore to.")
    overwrite: bool = Field(default=False, description="Replace a directory at the path, whatever it contains.")


def layer_assets(
    containers: Mapping[str, str | Path],
    *,
    key_prefix: Sequence[str] = ("layers",),
    group_name: str = "layers",
    level: int | None = None,
    exclude: Sequence[str] = (),
    symlinks: Symlinks = "refuse",
    state: str | None = None,
    home: str | Path | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    pool: str | None = None,
    deps: Mapping[str, Sequence[dg.AssetKey | Sequence[str] | str]] | None = None,
    resource_key: str = "blobflow",
) -> list[dg.AssetsDefinition]:
    """An asset for each container, whose materialization syncs its directory as a layer.

    After a killed step, the next run continues the upload, on any machine that has the directory. Two containers with
    the same content share one upload; if they sync at the same time, one of them is retried.

    Args:
        containers: Directories by the names of their containers.
        key_prefix: Prefix of the assets' keys, before the container's name.
        level: Compression level of zstd; 3 by default.
        exclude, symlinks: The same as in `DirectoryExporter`.
        state: SQLAlchemy URL of a database that machines share, for example Dagster's own.
        home: Directory for the stat cache and, without `state`, the state; by default the user's.
        retry_policy: Retries after temporary errors; other errors fail the step at once.
        pool: Concurrency pool; each sync takes a slot.
        deps: Assets that a container's sync waits for, by container.
        resource_key: Key of the `BlobflowResource` among the resources.

    Raises:
        UsageError: `deps` names an unknown container, or a pattern of `exclude` can never match.
    """
    if unknown := sorted((deps or {}).keys() - containers.keys()):
        raise UsageError(
            f"deps names {unknown[0]!r}, which is not a container", hint=f"the containers are {', '.join(containers)}"
        )
    ExcludePatterns(exclude)  # refuses a pattern now, not in every run
    check_choice("symlinks", symlinks, Symlinks)
    options: dict[str, Any] = {"exclude": tuple(exclude), "symlinks": symlinks, "state": state, "home": home}
    if level is not None:
        options["level"] = level

    def made(container: str, path: Path) -> dg.AssetsDefinition:
        @dg.asset(
            key=[*key_prefix, container],
            group_name=group_name,
            description=f"The layer of {container}: the content of {path}, compressed, in the store.",
            kinds={"blobflow", "directory"},
            deps=(deps or {}).get(container, ()),
            required_resource_keys={resource_key},
            retry_policy=retry_policy,
            pool=pool,
        )
        def synced(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
            with _layers(context.op_execution_context, resource_key, retry_policy, options) as (layers, journal):
                result = layers.sync(container, path)
                context.log.info(
                    "layer.sync status=%s container=%s key=%s bytes_sent=%d bytes_resumed=%d files_read=%d",
                    *(result.status, container, result.key, result.bytes_sent, result.bytes_resumed, result.files_read),
                )
                return dg.MaterializeResult(
                    data_version=dg.DataVersion(result.digest),
                    metadata={
                        **journal.metadata(),
                        md.STATUS: result.status,
                        md.URI: f"{layers.store.url}/{result.key}",
                        md.KEY: result.key,
                        md.REF: f"{CONTAINERS}{container}",
                        md.LAYER_DIGEST: result.digest,
                        md.SIZE: result.layer.object_size,
                        md.TAR_SIZE: result.layer.tar_size,
                        md.CODEC: result.layer.codec,
                        md.FILES_READ: result.files_read,
                        **md.left_out(result, context.log),
                        md.BYTES_SENT: result.bytes_sent,
                        md.BYTES_RESUMED: result.bytes_resumed,
                        md.PARTS: result.parts,
                        md.SYNC_SECONDS: round(result.seconds, 3),
                        **md.throughput(result.bytes_sent, result.seconds),
                    },
                )

        return synced

    return [made(container, Path(path)) for container, path in containers.items()]


def layer_restore_job(
    name: str = "blobflow_layer_restore",
    *,
    state: str | None = None,
    home: str | Path | None = None,
    retry_policy: dg.RetryPolicy | None = DEFAULT_RETRY_POLICY,
    pool: str | None = None,
    resource_key: str = "blobflow",
) -> dg.JobDefinition:
    """A job that restores a container's layer from the store; its run config names container and path.

    Args:
        name: Name of the job.
        state, home: The same as in `layer_assets`.
        retry_policy: Retries after temporary errors; a retry does not fetch again what is on the disk.
        pool: Concurrency pool; each restore takes a slot.
        resource_key: Key of the `BlobflowResource` among the resources.
    """
    options: dict[str, Any] = {"state": state, "home": home}

    @dg.op(name=f"{name}__restore", required_resource_keys={resource_key}, retry_policy=retry_policy, pool=pool)
    def restore_layer(context: dg.OpExecutionContext, config: LayerRestoreConfig) -> None:
        with _layers(context, resource_key, retry_policy, options) as (layers, journal):
            result = layers.restore(config.container, config.path, overwrite=config.overwrite)
            context.log.info(
                "layer.restore status=%s container=%s path=%s bytes_received=%d bytes_resumed=%d",
                *(result.status, config.container, result.path, result.bytes_received, result.bytes_resumed),
            )
            if result.kept:
                context.log.warning("layer.kept path=%s: another process wrote to it at the last moment", result.kept)
            context.add_output_metadata(
                {
                    **journal.metadata(),
                    md.STATUS: result.status,
                    md.KEY: result.key,
                    md.LAYER_DIGEST: result.digest,
                    md.MIRROR_PATH: dg.MetadataValue.path(result.path),
                    md.BYTES_RECEIVED: result.bytes_received,
                    md.BYTES_RESUMED: result.bytes_resumed,
                    md.DOWNLOAD_SECONDS: round(result.seconds, 3),
                }
            )

    @dg.job(name=name, description="Restores the layer of a container as a directory.")
    def restore() -> None:
        restore_layer()

    return restore


@contextmanager
def _layers(
    context: dg.OpExecutionContext,
    resource_key: str,
    retry_policy: dg.RetryPolicy | None,
    options: Mapping[str, Any],
):
    """Yields the layers of the resource's store, and the step's journal; raises the core's errors as Dagster's."""
    from blobflow.layers import LayerSync  # zstd and SQL are needed in steps only

    with step_journal(context, retry_policy) as journal:
        blobflow: BlobflowResource = getattr(context.resources, resource_key)
        watch: Callable[[int, int], None] = journal.watch("scan")
        yield (
            LayerSync(
                blobflow.get_store(),
                profile=blobflow.get_profile(),
                on_progress=journal.progress,
                on_checkpoint=journal.save,
                on_scan=watch,
                **options,
            ),
            journal,
        )
