"""The words: public names are the field's, and the glossary defines ours."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

import blobflow.dagster
from blobflow import lazy
from blobflow.cli.commands import cli

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = (
    "blobflow",
    *(f"blobflow.{name}" for name in ("backends", "batch", "lanes", "layers", "mirror", "streams")),
)

# Words that were ours alone, and what the field says.
FORBIDDEN = {
    "abilities": "capabilities",
    "answer": "response",
    "books": "progress",
    "bring": "run, upload or download",
    "crowd": "small files",
    "errand": "request",
    "forget": "reset or delete",
    "kennel": "what is in it",
    "refusal": "error",
    "seed": "requirement",
    "tells": "reports",
    "told": "reported",
    "tries": "attempts or backoff",
    "upkeep": "maintenance",
    "wire": "client",
    "yard": "what is in it",
}


def words(name: str) -> set[str]:
    """`MirrorReceiver.on_progress` has the words mirror, receiver, on and progress."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)}


def public_names() -> Iterator[str]:
    """Names, members and parameters of everything that users import."""
    objects = {
        name: getattr(importlib.import_module(space), name) for space in NAMESPACES for name in lazy.public_names(space)
    }
    objects |= {name: getattr(blobflow.dagster, name) for name in blobflow.dagster.__all__}
    for name, value in objects.items():
        yield name
        if inspect.isclass(value):
            yield from (f"{name}.{member}" for member in vars(value) if not member.startswith("_"))
        if inspect.isclass(value) or inspect.isfunction(value):
            yield from (f"{name}.{parameter}" for parameter in inspect.signature(value).parameters)


def options(command: click.Command, path: str = "blobflow") -> Iterator[str]:
    """Every command, argument and option of the command line."""
    yield path
    yield from (f"{path} {name}" for parameter in command.params for name in parameter.opts)
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from options(child, f"{path} {name}")


def test_no_public_name_uses_a_private_word():
    """A stranger knows the words in our names from other storage code."""
    found = [name for name in public_names() if words(name) & FORBIDDEN.keys()]
    assert sorted({*found}) == []


def test_no_command_or_option_uses_a_private_word():
    """The same holds on the command line."""
    assert [option for option in options(cli) if words(option) & FORBIDDEN.keys()] == []


def test_the_glossary_is_in_order_and_defines_what_the_names_use():
    """Each word is defined once, in a sentence, and is found by the alphabet."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z ]+) \| (.+) \|$", page, re.MULTILINE)[1:]
    defined = [word for word, _ in rows]
    assert defined == sorted(set(defined))
    assert [text for _, text in rows if not re.match(r"[A-Z].*\.$|.*\)\.$", text)] == []
    assert {"artifact", "checkpoint", "lane", "layer", "lease", "manifest", "mirror", "ref", "snapshot"} <= {*defined}
    assert FORBIDDEN.keys() & {*defined} == set()
