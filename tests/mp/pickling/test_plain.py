"""What is pickled without a call of a reducer, and what is left to the pickler that has some."""

from __future__ import annotations

import copyreg
import json
import pickle
import socket
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any

import dill
import pytest

from fdshare import SharedMemory
from fdshare.kinds import register_kind, unregister_kind
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.pickling import plain
from fdshare.mp.pickling.bundle import Bundle
from fdshare.mp.pickling.large import LARGE
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.reducers import encode
from mp.common import PACKAGES, trackers  # noqa: F401

Dump = Callable[[Any], bytes | None]


@pytest.fixture(params=PACKAGES)
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


@pytest.fixture
def dump(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dump]:
    monkeypatch.setattr(plain, "_skipped", 0)  # nothing was refused before
    pickler = family.Pickler.plain

    def dump(obj: Any) -> bytes | None:
        plain._skipped = 0
        return plain.dump_plain(pickler, obj, None)  # type: ignore[return-value]

    yield dump
    pickler.dispatch_table.clear()
    pickler.of_large.dispatch_table.clear()


class Sub(int):
    def twice(self) -> int:
        return 2 * self


PLAIN = [
    (len, int, print, json.dumps, dict.fromkeys),
    {"a": [(1, b"2"), ("3", None)], "b": bytearray(b"4"), "c": (True, 1.5, 2**100)},
    [{4}, frozenset({5})],
    (str.upper, str.__add__, [].append, "a".join),
]


@pytest.mark.parametrize("obj", PLAIN)
def test_what_is_plain(dump: Dump, family: Family, obj: Any) -> None:
    for _ in range(2):  # it knows the types then
        data = dump(obj)
        assert data is not None
        assert repr(family.loads(data)).split(" at ")[0] == repr(obj).split(" at ")[0]


def test_a_partial_function(dump: Dump, family: Family) -> None:
    data = dump([partial(json.dumps, 1, indent=2)])
    assert data is not None
    (arrived,) = family.loads(data)
    assert (arrived.func, arrived.args, arrived.keywords) == (json.dumps, (1,), {"indent": 2})


def test_what_is_the_same_object_arrives_as_one(dump: Dump, family: Family) -> None:
    part, shared = partial(abs, 1), [1]
    data = dump((part, shared, {"a": part, "b": shared}))
    assert data is not None
    first, second, mapping = family.loads(data)
    assert mapping["a"] is first
    assert mapping["b"] is second


@pytest.mark.parametrize(
    "obj",
    [Sub(1), ValueError("a"), range(3), partial(abs, Sub(1)), Sub(1).bit_length, Sub(1).twice],
)
def test_what_may_have_a_reducer(dump: Dump, family: Family, obj: Any) -> None:
    assert dump([1, "2", obj]) is None
    for _ in range(20):  # it is refused, then not tried for a while, then refused again
        message = encode(family, [1, "2", obj])
        assert type(message) is bytes
        arrived = family.loads(message)
        assert repr(arrived).split(" at ")[0] == repr([1, "2", obj]).split(" at ")[0]


@pytest.mark.parametrize("obj", [Sub, Enum, type(len), type(None), socket.socket])
def test_names_that_dill_may_not_write(obj: Any) -> None:
    """The C pickler would write all of them, or fail."""
    family = backend_of("multiprocess").FAMILY
    assert plain.dump_plain(family.Pickler.plain, (1, obj), None) is None


def test_what_is_refused_beside_dill_ends_no_later_attempt() -> None:
    family = backend_of("multiprocess").FAMILY
    for _ in range(2):
        assert plain.dump_plain(family.Pickler.plain, Sub(1), None) is None
        assert plain.dump_plain(family.Pickler.plain, [1], None) is not None


def test_a_large_bytearray_lies_in_memory(family: Family) -> None:
    bundle = plain.dump_plain(family.Pickler.plain, bytearray(LARGE), MemfdCache())
    assert isinstance(bundle, Bundle)
    assert bundle.own().load(family.loads) == bytearray(LARGE)


def mark(pickler: Any, _: object) -> None:
    """As a function of a program for dill: what is pickled with it becomes "marked"."""
    pickler.write(b"Vmarked\n")


BUILT_IN: list[Any] = [1, "a", b"b", 1.5, [1], {"a": 1}, {1}, (1,), json.dumps]


@pytest.mark.parametrize("obj", BUILT_IN, ids=[type(obj).__name__ for obj in BUILT_IN])
def test_what_the_program_has_told_dill(obj: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = backend_of("multiprocess").FAMILY
    assert plain.dump_plain(family.Pickler.plain, [obj], None) is not None
    monkeypatch.setitem(dill.Pickler.dispatch, type(obj), mark)
    assert plain.dump_plain(family.Pickler.plain, [obj], None) is None
    message = encode(family, obj)
    assert type(message) is bytes
    assert family.loads(message) == "marked"
    monkeypatch.undo()
    assert plain.dump_plain(family.Pickler.plain, [obj], None) is not None


def test_what_the_program_has_taken_from_dill(monkeypatch: pytest.MonkeyPatch) -> None:
    family = backend_of("multiprocess").FAMILY
    monkeypatch.delitem(dill.Pickler.dispatch, set)
    assert plain.dump_plain(family.Pickler.plain, [1], None) is None
    message = encode(family, [{1}])
    assert type(message) is bytes
    assert family.loads(message) == [{1}]


def arrays() -> list[Any]:
    numpy = pytest.importorskip("numpy")
    return [
        numpy.arange(9000.0),
        numpy.arange(12).reshape(3, 4)[:, ::2],
        numpy.array(7),
        numpy.array(["a", None], dtype=object),
        numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        numpy.float32(1.5),
        numpy.dtype("i2"),
        numpy.dtype,
    ]


def test_arrays_of_numpy(dump: Dump, family: Family) -> None:
    for obj in arrays():
        data = dump({"a": obj})
        assert data is not None
        arrived = family.loads(data)["a"]
        assert repr(arrived) == repr(obj)
        assert type(arrived) is type(obj)


def test_an_array_that_arrives_may_be_written_to(dump: Dump) -> None:
    data = dump(arrays()[0])
    assert data is not None
    arrived = pickle.loads(data)
    arrived[0] = 5
    assert arrived[0] == 5


def test_arrays_that_are_more(dump: Dump) -> None:
    numpy = pytest.importorskip("numpy")

    class Measured(numpy.ndarray):  # type: ignore[misc, name-defined]
        pass

    class Euro(numpy.float64):  # type: ignore[misc, name-defined]
        pass

    with SharedMemory(80) as memory:
        assert dump(memory.as_array("f8", (10,))) is None
    assert len(dump(numpy.zeros(LARGE, "b")) or b"") > LARGE
    assert dump(numpy.zeros(3).view(Measured)) is None
    assert dump(Euro(1)) is None
    assert dump(numpy.array([ValueError()], dtype=object)) is None


def reduced(_: object) -> Any:
    return str, ("reduced",)


def with_package(family: Family, cls: type) -> Callable[[], object]:
    former = family.ForkingPickler._extra_reducers.get(cls)
    family.ForkingPickler.register(cls, reduced)

    def undo() -> None:
        del family.ForkingPickler._extra_reducers[cls]
        if former is not None:
            family.ForkingPickler.register(cls, former)

    return undo


def with_copyreg(_: Family, cls: type) -> Callable[[], object]:
    copyreg.pickle(cls, reduced)  # type: ignore[arg-type]
    return lambda: copyreg.dispatch_table.pop(cls)


def with_kind(_: Family, cls: type) -> Callable[[], object]:
    register_kind(cls, "a", lambda _: (1, []), reduced)  # type: ignore[arg-type, return-value]
    return lambda: unregister_kind("a")


def with_dill(family: Family, cls: type) -> Callable[[], object]:
    dispatch = dill.Pickler.dispatch
    former = dispatch.get(cls)
    dill.pickle(cls, mark)

    def undo() -> None:
        del dispatch[cls]
        if former is not None:
            dispatch[cls] = former

    return undo


@pytest.mark.parametrize("register", [with_package, with_copyreg, with_kind, with_dill])
@pytest.mark.parametrize("made", ["a number of numpy's", "a partial function"])
def test_what_the_program_registers_later_counts(
    dump: Dump, family: Family, register: Any, made: str
) -> None:
    obj: Any = partial(abs, 1)
    if made == "a number of numpy's":
        obj = pytest.importorskip("numpy").float32(1.5)
    if register is with_dill and family.package == "multiprocessing":
        pytest.skip("multiprocessing does not pickle with dill")
    assert dump(obj) is not None
    undo = register(family, type(obj))
    try:
        assert dump(obj) is None
    finally:
        undo()
    assert dump(obj) is not None
