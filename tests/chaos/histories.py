"""One process of tests/chaos/test_following.py: it writes or reads one name, and records when.

    python histories.py ADDRESS w0|r0 SEED

A `w` registers one file after another under the name, each with a number that no other has, and
removes some of its own again. An `r` follows the name in two threads and reads the number, as fast
as they can. A byte on standard output is a write. At the end of standard input the history goes to
standard error, as JSON:

    writes: [number, generation, begun, acknowledged]; a removal of a generation is [-2, generation
            + 0.5, begun, acknowledged]
    reads:  [number, first begun, first ended, last begun, last ended], one for each run of the same
    absent: [begun, ended], of a read that found no entry
    looks:  how many reads that were

Times are of CLOCK_MONOTONIC, in ns: the same for all processes.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, count
from typing import Any

from fdshare.client.blocking.client import Client
from fdshare.errors import GenerationMismatch, NameNotFound

NAME = "followed"
# More than any death of a half takes: what finds no server would return the last object.
RECONNECT = 60.0
THREADS = 2
REMOVED = -2


def is_over() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def write(client: Client, word: str, chance: random.Random) -> list[list[float]]:
    done: list[list[float]] = []
    for number in count(int(word[1:]), 100):  # so that each writer has numbers of its own
        if is_over():
            return done
        fd = os.memfd_create("history")
        os.write(fd, b"%d" % number)
        begun = time.monotonic_ns()
        generation = client.register(NAME, fd, replace=True).generation
        done.append([number, generation, begun, time.monotonic_ns()])
        os.close(fd)
        if chance.random() < 0.1:
            begun = time.monotonic_ns()
            try:
                client.unregister(NAME, if_generation=generation)
                done.append([REMOVED, generation + 0.5, begun, time.monotonic_ns()])
            except (GenerationMismatch, NameNotFound):
                pass  # another has replaced it
        os.write(1, b".")
        time.sleep(chance.choice((0, 0, 0.001, 0.01)))
    raise AssertionError


def read(client: Client) -> dict[str, Any]:
    runs: list[list[int]] = []
    looks: list[int] = []
    absent: list[list[int]] = []
    stop = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        try:
            last: Any = None
            mine: list[list[int]] = []
            number = 0
            while not stop.is_set():
                number += 1
                begun = time.monotonic_ns()
                try:
                    obj = log.current
                except NameNotFound:
                    absent.append([begun, time.monotonic_ns()])
                    last = None
                    continue
                ended = time.monotonic_ns()
                if obj is last:
                    mine[-1][3:] = begun, ended
                else:
                    value = int(os.pread(obj.fileno(), 20, 0))
                    mine.append([value, begun, ended, begun, ended])
                    last = obj
            runs.extend(mine)
            looks.append(number)
        except BaseException as error:
            failures.append(error)

    with client.follow(NAME, timeout=RECONNECT) as log:
        log._state.timeout = 0  # from now on it says that the name is missing
        threads = [threading.Thread(target=look) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        while not failures and not select.select([sys.stdin], [], [], 0.1)[0]:
            pass
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return {"reads": runs, "absent": absent, "looks": sum(looks)}


# The checker.


def wrong(
    writes: list[list[float]], reads: list[list[int]], absent: Sequence[list[int]] = ()
) -> list[str]:
    """What no order of the writes and reads explains in which each has its effect between its
    begin and its end; empty where there is such an order. The generations are that of the writes.

    A run of reads of one number is judged by its first end and its last begin: every other read of
    it allows more.
    """
    generation = {write[0]: write[1] for write in writes if write[0] != REMOVED}
    begun = {write[0]: write[2] for write in writes}
    acknowledged = _greatest((write[3], write[1]) for write in writes)
    seen = _greatest((run[2], generation[run[0]]) for run in reads)
    found = []
    for value, _, first_ended, last_begun, _ in reads:
        if begun[value] > first_ended:
            found.append(f"{value} was read at {first_ended}, before it was written")
        if (newest := acknowledged(last_begun)) > generation[value]:
            found.append(f"{value} was read at {last_begun}, after generation {newest} was there")
        if (newest := seen(last_begun)) > generation[value]:
            found.append(f"{value} was read at {last_begun}, after generation {newest} was read")
    removed = _greatest((write[2], write[1]) for write in writes if write[0] == REMOVED)
    for begin, end in absent:
        if removed(end) < (newest := max(acknowledged(begin), seen(begin))):
            found.append(f"nothing was there at {end}, although generation {newest} was")
    return found


def _greatest(timed: Any) -> Any:
    """A function: the greatest value of those before a time, 0 if there is none."""
    ordered = sorted(timed)
    times = [time for time, _ in ordered]
    values = [0, *accumulate((value for _, value in ordered), max)]
    return lambda time: values[bisect_left(times, time)]


def main(address: str, word: str, seed: str) -> int:
    result: dict[str, Any] = {}
    try:
        with Client(address, reconnect=RECONNECT) as client:
            if word.startswith("w"):
                result["writes"] = write(client, word, random.Random(f"{seed}{word}"))
            else:
                result.update(read(client))
    except BaseException as error:
        result["wrong"] = f"{word}: {type(error).__name__}: {error}"
    print(json.dumps(result), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
