"""Our classes over one family. Each is made when it is first asked for: a program may never need
it, and its base is then not imported."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fdshare.mp.channels.connection import ConnectionMixin, ListenerMixin, make_client, make_pipe
from fdshare.mp.channels.queues import JoinableQueueMixin, QueueMixin, SimpleQueueMixin
from fdshare.mp.family import Family
from fdshare.mp.workers.process import PopenMixin, ProcessMixin

__all__ = ["Classes"]


class Classes:
    """A namespace with a class, or a function that makes one, under each name."""

    def __init__(self, family: Family) -> None:
        self.family = family

    # Channels

    @cached_property
    def Connection(self) -> Any:
        stock = self.family.module("connection").Connection
        return self.family.derive("Connection", ConnectionMixin, stock)

    @cached_property
    def Pipe(self) -> Any:
        return make_pipe(self.Connection)

    @cached_property
    def Listener(self) -> Any:
        stock = self.family.module("connection").Listener
        return self.family.derive("Listener", ListenerMixin, stock, _connection=self.Connection)

    @cached_property
    def Client(self) -> Any:
        return make_client(self.family, self.Connection)

    @cached_property
    def Queue(self) -> Any:
        return self._queue("Queue", QueueMixin, self._stock_queues.Queue)

    @cached_property
    def JoinableQueue(self) -> Any:
        return self._queue("JoinableQueue", JoinableQueueMixin, self._stock_queues.JoinableQueue)

    @cached_property
    def SimpleQueue(self) -> Any:
        return self._simple_queue("SimpleQueue", SimpleQueueMixin)

    @property
    def _stock_queues(self) -> Any:
        return self.family.module("queues")

    def _queue(self, name: str, mixin: type, stock: type, **attributes: Any) -> Any:
        return self.family.derive(name, mixin, stock, _pipe=staticmethod(self.Pipe), **attributes)

    def _simple_queue(self, name: str, mixin: type, **attributes: Any) -> Any:
        return self._queue(name, mixin, self._stock_queues.SimpleQueue, **attributes)

    # Processes

    @cached_property
    def ForkProcess(self) -> Any:
        return self._process("ForkProcess")

    @cached_property
    def SpawnProcess(self) -> Any:
        return self._process("SpawnProcess", _Popen=staticmethod(self.SpawnPopen))

    @cached_property
    def ForkServerProcess(self) -> Any:
        return self._process("ForkServerProcess", _Popen=staticmethod(self.ForkServerPopen))

    @cached_property
    def SpawnPopen(self) -> Any:
        return self._popen("SpawnPopen", "popen_spawn_posix")

    @cached_property
    def ForkServerPopen(self) -> Any:
        return self._popen("ForkServerPopen", "popen_forkserver")

    def _process(self, name: str, **attributes: Any) -> Any:
        stock = getattr(self.family.module("context"), name)
        call_queue = staticmethod(lambda: self.CallQueue)
        return self.family.derive(name, ProcessMixin, stock, _call_queue=call_queue, **attributes)

    def _popen(self, name: str, module: str) -> Any:
        stock = self.family.module(module).Popen
        return self.family.derive(name, PopenMixin, stock, _connection=self.Connection)

    # Pools, executors and managers

    @cached_property
    def Pool(self) -> Any:
        from fdshare.mp.workers.pool import PoolMixin

        stock = self.family.module("pool").Pool
        queues = {"_task_queue": self.TaskQueue, "_outcome_queue": self.OutcomeQueue}
        return self.family.derive("Pool", PoolMixin, stock, **queues)

    @cached_property
    def TaskQueue(self) -> Any:
        from fdshare.mp.workers.pool import TaskQueueMixin

        return self._simple_queue("TaskQueue", TaskQueueMixin)

    @cached_property
    def OutcomeQueue(self) -> Any:
        from fdshare.mp.workers.pool import OutcomeQueueMixin

        return self._simple_queue("OutcomeQueue", OutcomeQueueMixin)

    @cached_property
    def CallQueue(self) -> Any:
        from fdshare.mp.workers.executor_queues import CallQueueMixin, stock_call_queue

        return self._queue("CallQueue", CallQueueMixin, stock_call_queue())

    @cached_property
    def ResultQueue(self) -> Any:
        from fdshare.mp.workers.executor_queues import ResultQueueMixin

        return self._simple_queue("ResultQueue", ResultQueueMixin, _result_reader=self.ResultReader)

    @cached_property
    def ResultReader(self) -> Any:
        from fdshare.mp.workers.executor_queues import ResultReaderMixin

        stock = self.family.module("connection").Connection
        return self.family.derive("ResultReader", ResultReaderMixin, stock)

    @cached_property
    def SyncManager(self) -> Any:
        from fdshare.mp.workers.managers import SyncManagerMixin

        stock = self.family.module("managers").SyncManager
        connection = self.ManagerConnection
        return self.family.derive("SyncManager", SyncManagerMixin, stock, _connection=connection)

    @cached_property
    def ManagerConnection(self) -> Any:
        from fdshare.mp.workers.managers import ManagerConnectionMixin

        stock = self.family.module("connection").Connection
        return self.family.derive("ManagerConnection", ManagerConnectionMixin, stock)
