"""Arrays by themselves: what is remembered of one is what pickling gives for the next."""

from __future__ import annotations

import copyreg
import errno
import mmap
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from conftest import census

from fdshare import SharedMemory, get_context
from fdshare.errors import DescriptorLimit
from fdshare.mp.backends import backend_of
from fdshare.mp.pickling import array_pickles, plain
from fdshare.mp.pickling.array_pickles import array_maps, key_of, may_be_remembered, remember_array
from fdshare.mp.pickling.large import LARGE
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.plain import BESIDE
from fdshare.mp.pickling.reducers import encode
from mp.common import PACKAGES, descriptor_limit_reached, trackers  # noqa: F401
from mp.interrupts import Interrupt, Interrupter, handled_by, interrupt, make_interrupter  # noqa: F401

numpy = pytest.importorskip("numpy")

Send = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def nothing_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_skipped", 0)


@pytest.fixture(params=PACKAGES)
def send(request: pytest.FixtureRequest) -> Iterator[Send]:
    left, right = get_context("fork", backend=request.param).Pipe()

    def send(obj: Any) -> Any:
        sender = threading.Thread(target=left.send, args=(obj,))
        sender.start()
        try:
            return right.recv()
        finally:
            sender.join()

    with left, right:
        yield send


def described(array: Any) -> Any:
    """All that one array has and another one may not have."""
    flags = array.flags
    how = flags.writeable, flags.aligned, flags.c_contiguous, flags.f_contiguous
    dtype = array.dtype
    kinds = dtype.byteorder, dtype.metadata, dtype.descr
    return type(array), kinds, array.shape, array.strides, how, array.tobytes()


def read_only(array: Any) -> Any:
    array.setflags(write=False)
    return array


ONES = numpy.ones((LARGE // 4, 4), "u1")


def arrays(ones: Any) -> list[Any]:
    """Arrays of all sorts, with the numbers of *ones*."""
    return [
        ones,
        ones.reshape(2, 2, -1),
        ones.T,
        ones.reshape(2, 2, -1).transpose(2, 0, 1),
        ones.reshape(2, 2, -1).transpose(1, 0, 2),
        ones.reshape(2, 2, -1)[:, :, ::2],
        ones[::-1],
        ones[:, None, :],
        ones.view("i4"),
        ones.view(">i4"),
        ones.view("f4"),
        ones.view(numpy.dtype("f4", metadata={"unit": "m"})),
        ones.view("?"),
        ones.ravel().view("c16"),
        ones.view("f2"),
        ones.view("S4"),
        ones.view([("a", "u1"), ("b", "u1", 3)]),
        ones.ravel().view("M8[s]"),
        ones.ravel().view("M8[ms]"),
        read_only(ones.copy()),
        read_only(ones.copy().T),
        numpy.broadcast_to(numpy.uint8(1), (ones.size,)),
        numpy.zeros(ones.size // 8, dtype=object),
        numpy.zeros(ones.size // 8, dtype=[("a", object)]),
    ]


# A pickle has the numbers in a frame; beside its frames; and in memory.
SIZES = (BESIDE - 16, BESIDE, 2 * BESIDE, LARGE)


@pytest.mark.parametrize("size", SIZES)
def test_what_arrives_is_what_unpickling_gives(send: Send, size: int) -> None:
    for _ in range(4):  # first it is not known, then it is in one message after the other
        for sent in arrays(numpy.ones((size // 4, 4), "u1")):
            if sent.dtype.hasobject:
                assert (send(sent) == sent).all()
            else:
                assert described(send(sent)) == described(pickle.loads(pickle.dumps(sent, 5)))


@pytest.mark.parametrize("size", [BESIDE, LARGE])
def test_each_has_its_numbers_and_is_its_receivers(send: Send, size: int) -> None:
    arrived = []
    for number in range(4):  # so many are kept
        sent = numpy.full(size, number, "u1")
        arrived.append(send(sent))
        sent[0] = 99
    for number, array in enumerate(arrived):
        assert (array == number).all()
        assert size < LARGE or array.ctypes.data % 64 == 0
        array[:] = 77 + number
    assert [array[-1] for array in arrived] == list(range(77, 81))


def test_it_is_remembered_once(send: Send) -> None:
    array_maps.clear()
    for _ in range(3):
        send(ONES)
    assert len(array_maps) == 1
    for sent in read_only(ONES.copy()), ONES.view("S4"), [ONES], ONES[:10]:
        send(sent)
    assert len(array_maps) == 1


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("size", [64, LARGE])
def test_in_something_else_its_pickle_is_numpys(package: str, size: int) -> None:
    family = backend_of(package).FAMILY
    for _ in range(3):  # what was said of one is known for the next
        for sent in arrays(numpy.ones((size // 4, 4), "u1")):
            assert encode(family, [sent]) == pickle.dumps([sent], 5)


def test_only_types_that_there_is_one_of_are_remembered() -> None:
    family = backend_of("multiprocessing").FAMILY
    plain._of_types.clear()
    for number in range(3):
        for dtype in "f8", ">f8", numpy.dtype("f8", metadata={"number": number}):
            encode(family, [numpy.ones(3, dtype)])
    assert [dtype for dtype, _ in plain._of_types.values()] == [numpy.dtype("f8")]


calls: list[int] = []


def counted(array: Any) -> Any:
    calls.append(len(array))
    return array


class Counted:
    """Arrives as an array that a function of the program has seen."""

    def __reduce__(self) -> Any:
        return counted, (ONES,)


def test_a_function_that_returns_an_array_is_called_each_time(send: Send) -> None:
    calls.clear()
    for _ in range(4):
        assert (send(Counted()) == ONES).all()
    assert calls == [len(ONES)] * 4


class Measured(numpy.ndarray):  # type: ignore[misc, name-defined]
    """More than an array."""


def test_of_a_class_that_derives_it_is_that_class(send: Send) -> None:
    for _ in range(3):
        assert type(send(ONES.view(Measured))) is Measured


def reduced(_: object) -> Any:
    return str, ("reduced",)


@pytest.mark.parametrize("register", [ForkingPickler.register, copyreg.pickle])
@pytest.mark.parametrize("cls", [numpy.ndarray, type(ONES.dtype)])
@pytest.mark.parametrize("sent", [ONES, ONES[: BESIDE // 4]], ids=["large", "smaller"])
def test_what_the_program_registers_later_counts(register: Any, cls: type, sent: Any) -> None:
    left, right = get_context("fork").Pipe()
    with left, right:
        for _ in range(3):
            left.send(sent)
            assert (right.recv() == sent).all()
        register(cls, reduced)
        try:
            for _ in range(2):
                left.send(sent)
                check_reduced(right, cls)
        finally:
            copyreg.dispatch_table.pop(cls, None)
            ForkingPickler._extra_reducers.pop(cls, None)  # type: ignore[attr-defined]
        left.send(sent)
        assert (right.recv() == sent).all()


def check_reduced(right: Any, cls: type) -> None:
    if cls is numpy.ndarray:
        assert right.recv() == "reduced"
    else:  # a type that is a text is none
        with pytest.raises(TypeError, match="reduced"):
            right.recv()


def test_what_others_send_is_not_remembered_where_the_program_pickles_arrays() -> None:
    copyreg.pickle(numpy.ndarray, reduced)
    try:
        assert not may_be_remembered(ONES)
    finally:
        del copyreg.dispatch_table[numpy.ndarray]
    assert may_be_remembered(ONES)
    assert not may_be_remembered(read_only(ONES.copy()))
    assert not may_be_remembered([ONES])
    array_maps.clear()
    remember_array(b"arrived", ONES, pickle.dumps([ONES], 5, buffer_callback=taken), LARGE)
    assert not array_maps
    remember_array(b"arrived", ONES, pickle.dumps(ONES, 5, buffer_callback=taken), LARGE)
    assert array_maps.pop(b"arrived")


def taken(_: object) -> None:
    """A buffer_callback: the buffer is not in the pickle."""


@pytest.mark.parametrize("size", [BESIDE, LARGE])
def test_in_shared_memory_it_is_not_copied(size: int) -> None:
    left, right = get_context("fork").Pipe()
    with left, right, SharedMemory(size) as memory:
        sent = memory.as_array("u1", (size,))
        for _ in range(3):
            left.send(numpy.zeros(size, "u1"))
            right.recv()
        left.send(sent)
        arrived = right.recv()
        arrived[5] = 6
        assert sent[5] == 6
        del sent, arrived


def test_there_is_an_end_to_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    family = backend_of("multiprocessing").FAMILY
    pickler = family.Pickler.plain
    assert pickler is not None
    most = len(array_maps) + 2
    monkeypatch.setattr(array_pickles, "_REMEMBERED", most)
    monkeypatch.setattr(pickler, "arrays", dict.fromkeys(range(len(array_maps))))
    left, right = get_context("fork").Pipe()
    with left, right:
        for rows in range(4, 8):
            sent = numpy.zeros((rows, LARGE), "u1")
            for _ in range(2):
                left.send(sent)
                assert right.recv().shape == sent.shape
    assert len(array_maps) == len(pickler.arrays) == most
    assert type(encode(family, ONES)) is bytes


@pytest.mark.parametrize("package", PACKAGES)
def test_one_that_may_not_be_mapped_says_so(package: str) -> None:
    left, right = get_context("fork", backend=package).Pipe()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with left, right:
        for _ in range(3):
            left.send(ONES)
            assert (right.recv() == ONES).all()
        left.send(ONES)
        before = census()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (size + LARGE // 2, limits[1]))
        try:
            with pytest.raises(OSError) as raised:
                right.recv()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert raised.value.errno == errno.ENOMEM
        assert census() == before
        left.send(ONES)
        assert (right.recv() == ONES).all()


def test_one_that_may_not_be_mapped_leaves_its_place_in_a_queue() -> None:
    queue = get_context("fork").Queue(1)
    for _ in range(4):
        queue.put(ONES)
        assert (queue.get() == ONES).all()
    queue.put(ONES)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + LARGE // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="memory"):
            queue.get()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    queue.put("next", timeout=60)
    assert queue.get() == "next"
    queue.close()
    queue.join_thread()


def test_it_is_mapped_where_it_is_read() -> None:
    left, right = get_context("fork").Pipe()
    with left, right:
        for _ in range(4):
            left.send(ONES)
            right.recv()
        before = others()
        left.send(ONES)
        receiver: Any = right._receiver
        receiver.fetch()
        assert others() == before  # the map needs no descriptor
        (made,) = receiver.message
        assert (made == ONES).all()
        assert right.recv() is made


@pytest.mark.parametrize("package", PACKAGES)
def test_its_pickle_is_known_again_after_another_registration(package: str) -> None:
    family = backend_of(package).FAMILY
    cache = MemfdCache()
    for cls in numpy.ndarray, type(ONES.dtype):
        for _ in range(2):
            pickled_in(encode(family, ONES, cache))
        copyreg.pickle(cls, reduced)
        try:
            encode(family, ONES, cache)
        finally:
            del copyreg.dispatch_table[cls]
        plain._skipped = 0
        *made, last, known = (pickled_in(encode(family, ONES, cache)) for _ in range(4))
        assert made == [known, known]
        assert last is known


def pickled_in(message: Any) -> Any:
    with message.memory:
        return message.data


@pytest.mark.parametrize("package", PACKAGES)
def test_at_the_limit_of_its_receiver_it_stays(package: str) -> None:
    left, right = get_context("fork", backend=package).Pipe()
    with left, right:
        for _ in range(4):
            left.send(ONES)
            right.recv()
        left.send(ONES)
        left.send("next")
        for _ in range(2):
            with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
                right.recv()
        assert (right.recv() == ONES).all()
        assert right.recv() == "next"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("package", PACKAGES)
def test_an_interrupted_receiver_stays_in_step(package: str, interrupter: Interrupter) -> None:
    left, right = get_context("fork", backend=package).Pipe()
    with left, right:
        for _ in range(4):
            left.send(ONES)
            right.recv()
        before = others()
        instructions, over, interrupted = 1, False, 0
        while not over:
            left.send(ONES)
            left.send(instructions)
            with handled_by(interrupt) as came, suppress(Interrupt):
                over = not interrupter.arrives(instructions, partial(receive, right))
            interrupted += len(came)
            while not over and type(arrived := right.recv()) is not int:
                assert (arrived == ONES).all()
            assert over or arrived == instructions
            arrived = None
            instructions += 5
        assert right.recv() == instructions - 5
        assert interrupted > 64
        assert others() == before


def others() -> dict[int, str]:
    """The descriptors of this process but for the memory that it keeps."""
    return {fd: what for fd, what in census().items() if "fdshare-messages" not in what}


def receive(connection: Any) -> None:
    connection.recv()


def test_a_type_may_be_more_than_its_name() -> None:
    assert key_of(ONES) == key_of(ONES.copy())
    assert key_of(ONES.view("i4")) != key_of(ONES.view(">i4"))
    assert key_of(ONES.view(numpy.dtype("u1", metadata={"unit": "m"}))) is None
    assert key_of(ONES.view("V4")) is None
