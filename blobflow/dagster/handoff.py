"""Keeps the handles that steps pass to each other in the store, for workers that share nothing else.

```python
blobflow = BlobflowResource(store="s3://backups/orders", scratch_dir="/mnt/shared/blobflow")
resources = {"blobflow": blobflow, "io_manager": HandoffIOManager(blobflow=blobflow)}
```

The handles of pipelines are small: a key, a digest, an upload id. They are written as JSON of at most 8 MiB, never as
a pickle: write access to the store must not be enough to run code on the workers.
"""

import base64
import json
from dataclasses import fields
from typing import Any, Final, cast

import dagster as dg
from pydantic import Field, PrivateAttr

from blobflow.dagster.failures import io_manager_errors, waits_logged
from blobflow.dagster.fencing import RunFence
from blobflow.dagster.handles import MirrorHandle, RemoteHandle, SnapshotHandle, StagedHandle, UploadHandle
from blobflow.dagster.lanes import LaneHandle
from blobflow.dagster.resource import BlobflowResource, Configured
from blobflow.errors import ObjectNotFound, UsageError
from blobflow.stores.base import key_segment
from blobflow.transport import DownloadTicket, UploadTicket

MAX_BYTES: Final = 8 << 20

_KINDS: Final = {
    kind.__name__: kind
    for kind in (
        SnapshotHandle,
        UploadHandle,
        RemoteHandle,
        StagedHandle,
        MirrorHandle,
        LaneHandle,
        UploadTicket,
        DownloadTicket,
    )
}


class HandoffIOManager(Configured, dg.ConfigurableIOManager):
    """Keeps the handles of pipelines, and plain JSON values, as small objects in the store.

    Make it the default IO manager (`io_manager`) of a code location whose steps run on several machines. Assets of
    other kinds then name another one (`io_manager_key`). Values of assets are kept. Values of other steps are needed
    only while their run may be retried; `gc_job` removes them from `<prefix>/runs/` a month later.
    """

    blobflow: dg.ResourceDependency[BlobflowResource]
    prefix: str = Field(default="handoff", description="Prefix of the keys, after the prefix of the store.")

    _fence: RunFence = PrivateAttr(default_factory=lambda: RunFence(None, None))

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Remember the run, so that its steps can be stopped."""
        self._fence = RunFence(context.instance, context.run.run_id if context.run is not None else None)

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Write a value.

        Raises:
            dg.Failure: with a hint, for example for a value that is neither a handle nor JSON. Retries are allowed
                if they may help.
        """
        with waits_logged(context.log), io_manager_errors(self._fence):
            data = json.dumps(pack(obj)).encode()
            if len(data) > MAX_BYTES:
                raise UsageError(
                    f"a value of {len(data)} bytes is not a handle", hint="give its asset its own io_manager_key"
                )
            (key,) = self._keys(context).values()
            store = self.blobflow.get_store()
            store.put(key, data, content_type="application/json")
            context.add_output_metadata({"blobflow/handoff": f"{store.url}/{key}"})

    def load_input(self, context: dg.InputContext) -> Any:
        """Read a value, or for several partitions a dict by partition key.

        Raises:
            dg.Failure: the value was never written, or is not a handle of this version. Retries are allowed if they
                may help.
        """
        with waits_logged(context.log), io_manager_errors(self._fence):
            return self._load(context)

    def _load(self, context: dg.InputContext) -> Any:
        store = self.blobflow.get_store()
        loaded: dict[str | None, Any] = {}
        for partition, key in self._keys(context).items():
            try:
                loaded[partition] = unpack(json.loads(store.get(key, max_bytes=MAX_BYTES).data))
            except ObjectNotFound as error:
                raise UsageError(
                    f"there is no value {key!r} in {store.url}",
                    hint="materialize the upstream asset or step with this IO manager",
                    key=key,
                ) from error
        return next(iter(loaded.values())) if len(loaded) == 1 else loaded

    def _keys(self, context: dg.InputContext | dg.OutputContext) -> dict[str | None, str]:
        """The keys of a value by partition; the partition is None if there are no partitions."""
        if not context.has_asset_key:
            return {None: "/".join([self.prefix, "runs", *map(key_segment, context.get_identifier())]) + ".json"}
        asset = "/".join([self.prefix, "assets", *map(key_segment, context.asset_key.path)])
        if not context.has_asset_partitions:
            return {None: f"{asset}.json"}
        return {partition: f"{asset}/{key_segment(partition)}.json" for partition in context.asset_partition_keys}


def pack(value: Any) -> Any:
    """Plain JSON for a handle; values that JSON lacks become objects with one name that begins with `$`.

    Raises:
        UsageError: the value is neither a handle nor JSON.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dg.MetadataValue):  # before tuples, because some are tuples
        return {"$metadata": dg.serialize_value(cast("Any", value))}
    if isinstance(value, list | tuple):
        return [pack(each) for each in value]
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict) and all(isinstance(name, str) and not name.startswith("$") for name in value):
        return {name: pack(each) for name, each in value.items()}
    if (name := type(value).__name__) in _KINDS:
        return {f"${name}": {field.name: pack(getattr(value, field.name)) for field in fields(_KINDS[name])}}
    raise UsageError(f"a {type(value).__name__} cannot be stored as JSON", hint="give its asset its own io_manager_key")


def unpack(value: Any) -> Any:
    """The inverse of `pack`.

    Raises:
        UsageError: the value is a handle that this version does not know.
    """
    if isinstance(value, list):
        return [unpack(each) for each in value]
    if not isinstance(value, dict):
        return value
    name = next(iter(value), "")
    if not name.startswith("$"):
        return {each: unpack(content) for each, content in value.items()}
    content: Any = value[name]
    if name == "$bytes":
        return base64.b64decode(content)
    if name == "$metadata":
        return dg.deserialize_value(content)
    try:
        return _KINDS[name[1:]](**{field: unpack(each) for field, each in content.items()})
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{name[1:]!r} was stored by another version of blobflow", hint="materialize it again"
        ) from error
