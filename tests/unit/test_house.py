"""The house itself: start-up time, versions, the lock, and the rules no linter knows."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import blobflow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("botocore", "boto3", "dagster", "fsspec", "pyarrow", "s3fs")


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project_files() -> Iterator[Path]:
    """Every file somebody wrote: not what the tools make."""
    made = {"__pycache__", "dist", "site", "results"}
    for directory, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in made and (name == ".ci" or not name.startswith("."))]
        yield from (Path(directory, name) for name in names)


def locked() -> dict[str, str]:
    """requirements.lock: each requirement's name and its whole entry."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([A-Za-z0-9._-]+)==(.*(?:\n +.*)*)", text, re.MULTILINE)
    return {name.lower().replace("_", "-").replace(".", "-"): entry for name, entry in entries}


def test_importing_blobflow_loads_nothing_heavy():
    """A shard worker or a `blobflow --help` does not pay for clients it does not use."""
    code = f"import sys, blobflow; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_installed_version_is_the_one_in_the_package():
    """`blobflow.__version__` is the single source of the version."""
    assert metadata.version("blobflow") == blobflow.__version__


def test_every_lower_bound_is_met_and_under_test_lowest_it_is_what_runs():
    """What pyproject.toml asks for is installed; `make test-lowest` runs nothing newer, or a bound was never tried."""
    asked = [
        *project()["project"]["dependencies"],
        *project()["project"]["optional-dependencies"]["mirror"],
        *project()["dependency-groups"]["dev"],
    ]
    lowest = os.environ.get("BLOBFLOW_LOWEST") == "1"
    newer: list[str] = []
    for requirement in asked:
        found = re.match(r"([\w.-]+)(?:\[.*?\])?>=([\d.]+)$", requirement)
        assert found, requirement
        bound, installed = [
            [int(number) for number in re.findall(r"\d+", version)][: found[2].count(".") + 1]
            for version in (found[2], metadata.version(found[1]))
        ]
        assert installed >= bound, requirement
        if lowest and installed > bound:
            newer.append(requirement)
    assert newer == []


def test_the_package_says_that_it_is_typed():
    """Type checkers read our annotations only where py.typed lies."""
    assert (ROOT / "blobflow" / "py.typed").exists()


def test_the_lock_covers_every_dependency_with_hashes():
    """`make` installs nothing that is not pinned and hashed."""
    tables = project()
    wanted = [
        *tables["project"]["dependencies"],
        *tables["project"]["optional-dependencies"]["ui"],
        *tables["dependency-groups"]["dev"],
        *tables["dependency-groups"]["docs"],
        *tables["build-system"]["requires"],
    ]
    entries = locked()
    names = {re.split(r"[\[<>=~!; ]", requirement, maxsplit=1)[0] for requirement in wanted}
    assert names - entries.keys() == set()
    assert [name for name, entry in entries.items() if "--hash=sha256:" not in entry] == []


def test_dependencies_have_lower_bounds_only():
    """A library that forbids newer versions of its dependencies cannot be installed beside others."""
    bounds = re.compile(r"[a-z0-9-]+>=[0-9.]+")
    assert [name for name in project()["project"]["dependencies"] if not bounds.fullmatch(name)] == []


def test_the_lock_holds_no_address():
    """Where packages come from is the machine's configuration, not the project's."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert re.findall(r"\S*://\S*|^\s*-+(?:i|f|index-url|extra-index-url|find-links)\b.*", text, re.MULTILINE) == []


def test_no_file_names_a_package_registry():
    """Nothing ties the project to one package index."""
    hosts = [host.replace("_", ".").encode() for host in ("pypi_org", "files_pythonhosted", "registry_npmjs")]
    named = [
        f"{path.relative_to(ROOT)} names {host.decode()}"
        for path in project_files()
        for host in hosts
        if host in path.read_bytes()
    ]
    assert named == []


def test_every_core_package_is_checked_strictly():
    """A new package of the core cannot slip past pyright's strict mode; the Dagster layer is in standard mode."""
    core = {path.parent.name for path in (ROOT / "blobflow").glob("*/__init__.py")} - {"dagster"}
    assert {"blobflow/*.py", *(f"blobflow/{name}" for name in core)} == set(project()["tool"]["pyright"]["strict"])


def test_dagster_can_read_our_annotations():
    """Dagster resolves annotations while it defines things, so its layer does not postpone them."""
    files = [ROOT / "definitions.py", *(ROOT / "blobflow" / "dagster").rglob("*.py")]
    assert [f for f in files if "from __future__ import annotations" in f.read_text(encoding="utf-8")] == []


# ------------------------------------------------------------------------------------------------------- what code says

PACKAGE = ROOT / "blobflow"
MAX_FUNCTION_LINES = 60
MAX_IMPORTS_INSIDE = 40


def files() -> dict[str, Path]:
    """The file of every module of the package, by the module's name."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by name."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files().items()}


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods of a module, nested ones included."""
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def imported(module: ast.Module, names: Collection[str]) -> set[str]:
    """Which of the modules `names` a module imports, wherever it does; what only type checkers see does not count."""
    found: set[str] = set()
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(full & set(names) or {str(node.module)})
        pending.extend(ast.iter_child_nodes(node))
    return found & set(names)


def test_no_function_is_long():
    """A function that does not fit on a screen does several things."""
    found = {
        f"{name}.{function.name}"
        for name, module in modules().items()
        for function in functions(module)
        if body_lines(function) > MAX_FUNCTION_LINES
    }
    assert found == set()


def test_modules_do_not_import_each_other():
    """No module imports, directly or through others, one that imports it: neither at the top nor inside a function."""
    trees = modules()
    graph = {name: imported(module, trees.keys()) for name, module in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def imports_inside(module: ast.Module) -> set[tuple[int, int]]:
    """The lines, first and last, of the imports inside functions."""
    return {
        (node.lineno, node.end_lineno or node.lineno)
        for function in functions(module)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


def test_an_import_inside_a_function_says_why():
    """Imports stand at the top; the few exceptions have a comment, on the line or above the block, with the reason."""
    places: list[str] = []
    without: list[str] = []
    for name, module in modules().items():
        lines = files()[name].read_text(encoding="utf-8").splitlines()
        inside = imports_inside(module)
        ends = {last for _, last in inside}
        reasoned: set[int] = set()
        for first, last in sorted(inside):
            places.append(f"{name}:{first}")
            above = lines[first - 2].strip().startswith("#") or (first - 1 in ends and first - 1 in reasoned)
            if above or "# " in lines[last - 1].replace("# noqa", "").replace("# type:", ""):
                reasoned.add(last)
            else:
                without.append(f"{name}:{first}")
    assert without == []
    assert len(places) < MAX_IMPORTS_INSIDE, places
