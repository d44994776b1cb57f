"""Exceptions arrive whole, and whatever they were raised from does not cost them."""

from __future__ import annotations

import copyreg
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from fdshare import ProcessPoolExecutor, get_context
from fdshare.errors import NameTaken
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.pickling.reducers import SMALL, dumps
from mp import children
from mp.common import PACKAGES, identity, open_now, trackers  # noqa: F401
from mp.pickling import every_exception


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


def through(family: Family, obj: Any) -> Any:
    return dumps(family, obj).own().load(family.loads)


def caught(function: Callable[[], object]) -> Any:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError


def chained(error: BaseException, cause: BaseException | None, context: Any = None) -> Any:
    error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


# From 3.15 on an HTTPError says so where it is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up <HTTPError")

# Every class there is

KNOWN: dict[str, Callable[[], BaseException]] = {}
CLASSES: list[type[BaseException]] = []


@pytest.fixture(scope="module", autouse=True)
def every_class() -> None:
    pytest.importorskip("numpy")
    CLASSES[:] = every_exception.classes()
    KNOWN.update(every_exception.constructors())


def raise_one(position: int) -> BaseException:
    """In a worker. A Pool's ends by what is no Exception: that it returns."""
    error = every_exception.build(KNOWN, CLASSES[position])
    assert error is not None
    if isinstance(error, Exception):
        raise error
    return error


@pytest.mark.parametrize("how", ["pool", "executor"])
def test_every_class_of_the_library_and_of_numpy(family: Family, how: str) -> None:
    context = get_context("fork", backend=family.package)
    built = [(i, every_exception.build(KNOWN, cls)) for i, cls in enumerate(CLASSES)]
    missing = {every_exception.name(CLASSES[i]) for i, error in built if error is None}
    assert missing <= set(every_exception.NOT_BUILT)
    assert len(built) > 350
    with context.Pool(1) as pool, ProcessPoolExecutor(1, context) as executor:
        call: Any = pool.apply if how == "pool" else submit_to(executor)
        for position, sent in built:
            if sent is None or every_exception.name(type(sent)) in every_exception.NOT_NAMED:
                continue
            arrived = outcome(call, position)
            assert every_exception.attributes(arrived) == every_exception.attributes(sent)
            if isinstance(sent, Exception):
                rows = traceback.extract_tb(arrived.__traceback__)
                assert "raise_one" in [row.name for row in rows]
                assert "raise_one" in str(arrived.__cause__)


def submit_to(executor: ProcessPoolExecutor) -> Any:
    return lambda function, args: executor.submit(function, *args).result()


def outcome(call: Any, position: int) -> Any:
    try:
        return call(raise_one, (position,))
    except BaseException as error:
        return error


# Classes of programs


class Slotted(Exception):
    __slots__ = ("__private", "set", "unset")

    def __init__(self) -> None:
        self.set, self.__private = 1, 2

    def private(self) -> int:
        return self.__private


class OwnNew(Exception):
    def __new__(cls, first: int, second: int) -> OwnNew:
        return super().__new__(cls, first)

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first)
        self.second = second


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("frozen")


class OwnReduce(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.first, self.second, self.made = first, second, ["made"]

    def __reduce__(self) -> Any:
        return OwnReduce, (self.first, self.second), {"first": 10}


class OwnState(OSError):
    def __getstate__(self) -> Any:
        return ["state"]

    def __setstate__(self, state: Any) -> None:
        self.state = state


class WithState:
    """A base that is looked up after those in C."""

    def __getstate__(self) -> Any:
        return {"state": "of another base"}


class StateOfAnotherBase(ValueError, WithState):
    pass


class Bomb(Exception):
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return children.explode, ()


class Unpicklable(Exception):
    def __init__(self) -> None:
        self.lock = children.Unpicklable()


class BadText(Exception):
    def __reduce__(self) -> Any:
        raise BadText

    def __str__(self) -> str:
        raise BadText


def test_slots(family: Family) -> None:
    arrived = through(family, Slotted())
    assert (arrived.set, arrived.private()) == (1, 2)
    assert not hasattr(arrived, "unset")


def test_constructors_are_not_called(family: Family) -> None:
    assert through(family, OwnNew(1, 2)).second == 2
    arrived = through(family, Frozen("text"))
    assert (type(arrived), arrived.args) == (Frozen, ("text",))


def test_what_a_class_defines_is_obeyed(family: Family) -> None:
    error = OwnReduce(1, 2)
    error.add_note("noted")
    arrived = through(family, error)
    assert (arrived.first, arrived.second, str(arrived)) == (10, 2, "1 and 2")
    assert arrived.__notes__ == ["noted"]
    state = through(family, OwnState(2, "gone", "path"))
    assert (state.state, state.filename, str(state)) == (
        ["state"],
        "path",
        "[Errno 2] gone: 'path'",
    )


def test_what_is_registered_is_obeyed(family: Family) -> None:
    copyreg.pickle(OwnState, lambda _: (KeyError, ("registered",)))
    try:
        arrived = through(family, chained(OwnState("text"), OSError(5)))
    finally:
        del copyreg.dispatch_table[OwnState]
    assert (type(arrived), arrived.args, arrived.__cause__.errno) == (
        KeyError,
        ("registered",),
        None,
    )


def test_a_socket_in_an_exception(family: Family) -> None:
    with socket.socket() as sock:
        error = ValueError("with a socket")
        error.sock = sock  # type: ignore[attr-defined]
        arrived = through(family, chained(KeyError(), error))
        with arrived.__cause__.sock as there:
            assert identity(there) == identity(sock)


def test_the_object_without_an_attribute(family: Family) -> None:
    def missing(obj: Any) -> Any:
        return through(family, AttributeError("none", name="n", obj=obj))

    assert missing({1: 2}).obj == {1: 2}
    before = open_now()
    with socket.socket() as sock:
        for obj in (sock, children.Unpicklable(), children.Bomb(), b"x" * SMALL):
            arrived = missing(obj)
            assert (arrived.name, arrived.obj, str(arrived)) == ("n", None, "none")
    assert open_now() == before
    error = AttributeError("none", name="n")
    error.obj = [error]  # type: ignore[assignment]
    assert through(family, error).obj[0].args == ("none",)


def test_an_exception_of_which_a_slot_cannot_be_pickled(family: Family) -> None:
    error = Slotted()
    error.unset = children.Unpicklable()
    assert type(through(family, error)) is Slotted


# Tracebacks, notes, causes and contexts


def test_traceback_and_attributes(family: Family) -> None:
    error = through(family, caught(children.raise_two_arguments))
    assert (type(error).__name__, error.code, str(error)) == ("TwoArguments", 7, "seven")
    assert traceback.extract_tb(error.__traceback__)[-1].name == "raise_two_arguments"


def test_cause_and_notes(family: Family) -> None:
    def fail() -> None:
        try:
            children.raise_key_error()
        except KeyError as error:
            error.add_note("noted")
            raise NameTaken("web", 3) from error

    error = through(family, caught(fail))
    assert (error.name, error.generation) == ("web", 3)
    assert type(error.__cause__) is KeyError
    assert error.__context__ is error.__cause__
    assert error.__suppress_context__
    assert error.__cause__.__notes__ == ["noted"]
    assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == "raise_key_error"


def test_a_chain_arrives_as_it_was_linked(family: Family) -> None:
    a, b, c, d = KeyError("a"), ValueError("b"), OSError("c"), TypeError("d")
    chained(a, b, c), chained(b, d), chained(c, None, d), chained(d, None, a)
    arrived = through(family, a)
    assert [arrived.args, arrived.__cause__.args, arrived.__context__.args] == [
        ("a",),
        ("b",),
        ("c",),
    ]
    last = arrived.__cause__.__cause__
    assert last.args == ("d",)
    assert last is arrived.__context__.__context__
    assert last.__context__ is arrived
    assert not arrived.__context__.__suppress_context__
    # A circle, which a program that makes one has to break.
    last.__context__ = d.__context__ = None


def test_an_exception_that_is_an_attribute_too_is_one_object(family: Family) -> None:
    inner = chained(KeyError("inner"), None, OSError("innermost"))
    error = chained(ValueError("outer"), inner, inner)
    error.original = inner
    arrived = through(family, error)
    assert arrived.original is arrived.__cause__ is arrived.__context__
    assert arrived.original.__context__.args == ("innermost",)


def test_a_long_chain(family: Family) -> None:
    error = None
    for number in range(1200):
        error = chained(ValueError(number), None, error)
    arrived = through(family, error)
    for number in reversed(range(1200)):
        assert arrived.args == (number,)
        arrived = arrived.__context__


@pytest.mark.parametrize("how", ["cause", "context", "suppressed"])
@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (Bomb, "it cannot be unpickled: RuntimeError: it exploded"),
        (Unpicklable, "it cannot be pickled: AttributeError: not to be pickled"),
        (BadText, "it cannot be pickled: BadText"),
    ],
)
def test_what_an_error_was_raised_from_does_not_cost_the_error(
    family: Family, how: str, lost: type[Exception], reason: str
) -> None:
    def fail() -> None:
        try:
            raise lost
        except Exception as error:
            if how == "context":
                raise ValueError("the one that counts")
            raise ValueError("the one that counts") from (error if how == "cause" else None)

    before = open_now()
    error = through(family, caught(fail))
    assert (type(error), error.args) == (ValueError, ("the one that counts",))
    assert error.__context__ is error.__cause__ is None
    assert error.__suppress_context__ == (how != "context")
    role = "cause" if how == "cause" else "context"
    (note,) = error.__notes__
    assert note == f"The {role} of this exception ({lost.__name__}) is left out: {reason}"
    assert open_now() == before


def test_what_is_left_out_leaves_no_descriptor(family: Family) -> None:
    with socket.socket() as sock:
        before = open_now()
        for lost in (Unpicklable(), Bomb()):
            lost.sock = children.Bomb(sock)  # type: ignore[union-attr]
            lost.again = sock  # type: ignore[union-attr]
            error = chained(ValueError("the one that counts"), lost)
            error.sock = sock
            arrived = through(family, error)
            with arrived.sock as there:
                assert identity(there) == identity(sock)
            assert len(arrived.__notes__) == 1
            assert open_now() == before


@pytest.mark.parametrize("how", ["pool", "executor"])
@pytest.mark.parametrize("cls", [Frozen, OwnNew, Bomb])
def test_from_a_worker(family: Family, how: str, cls: Any) -> None:
    context = get_context("fork", backend=family.package)
    with context.Pool(1) as pool, ProcessPoolExecutor(1, context) as executor:
        call: Any = pool.apply if how == "pool" else submit_to(executor)
        with pytest.raises(RuntimeError if cls is Bomb else cls) as raised:
            call(fail_with, (cls,))
        assert "fail_with" in str(raised.value.__cause__) or cls is Bomb


def fail_with(cls: Any) -> None:
    raise cls(1, 2) if cls is OwnNew else cls()


def test_a_method_of_a_base_behind_those_in_c(family: Family) -> None:
    error = StateOfAnotherBase("text")
    error.state = "its own"  # type: ignore[attr-defined]
    assert vars(through(family, error)) == {"state": "of another base"}
