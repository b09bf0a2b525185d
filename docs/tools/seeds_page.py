"""Writes docs/seeds.md: every behaviour of the seed systems, and the tests that show it.

The rows stand in docs/seeds.tsv, the tests are found by their `@pytest.mark.seed("1.16")` without being imported.
`python docs/tools/seeds_page.py` writes the page and names the rows that are neither tested nor marked as later;
tests/unit/test_seeds_page.py fails while there are any, and while the page is old.
"""

from __future__ import annotations

import ast
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "seeds.tsv"
PAGE = ROOT / "docs" / "seeds.md"

SEEDS = {
    "0": "The chunk engine",
    "1": "The artifact's wire format and export rounds",
    "2": "The mirror receiver",
    "3": "Crash-tolerant layers on S3",
    "4": "The batch executor",
}


class Row(NamedTuple):
    """One behaviour; ids that begin with W are faults of a seed that blobflow does not inherit."""

    id: str
    behaviour: str
    later: str
    """The subject of the issue that brings it; empty if it is due now."""

    @property
    def seed(self) -> str:
        """The number of the seed system it comes from."""
        return self.id.lstrip("W").partition(".")[0]


Tests = Mapping[str, Sequence[str]]
"""Row id -> the pytest ids of the tests marked with it."""


def read_rows(path: Path = ROWS) -> list[Row]:
    """The rows, in the order of the page."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**record) for record in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def find_tests(root: Path = ROOT) -> dict[str, list[str]]:
    """The marked tests below `root`, by row id.

    Raises:
        ValueError: a marker's argument is not a plain string.
    """
    found: dict[str, list[str]] = {}
    for path in [*sorted(root.glob("tests/**/test_*.py")), *sorted(root.glob("blobflow/testing/*.py"))]:
        if not path.exists():
            continue
        name = path.relative_to(root).as_posix()
        for seed, owner in _markers(ast.parse(path.read_text(encoding="utf-8"), str(path)), (name,)):
            tests = found.setdefault(seed, [])
            if owner not in tests:
                tests.append(owner)
    return found


def _markers(node: ast.AST, owner: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(row id, pytest id) for every `pytest.mark.seed(...)` below `node`; a decorator belongs to what it decorates."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        owner = (*owner, node.name)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.seed":
        for argument in node.args:
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise ValueError(f"{owner[0]}:{node.lineno}: a seed marker takes plain strings")
            yield argument.value, "::".join(owner)
    for child in ast.iter_child_nodes(node):
        yield from _markers(child, owner)


def problems(rows: Sequence[Row], tests: Tests) -> list[str]:
    """What is wrong, a sentence each; nothing if every row has a test or says when it comes."""
    known = {row.id for row in rows}
    wrong = [f"{name}: no row {seed!r} in {ROWS.name}" for seed in tests if seed not in known for name in tests[seed]]
    wrong += [f"{row.id} has no test: {row.behaviour}" for row in rows if not row.later and row.id not in tests]
    wrong += [f"{row.id} has a test, so {ROWS.name} may not say later" for row in rows if row.later and row.id in tests]
    return wrong


def render(rows: Sequence[Row], tests: Tests) -> str:
    """The page."""
    tested = sum(row.id in tests for row in rows)
    later = sum(bool(row.later) and row.id not in tests for row in rows)
    lines = [
        "<!-- Written by docs/tools/seeds_page.py from docs/seeds.tsv and the tests. Do not edit. -->",
        "# Behaviours and their tests",
        "",
        "blobflow unites what five earlier systems did. Each row is one of their behaviours; a row whose id begins",
        "with W is a weakness of the original that blobflow does not inherit. A row counts as done when a test shows",
        "it, and the test is named here; `tests/unit/test_seeds_page.py` keeps this page true.",
        "",
        f"Of {len(rows)} rows {tested} have a test, {later} come later, {len(rows) - tested - later} are missing.",
    ]
    for number, title in SEEDS.items():
        lines += ["", f"## {number}. {title}", "", "| id | behaviour | test |", "|---|---|---|"]
        lines += [f"| {row.id} | {row.behaviour} | {_shown_by(row, tests)} |" for row in rows if row.seed == number]
    return "\n".join(lines) + "\n"


def _shown_by(row: Row, tests: Tests) -> str:
    if row.id in tests:
        return "<br>".join(f"`{name}`" for name in tests[row.id])
    return f"later: *{row.later}*" if row.later else "**missing**"


def main() -> None:
    """Write the page and say what is missing."""
    rows, tests = read_rows(), find_tests()
    PAGE.write_text(render(rows, tests), encoding="utf-8")
    for sentence in problems(rows, tests):
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    main()
