"""Plans: how a range is cut into parts."""

from __future__ import annotations

import pytest

from blobflow.engine.plan import Part, TransferPlan
from blobflow.errors import Unsupported

MIB = 2**20


@pytest.mark.parametrize(
    ("size", "lengths"),
    [(0, [0]), (1, [1]), (9, [9]), (10, [10]), (11, [10, 1]), (20, [10, 10]), (25, [10, 10, 5])],
)
def test_parts_are_equal_but_for_the_last(size: int, lengths: list[int]):
    """ceil(n / part) parts; nothing is one empty part, because an upload needs one."""
    plan = TransferPlan(size, 10, start=100)
    assert [part.length for part in plan] == lengths
    assert [part.number for part in plan] == list(range(1, len(lengths) + 1))
    assert [part.offset for part in plan] == [100 + 10 * i for i in range(len(lengths))]
    assert len(plan) == len(lengths)


def test_only_parts_of_the_plan_can_be_asked_for():
    """Numbers start at 1 and end with the plan."""
    plan = TransferPlan(25, 10)
    assert plan.part(3) == Part(3, 20, 5)
    for number in (0, 4, -1):
        with pytest.raises(IndexError):
            plan.part(number)


def test_missing_parts_are_those_that_are_not_done():
    """What is done is left out, whatever else is in the list."""
    plan = TransferPlan(25, 10)
    assert [part.number for part in plan.missing({2, 9})] == [1, 3]
    assert plan.missing({1, 2, 3}) == []


@pytest.mark.parametrize(
    ("offset", "length", "numbers"),
    [(100, 0, []), (100, 1, [1]), (109, 1, [1]), (109, 2, [1, 2]), (110, 10, [2]), (100, 25, [1, 2, 3]), (124, 1, [3])],
)
def test_a_range_is_found_in_its_parts(offset: int, length: int, numbers: list[int]):
    """The parts of a byte range are those that share a byte with it."""
    assert list(TransferPlan(25, 10, start=100).parts_of(offset, length)) == numbers


@pytest.mark.seed("W1.3")
def test_parts_grow_where_there_would_be_too_many():
    """5 TiB in 8 MiB chunks stay within 10,000 parts, in whole MiB."""
    plan = TransferPlan.for_upload(5 * 2**40, 8 * MIB)
    assert len(plan) <= 10_000
    assert plan.part_size % MIB == 0
    assert plan.part_size < 2 * (5 * 2**40 / 10_000)


def test_exactly_the_limit_needs_no_growth():
    """10,000 full parts are allowed, one byte more is not."""
    assert TransferPlan.for_upload(10_000 * 8 * MIB, 8 * MIB).part_size == 8 * MIB
    grown = TransferPlan.for_upload(10_000 * 8 * MIB + 1, 8 * MIB)
    assert (grown.part_size, len(grown)) == (9 * MIB, -(-(10_000 * 8 * MIB + 1) // (9 * MIB)))


def test_parts_are_as_large_as_the_store_wants():
    """A store's minimum counts more than the profile."""
    assert TransferPlan.for_upload(100 * MIB, MIB, min_part_size=5 * MIB).part_size == 5 * MIB


def test_what_no_plan_can_hold_is_refused():
    """More than the store's parts of the store's size is an error at once, not after a week."""
    with pytest.raises(Unsupported, match="do not fit in 10 parts"):
        TransferPlan.for_upload(101, 10, max_part_size=10, max_parts=10)
    with pytest.raises(Unsupported):
        TransferPlan.for_upload(1, 11, max_part_size=10)


@pytest.mark.parametrize("wrong", [(1, 0, 0), (-1, 1, 0), (1, 1, -1)])
def test_nonsense_is_no_plan(wrong: tuple[int, int, int]):
    """A part size of 0 and negative ranges are programming errors."""
    with pytest.raises(ValueError, match="not a plan"):
        TransferPlan(*wrong)
