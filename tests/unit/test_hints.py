"""Hints of errors: what they name exists on the surface where they are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import blobflow
from blobflow.cli.commands import cli
from blobflow.cli.formatting import as_option

PACKAGE = Path(blobflow.__file__).parent


class Said(NamedTuple):
    """A text of an error, and the settings in it."""

    where: str
    text: str
    settings: list[tuple[str, str | None]]


def _text(node: ast.AST, settings: list[tuple[str, str | None]]) -> str:
    """The literal parts of an expression; what is only known at run time is `{}`."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(_text(value, settings) for value in values)
        case ast.FormattedValue(value=value):
            return _text(value, settings)
        case ast.BinOp(left=left, right=right):
            return _text(left, settings) + _text(right, settings)
        case ast.IfExp(body=body, orelse=other):
            return f"{_text(body, settings)} {_text(other, settings)}"
        case ast.BoolOp(values=values):
            return " ".join(_text(value, settings) for value in values)
        case ast.Dict(values=values):
            return " ".join(_text(value, settings) for value in values)
        case ast.Call(func=ast.Name(id="setting"), args=[ast.Constant(value=str(name)), *rest]):
            value = rest[0].value if rest and isinstance(rest[0], ast.Constant) else None
            settings.append((name, str(value) if value is not None else None))
            return "{setting}"
        case _:
            return "{}"


def _is_hint(name: str | None) -> bool:
    return name is not None and name.lower().strip("_") in (
        "hint",
        "remedy",
        "hints",
        "remedies",
        "begin_again",
    )


def texts() -> Iterator[Said]:
    """Every hint of the package, and every message that an error is made with."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[ast.AST] = []
            match node:
                case ast.Call(func=func, args=args, keywords=keywords):
                    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
                    found += [keyword.value for keyword in keywords if _is_hint(keyword.arg)]
                    found += args[2:] if name == "unsupported" else []
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_hint(name):
                    found.append(value)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.AST() as value) if _is_hint(name):
                    found.append(value)
                case _:
                    continue
            for value in found:
                settings: list[tuple[str, str | None]] = []
                text = _text(value, settings)
                if text.strip("{} "):
                    yield Said(f"{path.relative_to(PACKAGE)}:{value.lineno}", text, settings)  # pyright: ignore[reportAttributeAccessIssue]


SAID = list(texts())
NOT_ON_THE_COMMAND_LINE = {
    "leases": "no command takes a lease",
    "part_size": "no command writes a stream",
    "schema_sha256": "no command pins a schema",
}
"""Settings that no command needs, each with the reason; an error that names one cannot come out of a command."""


def options_of_commands() -> dict[str, list[click.Parameter]]:
    """Every option of the command line -> the parameters of the commands that have it."""
    found: dict[str, list[click.Parameter]] = {}
    pending: list[click.Command] = [cli]
    while pending:
        command = pending.pop()
        if isinstance(command, click.Group):
            pending += command.commands.values()
        for parameter in command.params:
            for name in parameter.opts:
                found.setdefault(name, []).append(parameter)
    return found


def names_in_python() -> set[str]:
    """Every argument of a function and every field of a class in the package."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def test_there_are_hints_to_look_at():
    """What finds them has not gone blind."""
    assert len(SAID) > 120
    assert sum(bool(said.settings) for said in SAID) >= 14


@pytest.mark.parametrize("said", [said for said in SAID if said.settings], ids=lambda said: said.where)
def test_the_settings_that_a_hint_names_exist(said: Said):
    """As an argument or field in Python and Dagster, and as an option, with that value, on the command line."""
    options, names = options_of_commands(), names_in_python()
    for name, value in said.settings:
        assert name in names
        if name in NOT_ON_THE_COMMAND_LINE:
            continue
        option = as_option(name, None)
        if option.isupper():  # an environment variable
            assert f'"{option}"' in "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
            continue
        assert option in options, f"{option} is not an option of any command"
        if value is not None:
            choices = [p.type.choices for p in options[option] if isinstance(p.type, click.Choice)]
            assert any(value in each for each in choices), f"{option} does not take {value}"


@pytest.mark.parametrize("said", SAID, ids=lambda said: said.where)
def test_a_hint_names_settings_in_the_words_of_its_surface(said: Said):
    """A hint of the core names no flag and no argument literally: the command line and Dagster would show it so too."""
    text = re.sub(r"`blobflow [^`]*`|\{.*?\}", "", said.text)
    if not said.where.startswith("cli/"):
        assert not re.search(r"(?<!\S)--[a-z]", text)
    if not said.where.startswith("dagster/"):
        assert not re.findall(r"\b[a-z]+_[a-z_]+\b|\b[a-z]+=", text), "name it with setting()"


@pytest.mark.parametrize("said", [said for said in SAID if "`blobflow " in said.text], ids=lambda said: said.where)
def test_the_commands_that_a_hint_names_exist(said: Said):
    """With their options."""
    for line in re.findall(r"`blobflow ([^`]*)`", said.text):
        command: click.Command = cli
        for word in line.split():
            if word.startswith("-"):
                assert any(word in parameter.opts for parameter in command.params), line
            elif isinstance(command, click.Group):
                command = command.commands[word]
        assert command is not cli
