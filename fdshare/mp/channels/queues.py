"""Queue, JoinableQueue and SimpleQueue that carry descriptors, and pickle in put().

Derived from multiprocessing/queues.py of CPython 3.11 to 3.13. What changes: `put` pickles before
it returns, so an object that cannot be pickled raises there and not in a thread, and what was put
may be closed straight after; messages go through a Feeder and our connections. What stays: every
signature, the semaphore that bounds the queue, the locks, the state that is pickled while spawning.
No private method of the stock class is called but `_on_queue_feeder_error`, which
concurrent.futures overrides.
"""

from __future__ import annotations

import _thread
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import Full
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from fdshare.errors import DescriptorLimit
from fdshare.kernel import system
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.mp.channels.connection import ConnectionMixin, PipeFunction
from fdshare.mp.channels.feeder import READER_GONE, Feeder
from fdshare.mp.channels.peek_level import PeekLevel
from fdshare.mp.channels.sender import Sender
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Encoded
from fdshare.mp.pickling.reducers import encode
from fdshare.mp.stock import (
    RawSemLock,
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
_WAITING: Final = (True,)
_PATIENCE: Final = 1.0  # seconds that the end of the program waits for a SimpleQueue's reader
# What is told of a message that was not sent, and the object.
Report: TypeAlias = tuple[Callable[[BaseException, Any], None], Any]


class QueueMixin(StockQueue):
    """A queue of a socket pair that carries descriptors, shared by processes."""

    _family: ClassVar[Family]
    _pipe: ClassVar[PipeFunction]
    _reader: ConnectionMixin
    _writer: ConnectionMixin
    _peek_semaphore: Semaphore | None = None  # of peek_level.py
    _peek_level: PeekLevel | None = None
    _feeder: Feeder | None = None

    def __init__(self, maxsize: int = 0, *, ctx: StockContext) -> None:
        if maxsize <= 0:
            maxsize = self._family.synchronize.SEM_VALUE_MAX
        self._maxsize = maxsize
        self._reader, self._writer = self._pipe(duplex=False)
        self._rlock = ctx.Lock()
        self._wlock = ctx.Lock()
        self._sem = ctx.BoundedSemaphore(maxsize)
        self._peek_semaphore = ctx.Semaphore(0) if system.HAS_SEM_GETVALUE else None
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
        vars(self).pop("_feeder", None)
        self._close = None
        self._jointhread = None
        self._joincancelled = False
        if self._peek_semaphore is not None:
            self._peek_level = PeekLevel(self._peek_semaphore, self._wlock)
        # The stock handler only prints the error: the object need not be kept for it.
        stock = self._family.queues.Queue
        self._tells_object = type(self)._on_queue_feeder_error is not stock._on_queue_feeder_error
        self._reader._shared = True
        self._reader._peek_level = self._peek_level
        self._writer._open_cache()
        self._poll = self._reader.poll
        self._read_lock = raw(self._rlock)
        self._placing: Iterator[bool] = iter(self._sem.acquire, 2)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Puts *obj*. It is safe to close *obj* and what is in it after this call.

        Raises: Full; ValueError: the queue is closed; whatever pickling raises; DescriptorLimit: no
        descriptor is free for a duplicate while the pipe is full, or too many were in flight for 10
        seconds; for *timeout*, or at once, if that is less. If a signal's handler raises, *obj* is
        put as a whole or not at all.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        self._put_message(encode(self._family, obj, self._writer._cache), obj, block, timeout)

    def _put_message(
        self, message: Encoded, obj: Any, block: bool = True, timeout: float | None = None
    ) -> None:
        """As `put`, of *obj* pickled as *message*."""
        accepted: list[Any] = [False]
        place = False
        try:
            # Stored at once, as in kernel/ancillary.py.
            if block and timeout is None:
                for place in self._placing:  # noqa: B007
                    break
            else:
                (place,) = map(self._sem.acquire, (block,), (timeout,))
            if not place:
                raise Full
            self._dispatch(message, obj, accepted, timeout if block else 0.0)
        except BaseException as error:
            if place and not accepted[0]:
                self._sem.release()
            if getattr(error, "errno", 0) not in READER_GONE:
                raise
            # No reader is left: as the stock queue, report it and return.
            if not self._ignore_epipe:
                self._on_queue_feeder_error(error, obj)

    def _dispatch(
        self, message: Encoded, obj: Any, accepted: list[Any], patience: float | None
    ) -> None:
        feeder = self._feeder or self._open_feeder()
        report = (self._on_queue_feeder_error, obj) if self._tells_object else None
        feeder.put(message, accepted, report, patience)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next object. The caller owns the result.

        Raises: Empty; ValueError: the queue is closed; DescriptorLimit: at this process's limit,
        and the object stays in the queue; whatever unpickling raises, and that object is gone. If a
        signal's handler raises, as `Connection.recv`.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        return self._reader._take(self._read_lock, block, timeout, self._sem.release)

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
        reader, writer = self._reader, self._writer
        failed = _reporter(self._family, self._sem, self._ignore_epipe)
        level = None if self._peek_level is None else self._peek_level.level
        starting = weakref.WeakMethod(self._starting)
        new = Feeder(
            writer._carrier(), self._wlock, reader.close, writer.close, failed, level, starting
        )
        # In one step: there must not be two, whatever comes in between.
        feeder: Feeder = vars(self).setdefault("_feeder", new)
        self._close = feeder.stop
        return feeder

    def _starting(self) -> None:
        """The thread is about to start: at exit it is stopped and waited for, as the stock
        queue's."""
        finalize, feeder = self._family.util.Finalize, self._feeder
        assert feeder is not None
        if not self._joincancelled:
            self._jointhread = finalize(feeder, _join, [feeder.thread_ended], exitpriority=-5)
        self._close = finalize(self, feeder.stop, [], exitpriority=10)


def register_after_fork(queue: QueueMixin) -> None:
    """A forked child starts with an empty feeder of its own."""
    queue._family.util.register_after_fork(queue, _after_fork)


def _after_fork(queue: QueueMixin) -> None:
    queue._reset(after_fork=True)


def _join(thread_ended: threading.Lock) -> None:
    with thread_ended:
        pass


def _reporter(
    family: Family, semaphore: BoundedSemaphore, ignore_epipe: bool
) -> Callable[[BaseException, Report | None], None]:
    """What handles an error in the thread: it does as `Queue._feed` of the standard library.

    It has no reference to the queue, which a message has that waits and may have to be reported.
    """
    util = family.util
    stock = family.queues.Queue._on_queue_feeder_error

    def failed(error: BaseException, report: Report | None) -> None:
        if ignore_epipe and getattr(error, "errno", 0) in READER_GONE:
            return
        if util.is_exiting():
            util.info("error in queue thread: %s", error)
            return
        semaphore.release()
        tell, obj = report or (stock, None)
        tell(error, obj)

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

    def _dispatch(
        self, message: Encoded, obj: Any, accepted: list[Any], patience: float | None
    ) -> None:
        # Counted before it can be received: task_done() may follow at once.
        counted = False
        try:
            with raw(self._cond):
                counted = True
                self._unfinished_tasks.release()
            QueueMixin._dispatch(self, message, obj, accepted, patience)
        except BaseException:
            if counted and not accepted[0]:
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
    # Free when a thread has sent the rest of what put() has begun. Not Thread.join: interrupted, it
    # takes the thread for ended (CPython 3.11).
    _finished: threading.Lock | None = None

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
        self._write_lock = raw(self._wlock)
        self._reader._shared = True
        self._writer._open_cache()
        self._poll = self._reader.poll
        forget_after_fork(self)

    def _after_fork(self) -> None:
        """In a forked child: what put() has begun is the parent's, and so is the lock."""
        self._finished = None
        self._write_lock._after_fork()

    def get(self) -> Any:
        """The next object. The caller owns the result. Raises: as `Queue.get`."""
        return self._reader._take(raw(self._rlock))

    def put(self, obj: Any) -> None:
        """Sends *obj*. It is safe to close *obj* after this call. Raises: as `Connection.send`.

        A put() during a put() of the same thread, by a finaliser or a signal's handler, leaves
        *obj* to the outer one.
        """
        self._put_message(encode(self._family, obj, self._writer._cache))

    def _put_message(self, message: Encoded, send: Callable[[Encoded], None] | None = None) -> None:
        """As `put`, of what is pickled. *send* is called under the lock, to send it."""
        sender, lock = self._writer._own_sender(), self._write_lock
        finished = self._finished
        if finished is not None:
            with finished:
                self._finished = None
        elif lock._is_mine():
            sender.leave(message)
            return
        self._send(sender, lock, send or sender.send, message)
        while sender.waiting:  # left to this call at its last moment
            self._send(sender, lock, sender.send_waiting)

    def _send(
        self, sender: Sender, lock: RawSemLock, send: Callable[..., None], *message: Encoded
    ) -> None:
        locked = False
        try:
            (locked,) = map(lock.acquire, _WAITING)  # as in kernel/ancillary.py
            send(*message)
        finally:
            # A handler may raise in any function in Python: none is called before the lock is free.
            if locked:
                if sender.waiting and sender.begun:
                    self._finish_later(sender, lock)
                else:
                    lock.release()

    def _finish_later(self, sender: Sender, lock: RawSemLock) -> None:
        """Has a thread send what has begun, and release *lock*: until then nobody else may send.

        If the program ends, it gives readers a moment.
        """

        def finish() -> None:
            try:
                sender.send_waiting()
            except OSError as error:
                # Else the readers are gone, or this end was closed: the next put() raises it.
                if isinstance(error, DescriptorLimit):
                    raise
            finally:
                lock.release()
                finished.release()
                at_end.cancel()

        finished = threading.Lock()
        finished.acquire()
        finalize, reader = self._family.util.Finalize, self._reader
        # With the priority of Queue.close(): before the children are waited for.
        at_end = finalize(None, _wait_for_rest, [reader.close, finished], exitpriority=10)
        try:
            # Not threading.Thread: the end would wait for it as long as a reader is there.
            _thread.start_new_thread(finish, ())
        except RuntimeError:  # too many, or (3.12 and later) the interpreter ends
            finish()
        self._finished = finished


def _wait_for_rest(close_reader: Callable[[], object], finished: threading.Lock) -> None:
    """At the end of the program: gives the readers of other processes a moment.

    Not more: one that has the other end and does not read may be waiting for this process's end.
    """
    close_reader()
    if finished.acquire(timeout=_PATIENCE):
        finished.release()
