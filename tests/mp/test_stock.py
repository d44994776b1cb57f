"""The descriptions of stock.py, compared with this interpreter and with both packages."""

from __future__ import annotations

import concurrent.futures
import importlib
import inspect
import typing
from collections.abc import Iterator
from inspect import Parameter
from types import FunctionType
from typing import Any

import pytest

from fdshare.mp import stock
from fdshare.mp.backends import backend_of
from mp.common import PACKAGES, trackers  # noqa: F401
from mp.test_classes import NAMES

EXECUTOR = "concurrent.futures.process"
PLACES = [(f"{package}.{name}", name) for package in PACKAGES for name in stock.MODULES]


def description_of(module: str) -> type:
    return stock.ExecutorModule if module == EXECUTOR else stock.MODULES[module.split(".")[1]]


def descriptions() -> set[type]:
    """All of classes."""
    found = [getattr(value, "_description", None) for value in vars(stock).values()]
    return {one for one in found if one is not None}


def members(description: type) -> dict[str, Any]:
    """Its methods and functions."""
    made_by_typing = {"__init__", "__subclasshook__"} if is_protocol(description) else set()
    return {
        name: value
        for name, value in vars(description).items()
        if isinstance(value, FunctionType | staticmethod | classmethod)
        and name not in made_by_typing
    }


def is_protocol(description: type) -> bool:
    return getattr(description, "_is_protocol", False)


def classes_in(description: type) -> Iterator[tuple[str, type]]:
    """The classes that a module's description names, each with its description."""
    for name, hint in typing.get_type_hints(description).items():
        if typing.get_origin(hint) is type:
            yield name, typing.get_args(hint)[0]._description


# Parameters


def parameters(member: Any, is_method: bool) -> list[Parameter]:
    """Those that a caller gives, of a function or of a method as its class holds it."""
    bound = isinstance(member, staticmethod) or not is_method
    function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
    found = list(inspect.signature(function).parameters.values())
    return found if bound or inspect.isbuiltin(function) else found[1:]


def shape(parameter: Parameter) -> tuple[str, str, bool]:
    return parameter.name, parameter.kind.name, parameter.default is not Parameter.empty


def unlike(described: list[Parameter], real: list[Parameter]) -> str:
    """What a call by the description finds different; "": nothing."""
    for index, parameter in enumerate(described):
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            if index >= len(real) or real[index].kind not in BY_POSITION:
                return f"takes no argument {index}"
        elif shape(parameter) not in map(shape, real):
            return f"has no parameter {parameter}"
        elif parameter.kind in BY_POSITION and shape(parameter) != shape(real[index]):
            return f"has {real[index]} for {parameter}"
    needed = [one for one in real[len(described) :] if one.kind not in VARIABLE]
    needed = [str(one) for one in needed if one.default is Parameter.empty]
    return f"needs {', '.join(needed)}" if needed else ""


BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def differences(description: type, real: Any) -> list[str]:
    """In what the class or module *real* is not as described."""
    found = []
    for name, member in members(description).items():
        actual = inspect.getattr_static(real, name, None)
        wrong = "is not there"
        if actual is not None:
            wrong = other_kind(member, actual) if isinstance(real, type) else ""
            is_method = isinstance(real, type)
            wrong = wrong or unlike(parameters(member, is_method), parameters(actual, is_method))
        if wrong:
            found.append(f"{real.__name__}.{name} {wrong}")
    return found


def other_kind(described: Any, real: Any) -> str:
    """What the one is and the other is not: a static method, a class method."""
    for kind in (staticmethod, classmethod):
        if isinstance(described, kind) != isinstance(real, kind):
            return f"is a {type(real).__name__}"
    return ""


@pytest.mark.parametrize("module", [*(place for place, _ in PLACES), EXECUTOR])
def test_every_name_is_there_and_as_described(module: str) -> None:
    real, description = importlib.import_module(module), description_of(module)
    assert differences(description, real) == []
    for name in description.__annotations__:
        assert hasattr(real, name), f"{module} has no {name}"
    for name, described in classes_in(description):
        assert differences(described, getattr(real, name)) == []


def test_every_description_belongs_to_a_module() -> None:
    named = {
        described
        for module in (*stock.MODULES.values(), stock.ExecutorModule)
        for _, described in classes_in(module)
    }
    assert named == descriptions()


# What a class has only once there is an object of it


def objects(package: str) -> Iterator[tuple[type, Any]]:
    """An object of each class that is described with attributes."""
    ctx = importlib.import_module(package).get_context("fork")
    reader, writer = ctx.Pipe(duplex=False)
    yield stock.StockConnection, reader
    reader.close()
    writer.close()
    for cls, made in (
        (stock.StockQueue, ctx.Queue()),
        (stock.StockJoinableQueue, ctx.JoinableQueue()),
        (stock.StockSimpleQueue, ctx.SimpleQueue()),
    ):
        yield cls, made
        made._reader.close()
        made._writer.close()
    yield stock.StockContext, ctx
    yield stock.StockProcess, ctx.Process(target=print)
    pickler = importlib.import_module(f"{package}.reduction").ForkingPickler
    yield stock.StockForkingPickler, pickler
    with ctx.Pool(1) as pool:
        yield stock.StockPool, pool
        yield stock.StockPopen, pool._pool[0]._popen
        result = pool.apply_async(len, ("",))
        result.wait()  # until then it has no value
        yield stock.StockApplyResult, result
        results = pool.map_async(len, [""])
        yield stock.StockMapResult, results
        assert (result.get(), results.get()) == (0, [0])
        yield stock.StockIMapIterator, pool.imap(len, [])
    pool.join()
    pools = importlib.import_module(f"{package}.pool")
    yield stock.StockExceptionWithTraceback, pools.ExceptionWithTraceback(ValueError(), None)
    executors = importlib.import_module(EXECUTOR)
    yield stock.StockCallItem, executors._CallItem(1, len, (), {})
    yield stock.StockResultItem, executors._ResultItem(1)
    with concurrent.futures.ProcessPoolExecutor(1, ctx) as executor:
        assert executor.submit(len, "").result() == 0
        yield stock.StockExecutor, executor
        yield stock.StockSafeQueue, executor._call_queue  # type: ignore[attr-defined]
        yield stock.StockExecutorManager, executor._executor_manager_thread
        yield stock.StockThreadWakeup, executor._executor_manager_thread.thread_wakeup


@pytest.mark.parametrize("package", PACKAGES)
def test_every_attribute_is_there(package: str) -> None:
    seen = set()
    for cls, obj in objects(package):
        description = cls._description  # type: ignore[attr-defined]
        seen.add(description)
        for name in vars(description).get("__annotations__", ()):
            assert hasattr(obj, name), f"{type(obj)} has no {name}"
    described = {
        value._description
        for value in vars(stock).values()
        if isinstance(value, type)
        and vars(getattr(value, "description", int)).get("__annotations__")
    }
    assert described <= seen


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_under_a_lock(package: str) -> None:
    ctx = importlib.import_module(package).get_context("fork")
    for lock in (ctx.Lock(), ctx.Semaphore(1), ctx.BoundedSemaphore(1)):
        assert stock.raw(lock)._get_value() == 1
        with lock:
            assert stock.raw(lock)._is_zero()


# What our classes put in the place of the package's


# The executor makes its call queue itself: it becomes one of ours, which is never made.
NEVER_CALLED = {("CallQueue", "__init__")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("package", PACKAGES)
def test_what_we_override_has_the_same_parameters(package: str, name: str) -> None:
    cls = getattr(backend_of(package).CLASSES, name)
    for method in overrides(cls) if isinstance(cls, type) else ():
        if (name, method) in NEVER_CALLED:
            continue
        ours, theirs = (
            [(one.name, one.kind.name) for one in parameters(found[0], True)]
            for found in (holders(cls, method, of_ours=True), holders(cls, method, of_ours=False))
        )
        assert ours in (theirs, ANY), f"{name}.{method}"


ANY = [("args", "VAR_POSITIONAL"), ("kwargs", "VAR_KEYWORD")]


def holders(cls: type, method: str, *, of_ours: bool) -> list[Any]:
    """What the classes behind *cls* have under that name, nearest first."""
    return [
        vars(base)[method]
        for base in cls.__mro__
        if base.__module__.startswith("fdshare") is of_ours
        and isinstance(vars(base).get(method), FunctionType | staticmethod)
    ]


def overrides(cls: type) -> list[str]:
    """The methods of ours that stand before one of the package's."""
    return [
        name
        for name in dir(cls)
        if holders(cls, name, of_ours=True) and holders(cls, name, of_ours=False)
    ]


def test_a_difference_is_found() -> None:
    class Described:
        def gone(self) -> None: ...
        def renamed(self, obj: Any) -> None: ...
        def by_position(self, obj: Any, /) -> None: ...
        def longer(self, obj: Any) -> None: ...
        def optional(self, obj: Any) -> None: ...
        def static(self) -> None: ...

    class Real:
        def renamed(self, thing: Any) -> None: ...
        def by_position(self, thing: Any) -> None: ...
        def longer(self, obj: Any, more: Any) -> None: ...
        def optional(self, obj: Any, more: Any = None) -> None: ...
        @staticmethod
        def static() -> None: ...

    assert differences(Described, Real) == [
        "Real.gone is not there",
        "Real.renamed has no parameter obj: 'Any'",
        "Real.longer needs more: 'Any'",
        "Real.static is a staticmethod",
    ]


def test_a_description_is_empty_at_run_time() -> None:
    assert stock.StockQueue.__mro__ == (stock.StockQueue, object)
    assert not {"_reset", "put", "__init__"} & set(vars(stock.StockQueue))
