"""What goes wrong on a channel of ours: nothing is lost, nothing leaks, the channel goes on."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue as queues
import signal
import socket
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from fdshare import ProcessPoolExecutor, get_context, hold, install, uninstall
from fdshare.errors import DescriptorLimit, InvalidArgument, NoTransit
from mp import children
from mp.common import (  # noqa: F401
    METHODS,
    PACKAGES,
    descriptor_limit_reached,
    finish,
    identity,
    open_now,
    shares_duplicates,
    trackers,
)


@pytest.fixture
def ctx() -> Any:
    return get_context("fork")


# More than one message carries


@pytest.mark.parametrize("count", [252, 253, 254, 506, 1000])
def test_any_number_of_descriptors_in_one_object(ctx: Any, count: int) -> None:
    with open(os.devnull) as null:
        files = [os.fdopen(os.dup(null.fileno())) for _ in range(count)]
        queue = ctx.Queue()
        queue.put({"all": files})
        children.close_all(files)
        arrived = queue.get()["all"]
        assert len(arrived) == count
        assert {identity(file) for file in arrived} == {identity(null)}
        children.close_all(arrived)
        finish(queue)


def test_the_same_socket_twice_is_one_descriptor_and_one_object(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right, socket.socket() as sock:
        before = open_now()
        left.send({"a": sock, "b": [sock]})
        arrived = right.recv()
        assert arrived["a"] is arrived["b"][0]
        with arrived["a"]:
            assert open_now() <= before + 2  # it, and the connection's own look at its socket


# At a limit


@pytest.mark.parametrize("channel", ["Queue", "SimpleQueue", "Pipe"])
def test_at_the_receivers_limit_the_message_stays(ctx: Any, channel: str) -> None:
    reader, writer = ctx.Pipe(duplex=False)
    queue = None if channel == "Pipe" else getattr(ctx, channel)()
    send, receive = (writer.send, reader.recv) if queue is None else (queue.put, queue.get)
    send("before")
    with socket.socket() as sock, open(os.devnull) as file:
        send([sock, file])
        expected = identity(sock)
    send("after")
    assert receive() == "before"
    with descriptor_limit_reached():
        with pytest.raises(DescriptorLimit):
            receive()
        with pytest.raises(DescriptorLimit):
            receive()
    sock, file = receive()
    with sock, file:
        assert identity(sock) == expected
    assert receive() == "after"
    reader.close()
    writer.close()
    if queue is not None:
        finish(queue)


class Server:
    """Its method is a task that has the listener."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))

    def work(self, number: int) -> tuple[int, Any]:
        here = identity(self.listener)
        self.listener.close()
        return number, here


@shares_duplicates
@pytest.mark.parametrize("kind", ["Pool", "executor", "map"])
@pytest.mark.parametrize("package", PACKAGES)
def test_tasks_with_one_listener_keep_one_duplicate(package: str, kind: str) -> None:
    ctx = get_context("fork", backend=package)
    server = Server()
    expected = [(number, identity(server.listener)) for number in range(200)]
    started, go = os.pipe()
    with ctx.Pool(1) if kind == "Pool" else ProcessPoolExecutor(1, ctx) as workers:
        submit = (
            workers.submit
            if kind != "Pool"
            else lambda *call: workers.apply_async(call[0], call[1:])
        )
        submit(os.read, started, 1)
        before = open_now()
        if kind == "map":
            found: Any = workers.map(server.work, range(200))
        else:
            # Objects of their own, with numbers of their own.
            found = [submit(server.work, number) for number in range(200)]
        server.listener.close()
        assert open_now() <= before  # one more, and the program's own is closed
        os.write(go, b"x")
        if kind == "executor":
            found = [future.result() for future in found]
        elif kind == "Pool":
            found = [result.get() for result in found]
        assert list(found) == expected
    os.close(started)
    os.close(go)


@shares_duplicates
@pytest.mark.parametrize("package", PACKAGES)
def test_a_queue_that_waits_keeps_one_duplicate_of_a_description(package: str) -> None:
    queue = get_context("fork", backend=package).Queue()
    with open(os.devnull) as null, socket.socket() as sock:
        before = open_now()
        for number in range(500):
            with sock.dup() as copy, open(null.fileno(), closefd=False) as file:
                queue.put([number, copy, file])
        assert queue._feeder.has_thread
        assert open_now() <= before + 2
        for number in range(500):
            arrived, copy, file = queue.get()
            with copy, file:
                assert arrived == number
                assert (identity(copy), identity(file)) == (identity(sock), identity(null))
        assert open_now() == before
    finish(queue)


def test_what_one_process_had_to_leave_another_takes(ctx: Any) -> None:
    queue, answers = ctx.Queue(), ctx.SimpleQueue()
    with socket.socket() as sock:
        queue.put(sock)
        expected = identity(sock)
    with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
        queue.get()
    process = ctx.Process(target=children.echo, args=(queue, answers))
    process.start()
    with answers.get() as arrived:
        assert identity(arrived) == expected
    queue.put(None)
    process.join()
    finish(queue)
    finish(answers)


def test_at_the_senders_limit_the_caller_hears_of_it(ctx: Any) -> None:
    queue = ctx.Queue()
    queue._wlock.acquire()  # somebody writes: it would have to be kept
    with (
        socket.socket() as sock,
        descriptor_limit_reached(),
        pytest.raises(OSError, match="RLIMIT"),
    ):
        queue.put(sock)
    queue._wlock.release()
    queue.put("still works")
    assert queue.get() == "still works"
    assert queue._sem._semlock._get_value() == queue._maxsize
    finish(queue)


@pytest.mark.parametrize("package", PACKAGES)
def test_at_the_limit_every_sender_names_it(package: str) -> None:
    ctx = get_context("fork", backend=package)
    near, far = ctx.Pipe()
    with ctx.Pool(1) as pool, ProcessPoolExecutor(1, ctx) as executor, open(os.devnull) as null:
        executor.submit(abs, 1).result()
        many = [os.fdopen(os.dup(null.fileno())) for _ in range(300)]
        ways: dict[str, Any] = {
            "apply_async": lambda: pool.apply_async(len, (null,)),
            "map_async": lambda: pool.map_async(len, [null]),
            "submit": lambda: executor.submit(len, null),
            "send": lambda: near.send(many),
            "hold": lambda: hold(null),
            "initializer": lambda: ctx.Pool(1, print, (null,)),
        }
        for name, way in ways.items():
            with descriptor_limit_reached(), pytest.raises(DescriptorLimit) as caught:
                way()
            assert "RLIMIT_NOFILE of the sender is" in str(caught.value), name
        children.close_all(many)
    near.close()
    far.close()


def test_at_the_limit_patched_channels_name_it() -> None:
    install()
    try:
        with (
            open(os.devnull) as null,
            descriptor_limit_reached(),
            pytest.raises(DescriptorLimit, match="RLIMIT_NOFILE of the sender is"),
        ):
            ForkingPickler.dumps(null)
    finally:
        uninstall()


IN_FLIGHT = """
import os, resource, socket, sys, threading, time
from fdshare import get_context, DescriptorLimit
from fdshare.mp.channels import sending as outgoing

ctx = get_context("fork")
reader, writer = ctx.Pipe(duplex=False)
queue = ctx.Queue()
sock = socket.socket()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
os.setuid(200_000 + os.getpid())  # of descriptors in flight a user has one count
outgoing.patiently.__defaults__ = (0.3,)
for send, receive in ((writer.send, reader.recv), (queue.put, queue.get)):
    sent = 0
    try:
        while True:
            send([sock] * 1 + [sock.dup()])
            sent += 1
    except DescriptorLimit as limit:
        assert "RLIMIT_NOFILE of the sender is 64" in str(limit), limit
    assert 20 < sent < 100, sent
    for _ in range(sent):
        for arrived in receive():
            arrived.close()
    send("goes on")
    assert receive() == "goes on"
outgoing.patiently.__defaults__ = (20.0,)
def read():
    time.sleep(0.2)
    for _ in range(100):
        for arrived in reader.recv():
            arrived.close()
thread = threading.Thread(target=read)
thread.start()
for _ in range(100):
    writer.send([sock.dup()])
thread.join()
print("ok")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, whom the limit binds")
def test_too_many_descriptors_in_flight() -> None:
    done = subprocess.run([sys.executable, "-c", IN_FLIGHT], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


# What cannot be pickled, or unpickled


@pytest.mark.parametrize("package", PACKAGES)
def test_what_cannot_be_pickled_is_raised_at_the_call(package: str) -> None:
    ctx = get_context("fork", backend=package)
    queue, simple = ctx.Queue(maxsize=3), ctx.SimpleQueue()
    left, right = ctx.Pipe()
    with (
        left,
        right,
        socket.socket() as sock,
        ctx.Pool(1) as pool,
        ProcessPoolExecutor(1, ctx) as executor,
    ):
        before = open_now()
        bad = [sock, children.Unpicklable()]
        for call in (
            lambda: queue.put(bad),
            lambda: simple.put(bad),
            lambda: left.send(bad),
            lambda: pool.apply_async(children.same, (bad,)),
            lambda: pool.map_async(children.same, [sock, bad]),
            lambda: pool.starmap(children.same, [(bad,)]),
            lambda: list(pool.imap(children.same, [bad])),
            lambda: executor.submit(children.same, bad),
            lambda: executor.map(children.same, [bad]),
        ):
            with pytest.raises(AttributeError, match="not to be pickled"):
                call()
        gc.collect()
        assert open_now() <= before + 1  # the connection's own look at its socket
        assert queue.qsize() == 0
        assert pool.apply(children.same, (3,)) == 3
        assert executor.submit(children.same, 4).result() == 4
        pool.close()
        pool.join()
    finish(queue)
    finish(simple)


def test_one_item_that_cannot_be_unpickled(ctx: Any) -> None:
    queue, simple = ctx.Queue(maxsize=2), ctx.SimpleQueue()
    for one in (queue, simple):
        with socket.socket() as sock, open(os.devnull) as file:
            one.put([sock, children.Bomb(file), sock])
        one.put("next")
        before = open_now()
        with pytest.raises(RuntimeError, match="exploded"):
            one.get()
        assert open_now() <= before
        assert one.get() == "next"
        finish(one)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_job_that_cannot_be_unpickled_fails_alone(package: str) -> None:
    ctx = get_context("fork", backend=package)
    with ctx.Pool(1) as pool, ProcessPoolExecutor(1, ctx) as executor, socket.socket() as sock:
        for call in (
            lambda: pool.apply(children.same, (children.Bomb(sock),)),
            lambda: pool.apply(children.return_bomb),
            lambda: pool.map(children.same, [children.Bomb(sock)]),
            lambda: list(pool.imap_unordered(children.same, [children.Bomb(sock)])),
            lambda: executor.submit(children.same, children.Bomb(sock)).result(),
            lambda: executor.submit(children.return_bomb).result(),
        ):
            with pytest.raises(RuntimeError, match="exploded"):
                call()
        assert pool.apply(children.same, (3,)) == 3
        assert executor.submit(children.same, 4).result() == 4
        pool.close()
        pool.join()


def test_a_job_at_a_descriptor_limit_fails_alone(ctx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fdshare.mp.workers import tasks

    monkeypatch.setattr(tasks, "PATIENCE", 0.1)  # or every refusal takes 5 s
    with ctx.Pool(1) as pool, ProcessPoolExecutor(1, ctx) as executor:
        assert executor.submit(children.same, 1).result() == 1
        with descriptor_limit_reached():
            with pytest.raises(DescriptorLimit):
                pool.apply(children.many_sockets, (3,))
            with pytest.raises(DescriptorLimit):
                executor.submit(children.many_sockets, 3).result()
        children.close_all(pool.apply(children.many_sockets, (3,)))
        children.close_all(executor.submit(children.many_sockets, 3).result())
        # In the worker.
        for limit in (
            lambda: pool.apply(children.limit_descriptors, (2,)),
            lambda: executor.submit(children.limit_descriptors, 2).result(),
        ):
            limit()
        sockets = children.many_sockets(10)
        with pytest.raises(DescriptorLimit):
            pool.apply(len, (sockets,))
        with pytest.raises(DescriptorLimit):
            executor.submit(len, sockets).result()
        children.close_all(sockets)
        assert pool.apply(children.same, (3,)) == 3
        assert executor.submit(children.same, 4).result() == 4
        pool.close()
        pool.join()


# Death


def test_a_sender_killed_straight_after_put(ctx: Any) -> None:
    for _ in range(20):
        queue = ctx.Queue()
        process = ctx.Process(target=children.put_and_die, args=(queue,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with queue.get(timeout=10) as arrived:
            assert arrived.recv(99) == b"posthumous"
        finish(queue)


def test_a_receiver_that_is_killed_leaks_nothing(ctx: Any) -> None:
    reader, writer = os.pipe()
    queue, (ready, told) = ctx.Queue(), ctx.Pipe(duplex=False)
    process = ctx.Process(target=children.take_and_die, args=(queue, told))
    process.start()
    for _ in range(3):
        with os.fdopen(os.dup(writer), "wb", buffering=0) as file:
            queue.put(file)
    assert ready.recv() is True
    process.join()
    finish(queue)
    os.close(writer)
    # Every copy is closed: the one taken, those in flight, and ours.
    assert os.read(reader, 1) == b""
    os.close(reader)
    ready.close()
    told.close()


def test_a_sender_killed_in_the_middle_of_a_message(ctx: Any) -> None:
    reader, writer = ctx.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        writer.send(b"x" * (1 << 24))  # nobody reads
        os._exit(0)
    assert reader.poll(30)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    writer.close()
    with pytest.raises(OSError, match="end of file during message"):
        reader.recv()
    with pytest.raises(EOFError):
        reader.recv()
    reader.close()


# Mixed company


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stock_channel_beside_ours(package: str) -> None:
    from importlib import import_module

    stock = import_module(package).get_context("fork")
    ours = get_context("fork", backend=package)
    plain, rich = stock.Queue(), ours.Queue()
    plain.put(1)
    rich.put(2)
    assert (plain.get(timeout=10), rich.get(timeout=10)) == (1, 2)
    left, right = ours.Pipe()
    there, here = stock.Pipe()
    with left, right, there, here:
        with pytest.raises((NoTransit, TypeError), match=r"install\(\)"):
            there.send([left])
        with socket.socket() as sock:
            left.send([there, sock])
            copy, arrived = right.recv()
            with copy, arrived:
                copy.send("through a connection that came through ours")
        assert here.recv().startswith("through")
    finish(plain)
    finish(rich)


def test_our_queue_as_an_argument_of_a_stock_process() -> None:
    stock = multiprocessing.get_context("spawn")
    ours = get_context("spawn")
    inbox, outbox = ours.Queue(), ours.Queue()
    process = stock.Process(target=children.echo, args=(inbox, outbox))
    process.start()
    with socket.socket() as sock:
        inbox.put([sock, 5])
        arrived, five = outbox.get(timeout=60)
        with arrived:
            assert (identity(arrived), five) == (identity(sock), 5)
    inbox.put(None)
    process.join()
    finish(inbox)
    finish(outbox)


def test_bytes_cannot_hold_descriptors(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right, socket.socket() as sock:
        left.send(sock)
        left.send_bytes(b"plain")
        for receive in (right.recv_bytes, lambda: right.recv_bytes_into(bytearray(999))):
            with pytest.raises(InvalidArgument, match=r"recv\(\) takes it"):
                receive()
        with right.recv() as arrived:
            assert identity(arrived) == identity(sock)
        assert right.recv_bytes() == b"plain"


def test_a_queue_is_bounded_as_promised(ctx: Any) -> None:
    queue = ctx.Queue(maxsize=2)
    queue.put(1)
    queue.put(2)
    assert queue.full()
    with socket.socket() as sock:
        before = open_now()
        with pytest.raises(queues.Full):
            queue.put(sock, timeout=0.01)
        with pytest.raises(queues.Full):
            queue.put_nowait(sock)
        assert open_now() == before
    assert [queue.get(), queue.get_nowait()] == [1, 2]
    with pytest.raises(queues.Empty):
        queue.get(timeout=0.01)
    with pytest.raises(queues.Empty):
        queue.get_nowait()
    finish(queue)
    with pytest.raises(ValueError, match="closed"):
        queue.put(1)
