"""The memory of large messages, which is used again when nobody sees it any more."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import census

from fdshare import ProcessPoolExecutor, get_context
from fdshare.mp.pickling import memfd_cache
from fdshare.mp.pickling.large import LARGE, map_parts
from fdshare.mp.pickling.memfd_cache import MemfdCache, new_copy_of
from mp.common import PACKAGES, finish, trackers  # noqa: F401

SIZE = 1 << 16
MIB = 1 << 20


@pytest.fixture
def cache() -> Iterator[MemfdCache]:
    made = MemfdCache()
    yield made
    made._kept = ()  # pytest has it for longer


def copy_of(cache: MemfdCache, data: bytes) -> Any:
    return cache.copy_of([(0, data)], len(data))


def handed_over(cache: MemfdCache, data: bytes) -> tuple[mmap.mmap, int]:
    """The map of a receiver, and which file it is of."""
    with copy_of(cache, data) as memory:
        (mapped,) = map_parts(memory.fileno(), [len(data)])
        return mapped, os.fstat(memory.fileno()).st_ino


def kept() -> list[int]:
    """The descriptors of what this process keeps."""
    return [fd for fd, target in census().items() if "fdshare-messages" in target]


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def in_child(function: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_it_is_used_again(cache: MemfdCache) -> None:
    first, file = handed_over(cache, b"a" * SIZE)
    assert first[:] == b"a" * SIZE
    del first
    second, again = handed_over(cache, b"b" * 10)
    assert again == file
    assert second[:] == b"b" * 10
    assert len(kept()) == 1


def test_not_while_somebody_maps_it(cache: MemfdCache) -> None:
    first, file = handed_over(cache, b"a" * SIZE)
    view = memoryview(first)[100:]
    del first
    _, other = handed_over(cache, b"b" * SIZE)
    assert other != file
    assert view == b"a" * (SIZE - 100)


def test_not_before_it_is_received(cache: MemfdCache) -> None:
    with copy_of(cache, b"a") as first, copy_of(cache, b"b") as second:
        assert os.pread(first.fileno(), 2, 0) == b"a"
        assert os.pread(second.fileno(), 2, 0) == b"b"


def test_a_forked_child_of_the_receiver_keeps_it(cache: MemfdCache) -> None:
    mapped, file = handed_over(cache, b"a" * SIZE)
    reader, writer = os.pipe()
    child = in_child(lambda: os.read(reader, 1) and None)  # until it is killed
    del mapped
    try:
        other = handed_over(cache, b"b" * SIZE)
        assert other[1] != file
    finally:
        end(child)
        os.close(reader)
        os.close(writer)
    assert handed_over(cache, b"c" * SIZE)[1] == file


def test_what_the_receiver_writes_is_gone_with_it(cache: MemfdCache) -> None:
    mapped, file = handed_over(cache, b"a" * SIZE)
    mapped[:5] = b"write"
    del mapped
    mapped, again = handed_over(cache, b"b" * 3)
    assert again == file
    assert mapped[:] == b"bbb"


def test_a_receiver_cannot_change_it(cache: MemfdCache) -> None:
    with copy_of(cache, b"a" * SIZE) as memory:
        number = memory.fileno()
        assert fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        for change in (
            lambda: os.pwrite(number, b"x", 0),
            lambda: os.ftruncate(number, 0),
            lambda: fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            lambda: mmap.mmap(number, SIZE, mmap.MAP_SHARED, mmap.PROT_WRITE | mmap.PROT_READ),
        ):
            with pytest.raises(OSError):
                change()
        assert os.fstat(number).st_mode & 0o777 == 0o400


def test_it_cannot_shrink(cache: MemfdCache) -> None:
    copy_of(cache, b"a" * SIZE).close()
    (number,) = kept()
    with pytest.raises(PermissionError):
        os.ftruncate(number, 0)


def test_of_an_end_are_four(cache: MemfdCache) -> None:
    held = [handed_over(cache, b"%d" % number) for number in range(4)]
    oldest = held[0][1]
    fifth = handed_over(cache, b"5")  # in the place of the oldest, which the receiver has
    assert len(kept()) == 4
    assert fifth[1] not in [file for _, file in held]
    assert oldest not in [os.fstat(fd).st_ino for fd in kept()]
    assert [mapped[:] for mapped, _ in held] == [b"0", b"1", b"2", b"3"]


def test_who_finds_none_does_not_look_for_a_while(cache: MemfdCache) -> None:
    held = [handed_over(cache, b"%d" % number) for number in range(5)]
    del held[:]
    misses = 0
    while copy_of(cache, b"x") is None:
        misses += 1
    assert 0 < misses < 10


def test_what_waits_is_bounded(cache: MemfdCache) -> None:
    waiting = [copy_of(cache, b"x") for _ in range(1000)]
    assert 50 < sum(memory is not None for memory in waiting) <= 64
    assert new_copy_of([(0, b"x")]) is None


def test_what_is_larger_is_not_kept(cache: MemfdCache) -> None:
    large = memoryview(bytes(17 * MIB))
    assert cache.copy_of([(0, large)], len(large)) is None
    with new_copy_of([(0, large)]) as memory:  # type: ignore[union-attr]
        assert os.fstat(memory.fileno()).st_size == len(large)
    assert not kept()


def test_a_hundred_ends_keep_no_more_than_32_mib() -> None:
    caches, data = [MemfdCache() for _ in range(100)], bytes(8 * MIB)
    for cache in caches:
        copy_of(cache, data).close()
        assert sum(map(blocks, kept())) <= 32 * MIB
    assert len(kept()) == 4
    for cache in caches:
        copy_of(cache, b"x").close()
    assert len(kept()) == 16


def test_what_grows_counts(cache: MemfdCache) -> None:
    others = [MemfdCache() for _ in range(4)]
    for one in (cache, *others):
        copy_of(one, b"x").close()
    for one in (cache, *others):
        copy_of(one, bytes(8 * MIB)).close()
    assert sum(map(blocks, kept())) <= 32 * MIB
    assert copy_of(cache, b"y") is not None  # it was let go


def test_it_goes_with_its_end(cache: MemfdCache) -> None:
    one = MemfdCache()
    copy_of(one, b"x").close()
    copy_of(cache, b"x").close()
    assert len(kept()) == 2
    del one
    assert len(kept()) == 1


def test_a_forked_child_of_the_sender_has_none(cache: MemfdCache) -> None:
    copy_of(cache, b"x").close()
    mine = kept()

    def child() -> None:
        assert not kept()
        copy_of(cache, b"child").close()
        assert len(kept()) == 1

    assert os.waitpid(in_child(child), 0)[1] == 0
    assert kept() == mine
    copy_of(cache, b"x").close()
    assert kept() == mine


PAGE = mmap.PAGESIZE


def test_it_has_several_pieces(cache: MemfdCache) -> None:
    pieces = [(0, b"ab"), (2, b"c"), (PAGE, b"d")]
    with cache.copy_of(pieces, PAGE + 1) as memory:  # type: ignore[union-attr]
        assert [part[:] for part in map_parts(memory.fileno(), [3, 1])] == [b"abc", b"d"]


def my_map_sizes() -> list[int]:
    """The bytes of each map of memory that is kept."""
    with open("/proc/self/maps") as lines:
        places = [line.split()[0].split("-") for line in lines if "fdshare-messages" in line]
    return [int(end, 16) - int(start, 16) for start, end in places]


def my_maps() -> int:
    return len(my_map_sizes())


def use_often(cache: MemfdCache, size: int = SIZE) -> None:
    for _ in range(10):
        copy_of(cache, bytes(size)).close()


def test_one_that_is_used_often_is_mapped(cache: MemfdCache) -> None:
    copy_of(cache, bytes(SIZE)).close()
    assert not my_maps()
    use_often(cache)
    assert my_maps() == len(kept()) == 1
    for data in b"a" * SIZE, b"b" * 10, b"", b"c" * SIZE:
        mapped, _ = handed_over(cache, data or b"x")
        assert mapped[:] == data or b"x"
        del mapped
    pieces = [(0, b"ab"), (2, b"c"), (PAGE, b"d"), (PAGE + 1, b"e")]
    with cache.copy_of(pieces, PAGE + 2) as memory:  # type: ignore[union-attr]
        assert [part[:] for part in map_parts(memory.fileno(), [3, 2])] == [b"abc", b"de"]
    assert my_maps() == 1


def test_one_that_is_mapped_may_grow(cache: MemfdCache) -> None:
    use_often(cache, PAGE)
    with cache.copy_of([(0, b"a"), (PAGE, b"bc")], PAGE + 2) as memory:  # type: ignore[union-attr]
        assert [part[:] for part in map_parts(memory.fileno(), [1, 2])] == [b"a", b"bc"]
    assert not my_maps()
    use_often(cache, SIZE)
    mapped, _ = handed_over(cache, b"a" * SIZE)
    assert mapped[:] == b"a" * SIZE


def test_no_more_is_mapped_than_there_is(cache: MemfdCache) -> None:
    copy_of(cache, b"a").close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        assert copy_of(cache, bytes(2 * SIZE)) is None
        while not my_maps():
            copy_of(cache, b"b" * SIZE)
        assert my_map_sizes() == [SIZE]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    mapped, _ = handed_over(cache, b"c" * 2 * SIZE)
    assert mapped[:] == b"c" * 2 * SIZE


def test_a_map_goes_with_what_is_let_go(cache: MemfdCache) -> None:
    use_often(cache)
    others = [MemfdCache() for _ in range(16)]
    for other in others:
        copy_of(other, b"x").close()
    assert len(kept()) == 16
    assert not my_maps()
    use_often(cache)
    assert my_maps() == 1
    cache._kept = ()
    assert not my_maps()


def test_a_forked_child_of_the_sender_has_no_map(cache: MemfdCache) -> None:
    use_often(cache)

    def child() -> None:
        assert my_maps() == 1  # what the parent has received
        use_often(cache, 10)
        mapped, _ = handed_over(cache, b"child")
        assert mapped[:] == b"child"

    mapped, _ = handed_over(cache, b"parent")
    assert os.waitpid(in_child(child), 0)[1] == 0
    assert mapped[:] == b"parent"
    assert my_maps() == 2


def test_without_an_address_it_is_not_mapped(cache: MemfdCache) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    data = bytes(16 * MIB)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + MIB, limits[1]))
    try:
        for _ in range(10):
            cache.copy_of([(0, data)], len(data)).close()  # type: ignore[union-attr]
        assert not my_maps()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_without_proc_there_is_none(monkeypatch: pytest.MonkeyPatch, cache: MemfdCache) -> None:
    # Where /proc is not mounted, as after chroot.
    monkeypatch.setattr(memfd_cache, "_OWN", "/nowhere/%d")
    assert copy_of(cache, b"x") is None
    with new_copy_of([(0, b"x")]) as memory:  # type: ignore[union-attr]
        assert os.pread(memory.fileno(), 2, 0) == b"x"


def test_without_room_there_is_none(cache: MemfdCache) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        assert copy_of(cache, bytes(2 * SIZE)) is None
        assert new_copy_of([(0, bytes(2 * SIZE))]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_threads_have_each_their_own(cache: MemfdCache) -> None:
    wrong: list[object] = []

    def work(letter: bytes) -> None:
        for count in range(200):
            size = min(count + 1, 99)  # it is mapped in the end
            memory = copy_of(cache, letter * size)
            if memory is None:
                continue
            with memory:
                (mapped,) = map_parts(memory.fileno(), [size])
            if mapped[:] != letter * size:
                wrong.append(mapped[:])

    threads = [threading.Thread(target=work, args=(b"%d" % number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(kept()) <= 4


# Through channels.

numpy = pytest.importorskip("numpy")


@pytest.fixture(params=PACKAGES)
def ctx(request: pytest.FixtureRequest) -> Any:
    return get_context("fork", backend=request.param)


def arrays(count: int) -> Iterator[Any]:
    """Arrays of various sizes, each full of its number."""
    for number in range(count):
        yield numpy.full(LARGE + number % 7 * 40_000, number, "u1")


def right(received: list[Any]) -> bool:
    return all((array == array[0]).all() for array in received)


def last_are_right(queue: Any, answers: Any, count: int) -> None:
    """A receiver that keeps the last arrays that it was sent, and looks at all of them."""
    last: list[Any] = []
    wrong = 0
    for number in range(count):
        last.append(queue.get())
        wrong += last[-1][0] != number or not right(last)
        del last[: len(last) - number % 6]
    answers.put(wrong)


@pytest.mark.parametrize(
    ("method", "name"),
    [("fork", "Queue"), ("fork", "SimpleQueue"), ("fork", "JoinableQueue"), ("spawn", "Queue")],
)
@pytest.mark.parametrize("package", PACKAGES)
def test_no_array_changes_while_it_is_there(package: str, method: str, name: str) -> None:
    ctx = get_context(method, backend=package)
    queue, answers = getattr(ctx, name)(), ctx.Queue()
    receiver = ctx.Process(target=last_are_right, args=(queue, answers, 40))
    receiver.start()
    for array in arrays(40):
        queue.put(array)
        array[:] = 255  # nobody sees that
    assert answers.get(timeout=60) == 0
    receiver.join(60)
    finish(queue)
    finish(answers)


def test_nor_in_a_pipe(ctx: Any) -> None:
    left, right_end = ctx.Pipe()
    received: list[Any] = []
    with left, right_end:
        for number, array in enumerate(arrays(40)):
            thread = threading.Thread(target=left.send, args=(array,))  # the pipe may be full
            thread.start()
            received.append(right_end.recv())
            thread.join()
            assert right(received)
            del received[: len(received) - number % 6]
        assert len(kept()) == 4


def plus_one(array: Any) -> Any:
    return array + 1


@pytest.mark.parametrize(
    ("package", "method"),
    [
        ("multiprocessing", "fork"),
        ("multiprocess", "fork"),
        ("multiprocessing", "spawn"),
        ("multiprocess", "forkserver"),
    ],
)
def test_nor_in_a_pool(package: str, method: str) -> None:
    with get_context(method, backend=package).Pool(2) as pool:
        results = [result.copy() for result in pool.imap(plus_one, arrays(12))]
        results += pool.map(plus_one, arrays(12), chunksize=1)
        results += [pool.apply(plus_one, (array,)) for array in arrays(12)]
        pool.close()
        pool.join()
    assert [result[0] for result in results] == [*range(1, 13)] * 3
    assert right(results)


def test_nor_in_an_executor(ctx: Any) -> None:
    with ProcessPoolExecutor(2, ctx) as executor:
        results = list(executor.map(plus_one, arrays(12)))
        results += [executor.submit(plus_one, array).result() for array in arrays(12)]
    assert [result[0] for result in results] == [*range(1, 13)] * 2
    assert right(results)


def test_a_receiver_that_is_killed_leaves_nothing(ctx: Any) -> None:
    queue, answers = ctx.Queue(), ctx.Queue()

    def receive() -> None:
        held = [queue.get() for _ in range(3)]
        answers.put(len(held))
        signal.pause()

    receiver = ctx.Process(target=receive)
    receiver.start()
    for array in arrays(3):
        queue.put(array)
    answers.get(timeout=60)
    files = {os.fstat(fd).st_ino for fd in kept()}
    receiver.kill()
    receiver.join()
    for array in arrays(6):
        queue.put(array)
        assert right([queue.get()])
    assert {os.fstat(fd).st_ino for fd in kept()} == files
    assert not [name for name in os.listdir("/dev/shm") if "fdshare" in name]
    finish(queue)
    finish(answers)
    assert not kept()


def test_with_few_descriptors_the_rest_goes_through_the_socket(ctx: Any) -> None:
    queue = ctx.Queue()
    queue.put(0)
    queue.get()
    before = len(census())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Room for 40.
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, limits[1]))
    try:
        for array in (numpy.full(4 * MIB, number, "u1") for number in range(30)):
            queue.put(array)
        assert len(census()) - before <= 10 + 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [queue.get()[0] for _ in range(30)] == list(range(30))
    finish(queue)


def test_a_closed_connection_keeps_nothing(ctx: Any) -> None:
    left, right_end = ctx.Pipe()
    with right_end:
        left.send(numpy.zeros(LARGE, "u1"))
        right_end.recv()
        assert kept()
        left.close()
        assert not kept()
