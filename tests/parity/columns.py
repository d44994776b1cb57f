"""The columns that the same programs run in, and the outcomes of a case in one of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fdshare
from fdshare.errors import FdshareError

SECONDS = 30  # a case that is not done by then hangs


class Column(NamedTuple):
    name: str
    context: Any
    executor: Callable[..., Any]

    def make_executor(self, workers: int = 1, **options: Any) -> Any:
        return self.executor(workers, mp_context=self.context, **options)


def column(name: str, method: str) -> Column:
    """Its name is "standard", "install" or "context", and the package."""
    kind, package = name.split()
    if kind == "context":
        context = fdshare.get_context(method, backend=package)
        return Column(name, context, fdshare.ProcessPoolExecutor)
    if kind == "install":
        fdshare.install()
    context = importlib.import_module(package).get_context(method)
    return Column(name, context, concurrent.futures.ProcessPoolExecutor)


class HungError(BaseException):
    """The case is not done in time."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HungError

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


class BrokenPoolError(Exception):
    """The thread that reads results is dead: nothing will come any more."""


class LostCallError(Exception):
    """The worker that had the call is dead."""


def outcome(function: Callable[[], Any]) -> str:
    """What it returns or raises, as text."""
    try:
        with bounded():
            value = function()
    except HungError:
        return "hangs"
    except BrokenPoolError:
        return "breaks the pool"
    except LostCallError:
        return "loses the call"
    except BaseException as error:
        return f"raises {kind_of(error)}"
    return value if isinstance(value, str) else repr(value)


def kind_of(error: BaseException) -> str:
    """The name of its class; of one of fdshare's, that of what a program catches, too."""
    cls = type(error)
    if not isinstance(error, FdshareError):
        return cls.__name__
    caught = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    return f"{cls.__name__}, a {caught.__name__}"


@contextlib.contextmanager
def pool_of(column: Column, workers: int, **options: Any) -> Iterator[Any]:
    pool = column.context.Pool(workers, **options)
    try:
        yield pool
    finally:
        try:
            pool.terminate()
        except AssertionError:  # the thread that reads results is dead
            for worker in pool._pool:
                worker.kill()


def result_of(pool: Any, result: Any) -> Any:
    """The value of an AsyncResult of *pool*. Raises: BrokenPoolError, LostCallError."""
    workers = {worker.pid for worker in pool._pool}
    lost = 0
    while not result.ready():
        result.wait(0.05)
        if result.ready():
            break
        if not pool._result_handler.is_alive():
            raise BrokenPoolError
        lost += {worker.pid for worker in pool._pool} != workers
        if lost > 20:  # a worker is another since a second
            raise LostCallError
    return result.get()
