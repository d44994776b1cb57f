"""Processes whose arguments may hold anything shareable, under every start method.

Derived from popen_spawn_posix.py and popen_forkserver.py of CPython 3.11 to 3.13, whose `_launch`
still starts the process. What changes: the process object is sent over a socket pair, with its
descriptors, any number of them and any of them twice; the child inherits one end. Under fork
nothing is sent: there, only a start that fails is another (popen_fork.py of CPython 3.11 to 3.15).
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, Protocol

from fdshare.kernel import system
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.imports import import_lazy
from fdshare.kernel.plain_socket import stream_pair
from fdshare.kernel.process_limit import too_many, why_not_forked
from fdshare.mp.channels.connection import ConnectionMixin
from fdshare.mp.channels.sending import Outgoing
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.pickling.reducers import dumps
from fdshare.mp.stock import Duplicate, StockPopen, StockProcess

if TYPE_CHECKING:
    from fdshare.mp.workers.executor_queues import CallQueueMixin

__all__ = ["START_FAILED", "START_PAUSE", "ForkPopenMixin", "PopenMixin", "ProcessMixin"]

# What starting a process may raise now, and not when it is tried again: for want of processes,
# descriptors or memory; EOFError where the fork server has died.
START_FAILED: Final = (OSError, EOFError)
START_PAUSE: Final = 0.1  # seconds until a pool or an executor tries again
# A worker that has no descriptor left can import nothing. Without the module that CPython 3.15
# imports to format its first traceback, it would end, and its pool wait for what a call has raised.
traceback.StackSummary.from_list([("", 1, "", "")]).format()
_ALL_LAZY: Final = sys.version_info >= (3, 15) and sys.get_lazy_imports() == "all"
# Milliseconds that a fork server may take to end after it has said so.
_MOMENT: Final = 5000


class ForkPopenMixin(StockPopen):
    """Forks a process. The stock one's four descriptors stay open where fork(2) fails."""

    _family: ClassVar[Family]

    def _launch(self, process_obj: StockProcess) -> None:
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            self.pid = self._fork()
        except BaseException:
            for fd in ends:
                os.close(fd)
            raise
        parent_r, child_w, child_r, parent_w = ends
        if self.pid == 0:
            self._run(process_obj, child_r, parent_r, parent_w)
        os.close(child_w)
        os.close(child_r)
        util = self._family.util
        self.finalizer = util.Finalize(self, util.close_fds, (parent_r, parent_w))
        self.sentinel = parent_r

    def _fork(self) -> int:
        # gh-146313, CPython 3.14: the child uses the resource tracker of this process.
        intent = getattr(self._family.resource_tracker, "_fork_intent", None)
        if intent is None:
            return os.fork()
        intent.preserve_fd = True
        try:
            return os.fork()
        finally:
            intent.preserve_fd = False

    def _run(self, process_obj: StockProcess, sentinel: int, *parents: int) -> NoReturn:
        has_exit_functions = sys.version_info >= (3, 13)
        code = 1
        try:
            if has_exit_functions:
                atexit._clear()
                atexit.register(self._family.util._exit_function)
            for fd in parents:
                os.close(fd)
            code = process_obj._bootstrap(parent_sentinel=sentinel)
        finally:
            if has_exit_functions:
                atexit._run_exitfuncs()
            os._exit(code)


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
                    self._start(stand_in)
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

    def _start(self, stand_in: _StandIn) -> None:
        try:
            super()._launch(stand_in)  # type: ignore[arg-type]
        except EOFError:
            # It dies of an error of fork(2), which it prints.
            self._await_end_of_fork_server()
            why = f"the fork server died before it started the process; perhaps {too_many()}"
            raise EOFError(why) from None

    def _await_end_of_fork_server(self) -> None:
        """Else the next start might be refused, which makes another one where this one is dead."""
        module: Any = self._family.popen_forkserver
        pid = module.forkserver._forkserver._forkserver_pid
        if system.HAS_PIDFD and pid is not None:
            with suppress(ProcessLookupError), Descriptor(os.pidfd_open(pid)) as pidfd:
                ended = select.poll()
                ended.register(pidfd.fileno(), select.POLLIN)
                ended.poll(_MOMENT)

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

    def start(self) -> None:
        """As the standard one's. Raises: BlockingIOError, which names the limits of processes."""
        try:
            super().start()
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, why_not_forked(error)) from None

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        if _ALL_LAZY:
            import_lazy()
        return super()._bootstrap(parent_sentinel)


def _adopt_executor_queue(process: ProcessMixin) -> None:
    """Makes the call queue of a standard executor one of ours (executor_queues.py), before its
    first worker starts: until then nothing was put there."""
    futures = sys.modules.get("concurrent.futures.process")
    if futures is not None and process._target is futures._process_worker:
        # Here and not at the top: a program without an executor need not import it.
        from fdshare.mp.workers.executor_queues import adopt

        adopt(process._classes.CallQueue, process._args[0])
