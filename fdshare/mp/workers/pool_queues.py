"""The queues of pools: tasks to the workers, and their outcomes back.

Each is a stream, which carries whatever there is, with something beside it for what is small:
task_packets.py, outcome_pipe.py. Both can be ended while others wait for them.
"""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from functools import partial
from typing import Any

from fdshare.kernel import system
from fdshare.mp.channels.feeder import READER_GONE
from fdshare.mp.channels.incoming import TornMessage
from fdshare.mp.channels.queues import SimpleQueueMixin
from fdshare.mp.pickling.bundle import Encoded
from fdshare.mp.stock import StockContext
from fdshare.mp.workers.maps import MappedTask, Numbered
from fdshare.mp.workers.outcome_pipe import LONGEST, VOID, OutcomePipe, is_short
from fdshare.mp.workers.reader_lock import ReaderLock
from fdshare.mp.workers.task_packets import TaskPackets
from fdshare.mp.workers.tasks import (
    CALL,
    LOADED_CALL,
    MAPPED_CALL,
    RAISED,
    RETURNED,
    Raised,
    Task,
    beheaded,
    headed,
    open_call,
    outcome,
    pickled,
    receive_patiently,
)

__all__ = ["EndingQueueMixin", "OutcomeQueueMixin", "TaskQueueMixin"]


class EndingQueueMixin(SimpleQueueMixin):
    """A queue that can be ended without room in it, without its locks, and while others wait."""

    def _adopt(self) -> None:
        SimpleQueueMixin._adopt(self)
        self._abandoned = threading.Event()

    def finish(self) -> None:
        """Nothing more is sent by any process; what was sent is still received. Never waits."""
        self._writer._carrier().shutdown(socket.SHUT_WR)

    def abandon(self) -> None:
        """End it in every process: who waits to send fails, who waits to receive is at the end.

        Never waits.
        """
        self._abandoned.set()
        for end in (self._reader, self._writer):
            if not end.closed:
                end._carrier().shutdown(socket.SHUT_RDWR)


class TaskQueueMixin(EndingQueueMixin):
    """From the pool to its workers."""

    _packets: TaskPackets | None = None

    def __init__(self, *, ctx: StockContext) -> None:
        SimpleQueueMixin.__init__(self, ctx=ctx)
        turn = ReaderLock.create()
        if turn is not None:  # else a worker that is killed keeps the lock, as in the stock pool
            self._rlock = turn  # type: ignore[assignment]
        if system.HAS_SEQPACKET:
            self._packets = TaskPackets(self._reader, self._writer, self._rlock)

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._packets

    def __setstate__(self, state: Any) -> None:
        state, self._packets = state
        super().__setstate__(state)

    def finish(self) -> None:
        super().finish()
        if self._packets is not None:
            self._packets.finish()

    def abandon(self) -> None:
        super().abandon()
        if self._packets is not None:
            self._packets.abandon()

    def close(self) -> None:
        super().close()
        if isinstance(self._rlock, ReaderLock):
            self._rlock.close()
        if self._packets is not None:
            self._packets.close()

    def send_task(self, task: Numbered | None) -> None:
        """Sends (job, index, function, args, kwds), or None, the end."""
        if task is None:
            self.finish()
            return
        job, index, function, args, kwds = task
        form = MAPPED_CALL if type(function) is MappedTask else CALL
        if not isinstance(function, Task):
            # The worker looks at this function itself.
            form = LOADED_CALL if function is self._family.pool._helper_reraises_exception else CALL
            call = function, args, kwds
            function = Task(self._family, pickled(self._family, call, self._writer._cache))
        message = headed(form, job, index, function.content)
        try:
            if self._packets is None:
                self._put_message(message)
            else:
                self._packets.send(message)
        except OSError:
            if not self._abandoned.is_set():
                raise
        finally:
            function.close()  # the kernel has copies, or it is not sent

    def get(self) -> Numbered:
        """The next task; its call is not loaded yet.

        After a worker that was killed in the middle of a task there is no next one: it waits for
        the end, as in the stock pool, where the lock stays locked. Raises: EOFError.
        """
        packets = self._packets
        try:
            if packets is None:
                message = receive_patiently(self._reader, self._rlock)
            else:
                message = packets.receive()
        except TornMessage:
            ended = select.poll()
            ended.register(self._reader, system.RDHUP)
            ended.poll()
            raise EOFError from None
        form, job, index, content = beheaded(message)
        if form == MAPPED_CALL:
            return job, index, MappedTask(self._family, content), (), {}
        if form == CALL:
            return job, index, Task(self._family, content), (), {}
        try:
            return job, index, *open_call(content, self._family.loads)
        except Exception as error:  # of this job alone
            return job, index, self._family.pool._helper_reraises_exception, (error,), {}


class OutcomeQueueMixin(EndingQueueMixin):
    """From the workers to the pool."""

    def __init__(self, *, ctx: StockContext) -> None:
        SimpleQueueMixin.__init__(self, ctx=ctx)
        self._small = OutcomePipe(self._reader, self._writer)

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._small

    def __setstate__(self, state: Any) -> None:
        state, self._small = state
        super().__setstate__(state)

    def put(self, obj: Any) -> None:
        """Sends (job, index, (ok, value)), or None, the end, when every job is done.

        Raises: whatever pickling raises; SystemExit: the pool is gone.
        """
        if obj is None:
            self._small.finish()
            return
        job, index, (ok, value) = obj
        if not ok and isinstance(value, self._family.pool.ExceptionWithTraceback):
            value = Raised(value.exc, self._family.pool.RemoteTraceback(value.tb))
        content = pickled(self._family, value, self._writer._cache)
        form = RETURNED if ok else RAISED
        try:
            if type(content) is bytes and len(content) <= LONGEST:
                self._small.send(form, job, index, content)
            else:
                send = partial(self._send_announced, job, index)
                self._put_message(headed(form, job, index, content), send)
        except OSError as error:
            if error.errno in READER_GONE:
                raise SystemExit(1) from None
            raise

    def _send_announced(self, job: int, index: int, message: Encoded) -> None:
        sender = self._writer._own_sender()
        if is_short(message):
            sender.send(message)
            self._small.announce(job, index)
            return
        try:
            self._small.announce(job, index)
            sender.send(message)
        except BaseException:
            # The pool waits for it.
            if not sender.begun:
                with suppress(OSError):
                    sender.send(headed(VOID, job, index, b""))
            raise

    def take(self) -> Any:
        """The next (job, index, (ok, value)), for the pool's only reader. Raises: EOFError."""
        if self._abandoned.is_set():
            raise EOFError
        form, job, index, content = self._small.take(self._abandoned.wait)
        return job, index, outcome(self._family, form, content)

    def abandon(self) -> None:
        super().abandon()
        self._small.abandon()

    def close(self) -> None:
        super().close()
        self._small.close()
