"""What Dagster loads."""

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """The components and modules of `defs`."""
    found = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    # Five short steps: a process for each would cost more than the work.
    return dg.Definitions.merge(found, dg.Definitions(executor=dg.in_process_executor))
