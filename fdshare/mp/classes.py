"""Our classes over one family. Each is made when it is first asked for: a program may never need
it, and its base is then not imported."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from fdshare.mp.channels.connection import (
    ClientFunction,
    ConnectionMixin,
    ListenerMixin,
    PipeFunction,
    make_client,
    make_pipe,
)
from fdshare.mp.channels.queues import JoinableQueueMixin, QueueMixin, SimpleQueueMixin
from fdshare.mp.family import Family
from fdshare.mp.stock import PopenModule, StockProcess, executor_module
from fdshare.mp.workers.process import ForkPopenMixin, PopenMixin, ProcessMixin

if TYPE_CHECKING:
    from fdshare.mp.workers.executor_queues import (
        CallQueueMixin,
        ResultQueueMixin,
        ResultReaderMixin,
    )
    from fdshare.mp.workers.managers import ManagerConnectionMixin, SyncManagerMixin
    from fdshare.mp.workers.pool import PoolMixin
    from fdshare.mp.workers.pool_queues import OutcomeQueueMixin, TaskQueueMixin

__all__ = ["Classes"]

C = TypeVar("C", bound=ConnectionMixin)
Q = TypeVar("Q", bound=QueueMixin)
S = TypeVar("S", bound=SimpleQueueMixin)


class Classes:
    """A namespace with a class, or a function that makes objects of one, under each name."""

    def __init__(self, family: Family) -> None:
        self.family = family

    # Channels

    @cached_property
    def Connection(self) -> type[ConnectionMixin]:
        return self._connection("Connection", ConnectionMixin)

    @cached_property
    def Pipe(self) -> PipeFunction:
        return make_pipe(self.Connection)

    @cached_property
    def Listener(self) -> type[ListenerMixin]:
        stock = self.family.connection.Listener
        return self.family.derive("Listener", ListenerMixin, stock, _connection=self.Connection)

    @cached_property
    def Client(self) -> ClientFunction:
        return make_client(self.family, self.Connection)

    @cached_property
    def Queue(self) -> type[QueueMixin]:
        return self._queue("Queue", QueueMixin, self.family.queues.Queue)

    @cached_property
    def JoinableQueue(self) -> type[JoinableQueueMixin]:
        stock = self.family.queues.JoinableQueue
        return self._queue("JoinableQueue", JoinableQueueMixin, stock)

    @cached_property
    def SimpleQueue(self) -> type[SimpleQueueMixin]:
        return self._simple_queue("SimpleQueue", SimpleQueueMixin)

    def _connection(self, name: str, mixin: type[C]) -> type[C]:
        return self.family.derive(name, mixin, self.family.connection.Connection)

    def _queue(self, name: str, mixin: type[Q], stock: type) -> type[Q]:
        return self.family.derive(name, mixin, stock, _pipe=staticmethod(self.Pipe))

    def _simple_queue(self, name: str, mixin: type[S], **attributes: object) -> type[S]:
        stock, pipe = self.family.queues.SimpleQueue, staticmethod(self.Pipe)
        return self.family.derive(name, mixin, stock, _pipe=pipe, **attributes)

    # Processes

    @cached_property
    def ForkProcess(self) -> type[ProcessMixin]:
        return self._process("ForkProcess", self.family.context.ForkProcess, "ForkPopen")

    @cached_property
    def SpawnProcess(self) -> type[ProcessMixin]:
        return self._process("SpawnProcess", self.family.context.SpawnProcess, "SpawnPopen")

    @cached_property
    def ForkServerProcess(self) -> type[ProcessMixin]:
        stock = self.family.context.ForkServerProcess
        return self._process("ForkServerProcess", stock, "ForkServerPopen")

    @cached_property
    def ForkPopen(self) -> type[ForkPopenMixin]:
        stock = self.family.popen_fork.Popen
        return self.family.derive("ForkPopen", ForkPopenMixin, stock)

    @cached_property
    def SpawnPopen(self) -> type[PopenMixin]:
        return self._popen("SpawnPopen", self.family.popen_spawn_posix)

    @cached_property
    def ForkServerPopen(self) -> type[PopenMixin]:
        return self._popen("ForkServerPopen", self.family.popen_forkserver)

    def _process(self, name: str, stock: type[StockProcess], popen: str) -> type[ProcessMixin]:
        # At the first start: where eventlet has patched sockets, there is no fork server.
        start = staticmethod(lambda process_obj: getattr(self, popen)(process_obj))
        return self.family.derive(name, ProcessMixin, stock, _classes=self, _Popen=start)

    def _popen(self, name: str, module: PopenModule) -> type[PopenMixin]:
        return self.family.derive(name, PopenMixin, module.Popen, _connection=self.Connection)

    # Pools, executors and managers

    @cached_property
    def Pool(self) -> type[PoolMixin]:
        from fdshare.mp.workers.pool import PoolMixin
        from fdshare.mp.workers.pool_results import ApplyResultMixin, IMapIteratorMixin

        stock, derive = self.family.pool, self.family.derive
        ordered, unordered = stock.IMapIterator, stock.IMapUnorderedIterator
        parts = {
            "_task_queue": self.TaskQueue,
            "_outcome_queue": self.OutcomeQueue,
            "_apply_result": derive("ApplyResult", ApplyResultMixin, stock.ApplyResult),
            "_map_result": derive("MapResult", ApplyResultMixin, stock.MapResult),
            "_imap_iterator": derive("IMapIterator", IMapIteratorMixin, ordered),
            "_imap_unordered_iterator": derive(
                "IMapUnorderedIterator", IMapIteratorMixin, unordered
            ),
        }
        return derive("Pool", PoolMixin, stock.Pool, **parts)

    @cached_property
    def TaskQueue(self) -> type[TaskQueueMixin]:
        from fdshare.mp.workers.pool_queues import TaskQueueMixin

        return self._simple_queue("TaskQueue", TaskQueueMixin)

    @cached_property
    def OutcomeQueue(self) -> type[OutcomeQueueMixin]:
        from fdshare.mp.workers.pool_queues import OutcomeQueueMixin

        return self._simple_queue("OutcomeQueue", OutcomeQueueMixin)

    @cached_property
    def CallQueue(self) -> type[CallQueueMixin]:
        from fdshare.mp.workers.executor_queues import CallQueueMixin

        return self._queue("CallQueue", CallQueueMixin, executor_module()._SafeQueue)

    @cached_property
    def ResultQueue(self) -> type[ResultQueueMixin]:
        from fdshare.mp.workers.executor_queues import ResultQueueMixin

        return self._simple_queue("ResultQueue", ResultQueueMixin, _result_reader=self.ResultReader)

    @cached_property
    def ResultReader(self) -> type[ResultReaderMixin]:
        from fdshare.mp.workers.executor_queues import ResultReaderMixin

        return self._connection("ResultReader", ResultReaderMixin)

    @cached_property
    def SyncManager(self) -> type[SyncManagerMixin]:
        from fdshare.mp.workers.managers import SyncManagerMixin

        stock, connection = self.family.managers.SyncManager, self.ManagerConnection
        return self.family.derive("SyncManager", SyncManagerMixin, stock, _connection=connection)

    @cached_property
    def ManagerConnection(self) -> type[ManagerConnectionMixin]:
        from fdshare.mp.workers.managers import ManagerConnectionMixin

        return self._connection("ManagerConnection", ManagerConnectionMixin)
