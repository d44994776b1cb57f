"""The classes and functions of multiprocessing and multiprocess that this package builds on, and of
concurrent.futures: every one of their private names that it uses, with its type.

Read in CPython 3.11.7, 3.12.1 and 3.13.0, where all of it is the same, and in multiprocess 0.70.19,
which has the same modules with the same names in them. tests/mp/test_stock.py compares this file
with the interpreter that runs it and with both packages: a name that is gone, or a method with
other parameters, fails there and not in a program.

A class here is a description. For a type checker it is the documented class with the private names
added; at run time it is empty, so that a mixin may derive from it: the class that a mixin is for
comes after it (`Family.derive`), and no method of a description hides one of that.

A parameter before a "/" is one that is passed by position only: its name may differ.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import io
    import queue
    from collections import deque
    from multiprocessing.connection import Connection as _Connection
    from multiprocessing.connection import Listener as _Listener
    from multiprocessing.context import BaseContext as _Context
    from multiprocessing.managers import SyncManager as _SyncManager
    from multiprocessing.pool import ApplyResult, IMapIterator, MapResult
    from multiprocessing.pool import Pool as _Pool
    from multiprocessing.popen_fork import Popen as _Popen
    from multiprocessing.process import BaseProcess as _Process
    from multiprocessing.queues import JoinableQueue, Queue, SimpleQueue
    from multiprocessing.synchronize import BoundedSemaphore, Condition, Lock, Semaphore, SemLock
    from pickle import Pickler as _Pickler
    from threading import Condition as _Condition
    from threading import Event as _Event
    from threading import Thread as _Thread

    _ApplyResult: TypeAlias = ApplyResult[Any]
    _MapResult: TypeAlias = MapResult[Any]
    _IMapIterator: TypeAlias = IMapIterator[Any]
    _Queue: TypeAlias = Queue[Any]
    _JoinableQueue: TypeAlias = JoinableQueue[Any]
    _SimpleQueue: TypeAlias = SimpleQueue[Any]
else:
    _Connection = _Listener = _Context = _SyncManager = _Pool = _Popen = _Process = _Thread = object
    _ApplyResult = _MapResult = _IMapIterator = _Pickler = _Queue = _JoinableQueue = (
        _SimpleQueue
    ) = object

Address: TypeAlias = str | bytes | tuple[str, int]
Function: TypeAlias = Callable[..., Any]  # of a program's
C = TypeVar("C", bound=type)


def _description(cls: C) -> C:
    """At run time an empty class, whose `_description` is *cls*."""
    members = {"__doc__": cls.__doc__, "_description": cls}
    return type(cls.__name__, (), members)  # type: ignore[return-value]


# connection


@_description
class StockConnection(_Connection):
    _handle: int | None

    def _check_closed(self) -> None: ...
    def _check_readable(self) -> None: ...
    def _check_writable(self) -> None: ...
    def _send_bytes(self, buf: bytes | memoryview) -> None: ...
    def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO | None: ...
    def _poll(self, timeout: float | None) -> bool: ...
    def _close(self, _close: Callable[[int], None] = ...) -> None: ...


@_description
class StockListener(_Listener):
    def accept(self) -> StockConnection: ...


class ConnectionModule(Protocol):
    Connection: type[StockConnection]
    Listener: type[StockListener]
    default_family: str

    @staticmethod
    def arbitrary_address(family: str) -> str: ...

    @staticmethod
    def Client(
        address: Address, family: str | None = None, authkey: bytes | None = None
    ) -> StockConnection: ...


# queues


@_description
class StockQueue(_Queue):
    _maxsize: int
    _reader: StockConnection
    _writer: StockConnection
    _rlock: Lock
    _wlock: Lock
    _sem: BoundedSemaphore
    _opid: int
    _ignore_epipe: bool
    _closed: bool
    _close: Callable[[], object] | None
    _jointhread: StockFinalize | None
    _joincancelled: bool
    _poll: Callable[[float], bool]

    def _reset(self, after_fork: bool = False) -> None: ...
    @staticmethod
    def _on_queue_feeder_error(e: BaseException, obj: Any) -> None: ...


@_description
class StockJoinableQueue(_JoinableQueue):
    _unfinished_tasks: Semaphore
    _cond: Condition


@_description
class StockSimpleQueue(_SimpleQueue):
    _reader: StockConnection
    _writer: StockConnection
    _rlock: Lock
    _wlock: Lock
    _poll: Callable[[], bool]


class QueuesModule(Protocol):
    Queue: type[StockQueue]
    JoinableQueue: type[StockJoinableQueue]
    SimpleQueue: type[StockSimpleQueue]


# synchronize


class RawLock(Protocol):
    def acquire(self, block: bool = True, timeout: float | None = None, /) -> bool: ...
    def release(self) -> None: ...


class RawSemLock(RawLock, Protocol):
    """What is under every lock and semaphore: _multiprocessing.SemLock."""

    def __enter__(self) -> bool: ...
    def __exit__(self, *exc: object) -> None: ...
    def _get_value(self) -> int: ...
    def _is_mine(self) -> bool: ...
    def _is_zero(self) -> bool: ...
    def _after_fork(self) -> None: ...


def raw(lock: SemLock | Condition) -> RawSemLock:
    """The RawSemLock under *lock*, or under the lock of a condition.

    It is written in C: no signal's handler runs between its `with` and the block.
    """
    below: Any = getattr(lock, "_lock", lock)
    return below._semlock  # type: ignore[no-any-return]


class SynchronizeModule(Protocol):
    SEM_VALUE_MAX: int


# context, process, popen_*


@_description
class StockProcess(_Process):
    _name: str
    _target: Function | None
    _args: tuple[Any, ...]

    def _bootstrap(self, parent_sentinel: int | None = None) -> int: ...


@_description
class StockMethodProcess(StockProcess):
    @staticmethod
    def _Popen(process_obj: StockProcess) -> StockPopen: ...


@_description
class StockPopen(_Popen):
    method: ClassVar[str]
    pid: int
    finalizer: Any
    sentinel: int

    def _launch(self, process_obj: StockProcess) -> None: ...


class PopenModule(Protocol):
    Popen: type[StockPopen]


@_description
class StockContext(_Context):
    _name: str


class ContextModule(Protocol):
    ForkContext: type[StockContext]
    SpawnContext: type[StockContext]
    ForkServerContext: type[StockContext]
    ForkProcess: type[StockMethodProcess]
    SpawnProcess: type[StockMethodProcess]
    ForkServerProcess: type[StockMethodProcess]
    _default_context: _Context

    @staticmethod
    def get_spawning_popen() -> StockPopen | None: ...
    @staticmethod
    def set_spawning_popen(popen: StockPopen | None) -> None: ...


class ProcessModule(Protocol):
    BaseProcess: type[StockProcess]

    @staticmethod
    def parent_process() -> _Process | None: ...


class ResourceTrackerModule(Protocol):
    """From 3.14 on multiprocessing's has _fork_intent, an object with an attribute preserve_fd."""


# reduction


@_description
class StockForkingPickler(_Pickler):
    # Called on the class; multiprocess has a function there.
    loads: ClassVar[Callable[..., Any]]
    _extra_reducers: ClassVar[dict[type, Callable[[Any], tuple[Any, ...] | str]]]

    @classmethod
    def register(cls, type: type, reduce: Callable[[Any], tuple[Any, ...] | str]) -> None: ...
    @classmethod
    def dumps(cls, obj: Any, protocol: int | None = None, /) -> memoryview: ...
    def dump(self, obj: Any, /) -> None: ...


class Duplicate(Protocol):
    """A descriptor that a process being started inherits."""

    def detach(self) -> int: ...


class ReductionModule(Protocol):
    __name__: str
    ForkingPickler: type[StockForkingPickler]
    context: ContextModule

    @staticmethod
    def DupFd(fd: int) -> Duplicate: ...


# util


@_description
class StockFinalize:
    def __init__(
        self,
        obj: object,
        callback: Function,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        exitpriority: int | None = None,
    ) -> None: ...
    def __call__(self) -> object: ...
    def cancel(self) -> None: ...


class UtilModule(Protocol):
    Finalize: type[StockFinalize]

    @staticmethod
    def _exit_function() -> None: ...
    @staticmethod
    def close_fds(*fds: int) -> None: ...
    @staticmethod
    def register_after_fork(obj: Any, func: Callable[[Any], None]) -> None: ...
    @staticmethod
    def get_temp_dir() -> str: ...
    @staticmethod
    def is_exiting() -> bool: ...
    @staticmethod
    def info(msg: str, *args: object) -> None: ...


# pool


@_description
class StockPool(_Pool):
    _inqueue: StockSimpleQueue
    _outqueue: StockSimpleQueue
    _quick_put: Callable[[Any], None]
    _quick_get: Callable[[], Any]
    _taskqueue: queue.SimpleQueue[Any]
    _change_notifier: StockSimpleQueue
    _worker_handler: _Thread
    _cache: Any
    _pool: list[StockProcess]
    _processes: int
    _ctx: StockContext
    _initializer: Function | None
    _initargs: Iterable[Any]

    def _setup_queues(self) -> None: ...
    def _get_sentinels(self) -> list[StockConnection]: ...
    @staticmethod
    def _get_worker_sentinels(workers: list[StockProcess]) -> list[int]: ...
    @staticmethod
    def _join_exited_workers(pool: list[StockProcess]) -> bool: ...
    @staticmethod
    def _repopulate_pool_static(
        ctx: StockContext,
        Process: Function,
        processes: int,
        pool: list[StockProcess],
        inqueue: StockSimpleQueue,
        outqueue: StockSimpleQueue,
        initializer: Function | None,
        initargs: Iterable[Any],
        maxtasksperchild: int | None,
        wrap_exception: bool,
    ) -> None: ...
    @staticmethod
    def _wait_for_updates(
        sentinels: Sequence[Any], change_notifier: StockSimpleQueue, timeout: float | None = None
    ) -> None: ...
    def _check_running(self) -> None: ...
    @staticmethod
    def _get_tasks(func: Function, it: Iterable[Any], size: int) -> Iterable[tuple[Any, ...]]: ...
    def _map_async(
        self,
        func: Function,
        iterable: Iterable[Any],
        mapper: Function,
        chunksize: int | None = None,
        callback: Function | None = None,
        error_callback: Function | None = None,
    ) -> _MapResult: ...
    @classmethod
    def _terminate_pool(
        cls,
        taskqueue: queue.SimpleQueue[Any],
        inqueue: StockSimpleQueue,
        outqueue: StockSimpleQueue,
        pool: list[StockProcess],
        change_notifier: StockSimpleQueue,
        worker_handler: _Thread,
        task_handler: _Thread,
        result_handler: _Thread,
        cache: Any,
    ) -> None: ...


@_description
class StockApplyResult(_ApplyResult):
    _event: _Event
    _job: int
    _success: bool
    _value: Any

    def __init__(
        self,
        pool: StockPool,
        callback: Function | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None: ...


@_description
class StockMapResult(_MapResult):
    _job: int

    def __init__(
        self,
        pool: StockPool,
        chunksize: int,
        length: int,
        callback: Function | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None: ...


@_description
class StockIMapIterator(_IMapIterator):
    _cond: _Condition
    _items: deque[Any]
    _index: int
    _length: int | None


@_description
class StockExceptionWithTraceback:
    exc: BaseException
    tb: str


class PoolModule(Protocol):
    Pool: type[StockPool]
    ApplyResult: type[StockApplyResult]
    MapResult: type[StockMapResult]
    IMapIterator: type[StockIMapIterator]
    IMapUnorderedIterator: type[StockIMapIterator]
    ExceptionWithTraceback: type[StockExceptionWithTraceback]
    RemoteTraceback: type[StockRemoteTraceback]
    RUN: str
    TERMINATE: str

    @staticmethod
    def mapstar(args: Any) -> list[Any]: ...
    @staticmethod
    def starmapstar(args: Any) -> list[Any]: ...
    @staticmethod
    def _helper_reraises_exception(ex: BaseException) -> None: ...


# managers


@_description
class StockManager(_SyncManager):
    def __init__(
        self,
        address: Address | None = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: StockContext | None = None,
        *,
        shutdown_timeout: float = 1.0,
    ) -> None: ...


class ManagersModule(Protocol):
    SyncManager: type[StockManager]
    # serializer -> (listener, client)
    listener_client: MutableMapping[str, tuple[type[StockListener], Function]]


# concurrent.futures.process


@_description
class StockSafeQueue(StockQueue):
    def _on_queue_feeder_error(self, e: BaseException, obj: Any) -> None: ...  # type: ignore[override]


@_description
class StockCallItem:
    work_id: int
    fn: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(
        self, work_id: int, fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None: ...


@_description
class StockResultItem:
    work_id: int
    exception: BaseException | None
    result: Any
    exit_pid: int | None

    def __init__(
        self,
        work_id: int,
        exception: BaseException | None = None,
        result: Any = None,
        exit_pid: int | None = None,
    ) -> None: ...


@_description
class StockRemoteTraceback(Exception):
    def __init__(self, tb: str) -> None: ...


@_description
class StockExecutor:
    _mp_context: _Context
    _call_queue: StockSafeQueue
    _result_queue: StockSimpleQueue
    _initializer: Function | None
    _initargs: tuple[Any, ...]
    _max_workers: int
    _executor_manager_thread: StockExecutorManager | None
    _processes: dict[int | None, _Process]  # the manager's processes
    _pending_work_items: dict[int, Any]
    _work_ids: Any
    _queue_count: int
    _shutdown_thread: bool

    def _adjust_process_count(self) -> None: ...
    def _start_executor_manager_thread(self) -> None: ...


@_description
class StockThreadWakeup:
    _reader: StockConnection
    _writer: StockConnection

    def close(self) -> None: ...
    def wakeup(self) -> None: ...


@_description
class StockExecutorManager(_Thread):
    call_queue: StockSafeQueue
    result_queue: StockSimpleQueue
    processes: dict[int | None, _Process]
    pending_work_items: dict[int, Any]
    max_tasks_per_child: int | None
    shutdown_lock: Any
    thread_wakeup: StockThreadWakeup
    executor_reference: weakref.ref[StockExecutor]

    def process_result_item(self, result_item: Any, /) -> None: ...
    def wait_result_broken_or_wakeup(self) -> tuple[Any, bool, list[str] | None]: ...
    def is_shutting_down(self) -> bool: ...


class ExecutorModule(Protocol):
    ProcessPoolExecutor: type[StockExecutor]
    _SafeQueue: type[StockSafeQueue]
    _CallItem: type[StockCallItem]
    _ResultItem: type[StockResultItem]
    _RemoteTraceback: type[StockRemoteTraceback]
    _ThreadWakeup: type[StockThreadWakeup]
    _ExecutorManagerThread: type[StockExecutorManager]

    @staticmethod
    def _process_worker(
        call_queue: StockQueue,
        result_queue: StockSimpleQueue,
        initializer: Function | None,
        initargs: tuple[Any, ...],
        max_tasks: int | None = None,
    ) -> None: ...


def executor_module() -> ExecutorModule:
    """concurrent.futures.process, imported now."""
    return importlib.import_module("concurrent.futures.process")  # type: ignore[return-value]


# Of either package: the name of a module of it -> its description.
MODULES: Mapping[str, type] = {
    "connection": ConnectionModule,
    "context": ContextModule,
    "managers": ManagersModule,
    "pool": PoolModule,
    "popen_fork": PopenModule,
    "popen_forkserver": PopenModule,
    "popen_spawn_posix": PopenModule,
    "process": ProcessModule,
    "queues": QueuesModule,
    "reduction": ReductionModule,
    "resource_tracker": ResourceTrackerModule,
    "synchronize": SynchronizeModule,
    "util": UtilModule,
}
