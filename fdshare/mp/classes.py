"""Our classes over one family, all at once: what `on_multiprocessing` and `on_multiprocess` are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fdshare.mp.channels.connection import ConnectionMixin, ListenerMixin, make_client, make_pipe
from fdshare.mp.channels.queues import JoinableQueueMixin, QueueMixin, SimpleQueueMixin
from fdshare.mp.context import ContextMixin
from fdshare.mp.family import Family
from fdshare.mp.workers.process import PopenMixin, ProcessMixin

__all__ = ["build", "build_late"]

_METHODS = {
    "fork": ("Fork", None),
    "spawn": ("Spawn", "popen_spawn_posix"),
    "forkserver": ("ForkServer", "popen_forkserver"),
}


def build(family: Family) -> dict[str, Any]:
    """The classes that every program with a context of ours needs."""
    derive = family.derive
    stock, queues = family.module("connection"), family.module("queues")
    connection = derive("Connection", ConnectionMixin, stock.Connection)
    classes = {
        "Connection": connection,
        "Pipe": make_pipe(connection),
        "Listener": derive("Listener", ListenerMixin, stock.Listener, _connection=connection),
        "Client": make_client(family, connection),
        "Queue": derive("Queue", QueueMixin, queues.Queue),
        "JoinableQueue": derive("JoinableQueue", JoinableQueueMixin, queues.JoinableQueue),
        "SimpleQueue": derive("SimpleQueue", SimpleQueueMixin, queues.SimpleQueue),
    }
    return classes | _build_contexts(family)


def _build_contexts(family: Family) -> dict[str, Any]:
    stock = family.module("context")
    classes: dict[str, Any] = {"CONTEXTS": {}}
    for method, (prefix, module) in _METHODS.items():
        process = f"{prefix}Process"
        popen = {}
        if module is not None:
            classes[f"{prefix}Popen"] = _build_popen(family, prefix, module)
            popen = {"_Popen": staticmethod(classes[f"{prefix}Popen"])}
        classes[process] = family.derive(process, ProcessMixin, getattr(stock, process), **popen)
        context = f"{prefix}Context"
        classes[context] = family.derive(
            context, ContextMixin, getattr(stock, context), Process=classes[process]
        )
        classes["CONTEXTS"][method] = classes[context]()
    return classes


def _build_popen(family: Family, prefix: str, module: str) -> Any:
    return family.derive(f"{prefix}Popen", PopenMixin, family.module(module).Popen)


def build_late(family: Family, name: str) -> Any:
    """A class that a program may never need, and whose base it then does not import."""
    builder = _LATE.get(name)
    if builder is None:
        raise AttributeError(f"module {family.home!r} has no attribute {name!r}")
    return builder(family)


def _pool(family: Family) -> Any:
    from fdshare.mp.workers.pool import PoolMixin

    return family.derive("Pool", PoolMixin, family.module("pool").Pool)


def _task_queue(family: Family) -> Any:
    from fdshare.mp.workers.pool import TaskQueueMixin

    return family.derive("TaskQueue", TaskQueueMixin, family.module("queues").SimpleQueue)


def _outcome_queue(family: Family) -> Any:
    from fdshare.mp.workers.pool import OutcomeQueueMixin

    return family.derive("OutcomeQueue", OutcomeQueueMixin, family.module("queues").SimpleQueue)


def _call_queue(family: Family) -> Any:
    from fdshare.mp.workers.executor import CallQueueMixin, stock_call_queue

    return family.derive("CallQueue", CallQueueMixin, stock_call_queue())


def _result_queue(family: Family) -> Any:
    from fdshare.mp.workers.executor import ResultQueueMixin

    return family.derive("ResultQueue", ResultQueueMixin, family.module("queues").SimpleQueue)


def _result_reader(family: Family) -> Any:
    from fdshare.mp.workers.executor import ResultReaderMixin

    return family.derive("ResultReader", ResultReaderMixin, family.module("connection").Connection)


def _sync_manager(family: Family) -> Any:
    from fdshare.mp.workers.managers import SyncManagerMixin

    return family.derive("SyncManager", SyncManagerMixin, family.module("managers").SyncManager)


def _manager_connection(family: Family) -> Any:
    from fdshare.mp.workers.managers import ManagerConnectionMixin

    stock = family.module("connection").Connection
    return family.derive("ManagerConnection", ManagerConnectionMixin, stock)


_LATE: dict[str, Callable[[Family], Any]] = {
    "Pool": _pool,
    "TaskQueue": _task_queue,
    "OutcomeQueue": _outcome_queue,
    "CallQueue": _call_queue,
    "ResultQueue": _result_queue,
    "ResultReader": _result_reader,
    "SyncManager": _sync_manager,
    "ManagerConnection": _manager_connection,
}
