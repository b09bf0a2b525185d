"""What steps hand to each other, kept in the store: for workers that share nothing else.

```python
blobflow = BlobflowResource(store="s3://backups/orders", scratch_dir="/mnt/shared/blobflow")
resources = {"blobflow": blobflow, "io_manager": HandoffIOManager(blobflow=blobflow)}
```

The handles of pipelines are small (a key, a digest, an upload id), and so is what is written here: JSON of at most
8 MiB, never a pickle, because whoever can write to the store must not be able to run code on the workers.
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

    To be the default IO manager (`io_manager`) of a code location whose steps run on several machines; assets of other
    kinds then name one of their own (`io_manager_key`). What an asset handed on lasts; what other steps of a run did is
    needed only while that run may be retried: `gc_job` removes it from `<prefix>/runs/` a month later.
    """

    blobflow: dg.ResourceDependency[BlobflowResource]
    prefix: str = Field(default="handoff", description="What the keys begin with, after the prefix of the store.")

    _fence: RunFence = PrivateAttr(default_factory=lambda: RunFence(None, None))

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Learn which run this is."""
        self._fence = RunFence(context.instance, context.run.run_id if context.run is not None else None)

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Write a value.

        Raises:
            dg.Failure: saying what to do, for example with what is neither a handle nor JSON; retries are allowed
                where they may help.
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
        """Read a value; of several partitions, a dict by partition key.

        Raises:
            dg.Failure: it was never written, or is not a handle of this version; it is retried where that may help.
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
                    f"nothing was handed on as {key!r} in {store.url}",
                    hint="materialize what comes before with this IO manager",
                    key=key,
                ) from error
        return next(iter(loaded.values())) if len(loaded) == 1 else loaded

    def _keys(self, context: dg.InputContext | dg.OutputContext) -> dict[str | None, str]:
        """The keys of a value by partition; None for what has no partitions."""
        if not context.has_asset_key:
            return {None: "/".join([self.prefix, "runs", *map(key_segment, context.get_identifier())]) + ".json"}
        asset = "/".join([self.prefix, "assets", *map(key_segment, context.asset_key.path)])
        if not context.has_asset_partitions:
            return {None: f"{asset}.json"}
        return {partition: f"{asset}/{key_segment(partition)}.json" for partition in context.asset_partition_keys}


def pack(value: Any) -> Any:
    """Plain JSON for a handle; what JSON does not know is an object with one name that begins with `$`.

    Raises:
        UsageError: the value is neither a handle nor JSON.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dg.MetadataValue):  # before tuples, of which some are made
        return {"$metadata": dg.serialize_value(cast("Any", value))}
    if isinstance(value, list | tuple):
        return [pack(each) for each in value]
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict) and all(isinstance(name, str) and not name.startswith("$") for name in value):
        return {name: pack(each) for name, each in value.items()}
    if (name := type(value).__name__) in _KINDS:
        return {f"${name}": {field.name: pack(getattr(value, field.name)) for field in fields(_KINDS[name])}}
    raise UsageError(
        f"a {type(value).__name__} cannot be handed on as JSON", hint="give its asset its own io_manager_key"
    )


def unpack(value: Any) -> Any:
    """The inverse of `pack`.

    Raises:
        UsageError: a handle that this version does not know.
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
            f"{name[1:]!r} was handed on by another version of blobflow", hint="materialize it again"
        ) from error
