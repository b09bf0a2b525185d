"""The error classes: what they take, keep, show and document."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import blobflow.dagster  # noqa: F401  # its errors are errors of this package as well
from blobflow.cli.formatting import as_option
from blobflow.dagster.failures import as_field, error_metadata
from blobflow.errors import (
    BlobflowError,
    IntegrityError,
    NotFoundError,
    ObjectNotFound,
    PreconditionFailed,
    RefusedError,
    SlowDown,
    SourceChanged,
    StoreUnavailable,
    TemporaryError,
    UsageError,
    field_names,
    rebuilt,
    required_fields,
    setting,
)

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
GROUPS = {TemporaryError: 75, IntegrityError: 3, NotFoundError: 4, RefusedError: 5, UsageError: 2}


def public_classes() -> list[type[BlobflowError]]:
    """Every class that a user can meet: the base class, and all that derive from it."""
    found, pending = [BlobflowError], [BlobflowError]
    while pending:
        pending += (below := pending.pop().__subclasses__())
        found += [kind for kind in below if not kind.__name__.startswith("_")]
    return sorted({kind for kind in found if kind.__module__.startswith("blobflow.")}, key=lambda kind: kind.__name__)


CLASSES = public_classes()
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def value_for(kind: type[BlobflowError], name: str) -> Any:
    """One value of the type that the class declares."""
    declared = get_type_hints(kind)[name]
    return next(value for value in (f"the {name}", 7, 0.5) if isinstance(value, declared))


def required(kind: type[BlobflowError]) -> set[str]:
    return required_fields(kind)


def declares(kind: type[BlobflowError], name: str) -> type:
    """The class that declares a field last."""
    return next(each for each in kind.__mro__ if name in inspect.get_annotations(each))


def built(kind: type[BlobflowError], names: set[str] | None = None) -> BlobflowError:
    """An error with these fields, or with all of them."""
    chosen = set(field_names(kind)) if names is None else names
    return kind(f"no {setting('keep_last', 3)}", **{name: value_for(kind, name) for name in chosen})


def documented(kind: type[BlobflowError]) -> set[str]:
    """The attributes that the docstring describes."""
    described = re.search(r"\n\s*Attributes:\n(.*)\Z", kind.__doc__ or "", re.DOTALL)
    return set(re.findall(r"^\s+(\w+): ", described[1], re.MULTILINE)) if described else set()


@every_class
def test_an_error_takes_its_fields_and_nothing_else(kind: type[BlobflowError]):
    """What is declared becomes an attribute. What is missing, unknown or positional is a TypeError."""
    error = built(kind)
    assert {name: getattr(error, name) for name in field_names(kind)} == error.fields
    least = built(kind, required(kind))
    assert least.fields.keys() >= required(kind)
    assert all(getattr(least, name) is None for name in field_names(kind) if name not in least.fields)
    for name in required(kind):
        with pytest.raises(TypeError, match=name):
            built(kind, required(kind) - {name})
    with pytest.raises(TypeError, match="unheard_of"):
        kind("no", **error.fields, unheard_of=1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="positional"):
        kind("no", "hint", **error.fields)  # pyright: ignore[reportCallIssue]
    with pytest.raises(AttributeError):
        error.unheard_of  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


@every_class
def test_an_error_travels_between_processes(kind: type[BlobflowError]):
    """By pickle and by copy, with its fields, and with the settings that each surface writes in its own words."""
    error = built(kind)
    error.advise(f"use {setting('mode', 'copy')}")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert again.args == error.args == (error.message,)
        for wording in (as_option, as_field):
            assert again.to_dict(wording) == error.to_dict(wording)
        assert again.to_dict(as_option)["hint"] == "use --mode copy"
        assert repr(again) == repr(error)


@every_class
def test_an_error_travels_over_the_wire(kind: type[BlobflowError]):
    """It is built again from its dictionary, if its class is one of the core."""
    error = built(kind)
    facts = error.to_dict()
    again = rebuilt(facts.pop("type"), facts.pop("message"), facts.pop("hint"), facts)
    if kind.__module__ == BlobflowError.__module__:
        assert again is not None
        assert again.to_dict() == error.to_dict()
    else:
        assert again is None


@every_class
def test_an_error_shows_what_it_knows(kind: type[BlobflowError]):
    """As text the message, as a representation also the fields, as a dictionary all of it, cut to what a line holds."""
    error = built(kind)
    assert str(error) == error.message == "no keep_last=3"
    assert repr(error).startswith(f"{kind.__name__}('no keep_last=3'")
    assert all(f"{name}={value!r}" in repr(error) for name, value in error.fields.items())
    assert error.to_dict() == {"type": kind.__name__, "message": error.message, "hint": error.hint, **error.fields}
    assert error_metadata(error).keys() >= {f"blobflow/error/{name}" for name in error.fields}
    long = kind("no", **{**error.fields, "key": "k" * 9_999})
    assert (len(long.fields["key"]), len(long.to_dict()["key"])) == (8192, 200)
    assert len(repr(long)) < 2000


@every_class
def test_an_error_is_documented(kind: type[BlobflowError]):
    """Its docstring describes each field that it declares, and docs/errors.md names them with the exit code."""
    own = set(inspect.get_annotations(kind)) - {"hint"}
    assert documented(kind) - {"hint"} == own
    if kind.__module__ == BlobflowError.__module__ and kind is not BlobflowError:
        row = re.findall(rf"^\| `{kind.__name__}` \|.*", PAGE.read_text(), re.MULTILINE)[-1]
        _, _, _, code, again, listed, _ = row.split("|")
        assert (int(code), again.strip()) == (kind.exit_code, "yes" if kind.retryable else "no")
        shared = {BlobflowError, *GROUPS} - {kind}
        assert set(re.findall(r"`(\w+)`", listed)) == {
            name for name in field_names(kind) if declares(kind, name) not in shared
        }
        assert set(re.findall(r"\*\*`(\w+)`\*\*", listed)) == required(kind)


def test_the_page_names_no_other_class():
    """A class that is gone is gone from the page."""
    named = set(re.findall(r"^\| `([A-Z]\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert named == {kind.__name__ for kind in CLASSES if kind.__module__ == BlobflowError.__module__} - {
        "BlobflowError"
    }


@every_class
def test_a_handler_can_go_by_the_group(kind: type[BlobflowError]):
    """What may be tried again, and the exit code, are those of the group."""
    groups = [group for group in GROUPS if issubclass(kind, group)]
    assert len(groups) <= 1
    assert kind.exit_code == (GROUPS[groups[0]] if groups else 1)
    assert kind.retryable == issubclass(kind, TemporaryError)


class TestRebuilt:
    """Errors that somebody else reports: only what the class declares gets in."""

    def test_values_of_another_type_are_left_out(self):
        """Also a boolean, which Python takes for a number."""
        facts = {"operation": "get", "status": "404", "offset": 1.5, "retry_after_s": 3, "key": 9, "unheard_of": 1}
        error = rebuilt("SlowDown", "no", "", facts)
        assert isinstance(error, SlowDown)
        assert error.fields == {"operation": "get", "retry_after_s": 3}
        assert rebuilt("SlowDown", "no", "", {"operation": "get", "status": True}).fields == {"operation": "get"}  # pyright: ignore[reportOptionalMemberAccess]

    @pytest.mark.parametrize(
        "name", ["OSError", "_Declared", "field", "fields", "Any", "", "BaseException", "StepOrphaned"]
    )
    def test_other_names_are_no_errors(self, name: str):
        """Whatever else the module holds."""
        assert rebuilt(name, "no", "", {}) is None

    def test_without_a_required_field_it_is_of_the_base_class(self):
        """So that a handler still gets the group right, whatever another version leaves out."""
        assert type(rebuilt("SlowDown", "no", "", {"retry_after_s": 1.0})) is TemporaryError
        assert type(rebuilt("ObjectNotFound", "no", "", {"key": 3})) is NotFoundError
        assert type(rebuilt("ObjectNotFound", "no", "", {"key": "k"})) is ObjectNotFound

    @pytest.mark.parametrize("name", ["args", "message", "hint", "_texts", "__class__", "__traceback__", "self"])
    def test_facts_reach_no_other_attribute(self, name: str):
        """A hostile peer cannot write to what the class does not declare."""
        error = rebuilt("UsageError", "no", "", {name: "bad"})
        assert error is not None
        assert (error.fields, error.args, error.hint) == ({}, ("no",), "")


def test_the_place_is_filled_in_later():
    """By the store that the error came through, and by whoever knows the artifact; what the error knows stays."""
    error = StoreUnavailable("refused", operation="get", key="a")
    error.locate("s3://bucket", "s3://bucket at http://host")
    error.belongs_to(store="file:///other", key="b")
    assert (error.store, error.key) == ("s3://bucket at http://host", "a")
    assert str(error) == "refused (s3://bucket at http://host)"
    lost = PreconditionFailed("taken", key="a")
    lost.belongs_to(store="file:///s", key="b")
    assert (lost.store, lost.key, str(lost)) == ("file:///s", "a", "taken")


def test_a_change_while_exporting_may_be_tried_again():
    """With the fields of the change and the remedy of its own class."""
    busy = SourceChanged("it grew", path="a", what="size", expected=1, actual=2, at=3).while_exporting()
    assert busy.retryable
    assert busy.fields == {"path": "a", "what": "size", "expected": 1, "actual": 2}
    assert "nobody writes" in busy.hint


def test_python_can_write_to_an_error():
    """Context managers set the traceback, and notes are added: an error that is frozen would break both."""

    def fail() -> None:
        raise ObjectNotFound("no", key="k")

    with pytest.raises(ObjectNotFound) as refusal:
        fail()
    refusal.value.__traceback__ = None
    if sys.version_info >= (3, 11):
        refusal.value.add_note("seen")
    assert refusal.value.key == "k"
