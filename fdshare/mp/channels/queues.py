"""Queue, JoinableQueue and SimpleQueue that carry descriptors, and pickle in put().

Derived from multiprocessing/queues.py of CPython 3.11 to 3.13. What changes: `put` pickles before
it returns, so an object that cannot be pickled raises there and not in a thread, and what was put
may be closed straight after; messages go through a Feeder and our connections. What stays: every
signature, the semaphore that bounds the queue, the locks, the state that is pickled while spawning.
No private method of the stock class is called but `_on_queue_feeder_error`, which
concurrent.futures overrides.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, Full
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fdshare.mp.channels.connection import ConnectionMixin, PipeFunction
from fdshare.mp.channels.feeder import READER_GONE, Feeder
from fdshare.mp.channels.peek_level import POSSIBLE, PeekLevel
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Arrived, Encoded, open_arrived
from fdshare.mp.pickling.reducers import encode
from fdshare.mp.stock import (
    StockContext,
    StockJoinableQueue,
    StockQueue,
    StockSimpleQueue,
    raw,
)

if TYPE_CHECKING:
    from multiprocessing.synchronize import BoundedSemaphore, Semaphore

__all__ = ["JoinableQueueMixin", "QueueMixin", "SimpleQueueMixin", "register_after_fork"]


State: TypeAlias = tuple[Any, ...]


class QueueMixin(StockQueue):
    """A queue of a socket pair that carries descriptors, shared by processes."""

    _family: ClassVar[Family]
    _pipe: ClassVar[PipeFunction]
    _reader: ConnectionMixin
    _writer: ConnectionMixin
    _peek_semaphore: Semaphore | None = None  # of peek_level.py
    _peek_level: PeekLevel | None = None

    def __init__(self, maxsize: int = 0, *, ctx: StockContext) -> None:
        if maxsize <= 0:
            maxsize = self._family.synchronize.SEM_VALUE_MAX
        self._maxsize = maxsize
        self._reader, self._writer = self._pipe(duplex=False)
        self._rlock = ctx.Lock()
        self._wlock = ctx.Lock()
        self._sem = ctx.BoundedSemaphore(maxsize)
        self._peek_semaphore = ctx.Semaphore(0) if POSSIBLE else None
        self._opid = os.getpid()
        self._ignore_epipe = False  # concurrent.futures sets it
        self._reset()
        register_after_fork(self)

    def __getstate__(self) -> State:  # type: ignore[override]
        _assert_spawning(self)
        return (
            self._ignore_epipe,
            self._maxsize,
            self._reader,
            self._writer,
            self._rlock,
            self._wlock,
            self._sem,
            self._peek_semaphore,
            self._opid,
        )

    def __setstate__(self, state: State) -> None:  # type: ignore[override]
        (
            self._ignore_epipe,
            self._maxsize,
            self._reader,
            self._writer,
            self._rlock,
            self._wlock,
            self._sem,
            self._peek_semaphore,
            self._opid,
        ) = state
        self._reset()

    def _reset(self, after_fork: bool = False) -> None:
        self._closed = False
        self._feeder: Feeder | None = None
        self._opening = threading.Lock()
        self._close = None
        self._jointhread = None
        self._joincancelled = False
        if self._peek_semaphore is not None:
            self._peek_level = PeekLevel(self._peek_semaphore, self._wlock)
        self._reader._shared = True
        self._reader._peek_level = self._peek_level
        self._poll = self._reader.poll

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Puts *obj*. It is safe to close *obj* and what is in it after this call.

        Raises: Full; ValueError: the queue is closed; whatever pickling raises; DescriptorLimit: no
        descriptor is free for a duplicate, or too many were in flight for 10 seconds.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        message = encode(self._family, obj)
        if not self._sem.acquire(block, timeout):
            raise Full
        self._dispatch(message, obj)

    def _dispatch(self, message: Encoded, obj: Any) -> None:
        feeder = self._feeder or self._open_feeder()
        try:
            if feeder.put(message, obj if self._tells_object else None):
                self._started(feeder)
        except OSError as error:
            self._sem.release()
            # No reader is left: as the stock queue, report it and return.
            if error.errno not in READER_GONE:
                raise
            if not self._ignore_epipe:
                self._on_queue_feeder_error(error, obj)
        except BaseException:
            # Ctrl-C, or what another signal's handler raised. Once sending has begun the object may
            # have been sent, and then its reader releases the semaphore: a second release would
            # fail there, a missing one costs one place.
            if not feeder.begun:
                self._sem.release()
            raise

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next object. The caller owns the result.

        Raises: Empty; ValueError: the queue is closed; DescriptorLimit: at this process's limit,
        and the object stays in the queue; whatever unpickling raises, and that object is gone.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if not block or timeout is not None:
            message = self._take_within(block, timeout)
        else:
            self._rlock.acquire()
            try:
                message = self._reader.receive()
            finally:
                self._rlock.release()
            self._sem.release()
        return open_arrived(message, self._family.loads)

    def _take_within(self, block: bool, timeout: float | None) -> Arrived:
        deadline = time.monotonic() + (timeout or 0)
        if not self._rlock.acquire(block, timeout):
            raise Empty
        try:
            if not self._poll(deadline - time.monotonic() if block else 0):
                raise Empty
            message = self._reader.receive()
            self._sem.release()
        finally:
            self._rlock.release()
        return message

    def close(self) -> None:
        """Ends put and get in this process; what was put is still sent.

        If no process is left that could get it, it is dropped: the stock queue would wait for ever
        at exit.
        """
        self._closed = True
        close, self._close = self._close, None
        if close is not None:
            close()

    def join_thread(self) -> None:
        """Waits until what was put is sent; to be called after close()."""
        assert self._closed, f"Queue {self!r} not closed"
        if self._jointhread is not None:
            self._jointhread()

    def cancel_join_thread(self) -> None:
        """At exit the process does not wait until what was put is sent: it may be lost."""
        self._joincancelled = True
        if self._jointhread is not None:
            self._jointhread.cancel()

    def _open_feeder(self) -> Feeder:
        with self._opening:
            if self._feeder is None:
                reader, writer = self._reader, self._writer

                failed = _reporter(
                    self._family, self._sem, self._ignore_epipe, self._on_queue_feeder_error
                )
                # The stock handler only prints the error: the object need not be kept for it.
                stock = self._family.queues.Queue
                self._tells_object = (
                    type(self)._on_queue_feeder_error is not stock._on_queue_feeder_error
                )
                level = None if self._peek_level is None else self._peek_level.level
                self._feeder = Feeder(
                    writer.carrier(), self._wlock, reader.close, writer.close, failed, level
                )
                self._close = self._feeder.stop
            return self._feeder

    def _started(self, feeder: Feeder) -> None:
        """The thread runs: at exit it is stopped and joined, as the stock queue's."""
        finalize = self._family.util.Finalize
        if not self._joincancelled:
            self._jointhread = finalize(
                feeder.thread, _join, [weakref.ref(feeder.thread)], exitpriority=-5
            )
        self._close = finalize(self, feeder.stop, [], exitpriority=10)


def register_after_fork(queue: QueueMixin) -> None:
    """A forked child starts with an empty feeder of its own."""
    queue._family.util.register_after_fork(queue, _after_fork)


def _after_fork(queue: QueueMixin) -> None:
    queue._reset(after_fork=True)


def _join(reference: weakref.ref[threading.Thread]) -> None:
    thread = reference()
    if thread is not None:
        thread.join()


def _reporter(
    family: Family,
    semaphore: BoundedSemaphore,
    ignore_epipe: bool,
    report: Callable[[BaseException, Any], None],
) -> Callable[[BaseException, Any], None]:
    """What handles an error in the thread: it does as `Queue._feed` of the standard library."""
    util = family.util

    def failed(error: BaseException, obj: Any) -> None:
        if ignore_epipe and getattr(error, "errno", 0) in READER_GONE:
            return
        if util.is_exiting():
            util.info("error in queue thread: %s", error)
            return
        semaphore.release()
        report(error, obj)

    return failed


def _assert_spawning(obj: QueueMixin | SimpleQueueMixin) -> None:
    """Raises: RuntimeError: *obj* is pickled, and no process is being started."""
    if not obj._family.is_spawning:
        raise RuntimeError(
            f"{type(obj).__name__} objects should only be shared between processes "
            "through inheritance"
        )


class JoinableQueueMixin(QueueMixin, StockJoinableQueue):
    """A Queue that also counts unfinished tasks."""

    def __init__(self, maxsize: int = 0, *, ctx: StockContext) -> None:
        QueueMixin.__init__(self, maxsize, ctx=ctx)
        self._unfinished_tasks = ctx.Semaphore(0)
        self._cond = ctx.Condition()

    def __getstate__(self) -> State:  # type: ignore[override]
        return (*QueueMixin.__getstate__(self), self._cond, self._unfinished_tasks)

    def __setstate__(self, state: State) -> None:  # type: ignore[override]
        QueueMixin.__setstate__(self, state[:-2])
        self._cond, self._unfinished_tasks = state[-2:]

    def _dispatch(self, message: Encoded, obj: Any) -> None:
        # Counted before it can be received: task_done() may follow at once.
        with self._cond:
            self._unfinished_tasks.release()
        try:
            QueueMixin._dispatch(self, message, obj)
        except BaseException:
            with self._cond:
                self._unfinished_tasks.acquire(False)
                if raw(self._unfinished_tasks)._is_zero():
                    self._cond.notify_all()
            raise


class SimpleQueueMixin(StockSimpleQueue):
    """A locked connection that carries descriptors; put() waits while it is full."""

    _family: ClassVar[Family]
    _pipe: ClassVar[PipeFunction]
    _reader: ConnectionMixin
    _writer: ConnectionMixin

    def __init__(self, *, ctx: StockContext) -> None:
        self._reader, self._writer = self._pipe(duplex=False)
        self._rlock = ctx.Lock()
        self._wlock = ctx.Lock()
        self._adopt()

    def __getstate__(self) -> State:  # type: ignore[override]
        _assert_spawning(self)
        return (self._reader, self._writer, self._rlock, self._wlock)

    def __setstate__(self, state: State) -> None:  # type: ignore[override]
        self._reader, self._writer, self._rlock, self._wlock = state
        self._adopt()

    def _adopt(self) -> None:
        self._reader._shared = True
        self._poll = self._reader.poll

    def get(self) -> Any:
        """The next object. The caller owns the result. Raises: as `Queue.get`."""
        with self._rlock:
            message = self._reader.receive()
        return open_arrived(message, self._family.loads)

    def put(self, obj: Any) -> None:
        """Sends *obj*. It is safe to close *obj* after this call. Raises: as `Connection.send`."""
        message = encode(self._family, obj)
        with self._wlock:
            self._writer.send_message(message)
