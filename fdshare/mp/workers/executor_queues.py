"""The queues of executors on our contexts, and the calls and results in them.

Over concurrent/futures/process.py of CPython 3.11 to 3.13. That executor takes Process, locks and a
SimpleQueue from its context, but its call queue is of multiprocessing's class, whatever the context
is. So before the first worker starts, the class of the call queue is changed in place (`adopt`), in
the standard executor, too, if its `mp_context` is ours.

stock.py has the private names that are used.
"""

from __future__ import annotations

import socket
import struct
import traceback
from collections.abc import Mapping
from queue import Full
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fdshare.mp.channels.connection import ConnectionMixin, turned_into
from fdshare.mp.channels.queues import QueueMixin, SimpleQueueMixin, register_after_fork
from fdshare.mp.pickling.bundle import Arrived, open_arrived
from fdshare.mp.stock import StockContext, StockQueue, StockSafeQueue, executor_module
from fdshare.mp.workers.reader_lock import ReaderLock
from fdshare.mp.workers.tasks import (
    CALL,
    LOADED_CALL,
    RAISED,
    RETURNED,
    Raised,
    Task,
    beheaded,
    has_head,
    headed,
    outcome,
    pickled,
    receive_patiently,
)

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.synchronize import Semaphore

__all__ = [
    "Call",
    "CallQueueMixin",
    "ResultQueueMixin",
    "ResultReaderMixin",
    "adopt",
]


_futures: Final = executor_module()
_ONE_SECOND: Final = struct.pack("@ll", 1, 0)  # struct timeval


class Call(Task):
    """A Task that returns what it raised, with the traceback that the stock worker would clear."""

    __slots__ = ()

    def __call__(self) -> Any:
        try:
            return super().__call__()
        except BaseException as error:
            # As the standard executor: the worker's traceback as text, printed with the exception.
            text = "".join(traceback.format_exception(error))
            return Raised(error, _futures._RemoteTraceback(f'\n"""\n{text}"""'))


# The call queue


def adopt(
    cls: type[CallQueueMixin], queue: StockQueue, peek_semaphore: Semaphore | None = None
) -> None:
    """Makes the call *queue* of an executor one of *cls*, in place; nothing was put yet.

    *peek_semaphore* is that of its PeekLevel, if it is to have one. Raises: OSError (EMFILE); the
    queue may be adopted later then.
    """
    if isinstance(queue, QueueMixin):
        return
    stock, pipe = type(queue), (queue._reader, queue._writer)
    reader, writer = cls._pipe(duplex=False)
    turn = ReaderLock.create()
    try:
        queue.__class__ = cls
        assert isinstance(queue, CallQueueMixin)
        queue._reader, queue._writer = reader, writer
        queue._peek_semaphore = peek_semaphore
        queue._turn = turn
        queue._reset()
        register_after_fork(queue)
    except BaseException:  # a signal's handler may raise; the next submit() begins anew
        queue.__class__ = stock
        raise
    for end in pipe:
        end.close()


class CallQueueMixin(QueueMixin, StockSafeQueue):
    """From the executor to its workers."""

    # In place of _rlock. None: a worker that is killed keeps that, as in the stock executor.
    _turn: ReaderLock | None = None

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._turn

    def __setstate__(self, state: Any) -> None:
        state, self._turn = state
        super().__setstate__(state)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Sends a call. An error of that is its future's: the executor's thread calls this."""
        if not isinstance(obj, _futures._CallItem):
            QueueMixin.put(self, obj, block, timeout)
            return
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        call, form = obj.fn, CALL
        try:
            if type(call) is not Call:
                form = LOADED_CALL
                parts = obj.fn, obj.args, obj.kwargs
                call = Call(self._family, pickled(self._family, parts, self._writer._cache))
            message = headed(form, obj.work_id, 0, call.content)
            self._put_message(message, obj, block, timeout)
        except Full:
            raise
        except BaseException as error:  # of any class: it must not end the thread
            self._on_queue_feeder_error(error, obj)
        if type(call) is Call:
            call.close()  # the kernel has it

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next call; not loaded yet, if it was submitted to an executor of ours.

        Raises: Empty; ValueError: the queue is closed; DescriptorLimit: at this process's limit,
        and the call stays in the queue. A worker's get, which waits for as long as it takes, waits
        at the limit, too: `receive_patiently` says for how long.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        message = self._next_call(block, timeout)
        if not has_head(message):
            return self._reader._decode(message)
        form, work_id, _, content = beheaded(message)
        call: Any = (Call(self._family, content), (), {})
        if form == LOADED_CALL:
            call = open_arrived(content, self._family.loads)
        return _futures._CallItem(work_id, *call)

    def close(self) -> None:
        """As of a Queue; no thread of this process may be in `get`: only those of workers are."""
        super().close()
        if self._turn is not None:
            self._turn.close()

    def _next_call(self, block: bool, timeout: float | None) -> Arrived:
        if block and timeout is None:
            message = receive_patiently(self._reader, self._turn or self._rlock)
            self._sem.release()
            return message
        taken: list[Arrived | None] = [None]
        lock = self._turn or self._read_lock
        self._reader._take_locked(taken, lock, block, timeout, self._sem.release)
        assert taken[0] is not None
        return taken[0]


# Results


class ResultQueueMixin(SimpleQueueMixin):
    """From the workers to the executor."""

    _result_reader: ClassVar[type[ResultReaderMixin]]

    def __init__(self, *, ctx: StockContext) -> None:
        SimpleQueueMixin.__init__(self, ctx=ctx)
        self._reader = turned_into(self._result_reader, self._reader)
        self._adopt()

    def watch(self, workers: Mapping[int, BaseProcess]) -> None:
        """Has `recv` of the reader raise when one of *workers*, the senders, has died and no more
        of a result comes that has begun. The standard executor waits for the rest for ever."""
        assert isinstance(self._reader, ResultReaderMixin)
        self._reader._senders = workers
        sock = self._reader._carrier()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ONE_SECOND)

    def put(self, obj: Any) -> None:
        """Sends a result. Raises: whatever pickling raises; the worker then sends that."""
        if not isinstance(obj, _futures._ResultItem):
            SimpleQueueMixin.put(self, obj)
            return
        raised = isinstance(obj.result, Raised) or obj.exception is not None
        form = RAISED if raised else RETURNED
        value = obj.exception or obj.result
        content = pickled(self._family, value, self._writer._cache)
        self._put_message(headed(form, obj.work_id, obj.exit_pid or 0, content))


class ResultReaderMixin(ConnectionMixin):
    """The end that the executor's manager thread reads."""

    _senders: Mapping[int, BaseProcess] | None = None

    def recv(self) -> Any:
        """The next result, loaded; an error of loading it is the result.

        Raises: ConnectionAbortedError: a worker has died in the middle of it, see `watch`.
        """
        message: Arrived | None = None
        while message is None:
            try:
                message = receive_patiently(self)
            except BlockingIOError:  # nothing has come for a second
                if self._sender_died():
                    raise ConnectionAbortedError("a worker died while it sent a result") from None
        if not has_head(message):
            return self._decode(message)
        form, work_id, exit_pid, content = beheaded(message)
        ok, value = outcome(self._family, form, content)
        item = _futures._ResultItem(work_id, exit_pid=exit_pid or None)
        item.result, item.exception = (value, None) if ok else (None, value)
        return item

    def _sender_died(self) -> bool:
        senders = self._senders
        # The manager has taken out who has ended as it should: its last result came before.
        return senders is not None and any(
            sender.exitcode is not None for sender in list(senders.values())
        )
