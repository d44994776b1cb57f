"""Packets of tasks beside a stream: order, failures in between, workers that are killed."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from breaking import ended, state, waits_for_lock
from conftest import wait_until

from fdshare import get_context
from fdshare.mp.backends import backend_of
from fdshare.mp.channels.framing import LENGTH
from fdshare.mp.pickling.bundle import Bundle
from fdshare.mp.workers.reader_lock import ReaderLock
from fdshare.mp.workers.tasks import CALL, HEAD_SIZE, Task, headed
from mp import children
from mp.common import (  # noqa: F401
    METHODS,
    PACKAGES,
    descriptor_limit_reached,
    ends,
    identity,
    open_now,
    trackers,
)

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="no packets")

LONG = 130_000  # longer than a packet
HUGE = 250_000  # longer than the stream has room for, and not in a memfd


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Tasks:
    """A task queue of a pool, with both ends in this process."""

    def __init__(self, package: str) -> None:
        classes = backend_of(package).CLASSES
        self.family = classes.family
        self.queue: Any = classes.TaskQueue(ctx=get_context("fork", backend=package))
        self.packets = self.queue._packets

    def send(self, index: int, value: Any, *beside: Any) -> None:
        """A task that returns *value*."""
        call = Task.of(self.family, (children.first, (value, *beside), {}))
        self.queue.send_task((7, index, call, (), {}))

    def receive(self) -> tuple[int, Any]:
        job, index, call, args, kwds = self.queue.get()
        assert job == 7
        return index, call(*args, **kwds)

    def kill_who_receives(self) -> None:
        """What is left behind by a worker that is killed between a packet and the stream."""
        assert len(os.read(self.packets._reader.fileno(), 100)) == HEAD_SIZE


@pytest.fixture
def tasks(package: str) -> Iterator[Tasks]:
    made = Tasks(package)
    before = open_now()
    yield made
    assert open_now() == before
    made.queue.abandon()
    made.queue.close()
    assert open_now() == before - (6 if type(made.queue._rlock) is ReaderLock else 4)


def test_small_tasks_are_packets(tasks: Tasks) -> None:
    for size in 0, 100_000:
        tasks.send(1, bytes(size))
        assert not tasks.queue._reader.poll()
        assert tasks.receive() == (1, bytes(size))


def test_all_arrive_in_the_order_in_which_they_were_sent(tasks: Tasks) -> None:
    sent = list(enumerate(["a", bytes(LONG), "with a file", "b", "with a file", "c"]))
    with open(os.devnull) as file:
        for index, value in sent:
            tasks.send(index, value, *[file] * (value == "with a file"))
    assert [tasks.receive() for _ in sent] == sent


def test_a_task_for_which_there_is_no_room_is_read_while_it_is_sent(tasks: Tasks) -> None:
    def send() -> None:
        for index in range(3):
            tasks.send(2 * index, bytes(HUGE))
            tasks.send(2 * index + 1, index)
        tasks.queue.send_task(None)

    def run() -> None:
        sender = Thread(target=send)
        sender.start()
        for index in range(3):
            assert tasks.receive() == (2 * index, bytes(HUGE))
            assert tasks.receive() == (2 * index + 1, index)
        with pytest.raises(EOFError):
            tasks.receive()
        sender.join()

    ends(run)


def test_a_worker_that_was_killed_before_it_looked_leaves_no_task_behind(tasks: Tasks) -> None:
    with open(os.devnull) as file:
        tasks.send(1, "a", file)
        tasks.kill_who_receives()
        tasks.send(2, "b", file)
        tasks.send(3, "c")
        tasks.send(4, "d", file)
    assert [tasks.receive() for _ in range(4)] == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    tasks.send(5, "e")
    assert tasks.receive() == (5, "e")


def test_what_was_left_behind_comes_before_the_end(tasks: Tasks) -> None:
    with open(os.devnull) as file:
        tasks.send(1, "a", file)
        tasks.send(2, "b", file)
    tasks.kill_who_receives()
    tasks.queue.finish()
    assert [tasks.receive() for _ in range(2)] == [(1, "a"), (2, "b")]
    for _ in range(2):
        with pytest.raises(EOFError):
            tasks.receive()


def test_another_worker_is_told_where_one_was_killed_while_its_task_was_sent(tasks: Tasks) -> None:
    def run() -> None:
        sender = Thread(target=tasks.send, args=(1, bytes(HUGE)))
        sender.start()
        tasks.kill_who_receives()
        assert tasks.receive() == (1, bytes(HUGE))
        sender.join()

    ends(run)


def test_packets_fill_before_a_task_without_room_has_begun(tasks: Tasks) -> None:
    count = 1000  # more than the packets have room for

    def send() -> None:
        for index in range(count):
            tasks.send(index, index)
        tasks.send(count, bytes(HUGE))

    def run() -> None:
        sender = Thread(target=send)
        sender.start()
        assert [tasks.receive() for _ in range(count)] == [(n, n) for n in range(count)]
        assert tasks.receive() == (count, bytes(HUGE))
        sender.join()

    ends(run)


def test_a_task_that_fails_between_announcement_and_body(tasks: Tasks) -> None:
    def run() -> None:
        with open(os.devnull) as file:
            for index in range(2):
                with pytest.raises(OSError, match="Bad file descriptor") as caught:
                    tasks.packets.send(headed(CALL, 7, index, Bundle(bytes(LONG), [-1])))
                assert caught.value.errno == errno.EBADF
            # Who looks does not wait for a body.
            tasks.packets._tell(bytes(HEAD_SIZE))
            tasks.send(2, "b")
            assert tasks.receive() == (2, "b")
            tasks.send(3, "c", file)
            assert tasks.receive() == (3, "c")

    ends(run)


def test_at_the_limit_a_task_stays(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdshare.mp.workers.tasks.PATIENCE", -1.0)
    with open(os.devnull) as file:
        tasks.send(1, "a", file)
        tasks.send(2, "b")
        tasks.send(3, "c", file)
    with descriptor_limit_reached():
        index, call = tasks.queue.get()[1:3]
        with pytest.raises(OSError) as caught:
            call()
        assert (index, caught.value.errno) == (1, errno.EMFILE)
    assert [tasks.receive() for _ in range(2)] == [(2, "b"), (3, "c")]


def test_a_task_with_descriptors_is_one_send(tasks: Tasks) -> None:
    with open(os.devnull) as file:
        tasks.send(1, "a", file)
    stream = tasks.queue._reader._carrier()
    announcement, (number,), *_ = socket.recv_fds(stream, LENGTH.size, 1)
    os.close(number)
    assert len(announcement) == LENGTH.size


def test_ended_while_both_wait_for_room(tasks: Tasks) -> None:
    def run(sizes: list[int]) -> None:
        def send() -> None:
            for index in range(1000):
                tasks.send(index, bytes(sizes[index % len(sizes)]))

        sender = Thread(target=send)
        sender.start()
        wait_until(lambda: state(sender.native_id or 0) == "S" and tasks.queue._reader.poll())
        tasks.queue.abandon()
        sender.join()

    ends(run, [10, LONG])


def test_a_small_buffer_is_no_limit_of_tasks(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.getsockopt", lambda *_: 4096)
    tasks = Tasks(package)
    monkeypatch.undo()
    tasks.send(1, bytes(4096))
    assert tasks.queue._reader.poll()
    assert tasks.receive() == (1, bytes(4096))
    tasks.queue.close()


# Pools


def mix(ctx: Any) -> None:
    with ctx.Pool(3, maxtasksperchild=50) as pool, open(os.devnull) as file:
        beside = [(), (file,), (), (bytes(LONG),), (bytes(HUGE),)]
        results = [
            pool.apply_async(children.first, (number, *beside[number % 7 % 5]))
            for number in range(200)
        ]
        assert [result.get() for result in results] == list(range(200))
        kinds = [(os.fspath, ""), (children.identity, file), (len, bytes(LONG))] * 20
        left = [pool.apply_async(function, (argument,)) for function, argument in kinds]
        pool.close()  # with all of them in the queue
        pool.join()
        assert [result.get(0) for result in left] == ["", identity(file), LONG] * 20


def test_without_packets(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdshare.kernel.system.HAS_SEQPACKET", False)
    ends(mix, get_context("fork", backend=package))


@pytest.mark.parametrize("method", METHODS)
def test_a_mix_of_tasks_is_complete(package: str, method: str) -> None:
    ends(mix, get_context(method, backend=package))


def kill_workers(ctx: Any) -> None:
    with ctx.Pool(3) as pool, open(os.devnull) as file:
        results = []
        for number in range(200):
            if number % 20 == 0:
                pool.apply_async(signal.raise_signal, (signal.SIGKILL,))
            results.append(pool.apply_async(children.first, (number, *[file] * (number % 3))))
        assert [result.get(30) for result in results] == list(range(200))


def test_workers_that_are_killed_lose_their_own_tasks(package: str) -> None:
    ends(kill_workers, get_context("fork", backend=package))


def kill_a_worker_before_it_looks(ctx: Any) -> None:
    with ctx.Pool(1) as pool, open(os.devnull) as file:
        (worker,) = pool._pool
        with pool._inqueue._rlock:
            first = pool.apply_async(children.identity, (file,))
            wait_until(lambda: waits_for_lock(worker.pid))
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: worker not in pool._pool)
        assert pool.apply(children.same, (2,)) == 2
        assert not first.ready()
        second = pool.apply_async(children.identity, (file,))
        assert first.get(30) == second.get(30) == identity(file)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptions of a process's own")
def test_a_worker_that_is_killed_before_it_looks(package: str) -> None:
    ends(kill_a_worker_before_it_looks, get_context("fork", backend=package))


def test_workers_end_with_the_program(package: str, child: Any) -> None:
    process = child(PROGRAM, package)
    pids = list(map(int, process.stdout.readline().split()))
    assert len(pids) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: all(map(ended, pids)))


PROGRAM = """
    import sys, time
    from fdshare import get_context

    pool = get_context("fork", backend=sys.argv[1]).Pool(2)
    print(*[worker.pid for worker in pool._pool], flush=True)
    time.sleep(1000)
"""
