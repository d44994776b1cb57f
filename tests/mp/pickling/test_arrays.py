"""Arrays in shared memory, and classes that derive from numpy's array."""

from __future__ import annotations

import copyreg
import os
import pickle
import socket
from importlib import import_module
from typing import Any

import pytest

import fdshare
from fdshare import SharedMemory
from fdshare.errors import AlreadyTaken, UnsupportedKind
from fdshare.kernel.shared_memory import array_place
from fdshare.mp.family import Family
from mp.pickling.conftest import Through

numpy = pytest.importorskip("numpy")


def ten_numbers() -> Any:
    made = SharedMemory(80).as_array("f8", (10,))
    made[:] = range(10)
    return made


def assert_shared(arrived: Any, sent: Any) -> None:
    sent[9] = 99
    assert arrived[9] == 99
    assert type(arrived) is type(sent)


class Measured(numpy.ndarray):  # type: ignore[misc, name-defined]
    """Numbers with a unit."""

    def __array_finalize__(self, other: Any) -> None:
        self.unit = getattr(other, "unit", None)


class Placed(numpy.ndarray):  # type: ignore[misc, name-defined]
    __slots__ = ("place",)


class Quantity(Measured):
    """The same; it says itself how it is pickled."""

    def __reduce__(self) -> Any:
        function, args, state = super().__reduce__()
        return function, args, (state, self.unit)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        self.unit = state[1]


def test_an_array(through: Through) -> None:
    array = ten_numbers()
    assert_shared(through([array])[0], array)


def test_a_masked_array_keeps_its_mask_and_its_memory(through: Through) -> None:
    array = ten_numbers()
    mask = SharedMemory(10).as_array("?", (10,))
    mask[:5] = True
    sent = numpy.ma.masked_array(array, mask=mask, fill_value=-1)
    for _ in range(2):
        arrived = through(sent)
        assert arrived.sum() == 35
        assert arrived.fill_value == -1
        assert arrived.tolist() == sent.tolist()
    assert_shared(arrived, sent)
    mask[9] = True  # masked_array() did not copy it
    assert arrived.tolist()[8:] == [8, None]


def test_classes_that_have_attributes_keep_them(through: Through) -> None:
    array = ten_numbers()
    measured, placed = array.view(Measured), array.view(Placed)
    measured.unit, placed.place = "m", "here"
    assert through(measured).unit == "m"
    assert through(placed).place == "here"
    assert_shared(through(measured), measured)
    assert_shared(through(placed), placed)


def test_a_class_that_pickles_itself_does(through: Through) -> None:
    array = ten_numbers()
    sent = array.view(Quantity)
    sent.unit = "m"
    arrived = through(sent)
    assert (type(arrived), arrived.unit, arrived.sum()) == (Quantity, "m", 45)
    assert not numpy.shares_memory(arrived, array)
    array[0] = 7
    assert arrived[0] == 0


def test_numpys_own_classes(through: Through) -> None:
    square = SharedMemory(32).as_array("f8", (2, 2))
    square[:] = [[1, 2], [3, 4]]
    matrix = square.view(numpy.matrix)
    arrived = through(matrix)
    assert type(arrived) is numpy.matrix
    assert arrived.tolist() == [[1, 2], [3, 4]]
    arrived[0, 0] = 9
    assert square[0, 0] == 9
    records = SharedMemory(160).as_array([("a", "f8"), ("b", "i8")], (10,)).view(numpy.recarray)
    arrived = through(records)
    records.b[:] = 5
    assert type(arrived) is numpy.recarray
    assert arrived.b.tolist() == [5] * 10
    assert arrived.dtype == records.dtype
    assert arrived.dtype.type is numpy.record


def test_a_reducer_of_the_programs_is_obeyed(through: Through) -> None:
    array = ten_numbers()
    copyreg.pickle(numpy.ndarray, lambda _: (str, ("reduced",)))
    try:
        assert through([array]) == ["reduced"]
    finally:
        del copyreg.dispatch_table[numpy.ndarray]


class Exposed:
    """No array; it shows one."""

    def __init__(self, base: Any) -> None:
        self.base = base

    @property
    def __array_interface__(self) -> Any:
        return self.base.__array_interface__


def test_what_only_shows_an_array_is_none(through: Through) -> None:
    array = ten_numbers()
    arrived = through(Exposed(array))
    assert type(arrived) is Exposed
    assert_shared(arrived.base, array)


def test_nothing_but_an_array_is_registered_or_held_as_one() -> None:
    array = ten_numbers()
    for obj in (numpy.ma.masked_array(array), array.view(Measured), Exposed(array)):
        with pytest.raises(UnsupportedKind, match="what its class adds"):
            fdshare.hold(obj)
    fdshare.hold(array).close()


def test_a_shared_copy_in_a_standard_queue(armed: None, family: Family) -> None:
    sent = fdshare.shared_copy(numpy.arange(10.0))
    queue = import_module(family.package).get_context("fork").SimpleQueue()
    queue.put({"a": sent, "b": sent[2:4]})
    arrived = queue.get()
    queue.close()
    assert arrived["a"].tolist() == sent.tolist()
    assert arrived["b"].tolist() == [2, 3]
    assert not arrived["a"].flags.writeable
    assert file_of(arrived["a"]) == file_of(sent)


def file_of(array: Any) -> int:
    place = array_place(array)
    assert place is not None
    return os.fstat(place.fd).st_ino


def test_a_shared_copy_is_loaded_once_and_in_time(armed: None, family: Family) -> None:
    copy, plain = fdshare.shared_copy(numpy.ones(10)), numpy.ones(10)
    once, twice = (family.ForkingPickler.dumps(obj) for obj in (copy, fdshare.hold(copy, uses=2)))
    for message, times in (once, 1), (twice, 2):
        for _ in range(times):
            assert pickle.loads(message).sum() == 10
        with pytest.raises(AlreadyTaken):
            pickle.loads(message)
    fdshare.install(ttl=0.1)
    near, far = socket.socketpair()
    late, streamed = map(family.ForkingPickler.dumps, ([copy, near], plain))
    near.close()
    with far:
        far.settimeout(60)
        assert far.recv(1) == b""  # the server has closed what was parked with it
    with pytest.raises(AlreadyTaken):
        pickle.loads(late)
    for _ in range(2):
        assert pickle.loads(streamed).sum() == 10
