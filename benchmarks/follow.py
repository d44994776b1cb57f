"""follow: to look whether a name has changed, beside fetching it to be sure.

A look compares a word of memory, and asks nobody. After a change it fetches: that side registers
another file, and looks. The name that 1,000 handles follow is replaced while none of them looks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import cycle, repeat
from time import perf_counter_ns

from benchmarks.fetch import S6, s6_retrieve
from benchmarks.measure import Bench, NotHere, Run, each, middle
from benchmarks.processes import fdshare_serve, held_file, same_file
from fdshare import Client, Descriptor, Follower

LOOK, FETCH = "current, nothing has changed", "fetch, to be sure"
CHANGED, AGAIN = "register and current", "register and fetch"
FOLLOWED, ALONE = "register, 1,000 followers", "register, none"
FOLLOWERS, TOGETHER = 1000, 100


def run(bench: Bench) -> None:
    fd = bench.keep(held_file())
    folder = bench.folder()
    client = bench.keep(fdshare_serve(folder))
    others = [bench.keep(Descriptor(os.memfd_create(name))) for name in "ab"]
    for name in ("quiet", "changing", "followed", "alone"):
        client.register(name, fd)
    quiet, changing = (bench.keep(client.follow(name)) for name in ("quiet", "changing"))
    followers = [bench.keep(client.follow("followed")) for _ in range(bench.plan.count(FOLLOWERS))]
    assert same_file(quiet.current.fileno(), fd)
    sides: dict[str, Run] = {
        LOOK: looks(quiet),
        FETCH: each(lambda: client.fetch("quiet").close()),
        CHANGED: each(replacing(client, "changing", others, lambda: changing.current)),
        AGAIN: each(replacing(client, "alone", others, lambda: client.fetch("alone").close())),
        FOLLOWED: each(replacing(client, "followed", others)),
        ALONE: each(replacing(client, "alone", others)),
    }
    try:
        sides[S6] = bench.keep(s6_retrieve(folder, fd))
    except NotHere as error:
        bench.absent(S6, error)
    before = client.info("quiet").fetches
    times = bench.alternate(sides)
    assert client.info("quiet").fetches > before  # of the side that fetches
    newest = client.info("followed").generation
    assert followers[0].generation < newest
    for follower in followers[:10]:
        follower.current.fileno()
        assert follower.generation == newest
    bench.value(LOOK, [seconds * 1e6 for seconds in times[LOOK]], "us", goal=0.5)
    bench.ratio(times, LOOK, FETCH)
    if S6 in sides:
        bench.ratio(times, LOOK, S6, goal=0.02)
    bench.ratio(times, CHANGED, AGAIN)
    bench.ratio(times, FOLLOWED, ALONE)


def looks(follower: Follower) -> Run:
    """A look takes less than to read the clock before it and after it: so many are timed together,
    and the time of those is the median."""

    def run(count: int) -> float:
        took, groups, first = [], -(-count // TOGETHER), follower.current
        for _ in range(groups):
            start = perf_counter_ns()
            for _ in repeat(None, TOGETHER):
                last = follower.current
            took.append(perf_counter_ns() - start)
            assert last is first
        return middle(took) * count / (groups * TOGETHER)

    return run


def replacing(
    client: Client,
    name: str,
    others: list[Descriptor],
    then: Callable[[], object] = lambda: None,
) -> Callable[[], object]:
    """A call that registers another file under *name*, and then calls *then*."""
    turns = cycle(others)

    def replace() -> None:
        client.register(name, next(turns), replace=True)
        then()

    return replace
