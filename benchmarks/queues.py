"""Queues and pipes of `get_context()`, beside the stock ones of multiprocessing and multiprocess.

*Streamed*: a child puts n items and this process gets them all, as in a queue of work. *To and
fro*: a child sends each item back over a second queue; each direction counts as one. Items are an
int, or a listening socket, which the receiver closes. There is also a row for 64 MiB through a
pipe.

*Bare* is the floor for both kinds of item: the system calls of such a queue, in two loops, without
a queue. The extra cost of a socket beside an int is there that of the kernel and of socket.socket.
"""

from __future__ import annotations

import multiprocessing
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any

from benchmarks.measure import FEW_ROUNDS, Bench, Run
from benchmarks.processes import in_child
from fdshare.mp import get_context

STOCK, OURS = "stock", "fdshare"
BACKENDS = ("multiprocessing", "multiprocess")
BARE = "bare stream"
ITEMS = ("int", "socket")
_END = 0  # "put none": the child ends
LARGE = 64 << 20


def run(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for backend in BACKENDS:
            measure(bench, backend, listener)


def measure(bench: Bench, backend: str, listener: socket.socket) -> None:
    try:
        import_module(backend)
    except ImportError:
        bench.absent(f"queues of {backend}", f"not installed: {backend}")
        return
    sides: dict[str, Run] = {}
    for kind, context in contexts(backend):
        for item in ITEMS:
            for shape, make in (("Queue", streamed), ("Queue to and fro", echoed), ("Pipe", piped)):
                side = partial(make, context, item, listener)
                sides[f"{kind} {shape}, {item}"] = bench.keep(in_child(side))
    if backend == "multiprocessing":
        for item in ITEMS:
            sides[f"{BARE}, {item}"] = bench.keep(in_child(partial(bare, item, listener)))
    times = bench.alternate(sides, rounds=FEW_ROUNDS, longer=5)
    goals = {"int": 1.2, "socket": 0.10}
    for shape in ("Queue", "Queue to and fro", "Pipe"):
        for item in ITEMS:
            what, against = f"{OURS} {shape}, {item}", f"{STOCK} {shape}, {item}"
            goal = goals[item] if shape != "Pipe" and backend == "multiprocessing" else None
            row = bench.ratio(times, what, against, goal=goal)
            row.what, row.against = f"{what} ({backend})", f"{against} ({backend})"
    if backend == "multiprocessing":
        for shape in ("Queue", "Queue to and fro"):
            bench.ratio(times, f"{OURS} {shape}, socket", f"{OURS} {shape}, int", goal=2.0)
        bench.ratio(times, f"{BARE}, socket", f"{BARE}, int")
        bench.ratio(times, f"{OURS} Queue, socket", f"{BARE}, socket")
        large(bench, backend)


def large(bench: Bench, backend: str) -> None:
    """Megabytes of bytes: their time depends on how often they are copied."""
    sides = {kind: bench.keep(poured(context)) for kind, context in contexts(backend)}
    times = bench.alternate(sides, rounds=FEW_ROUNDS)
    row = bench.ratio(times, OURS, STOCK, goal=1.0)
    row.what, row.against = (f"{kind} Pipe, {LARGE >> 20} MiB" for kind in (OURS, STOCK))


def contexts(backend: str) -> list[tuple[str, Any]]:
    """The stock context and fdshare's, both with the default start method of this Python."""
    stock = import_module(backend).get_context("fork")
    return [(STOCK, stock), (OURS, get_context("fork", backend=backend))]


class Checked:
    """What is sent, and how the receiver recognises it."""

    def __init__(self, item: str, listener: socket.socket) -> None:
        self.item: Any = 12345 if item == "int" else listener
        self._address = listener.getsockname() if item == "socket" else None

    def done_with(self, item: Any) -> None:
        """What a receiver does with each item."""
        if self._address is not None:
            item.close()

    def check(self, item: Any) -> None:
        if self._address is None:
            assert item == self.item
        else:
            assert item.getsockname() == self._address
            item.close()


@contextmanager
def streamed(context: Any, item: str, listener: socket.socket) -> Iterator[Run]:
    """A child that puts the number of items that it is asked for into one queue."""
    orders: Any = multiprocessing.SimpleQueue()
    queue = context.Queue()
    sent = Checked(item, listener)

    def child() -> None:
        while count := orders.get():
            for _ in range(count):
                queue.put(sent.item)

    yield from draining(context, child, orders, queue.get, sent)
    queue.close()
    queue.join_thread()


@contextmanager
def piped(context: Any, item: str, listener: socket.socket) -> Iterator[Run]:
    """As `streamed`, over the connections of a Pipe."""
    orders: Any = multiprocessing.SimpleQueue()
    ours, theirs = context.Pipe()
    sent = Checked(item, listener)

    def child() -> None:
        while count := orders.get():
            for _ in range(count):
                theirs.send(sent.item)

    yield from draining(context, child, orders, ours.recv, sent)
    ours.close()
    theirs.close()


@contextmanager
def bare(item: str, listener: socket.socket) -> Iterator[Run]:
    """As `piped`, but only the calls: a length and a number; or an announcement and a body with a
    descriptor, which the receiver peeks at before it reads it and makes a socket of it."""
    orders: Any = multiprocessing.SimpleQueue()
    ours, theirs = socket.socketpair()
    sent = Checked(item, listener)
    length, body = bytes(4), bytes(120)
    rights = ((socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", listener.fileno())),)
    look = int(socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC)
    number = struct.Struct("i")

    def child() -> None:
        while count := orders.get():
            for _ in range(count):
                if item == "int":
                    theirs.send(length + b"12345")
                else:
                    theirs.send(length)
                    theirs.sendmsg((body,), rights)

    def get() -> Any:
        if item == "int":
            ours.recv(4)
            return int(ours.recv(5))
        while True:
            head, control, _, _ = ours.recvmsg(5, 1400, look)
            if len(head) == 5:
                break
        ours.recv(len(length) + len(body), socket.MSG_WAITALL)
        return socket.socket(fileno=number.unpack(control[0][2])[0])

    yield from draining(multiprocessing.get_context("fork"), child, orders, get, sent)
    ours.close()
    theirs.close()


@contextmanager
def poured(context: Any) -> Iterator[Run]:
    """A child that receives bytes, and answers how many."""
    ours, theirs = context.Pipe()
    data = bytes(LARGE)

    def child() -> None:
        while size := len(theirs.recv_bytes()):
            theirs.send(size)

    process = context.Process(target=child)
    process.start()

    def run(count: int) -> float:
        start = perf_counter()
        for _ in range(count):
            ours.send_bytes(data)
            assert ours.recv() == LARGE
        return perf_counter() - start

    try:
        yield run
    finally:
        ours.send_bytes(b"")
        process.join()
        ours.close()
        theirs.close()


def draining(
    context: Any, child: Callable[[], None], orders: Any, get: Callable[[], Any], sent: Checked
) -> Iterator[Run]:
    """A side that asks for items and gets them all."""
    process = context.Process(target=child)
    process.start()

    def run(count: int) -> float:
        start = perf_counter()
        orders.put(count)
        for _ in range(count - 1):
            sent.done_with(get())
        last = get()
        took = perf_counter() - start
        sent.check(last)
        return took

    try:
        yield run
    finally:
        orders.put(_END)
        process.join()


@contextmanager
def echoed(context: Any, item: str, listener: socket.socket) -> Iterator[Run]:
    """A child that sends each item back; a side counts each direction as one operation."""
    there, back = context.Queue(), context.Queue()
    sent = Checked(item, listener)

    def child() -> None:
        before = None
        while (got := there.get()) is not None:
            back.put(got)
            if before is not None:  # not earlier: the stock queue needs it until it has sent it
                sent.done_with(before)
            before = got

    process = context.Process(target=child)
    process.start()

    def run(count: int) -> float:
        start = perf_counter()
        for _ in range(count - 1):
            there.put(sent.item)
            sent.done_with(back.get())
        there.put(sent.item)
        last = back.get()
        took = perf_counter() - start
        sent.check(last)
        return took / 2

    try:
        yield run
    finally:
        there.put(None)
        process.join()
        for queue in (there, back):
            queue.close()
            queue.join_thread()
