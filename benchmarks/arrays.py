"""Arrays of numpy and bytes through every channel, ours beside the stock one.

The stock channels send what they are given through a pipe; ours send what is large, from 256 KiB
on, in a memfd that the receiver maps (fdshare/mp/pickling/large.py). The receiver reads all of it:
pages that it had not touched would cost it nothing.

One child has a side of a channel, and a worker: *argument* goes to the worker, *result* comes from
it, and a Queue and a Pipe lead to it. array_floor.py has the bare system calls of a Pipe, and
array_peers.py other ways to hand over an array.

After install() the stock channels carry the descriptor of what `shared_copy` makes of an array. The
time to make that is measured, too.
"""

from __future__ import annotations

import concurrent.futures
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import fdshare
from benchmarks import array_floor, array_peers
from benchmarks.measure import FEW_ROUNDS, Bench
from benchmarks.processes import in_child
from benchmarks.small_tasks import SIDES, context_of
from fdshare.mp.executor import ProcessPoolExecutor

KIB, MIB = 1 << 10, 1 << 20
# Bytes, which stay with the socket, only beside them.
SIZES = {
    "array": (64 * KIB, 256 * KIB, MIB, 8 * MIB, 64 * MIB),
    "bytes": (64 * KIB, 8 * MIB),
}
LARGEST = 512 * MIB  # through a queue alone, because the stock one takes seconds for it
GOALS = {64 * KIB: 1.0, MIB: 0.5, 8 * MIB: 0.25, 64 * MIB: 0.25, LARGEST: 0.25}
ROUNDS = {64 * MIB: 7, LARGEST: 3}
INSTALLED = "shared_copy() after install()"  # in the stock channels
BARE = "bare system calls of a"  # what array_floor.py says

# Has a worker read an item, and returns what `read` returns; or has it make one, and reads that.
Hand: TypeAlias = Callable[[str, int], float]


def run(bench: Bench) -> None:
    try:
        import numpy  # noqa: F401
    except ImportError:
        bench.absent("arrays", "not installed: numpy")
        return
    for channel in CHANNELS:
        sides: dict[str, Any] = {
            who: bench.keep(in_child(partial(handing, who, channel))) for who in SIDES
        }
        for kind, sizes in SIZES.items():
            for size in (*sizes, LARGEST) if (channel, kind) == ("Queue", "array") else sizes:
                if size > 8 * MIB and bench.plan.scale < 1:
                    continue
                runs = {who: partial(sides[who], kind, size) for who in SIDES}
                goal = GOALS.get(size) if kind == "array" else None
                times = bench.alternate(runs, rounds=ROUNDS.get(size, FEW_ROUNDS))
                row = bench.ratio(times, *SIDES, goal=goal)
                row.what, row.against = (f"{who} {channel}, {shown(kind, size)}" for who in SIDES)
        if channel == "Queue":
            memory(bench, sides)
    floor(bench)
    shared_copies(bench)
    array_peers.run(bench)


def floor(bench: Bench) -> None:
    """How near a Pipe is to the system calls that it makes."""
    sides: dict[str, Any] = {
        who: bench.keep(in_child(partial(handing, who, "Pipe"))) for who in (BARE, *SIDES)
    }
    for size in (MIB, 8 * MIB) if bench.plan.scale == 1 else (MIB,):
        runs = {who: partial(side, "array", size) for who, side in sides.items()}
        times = bench.alternate(runs, rounds=FEW_ROUNDS)
        for pair in (BARE, "stock"), ("fdshare", BARE):
            row = bench.ratio(times, *pair)
            row.what, row.against = (f"{who} Pipe, {shown('array', size)}" for who in pair)


def shared_copies(bench: Bench) -> None:
    sizes = (MIB, 8 * MIB, 64 * MIB) if bench.plan.scale == 1 else (MIB,)
    whose = INSTALLED, "stock"
    for channel in "Queue", "Pipe":
        sides: dict[str, Any] = {
            who: bench.keep(in_child(partial(handing, who, channel))) for who in whose
        }
        for size in sizes:
            runs = {who: partial(side, "array", size) for who, side in sides.items()}
            row = bench.ratio(bench.alternate(runs, rounds=7), *whose, goal=GOALS[size])
            row.against = f"stock {channel}, {shown('array', size)}"
            row.what = f"{row.against}, {INSTALLED}"


def shown(kind: str, size: int) -> str:
    return f"{kind} of {size // MIB} MiB" if size >= MIB else f"{kind} of {size // KIB} KiB"


def memory(bench: Bench, sides: dict[str, Any]) -> None:
    """How far the memory of each process grows at most, while one array is handed over."""
    size = 64 * MIB if bench.plan.scale == 1 else MIB
    for index, process in enumerate(("sender", "receiver")):
        for who in SIDES:
            grown = sides[who](f"peak {index}", size, 1) / MIB
            what = f"{who} Queue, peak memory of the {process}, {shown('array', size)}"
            bench.value(what, [grown], "MiB")


@lru_cache(maxsize=1)
def item(kind: str, size: int) -> Any:
    import numpy

    return numpy.ones(size // 8) if kind == "array" else b"\1" * size


def read(obj: Any) -> float:
    """The number of ones in it, which has nothing else."""
    # To count what is not there is as fast as memchr(3).
    return len(obj) - obj.count(b"\0") if isinstance(obj, bytes) else float(obj.sum())


@contextmanager
def handing(who: str, channel: str) -> Iterator[Any]:
    with CHANNELS[channel](who) as (hand, pid):

        def run(kind: str, size: int, count: int) -> float:
            if kind.startswith("peak"):
                return peak([os.getpid(), pid()][int(kind[-1])], lambda: hand("array", size))
            ones = size if kind == "bytes" else size // 8
            start = perf_counter()
            for _ in range(count):
                assert hand(kind, size) == ones
            return perf_counter() - start

        yield run


def peak(pid: int, call: Callable[[], object]) -> float:
    """The bytes by which the resident memory of *pid* grows at most in a second call."""
    call()
    gc.collect()
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM is VmRSS again: proc(5)
    before = resident(pid)
    call()
    return resident(pid) - before


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * KIB


# Channels: each yields its Hand, and what returns the worker's pid.


@contextmanager
def queue(who: str) -> Iterator[tuple[Hand, Callable[[], int]]]:
    context = context_of(who, "multiprocessing", "fork")
    there, back = context.Queue(), context.Queue()
    put = putting(who, there.put)
    with reader(context, there.get, back.put) as process:
        yield partial(ask, put, back.get), lambda: process.pid
    for one in there, back:
        one.close()
        one.join_thread()


@contextmanager
def pipe(who: str) -> Iterator[tuple[Hand, Callable[[], int]]]:
    if who == BARE:
        with array_floor.bare(read) as hand:
            yield lambda kind, size: hand(item(kind, size)), os.getpid
        return
    context = context_of(who, "multiprocessing", "fork")
    ours, theirs = context.Pipe()
    send = putting(who, ours.send)
    with ours, theirs, reader(context, theirs.recv, theirs.send) as process:
        yield partial(ask, send, ours.recv), lambda: process.pid


def putting(who: str, put: Callable[[Any], None]) -> Callable[[Any], None]:
    """What puts an array. The reader is forked later, so install() is for it, too."""
    if who != INSTALLED:
        return put
    fdshare.install()
    return lambda array: put(fdshare.shared_copy(array))


def ask(put: Callable[[Any], None], get: Callable[[], Any], kind: str, size: int) -> Any:
    put(item(kind, size))
    return get()


@contextmanager
def reader(context: Any, get: Callable[[], Any], put: Callable[[Any], None]) -> Iterator[Any]:
    """A child that reads what it gets, and answers."""

    def child() -> None:
        while True:
            put(read(get()))

    process = context.Process(target=child)
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join()


@contextmanager
def pool(who: str, results: bool) -> Iterator[tuple[Hand, Callable[[], int]]]:
    with context_of(who, "multiprocessing", "fork").Pool(1) as made:

        def hand(kind: str, size: int) -> float:
            if results:
                return read(made.apply(item, (kind, size)))
            return float(made.apply(read, (item(kind, size),)))

        yield hand, lambda: made._pool[0].pid


@contextmanager
def executor(who: str) -> Iterator[tuple[Hand, Callable[[], int]]]:
    cls = ProcessPoolExecutor if who == "fdshare" else concurrent.futures.ProcessPoolExecutor
    with cls(1, context_of(who, "multiprocessing", "fork")) as made:
        yield (
            lambda kind, size: made.submit(read, item(kind, size)).result(),
            lambda: next(iter(made._processes)),
        )


CHANNELS: dict[str, Any] = {
    "Queue": queue,
    "Pipe": pipe,
    "Pool, argument": partial(pool, results=False),
    "Pool, result": partial(pool, results=True),
    "executor, argument": executor,
}
