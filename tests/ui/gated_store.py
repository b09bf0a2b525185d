"""A module of a Dagster project: its store, which stops at the fourth part of an upload as long as there is a gate.

The gate is a named pipe; what waits at it goes on when it is opened for writing, or dies there.
"""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from blobflow.testing import Fault, Hook, Request
from tests.dagster.kit import SMALL, FaultyResource

GATE = Path(os.environ["GATE"])


def wait(_: Request) -> None:
    GATE.read_bytes()


def fourth_part_waits(request: Request) -> Fault | None:
    if request.operation == "put_part" and request.number == 4 and GATE.exists():
        return Hook(wait)
    return None


FaultyResource.script(fourth_part_waits)


@dg.definitions
def store() -> dg.Definitions:
    return dg.Definitions(
        resources={"blobflow": FaultyResource(store=str(GATE.parent / "store"), custom_profile=SMALL)}
    )
