"""Other ways to hand an array to another process, beside a Queue of ours.

*Shared*: the array is in a `fdshare.SharedMemory`, and is not copied; the stock queue copies it.
*By hand*: a new `multiprocessing.shared_memory` for each array, whose name goes through a stock
queue, and which is removed when the receiver has answered. faster-fifo is a queue in shared memory.
joblib writes an array into a file of /dev/shm, which its workers map; what is measured is a call of
its `Parallel`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from time import perf_counter
from typing import Any, TypeAlias

from benchmarks.measure import Bench
from benchmarks.processes import in_child
from fdshare import SharedMemory as OurMemory
from fdshare.mp import get_context

MIB = 1 << 20
SIZES = (MIB, 8 * MIB, 64 * MIB)
ROUNDS = 7
SHARED = 64 * MIB

# Puts an array, and returns what its reader answers.
Hand: TypeAlias = Callable[[Any], float]


def run(bench: Bench) -> None:
    shared(bench)
    ours: Any = bench.keep(in_child(partial(handing, queue, get_context("fork"))))
    for name, module, make in PEERS:
        try:
            import_module(module)
        except ImportError:
            bench.absent(f"arrays of {name}", f"not installed: {name}")
            continue
        theirs: Any = bench.keep(in_child(partial(handing, make)))
        for size in SIZES if bench.plan.scale == 1 else SIZES[:1]:
            sides = {"ours": partial(ours, size), "theirs": partial(theirs, size)}
            row = bench.ratio(bench.alternate(sides, rounds=ROUNDS), "ours", "theirs", goal=1.0)
            row.what, row.against = "fdshare Queue", name
            row.what += f", array of {size // MIB} MiB"


def shared(bench: Bench) -> None:
    """From hand to hand: the receiver reads one number of it, and answers."""
    sides: dict[str, Any] = {
        "ours": bench.keep(in_child(partial(handing, queue, get_context("fork"), True))),
        "theirs": bench.keep(in_child(partial(handing, queue, multiprocessing, False, first))),
    }
    size = SHARED if bench.plan.scale == 1 else MIB
    times = bench.alternate(
        {who: partial(side, size) for who, side in sides.items()}, rounds=ROUNDS
    )
    row = bench.ratio(times, "ours", "theirs", goal=0.02)
    row.what = f"fdshare Queue, shared array of {size // MIB} MiB"
    row.against = "stock Queue, the same array, not shared"


def total(array: Any) -> float:
    return float(array.sum())


def first(array: Any) -> float:
    return float(array[0] * array.size)


@contextmanager
def handing(
    make: Any, context: Any = None, in_memory: bool = False, read: Any = total
) -> Iterator[Any]:
    import numpy

    arrays: dict[int, Any] = {}
    if in_memory:
        read = first
    with make(context, read) as hand:

        def run(size: int, count: int) -> float:
            array = arrays.get(size)
            if array is None:
                array = arrays[size] = (
                    OurMemory(size).as_array("f8") if in_memory else numpy.ones(size // 8)
                )
                array[:] = 1
            start = perf_counter()
            for _ in range(count):
                assert hand(array) == size // 8
            return perf_counter() - start

        yield run


@contextmanager
def queue(context: Any, read: Any) -> Iterator[Hand]:
    there, back = context.Queue(), context.Queue()
    with reader(there.get, back.put, read):
        yield lambda array: (there.put(array), back.get())[1]
    for one in there, back:
        one.close()
        one.join_thread()


@contextmanager
def by_hand(_: Any, read: Any) -> Iterator[Hand]:
    import numpy

    resource_tracker.ensure_running()  # one for both: else each removes what the other has
    there: Any = multiprocessing.SimpleQueue()
    back: Any = multiprocessing.SimpleQueue()

    def hand(array: Any) -> float:
        memory = SharedMemory(create=True, size=array.nbytes)
        numpy.ndarray(array.shape, array.dtype, memory.buf)[:] = array
        there.put((memory.name, array.shape, array.dtype.str))
        answer: float = back.get()
        memory.close()
        memory.unlink()
        return answer

    def answer(message: Any) -> float:
        name, shape, dtype = message
        memory = SharedMemory(name)
        number: float = read(numpy.ndarray(shape, dtype, memory.buf))
        memory.close()
        return number

    with reader(there.get, back.put, answer):
        yield hand


@contextmanager
def faster_fifo(_: Any, read: Any) -> Iterator[Hand]:
    module: Any = import_module("faster_fifo")
    there, back = module.Queue(max_size_bytes=2 * SIZES[-1]), module.Queue()
    with reader(lambda: there.get(timeout=60), back.put, read):
        yield lambda array: (there.put(array), back.get(timeout=60))[1]


@contextmanager
def joblib(_: Any, read: Any) -> Iterator[Hand]:
    module: Any = import_module("joblib")
    with module.Parallel(n_jobs=2) as parallel:
        # A view of its own each time: joblib writes the same array once, and maps it again.
        yield lambda array: parallel([module.delayed(read)(array[:])])[0]
    # Its workers outlive it, and multiprocessing waits for them at exit.
    import_module("joblib.externals.loky").get_reusable_executor().shutdown()


@contextmanager
def reader(get: Any, put: Any, answer: Any) -> Iterator[None]:
    """A child that answers what it gets."""

    def child() -> None:
        while True:
            put(answer(get()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


PEERS = (
    ("multiprocessing.shared_memory by hand", "multiprocessing.shared_memory", by_hand),
    ("faster-fifo", "faster_fifo", faster_fifo),
    ("joblib", "joblib", joblib),
)
