"""A server of which every descriptor number is used, or all but a few."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from barepeer import Peer
from nursery import Manager


def numbers(pid: int) -> set[int]:
    """The descriptors of *pid*, without the one that is open for this listing."""
    listed = os.listdir(f"/proc/{pid}/fd")
    return {int(number) for number in listed if os.path.lexists(f"/proc/{pid}/fd/{number}")}


@contextmanager
def limited(pid: int, spare: int) -> Iterator[None]:
    """*pid* has only so many free descriptors."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = numbers(pid)
    fitting = range(max(used) + spare + 2)
    limit = max(n for n in fitting if n - len([u for u in used if u < n]) == spare)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def fill_gaps(manager: Manager, stack: ExitStack) -> list[Peer]:
    """Connections until no number is free below the highest: one that is freed above a limit is of
    no use."""
    peers = []
    while True:
        used = numbers(server_pid(manager))
        if len(used) > max(used):
            return peers
        peers.append(stack.enter_context(Peer(manager.address)))


def server_pid(manager: Manager) -> int:
    assert manager._process is not None
    return manager._process.pid
