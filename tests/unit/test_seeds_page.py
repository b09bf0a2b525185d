"""docs/seeds.md says the truth about which behaviour is tested where."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.tools import seeds_page
from docs.tools.seeds_page import Row


def test_every_row_has_a_test_or_says_when_it_comes():
    """No row is forgotten, no test names a row that does not exist, no "later" outlives the test."""
    wrong = seeds_page.problems(seeds_page.read_rows(), seeds_page.find_tests())
    assert not wrong, "\n".join(["docs/seeds.tsv and the seed markers disagree:", *wrong])


def test_the_page_is_up_to_date():
    """The committed page is what the rows and the markers give."""
    page = seeds_page.render(seeds_page.read_rows(), seeds_page.find_tests())
    assert seeds_page.PAGE.read_text(encoding="utf-8") == page, "run python docs/tools/seeds_page.py"


def test_the_ids_are_unique_and_belong_to_a_seed():
    """Each id stands once, under a heading of the page."""
    rows = seeds_page.read_rows()
    assert len({row.id for row in rows}) == len(rows) == 139
    assert {row.seed for row in rows} == set(seeds_page.SEEDS)


def test_markers_are_found_wherever_pytest_allows_them(tmp_path: Path):
    """Decorators of functions, methods and classes, parameters and whole modules count, each under its pytest id."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        'pytestmark = pytest.mark.seed("0.1")\n'
        '@pytest.mark.seed("0.2", "0.3")\n'
        "def test_a(): ...\n"
        '@pytest.mark.seed("0.4")\n'
        "class TestB:\n"
        '    @pytest.mark.seed("0.2")\n'
        "    async def test_c(self): ...\n"
        '@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.seed("0.5"))])\n'
        "def test_d(x): ...\n"
    )
    assert seeds_page.find_tests(tmp_path) == {
        "0.1": ["tests/test_some.py"],
        "0.2": ["tests/test_some.py::test_a", "tests/test_some.py::TestB::test_c"],
        "0.3": ["tests/test_some.py::test_a"],
        "0.4": ["tests/test_some.py::TestB"],
        "0.5": ["tests/test_some.py::test_d"],
    }


def test_a_marker_that_cannot_be_read_is_refused(tmp_path: Path):
    """A computed row id would be missed silently, so it is an error."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text("@pytest.mark.seed(ROW)\ndef test_a(): ...\n")
    with pytest.raises(ValueError, match=r"tests/test_some.py:1: a seed marker takes plain strings"):
        seeds_page.find_tests(tmp_path)


def test_each_kind_of_disagreement_is_named():
    """A missing test, a leftover "later" and an unknown id each get a sentence."""
    rows = [Row("0.1", "one", ""), Row("0.2", "two", "The engine"), Row("W0.1", "three", "The engine")]
    assert seeds_page.problems(rows, {"0.2": ["t::b"], "9.9": ["t::z"]}) == [
        "t::z: no row '9.9' in seeds.tsv",
        "0.1 has no test: one",
        "0.2 has a test, so seeds.tsv may not say later",
    ]


def test_the_page_shows_tested_later_and_missing_rows():
    """Each row says by which test it is shown, with which issue it comes, or that it is missing."""
    rows = [Row("0.1", "one", ""), Row("0.2", "two", "The engine"), Row("0.3", "three", "")]
    page = seeds_page.render(rows, {"0.1": ["t.py::a", "t.py::b"]})
    assert "| 0.1 | one | `t.py::a`<br>`t.py::b` |" in page
    assert "| 0.2 | two | later: *The engine* |" in page
    assert "| 0.3 | three | **missing** |" in page
    assert "Of 3 rows 1 have a test, 1 come later, 1 are missing." in page
