"""What is pickled without a call of a reducer, and what is left to the pickler that has some."""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from fdshare import SharedMemory
from fdshare.kinds import register_kind, unregister_kind
from fdshare.mp.backends import backend_of
from fdshare.mp.pickling import plain
from fdshare.mp.pickling.bundle import Bundle
from fdshare.mp.pickling.large import LARGE
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.reducers import encode

FAMILY = backend_of("multiprocessing").FAMILY
Dump = Callable[[Any], bytes | None]


@pytest.fixture
def dump(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dump]:
    monkeypatch.setattr(plain, "_skipped", 0)  # nothing was refused before
    pickler = FAMILY.Pickler.plain
    assert pickler is not None

    def dump(obj: Any) -> bytes | None:
        plain._skipped = 0
        return plain.dump_plain(pickler, obj, None)  # type: ignore[return-value]

    yield dump
    pickler.dispatch_table.clear()
    pickler.of_large.dispatch_table.clear()


class Sub(int):
    pass


@pytest.mark.parametrize("obj", [(len, int, print), {"a": [(1, b"2"), ("3", None)]}, [{4}]])
def test_what_is_plain(dump: Dump, obj: Any) -> None:
    for _ in range(2):  # it knows the types then
        data = dump(obj)
        assert data is not None
        assert pickle.loads(data) == obj


@pytest.mark.parametrize("obj", [Sub(1), ValueError("a"), range(3), partial(int)])
def test_what_may_have_a_reducer(dump: Dump, obj: Any) -> None:
    assert dump([1, "2", obj]) is None
    for _ in range(20):  # it is refused, then not tried for a while, then refused again
        message = encode(FAMILY, [1, "2", obj])
        assert type(message) is bytes
        assert repr(FAMILY.loads(message)) == repr([1, "2", obj])


def test_a_large_bytearray_lies_in_memory() -> None:
    pickler = FAMILY.Pickler.plain
    assert pickler is not None
    bundle = plain.dump_plain(pickler, bytearray(LARGE), MemfdCache())
    assert isinstance(bundle, Bundle)
    assert bundle.own().load(FAMILY.loads) == bytearray(LARGE)


def test_dill_has_a_pickler_of_its_own() -> None:
    assert backend_of("multiprocess").FAMILY.Pickler.plain is None


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


def test_arrays_of_numpy(dump: Dump) -> None:
    for obj in arrays():
        data = dump({"a": obj})
        assert data is not None
        arrived = pickle.loads(data)["a"]
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


@pytest.mark.parametrize("register", [ForkingPickler.register, copyreg.pickle, register_kind])
def test_what_the_program_registers_later_counts(dump: Dump, register: Any) -> None:
    numpy = pytest.importorskip("numpy")
    obj = numpy.float32(1.5)
    assert dump(obj) is not None
    args = (reduced,) if register is not register_kind else ("a", lambda _: (1, []), reduced)
    register(numpy.float32, *args)
    try:
        assert dump(obj) is None
    finally:
        for table in (ForkingPickler._extra_reducers, copyreg.dispatch_table):
            table.pop(numpy.float32, None)
        with suppress(Exception):
            unregister_kind("a")
    assert dump(obj) is not None
