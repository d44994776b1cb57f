"""Large buffers of a pickle, through every channel."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import census

from fdshare import get_context
from fdshare.errors import DescriptorLimit, InvalidArgument
from fdshare.mp.backends import backend_of
from fdshare.mp.pickling.large import LARGE, NEW, NEW_PICKLE
from mp.common import METHODS, PACKAGES, descriptor_limit_reached, finish, trackers  # noqa: F401
from mp.interrupts import Interrupt, Interrupter, handled_by, interrupt, make_interrupter  # noqa: F401

numpy = pytest.importorskip("numpy")


@pytest.fixture(params=PACKAGES)
def ctx(request: pytest.FixtureRequest) -> Any:
    return get_context("fork", backend=request.param)


@pytest.fixture
def queue(ctx: Any) -> Iterator[Any]:
    queue = ctx.Queue()
    yield queue
    finish(queue)


def array(first: int = 1, size: int = NEW) -> Any:
    made = numpy.zeros(size, "u1")
    made[0] = first
    return made


def is_mapped(array: Any) -> bool:
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base is not None


def maps() -> int:
    with open("/proc/self/maps") as lines:
        return sum("fdshare-message" in line for line in lines)


def waiting() -> int:
    """Memory of messages that are not sent, but for what is kept."""
    return sum("fdshare-message " in target for target in census().values())


def used(queue: Any) -> int:
    """How often memory of this sending end was used."""
    return sum(kept.used > 0 for kept in queue._writer._cache._kept)


def test_a_large_array_is_mapped(queue: Any) -> None:
    sent = array()
    queue.put([sent])
    sent[0] = 2  # after it was put
    (arrived,) = queue.get()
    assert is_mapped(arrived)
    assert arrived.shape == sent.shape
    assert arrived[0] == 1
    arrived[1] = 3  # it is its receiver's
    assert not waiting()


@pytest.mark.parametrize("name", ["SimpleQueue", "JoinableQueue"])
def test_of_another_queue(ctx: Any, name: str) -> None:
    queue = getattr(ctx, name)()
    queue.put(array())
    assert is_mapped(queue.get())
    finish(queue)


def test_of_a_pipe(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right:
        for sender, receiver in (left, right), (right, left):
            sender.send(array())
            assert is_mapped(receiver.recv())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("package", PACKAGES)
def test_of_a_pool(package: str, method: str) -> None:
    with get_context(method, backend=package).Pool(1) as pool:
        results = pool.map(numpy.sqrt, [array(number, LARGE) for number in (1, 4, 9)])
        assert [result[0] for result in results] == [1, 2, 3]
        assert all(map(is_mapped, results))
        pool.close()
        pool.join()


PLAIN: list[Any] = [
    b"1" * LARGE,
    "x" * LARGE,
    "\N{EURO SIGN}" * LARGE,
    bytearray(b"2" * LARGE),
    {"a": b"3" * LARGE, "b": [1, 2.5, None]},
    [b"4" * (LARGE // 2), "5" * (LARGE // 2)],
    list(range(LARGE // 2)),
]


@pytest.mark.parametrize("sent", PLAIN, ids=range(len(PLAIN)))
def test_a_pickle_that_is_large_by_itself(queue: Any, sent: Any) -> None:
    queue.put(sent)
    arrived = queue.get()
    assert type(arrived) is type(sent)
    assert arrived == sent
    assert used(queue)
    assert not maps()  # it was copied


def test_one_that_is_smaller_is_not(queue: Any) -> None:
    for sent in b"1" * (LARGE - 100), [b"2" * (LARGE - 100)]:
        queue.put(sent)
        assert queue.get() == sent
    assert not used(queue)


def test_one_that_is_larger_than_what_is_kept(queue: Any) -> None:
    sent = b"1" * NEW_PICKLE
    before = census()
    queue.put([sent])
    assert queue.get() == [sent]
    assert not used(queue)
    assert len(census()) - len(before) < 4


def test_beside_what_is_taken_out_of_it(queue: Any) -> None:
    queue.put([array(7), b"1" * LARGE, numpy.zeros(3)])
    arrived = queue.get()
    assert is_mapped(arrived[0])
    assert arrived[0][0] == 7
    assert arrived[1] == b"1" * LARGE
    assert maps() == 1


class Unloadable:
    """Large, and cannot be loaded."""

    def __init__(self) -> None:
        self.data = b"1" * LARGE

    def __setstate__(self, state: object) -> None:
        raise ValueError("not here")


@pytest.mark.parametrize("package", PACKAGES)
def test_one_that_cannot_be_loaded_is_its_jobs_error(package: str) -> None:
    with get_context("fork", backend=package).Pool(1) as pool:
        jobs = [pool.apply_async(len, (Unloadable(),)), pool.apply_async(Unloadable)]
        for job in jobs:
            with pytest.raises(ValueError, match="not here"):
                job.get(60)
        assert pool.apply(len, (b"1" * LARGE,)) == LARGE
        pool.close()
        pool.join()


def test_what_is_small_or_has_gaps_is_not(queue: Any) -> None:
    for sent in array(size=LARGE - 1), array(size=2 * LARGE)[::2]:
        queue.put(sent)
        arrived = queue.get()
        assert not is_mapped(arrived)
        assert (arrived == sent).all()


def test_what_is_empty(queue: Any) -> None:
    sent = [b"", numpy.zeros(0), numpy.zeros((0, 3)), numpy.broadcast_to(1.0, (2, 0))]
    queue.put(sent)
    arrived = queue.get()
    assert [one.shape for one in arrived[1:]] == [(0,), (0, 3), (2, 0)]
    assert [one.flags.writeable for one in arrived[1:]] == [True, True, False]


def test_what_is_read_only_stays_it(queue: Any) -> None:
    sent = array()
    sent.setflags(write=False)
    queue.put(sent)
    arrived = queue.get()
    assert is_mapped(arrived)
    assert not arrived.flags.writeable


def test_each_is_unmapped_by_itself(queue: Any) -> None:
    queue.put({"a": array(1), "b": array(2, LARGE + 1), "small": b"c"})
    arrived = queue.get()
    assert maps() == 2
    del arrived["a"]
    assert maps() == 1
    assert arrived["b"][0] == 2
    assert arrived["small"] == b"c"
    del arrived["b"]
    assert not maps()


def test_without_a_descriptor_it_goes_through_the_socket(queue: Any) -> None:
    with descriptor_limit_reached():
        queue.put(array())
        assert not is_mapped(queue.get())


def test_without_room_it_goes_through_the_socket(queue: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 2, limits[1]))
    try:
        queue.put(array())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not is_mapped(queue.get())


def test_at_the_limit_of_its_receiver_it_stays(queue: Any) -> None:
    queue.put(array())
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        queue.get()
    assert is_mapped(queue.get())


def test_no_more_than_64_wait(queue: Any) -> None:
    for number in range(80):
        queue.put(array(number))
    assert 40 < waiting() <= 64
    assert [queue.get()[0] for _ in range(80)] == list(range(80))
    assert not waiting()


def test_what_the_parent_has_not_sent_does_not_count_in_its_child(ctx: Any, queue: Any) -> None:
    for number in range(80):
        queue.put(array(number))
    unsent = queue._feeder._waiting.copy()  # as what a pool has not sent yet
    child = os.fork()
    if not child:
        try:
            own = ctx.Queue()
            own.put(array())
            os._exit(0 if is_mapped(own.get(timeout=30)) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    unsent.clear()
    for _ in range(80):
        queue.get()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_puts_do_not_count(queue: Any, interrupter: Interrupter) -> None:
    sent, instructions, over, interrupted = array(), 1, False, 0
    while not over:
        with handled_by(interrupt) as came, suppress(Interrupt):
            over = not interrupter.arrives(instructions, lambda: queue.put(sent))
        interrupted += len(came)
        queue.put("end")
        while type(queue.get()) is not str:
            pass
        assert not waiting()
        instructions += 5
    assert interrupted > 64
    queue.put(sent)
    assert is_mapped(queue.get())


def test_few_are_in_flight(ctx: Any) -> None:
    left, right = ctx.Pipe(duplex=False)
    with left, right:
        os.set_blocking(right.fileno(), False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                right.send(array())
                sent += 1
        assert 5 < sent < 20


def test_a_receiver_may_be_one_of_the_package(ctx: Any, folder: Path) -> None:
    stock = import_module(f"{ctx._family.package}.connection")
    address = str(folder / "sock")
    with backend_of(ctx._family.package).Listener(address) as listener:
        client = stock.Client(address)
        thread = threading.Thread(target=lambda: ours.send(array(5)))
        with client, listener.accept() as ours:
            thread.start()
            assert client.recv()[0] == 5
            thread.join()


def test_bytes_are_not_an_array(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right:
        left.send(array())
        with pytest.raises(InvalidArgument):
            right.recv_bytes()
        assert is_mapped(right.recv())


def test_an_exception_brings_its_array(queue: Any) -> None:
    queue.put(ValueError(array(7)))
    assert queue.get().args[0][0] == 7


def test_a_receiver_that_may_not_map_it_says_so(queue: Any) -> None:
    queue.put(array())
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + LARGE // 2, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            queue.get()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert raised.value.errno == errno.ENOMEM
    queue.put(array(2))
    assert queue.get()[0] == 2


def test_what_was_put_outlives_its_sender(ctx: Any, queue: Any) -> None:
    def put() -> None:
        queue.put(array(3))
        os.kill(os.getpid(), signal.SIGKILL)

    sender = ctx.Process(target=put)
    sender.start()
    sender.join()
    assert sender.exitcode == -signal.SIGKILL
    assert queue.get()[0] == 3
    assert not maps()
