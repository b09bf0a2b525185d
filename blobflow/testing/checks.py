"""Assertions for the contracts; pytest is not needed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Generic, TypeVar

_E = TypeVar("_E", bound=BaseException)


class Caught(Generic[_E]):
    """An error that was raised as expected."""

    value: _E


@contextmanager
def raises(kind: type[_E]) -> Generator[Caught[_E]]:
    """Assert that the block raises an error of this kind, which is in `value` afterwards."""
    caught: Caught[_E] = Caught()
    try:
        yield caught
    except kind as error:
        caught.value = error
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
