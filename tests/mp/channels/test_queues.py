"""Queue, JoinableQueue and SimpleQueue beyond what CPython's own tests check."""

from __future__ import annotations

import _thread
import gc
import os
import pickle
import queue as queues
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from fdshare import get_context
from fdshare.errors import KindMismatch, NoTransit
from fdshare.mp.channels import queues as queues_of_ours
from fdshare.mp.pickling.reducers import encode
from mp import children
from mp.common import (
    METHODS,
    PACKAGES,
    dismiss,
    ends,
    finish,
    identity,
    open_now,
    trackers,  # noqa: F401
    writable,
)
from mp.interrupts import SIGNAL, Interrupt, handled_by, interrupt

NAMES = ("Queue", "JoinableQueue", "SimpleQueue")


@pytest.fixture(params=PACKAGES)
def ctx(request: pytest.FixtureRequest) -> Any:
    return get_context("fork", backend=request.param)


@pytest.fixture(params=NAMES)
def queue(ctx: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    queue = getattr(ctx, request.param)()
    yield queue
    finish(queue)


def test_it_is_a_queue_of_the_package(queue: Any) -> None:
    stock = getattr(queue._family.queues, type(queue).__name__)
    assert isinstance(queue, stock)


def test_in_order(queue: Any) -> None:
    for number in range(50):
        queue.put(number)
        with socket.socket() as sock:
            queue.put((number, sock))
    for number in range(50):
        assert queue.get() == number
        again, sock = queue.get()
        sock.close()
        assert again == number


def test_more_than_the_pipe_holds_in_order(ctx: Any) -> None:
    queue = ctx.Queue()
    with open(os.devnull) as file:
        for number in range(1000):
            queue.put((number, file) if number % 3 == 0 else number)
    assert queue.qsize() == 1000
    for number in range(1000):
        item = queue.get(timeout=30)
        if number % 3 == 0:
            item[1].close()
            item = item[0]
        assert item == number
    assert queue.empty()
    finish(queue)


def test_large_items_from_many_threads(ctx: Any) -> None:
    queue = ctx.Queue()
    items = [os.urandom(100) * (10 ** (n % 5)) for n in range(40)]

    def put(start: int) -> None:
        for item in items[start::4]:
            with open(os.devnull) as file:
                queue.put((item, file))

    threads = [threading.Thread(target=put, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    arrived = []
    for _ in items:
        item, file = queue.get(timeout=30)
        file.close()
        arrived.append(item)
    for thread in threads:
        thread.join()
    assert sorted(arrived) == sorted(items)
    finish(queue)


def test_many_processes_read_and_write(ctx: Any) -> None:
    inbox, outbox = ctx.Queue(), ctx.Queue()
    workers = [ctx.Process(target=children.echo, args=(inbox, outbox)) for _ in range(4)]
    for worker in workers:
        worker.start()
    with socket.socket() as sock:
        for number in range(200):
            inbox.put((number, sock))
        seen = set()
        for _ in range(200):
            number, arrived = outbox.get(timeout=30)
            with arrived:
                assert identity(arrived) == identity(sock)
            seen.add(number)
    assert seen == set(range(200))
    dismiss(workers, inbox, outbox)


@pytest.mark.parametrize("name", ["Queue", "SimpleQueue"])
def test_what_is_not_the_socket_it_is_said_to_be(ctx: Any, name: str) -> None:
    queue = getattr(ctx, name)(*[1] * (name == "Queue"))  # with one place, which must not be lost
    left, right = socket.socketpair()
    with left, right, open(os.devnull) as file:
        data, _ = encode(queue._family, left)  # type: ignore[misc]
        for fd in [left.fileno()] * 4 + [file.fileno()] * 2 + [left.fileno()] * 2:
            if name == "Queue":
                queue._sem.acquire()
                queue._dispatch((data, [fd]), None, [False], None)
            else:
                queue._writer._own_sender().send((data, [fd]))
            if fd == file.fileno():
                with pytest.raises(KindMismatch, match=r"non-socket"):
                    queue.get()
            else:
                with queue.get() as arrived:
                    assert identity(arrived) == identity(left)
    finish(queue)


def test_a_queue_pickles_only_while_a_process_starts(queue: Any) -> None:
    with pytest.raises(RuntimeError, match="through inheritance"):
        pickle.dumps(queue)
    with pytest.raises(RuntimeError, match="through inheritance"):
        queue.put(queue)


def test_what_is_put_before_close_arrives_in_another_process(ctx: Any) -> None:
    queue, outbox = ctx.Queue(), ctx.SimpleQueue()
    process = ctx.Process(target=children.echo, args=(queue, outbox))
    process.start()
    for number in range(300):
        with socket.socket() as sock:
            queue.put((number, sock, b"x" * 2000))
    queue.put(None)
    queue.close()
    for number in range(300):
        again, sock, _ = outbox.get()
        sock.close()
        assert again == number
    queue.join_thread()
    process.join()
    finish(outbox)
    finish(queue)


def test_a_closed_queue(ctx: Any) -> None:
    queue = ctx.Queue()
    queue.put(1)
    queue.close()
    for use in (lambda: queue.put(1), queue.get, queue.get_nowait):
        with pytest.raises(ValueError, match="is closed"):
            use()
    queue.join_thread()
    queue.close()


def test_what_nobody_can_receive_does_not_keep_the_program() -> None:
    code = (
        "from fdshare import get_context\n"
        "queue = get_context('fork').Queue()\n"
        "for _ in range(100): queue.put(b'x' * 100_000)\n"
        "print('ok')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


# The main thread of *sys.argv[2]*, "parent" or "child", is interrupted in a put.
INTERRUPTED = """
import select, signal, sys, threading
import fdshare

class GivenUp(Exception):
    pass

def give_up(*_):
    raise GivenUp

def interrupt():
    while select.select([], [queue._writer], [], 0)[1]:
        pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

def put():
    signal.signal(signal.SIGUSR1, give_up)
    threading.Thread(target=interrupt).start()
    try:
        queue.put(b"x" * 250_000)  # more than a socket holds, and not laid into memory
    except GivenUp:
        print("given up", flush=True)

context = fdshare.get_context("fork", backend=sys.argv[1])
queue = context.SimpleQueue()
if sys.argv[2] == "parent":
    put()
else:
    context.Process(target=put).start()
"""


@pytest.mark.parametrize("who", ["parent", "child"])
@pytest.mark.parametrize("package", PACKAGES)
def test_an_interrupted_put_does_not_keep_the_program(package: str, who: str) -> None:
    words = [sys.executable, "-c", INTERRUPTED, package, who]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("given up\n", "", 0)


LONG = b"x" * 250_000  # as above


def interrupt_a_put(queue: Any) -> None:
    """Interrupts a put of LONG when the socket is full."""

    def when_full() -> None:
        wait_until(lambda: not writable(queue._writer))
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)

    thread = threading.Thread(target=when_full)
    thread.start()
    with handled_by(interrupt), pytest.raises(Interrupt):
        queue.put(LONG)
    thread.join()


def end_after_an_interrupted_put(queue: Any, ending: socket.socket) -> None:
    queues_of_ours._PATIENCE = 60.0
    util = queue._family.util
    util.Finalize(None, ending.send, [b"1"], exitpriority=20)  # before those of the queue
    interrupt_a_put(queue)


def test_what_an_interrupted_put_has_begun_comes_before_the_process_ends(
    ctx: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    queue = ctx.SimpleQueue()
    process = ctx.Process(target=end_after_an_interrupted_put, args=(queue, far))
    process.start()
    far.close()
    assert near.recv(1)
    # It waits, or has ended.
    wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2][1] in "SZ")
    assert queue.get() == LONG
    process.join()
    assert process.exitcode == 0
    assert not queue._reader.poll()
    finish(queue)


def put_without_threads(ctx: Any) -> None:
    def read() -> None:
        wait_until(lambda: sender.begun)
        got.append(queue.get())

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")  # EAGAIN of clone(2)

    queue = ctx.SimpleQueue()
    sender = queue._writer._own_sender()
    got: list[Any] = []
    reading = threading.Thread(target=read)
    reading.start()
    _thread.start_new_thread = refuse
    interrupt_a_put(queue)
    reading.join()
    queue.put("next")
    got.append(queue.get())
    assert got == [LONG, "next"]


def test_an_interrupted_put_where_no_thread_can_start(ctx: Any) -> None:
    ends(put_without_threads, ctx)


def test_a_dropped_queue_is_collected(ctx: Any) -> None:
    before = open_now(), threading.active_count()
    for _ in range(3):
        queue = ctx.Queue()
        with open(os.devnull) as file:
            for _ in range(300):
                queue.put([file])
        ended = queue._feeder.thread_ended
        del queue
        gc.collect()
        with ended:
            pass
    gc.collect()
    assert (open_now(), threading.active_count()) == before


def test_a_reader_that_goes_during_a_large_item(ctx: Any) -> None:
    queue = ctx.SimpleQueue()
    raised: list[BaseException] = []

    def put() -> None:
        try:
            queue.put(b"1" * 250_000)  # more than the pipe holds, and not laid into memory
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    wait_until(queue._reader.poll)
    queue._reader.close()
    thread.join(60)
    with queue._finished:  # a thread has tried to send the rest, and says nothing
        pass
    with pytest.raises(BrokenPipeError):
        queue.put(1)
    assert [type(error) for error in raised] == [BrokenPipeError]
    finish(queue)


LEFT_OPEN = """
import collections, sys
import fdshare

context = fdshare.get_context("fork", backend=sys.argv[1])
ends = context.Pipe()
ends[0].send(1)
queues = context.SimpleQueue(), context.Queue(), context.JoinableQueue()
for queue in queues:
    queue.put(1)
collections.kept = lambda: queues  # so all of it is there until the modules have lost their names
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_left_open_at_the_end_of_the_interpreter(package: str) -> None:
    words = [sys.executable, "-c", LEFT_OPEN, package]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""


def test_joinable(ctx: Any) -> None:
    queue = ctx.JoinableQueue()
    with socket.socket() as sock:
        queue.put(sock)
        queue.put(2)
    with pytest.raises(AttributeError):
        queue.put(children.Unpicklable())
    queue.get().close()
    queue.task_done()
    queue.get()
    queue.task_done()
    queue.join()
    with pytest.raises(ValueError, match="too many"):
        queue.task_done()
    finish(queue)


def test_timeouts(ctx: Any) -> None:
    queue = ctx.Queue(1)
    with pytest.raises(queues.Empty):
        queue.get(timeout=-1)
    queue.put(1)
    with pytest.raises(queues.Full):
        queue.put(2, timeout=-1)
    assert queue.get(timeout=5) == 1
    finish(queue)


@pytest.mark.parametrize("method", METHODS)
def test_the_lock_of_a_dead_writer_does_not_stop_put(method: str) -> None:
    ctx = get_context(method)
    queue = ctx.Queue()
    queue._wlock.acquire()  # as a process that was killed in the middle
    with socket.socket() as sock:
        queue.put(sock)  # returns: the thread waits for the lock, as the stock queue's
    assert queue.empty()
    queue._wlock.release()
    queue.get(timeout=30).close()
    finish(queue)


def test_stock_pickle_says_which_line_to_change(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right, pytest.raises(NoTransit) as refusal:
        pickle.dumps(left)
    assert "fdshare.install()" in str(refusal.value)
    assert "fdshare.get_context()" in str(refusal.value)


class Loud:
    """Puts into a queue when the collector finds it."""

    def __init__(self, queue: Any) -> None:
        self.me = self
        self.queue = queue

    def __del__(self) -> None:
        self.queue.put("deleted")


@pytest.mark.parametrize("name", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_a_finaliser_may_put_during_a_put(ctx: Any, name: str) -> None:
    queue = getattr(ctx, name)()
    got: list[Any] = []

    def read() -> None:
        # Finalisers may run in this thread, too: the order of theirs is not known.
        while len(got) < 400:
            obj = queue.get()
            got.append(obj[0] if isinstance(obj, list) else obj)
            if isinstance(obj, list):
                obj[1].close()

    def collect() -> bool:
        gc.collect()  # does nothing while the other thread collects
        return len(got) == 2 * (number + 1)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    thresholds = gc.get_threshold()
    gc.set_threshold(1)  # the collector runs wherever it can
    try:
        with socket.socket() as sock:
            for number in range(200):
                Loud(queue)
                queue.put([number, sock])
                # A put() of a finaliser in the thread that reads must not find a SimpleQueue full.
                if number % 50 == 49:
                    wait_until(collect)
    finally:
        gc.set_threshold(*thresholds)
    reader.join()
    assert [obj for obj in got if obj != "deleted"] == list(range(200))
    assert got.count("deleted") == 200
    finish(queue)
