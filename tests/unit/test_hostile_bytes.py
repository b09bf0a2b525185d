"""Whatever bytes a file or a peer gives: what comes out is a value or a `BlobflowError`, of few words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from blobflow.errors import BlobflowError
from tests.fuzz.targets import CORPUS, Target, quotes_too_much, targets

NAMES = sorted(targets())
ALL_CHECKS: Any = list(HealthCheck)
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 63,
    1 << 64,
    10**400,
    1e300,
    -0.5,
    "",
    "x" * 5000,
    "\0",
    "\ud800",
    "9999-12-31T23:59:59.999999999Z",
    "0001-01-01T00:00:00+23:59",
    [],
    [[]],
    {},
    {"x" * 5000: 1},
]


def held_to_the_rule(target: Target, data: bytes) -> None:
    too_much = ""
    try:
        target.run(data)
    except BlobflowError as error:
        too_much = error.message if quotes_too_much(error, data) else ""
    assert not too_much, "the message quotes too much"


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a JSON document."""
    yield path
    if isinstance(document, dict):
        for name in document:
            yield from places(document[name], (*path, name))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from places(value, (*path, number))


def changed(document: Any, path: tuple[Any, ...], value: Any, *, drop: bool = False) -> Any:
    """The document with another value at a place, or without it."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    if len(path) == 1 and drop:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], value, drop=drop)
    return copy


def spoiled(seed: bytes) -> Iterator[bytes]:
    """A seed of JSON, whole or by lines, with each of its values replaced by each strange one, and left out."""
    lines = [seed] if _json(seed) is not None else seed.split(b"\n")
    for number, line in enumerate(lines):
        skip = line.find(b"{") if line[:1] < b" " or _json(line) is None else 0
        document = _json(line[max(0, skip) :])
        if document is None:
            continue
        for path in places(document):
            variants = [changed(document, path, value) for value in STRANGE]
            variants += [changed(document, path, None, drop=True)] if path else []
            for variant in variants:
                yield b"\n".join(
                    [*lines[:number], line[: max(0, skip)] + json.dumps(variant).encode(), *lines[number + 1 :]]
                )


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_is_taken(name: str) -> None:
    """Each target's first seed is a value, so that the mutations begin where a parser does its work."""
    if name not in ("receiver", "s3_made"):
        targets()[name].run(targets()[name].seeds[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_value_or_an_error_of_ours_for_every_strange_value(name: str) -> None:
    """Every value of a document is replaced by what nobody expects there: no other exception, no long quotation."""
    target = targets()[name]
    for seed in target.seeds:
        for data in spoiled(seed):
            held_to_the_rule(target, data)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_or_an_error_of_ours_for_any_bytes(name: str) -> None:
    """Seeds that are cut, glued, flipped and stuffed, and bytes that are nothing: no other exception."""
    target = targets()[name]

    @given(
        st.one_of(st.binary(max_size=300), st.sampled_from(target.seeds)),
        st.lists(
            st.tuples(st.integers(0, 1 << 16), st.integers(0, 8), st.binary(max_size=8) | st.just(b"Q" * 600)),
            max_size=4,
        ),
    )
    @example(b"", [])
    @example(b"\xff\xfe", [])
    @example(b"[" * 100_000, [])
    @example(b'{"a":' * 50_000, [])
    @example(b"<a>" * 50_000, [])
    @example(b"1" * 5000, [])
    @settings(max_examples=40, deadline=None, suppress_health_check=ALL_CHECKS, derandomize=True)
    def holds(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        for place, length, insert in edits:
            at = place % (len(data) + 1)
            data = data[:at] + insert + data[at + length :]
        held_to_the_rule(target, data)

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_fuzzers_found_stays_found(name: str) -> None:
    """The corpus of `make fuzz`, every file of it."""
    for path in sorted((CORPUS / name).glob("*")):
        held_to_the_rule(targets()[name], path.read_bytes())
