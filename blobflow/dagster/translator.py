"""How the three assets of a pipeline look in Dagster; subclass to change it."""

from dataclasses import dataclass
from typing import Literal

import dagster as dg

Stage = Literal["snapshot", "remote", "mirror"]

_DESCRIPTIONS: dict[Stage, str] = {
    "snapshot": "One consistent artifact of the source: every file read once, manifest and index written.",
    "remote": "The artifact in the store: sent, verified there, and named by the ref.",
    "mirror": "The artifact brought to life at its target: fetched, every member verified, swapped in at once.",
}


@dataclass(frozen=True)
class BlobflowAssetProps:
    """What a translator is told about an asset."""

    pipeline: str
    stage: Stage
    backend: str | None
    """Of the exporter (snapshot) or the importer (mirror), e.g. `directory`, where it is known beforehand."""


class BlobflowTranslator:
    """Turns the assets of a pipeline into asset specs.

    ```python
    class Ours(BlobflowTranslator):
        def get_asset_spec(self, props):
            return super().get_asset_spec(props).replace_attributes(owners=["team:data"])
    ```
    """

    def get_asset_spec(self, props: BlobflowAssetProps) -> dg.AssetSpec:
        """Key, group, description, tags, kinds, owners, metadata, automation condition and so on of one asset.

        Assets in the spec's `deps` are waited for. Partitions belong to the pipeline, not to the spec.
        """
        return dg.AssetSpec(
            key=[props.pipeline, props.stage],
            group_name=props.pipeline,
            description=_DESCRIPTIONS[props.stage],
            kinds={"blobflow", *([props.backend] if props.backend else [])},
        )
