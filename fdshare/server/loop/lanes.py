"""Lanes: threads for calls that may never return, at most one of them for each user.

close(2) and fstat(2) of a file on a FUSE or NFS mount wait for whoever serves that file system,
for ever where it does not answer. So the calls that one user is the cause of are made one after
the other: where one hangs, that user's later ones wait, and nobody else's.

Two threads are started at once, for later there may be no room for one (RLIMIT_NOFILE is no limit
of theirs, but RLIMIT_NPROC is, and a cgroup's pids.max). There is another whenever all are at work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from fdshare.kernel.thread_signals import start_without_signals

__all__ = ["Lanes"]

log = logging.getLogger("fdshare.server")

_AT_ONCE: Final = 2  # threads that are started with the first
_MOST: Final = 64  # threads; so many users can have a call that hangs
_STUCK: Final = 0.1  # seconds after which a call is taken for one that hangs
_TURN: Final = 64  # calls of one user after which another's come
_PAUSE: Final = 0.001  # seconds between two looks whether the threads are done
_REST: Final = 2  # times as long as its threads work, an interpreter is left to others
_LONGEST: Final = 0.1  # seconds of one rest


class _Lane:
    """The calls of one user: *left* are not done, the first of them perhaps being made *since*."""

    __slots__ = ("calls", "left", "since", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.calls: deque[Callable[[], None]] = deque()
        self.left = 0
        self.since: float | None = None


class Lanes:
    """The threads, and the calls that wait for them. To be used by one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.waiting: dict[int, _Lane] = {}
        self._ready: SimpleQueue[_Lane | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._at_work = 0  # of them
        self._resting = False
        for _ in range(_AT_ONCE):
            self._grow()

    def put(self, uid: int, call: Callable[[], None]) -> None:
        """Has *call* made, after those that were put for *uid* before; soon, unless one hangs."""
        with self._lock:
            lane = self.waiting.get(uid)
            if lane is None:
                lane = self.waiting[uid] = _Lane(uid)
            lane.calls.append(call)
            lane.left += 1
            first = lane.left == 1
        if first:
            self._ready.put(lane)
        if self._at_work == len(self._threads):
            self._grow()

    def give_way(self, uid: int, worked: float) -> None:
        """Leaves the interpreter to the loop, after *worked* seconds of a call of *uid*, which this
        is called in.

        A thread that makes many short system calls keeps the others from running: it takes the lock
        of the interpreter again before who waits for it wakes up, and who wakes up in vain waits
        for sys.getswitchinterval() once more.
        """
        at_work = len(self.waiting) - len(self.hanging())
        time.sleep(min(worked * _REST * max(at_work, 1), _LONGEST))
        self.waiting[uid].since = time.monotonic()

    @property
    def has_threads(self) -> bool:
        """False where none can be started."""
        if not self._threads:
            self._grow()
        return bool(self._threads)

    @property
    def starved(self) -> bool:
        """True if calls wait and no thread could be started; `has_threads` tries again."""
        return not self._threads and bool(self.waiting) and not self._resting

    def hangs(self, uid: int) -> bool:
        """True if a call of *uid* takes so long that its others had better not be waited for."""
        lane = self.waiting.get(uid)
        since = lane.since if lane is not None else None
        return since is not None and time.monotonic() - since > _STUCK

    def hanging(self) -> list[int]:
        """The uids for which `hangs` is true."""
        return [uid for uid in list(self.waiting) if self.hangs(uid)]

    def stop(self, timeout: float) -> bool:
        """Waits up to *timeout* seconds for all that was put; True if all is done. The threads end,
        but for those that hang: they are daemons, and no reason for the process not to end."""
        deadline = time.monotonic() + timeout
        while self.waiting and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        self.rest()
        return not self.waiting

    def rest(self) -> None:
        """Ends the threads, but for those that are at work. To be called before a fork: what the
        threads of the parent have begun would stay in the child's memory for ever."""
        deadline = time.monotonic() + _STUCK
        with self._lock:
            self._resting = True
            threads = list(self._threads)
        for _ in threads:
            self._ready.put(None)
        while len(self._threads) > self._at_work and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        for thread in threads:
            if thread not in self._threads:
                thread.join(max(deadline - time.monotonic(), 0.0))

    def resume(self) -> None:
        """Starts threads again after `rest`."""
        self._resting = False
        for _ in range(_AT_ONCE - len(self._threads)):
            self._grow()

    # In the threads.

    def _grow(self) -> None:
        """Starts another thread, if that is possible."""
        thread = threading.Thread(target=self._run, name="fdshare-lane", daemon=True)
        with self._lock:
            if len(self._threads) >= _MOST or self._resting:
                return
            self._threads.add(thread)
        try:
            start_without_signals(thread)
        except RuntimeError:  # EAGAIN; the next call tries again
            with self._lock:
                self._threads.remove(thread)

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                # Those that are being started are counted as idle, too.
                if len(self._threads) - self._at_work > _AT_ONCE:  # enough without this one
                    self._threads.remove(me)
                    return
            lane = self._ready.get()
            with self._lock:
                if lane is not None:
                    self._at_work += 1
                elif self._resting:
                    self._threads.remove(me)
                    return
            if lane is None:  # of a rest that is over
                continue
            if self._at_work == len(self._threads):  # if this one hangs, there must be another
                self._grow()
            self._serve(lane)
            with self._lock:
                self._at_work -= 1

    def _serve(self, lane: _Lane) -> None:
        for _ in range(_TURN):
            call = lane.calls.popleft()
            lane.since = time.monotonic()
            try:
                call()
            except Exception:
                log.exception("a call in a thread failed")
            del call  # with what it refers to
            with self._lock:
                lane.since = None
                lane.left -= 1
                if not lane.left:
                    del self.waiting[lane.uid]
                    return
        self._ready.put(lane)
