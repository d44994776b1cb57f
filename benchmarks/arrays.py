"""Arrays of numpy through a queue, ours beside the stock one: a child sums each, and answers.

The standard queue sends their bytes through a pipe, ours from 1 MiB on in a memfd that the child
maps (fdshare/mp/pickling/large.py). The child reads all of the array: pages that it had not touched
would cost it nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.measure import Bench, Run
from benchmarks.queues import OURS, STOCK, contexts

GOALS = {1 << 16: 1.0, 1 << 20: 0.5, 8 << 20: 0.25, 64 << 20: 0.25}


def run(bench: Bench) -> None:
    try:
        import numpy
    except ImportError:
        bench.absent("arrays", "not installed: numpy")
        return
    for size, goal in GOALS.items():
        array = numpy.ones(size // 8)
        made = contexts("multiprocessing")
        sides = {kind: bench.keep(summed(context, array)) for kind, context in made}
        row = bench.ratio(bench.alternate(sides), OURS, STOCK, goal=goal)
        what = f"Queue, array of {size >> 10} KiB"
        row.what, row.against = f"{OURS} {what}", f"{STOCK} {what}"


@contextmanager
def summed(context: Any, array: Any) -> Iterator[Run]:
    """A child that gets arrays, and answers with their sum."""
    there, back = context.Queue(), context.Queue()
    process = context.Process(target=partial(add, there, back))
    process.start()

    def run(count: int) -> float:
        start = perf_counter()
        for _ in range(count):
            there.put(array)
            assert back.get() == array.size
        return perf_counter() - start

    try:
        yield run
    finally:
        there.put(None)
        process.join()
        for queue in there, back:
            queue.close()
            queue.join_thread()


def add(there: Any, back: Any) -> None:
    while (array := there.get()) is not None:
        back.put(array.sum())
