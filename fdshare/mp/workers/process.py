"""Processes whose arguments may hold anything shareable, under every start method.

Derived from popen_spawn_posix.py and popen_forkserver.py of CPython 3.11 to 3.13, whose `_launch`
still starts the process. What changes: the process object is sent over a socket pair, with its
descriptors, any number of them and any of them twice; the child inherits one end. Under fork
nothing is sent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.plain_socket import stream_pair
from fdshare.mp.channels.connection import ConnectionMixin
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.pickling.reducers import dumps
from fdshare.mp.stock import Duplicate, StockPopen, StockProcess

if TYPE_CHECKING:
    from fdshare.mp.workers.executor_queues import CallQueueMixin

__all__ = ["PopenMixin", "ProcessMixin"]


class PopenMixin(StockPopen):
    """Starts a process, and sends it its Process object with descriptors."""

    _family: ClassVar[Family]
    _connection: ClassVar[type[ConnectionMixin]]

    def _launch(self, process_obj: StockProcess) -> None:
        near, far = stream_pair()
        with near:
            with Descriptor(far.detach()) as inherited:
                message = self._pack(process_obj)
                try:
                    sent = message.push_now(near)
                    stand_in = _StandIn(self._connection, process_obj._name, inherited)
                    super()._launch(stand_in)  # type: ignore[arg-type]
                except BaseException:
                    message.close()
                    self._reap()
                    raise
            if not sent:
                try:
                    message.push_patiently(near)
                except BaseException:  # such as EPIPE: the child has died
                    self._reap()
                    raise

    def _reap(self) -> None:
        """Ends a child that was started and will not get its Process: nobody else waits for it."""
        if self.method == "spawn" and hasattr(self, "pid"):  # a fork server waits for its own
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _pack(self, process: StockProcess) -> Outgoing:
        # Locks, queues and shared memory can be pickled only while this is set.
        context = self._family.context
        context.set_spawning_popen(self)
        try:
            return Outgoing(dumps(self._family, process))
        finally:
            context.set_spawning_popen(None)


class _StandIn:
    """The package pickles this in place of the process object; unpickling it receives that."""

    def __init__(self, connection: type[ConnectionMixin], name: str, inherited: Descriptor) -> None:
        self._connection = connection
        self._name = name
        self._inherited = inherited

    def __reduce__(self) -> Reduced:
        # DupFd of a process being started: the number that the child will know it by.
        reduction = self._connection._family.reduction
        return _receive_process, (self._connection, reduction.DupFd(self._inherited.fileno()))


def _receive_process(cls: type[ConnectionMixin], copy: Duplicate) -> StockProcess:
    with cls(copy.detach(), writable=False) as connection:
        process: StockProcess = connection.recv()
    return process


class HasCallQueue(Protocol):
    """Makes the class when it is asked for: most programs have no executor."""

    @property
    def CallQueue(self) -> type[CallQueueMixin]: ...


class ProcessMixin(StockProcess):
    """A Process of a context of ours."""

    _family: ClassVar[Family]
    _classes: ClassVar[HasCallQueue]

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        super().__init__(group, target, name, args, kwargs or {}, daemon=daemon)
        _adopt_executor_queue(self)


def _adopt_executor_queue(process: ProcessMixin) -> None:
    """Makes the call queue of a standard executor one of ours (executor_queues.py), before its
    first worker starts: until then nothing was put there."""
    futures = sys.modules.get("concurrent.futures.process")
    if futures is not None and process._target is futures._process_worker:
        # Here and not at the top: a program without an executor need not import it.
        from fdshare.mp.workers.executor_queues import adopt

        adopt(process._classes.CallQueue, process._args[0])
