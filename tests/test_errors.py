"""The tree of errors: each is a builtin too, says its fields, and survives every way to travel."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
import re
from typing import Any

import pytest

from fdshare import errors
from fdshare.errors import AccessDenied, FdshareError, error_from_wire
from fdshare.protocol import messages as m

LEAVES = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]
# One of each type that a field may have.
SAMPLES: dict[str, Any] = {
    "names": ["a", "b"],
    "limit": 10,
    "used": 9,
    "count": 254,
    "generation": 3,
    "expected": 3,
    "current": 4,
    "uid": 1000,
    "pid": 123,
    "theirs": 2,
    "ours": 1,
    "status": 13,
    "errno": 24,
    "timeout": 1.5,
    "received": 5,
    "room": 5,
}


def make(cls: type[FdshareError]) -> FdshareError:
    if cls is FdshareError:
        return FdshareError("text", field="value")
    parameters = list(inspect.signature(cls).parameters)
    fields = {name: SAMPLES.get(name, f"the {name}") for name in parameters}
    if cls is errors.MagicMismatch:
        fields = {"expected": b"one", "received": b"two"}
    return cls(**fields)


every = pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)


@every
def test_a_leaf_has_its_fields_and_a_text(cls: type[FdshareError]) -> None:
    error = make(cls)
    for name, value in error.fields.items():
        assert getattr(error, name) == value
    assert str(error) == error.message
    assert len(str(error)) > 3
    assert isinstance(error, FdshareError)


@every
def test_a_leaf_also_is_a_builtin(cls: type[FdshareError]) -> None:
    if cls is FdshareError:
        return
    builtins = [base for base in cls.__mro__ if base.__module__ == "builtins"]
    assert builtins[0] not in (Exception, BaseException)
    if issubclass(cls, OSError):
        assert make(cls).errno  # type: ignore[attr-defined]


@every
def test_a_leaf_travels(cls: type[FdshareError]) -> None:
    error = make(cls)
    by_wire = m.decode_reply(m.encode(m.refusal(error)))
    assert isinstance(by_wire, m.Refused)
    for other in (
        pickle.loads(pickle.dumps(error)),
        copy.copy(error),
        error_from_wire(error.code, error.fields, error.message),
        m.refusal_error(by_wire),
    ):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.fields == error.fields
        assert getattr(other, "errno", None) == getattr(error, "errno", None)


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in LEAVES}) == len(LEAVES)
    assert set(errors._by_code) == {cls.code for cls in LEAVES}


def test_the_drawn_tree_is_the_real_one() -> None:
    """The docstring's tree: every class, under its parent, with its builtin."""
    drawn: dict[str, tuple[str, str | None]] = {}
    above = {0: "FdshareError"}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│ ]*)[├└]── (\w+)\s+(?:\((\w+)\))?", line)
        if found:
            depth = len(found[1]) // 4 + 1
            above[depth] = found[2]
            drawn[found[2]] = (above[depth - 1], found[3])
    assert set(drawn) == {cls.__name__ for cls in LEAVES} - {"FdshareError"}
    for name, (parent, builtin) in drawn.items():
        cls = getattr(errors, name)
        assert issubclass(cls, getattr(errors, parent)), name
        if builtin:
            assert issubclass(cls, getattr(builtins, builtin)), name


def test_what_a_stranger_says_overwrites_nothing() -> None:
    error = error_from_wire(
        "new", {"message": "x", "args": 5, "__class__": int, "extra": 1}, "text"
    )
    assert type(error) is FdshareError
    assert str(error) == "text"
    assert error.args == ("text",)
    assert error.extra == 1  # type: ignore[attr-defined]


def test_a_refusal_of_what_has_no_name_names_none() -> None:
    assert str(AccessDenied("stats", "", 1, "why")) == "uid 1 may not stats: why"
    assert str(AccessDenied("fetch", "web", 1, "why")) == "uid 1 may not fetch 'web': why"
