"""Exceptions that workers of pools and executors raise."""

from __future__ import annotations

import json
import subprocess
import threading
import traceback
import urllib.error
from collections.abc import Callable, Iterator
from typing import Any

from parity.columns import BrokenPoolError, Column, outcome, pool_of, result_of


class Two(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code


class Slotted(Exception):
    __slots__ = ("a",)

    def __init__(self, a: int) -> None:
        self.a = a


class WithLock(Exception):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class OwnReduce(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.a = a

    def __reduce__(self) -> Any:
        return OwnReduce, (self.args[0], self.args[1])


class BadReduce(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("it has none")


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class OwnNew(Exception):
    def __new__(cls, a: int, b: int) -> OwnNew:
        return super().__new__(cls, a)

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)


class OwnOSError(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "gone", path)
        self.path = path


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("frozen")


class Bomb(Exception):
    def __reduce__(self) -> Any:
        return int, ("no number",)


def local() -> BaseException:
    class Local(Exception):
        pass

    return Local("local")


def of_call(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError


def noted() -> BaseException:
    error = ValueError("noted")
    error.add_note("a note")
    return error


def after(error: BaseException, kind: str) -> BaseException:
    real = ValueError("the one that counts")
    if kind == "cause":
        real.__cause__ = error
    real.__context__ = error
    return real


ERRORS: dict[str, Callable[[], BaseException]] = {
    "plain: ValueError": lambda: ValueError("text", 2),
    "plain: KeyError": lambda: KeyError("key"),
    "plain: StopIteration": lambda: StopIteration(7),
    "plain: with a note": noted,
    "plain: UnicodeDecodeError": lambda: of_call(b"\xff".decode),
    "plain: JSONDecodeError": lambda: of_call(lambda: json.loads("{")),
    "plain: CalledProcessError": lambda: subprocess.CalledProcessError(1, ["false"]),
    "plain: a __reduce__ of its own": lambda: OwnReduce(1, 2),
    "plain: a circle of causes": lambda: after(ValueError("other"), "cause"),
    "constructor: two arguments": lambda: Two(7, "seven"),
    "constructor: a keyword": lambda: KeywordOnly(code=4),
    "constructor: an OSError": lambda: OwnOSError("path"),
    "constructor: its __new__": lambda: OwnNew(1, 2),
    "constructor: HTTPError": lambda: urllib.error.HTTPError("url", 404, "none", {}, None),  # type: ignore[arg-type]
    "constructor: in a group": lambda: ExceptionGroup("group", [Two(1, "one"), ValueError(3)]),
    "slots": lambda: Slotted(3),
    "no attribute can be set": lambda: Frozen("frozen"),
    "its text fails": BadText,
    "it cannot be pickled: a lock": WithLock,
    "it cannot be pickled: its __reduce__ fails": BadReduce,
    "it cannot be pickled: of a local class": local,
    "it cannot be unpickled": Bomb,
    **{
        f"raised from another, {kind}: {cls.__name__}": (
            lambda kind=kind, cls=cls: after(cls(), kind)
        )
        for kind in ("cause", "context")
        for cls in (Bomb, WithLock, BadReduce)
    },
}


def fail(name: str) -> None:
    raise ERRORS[name]()


def attributes(error: BaseException) -> dict[str, Any]:
    slots = {"a": error.a} if isinstance(error, Slotted) and hasattr(error, "a") else {}
    kept = {key: value for key, value in vars(error).items() if key not in ("lock", "__notes__")}
    return {key: str(value) for key, value in (kept | slots).items() if "0x" not in str(value)}


def compared(name: str, error: BaseException) -> str:
    sent = ERRORS[name]()
    if type(error).__qualname__ != type(sent).__qualname__:
        return f"{type(error).__name__} arrives"
    try:
        same_text = str(error) == str(sent)
    except RuntimeError:
        same_text = isinstance(error, BadText)
    same_args = isinstance(sent, BaseExceptionGroup) or error.args == sent.args
    if not (same_text and same_args):
        return "arrives with another text"
    if attributes(error) != attributes(sent):
        return "arrives without attributes"
    lines = traceback.format_exception(error) if same_text and type(error) is not BadText else []
    return "arrives" if not lines or "fail" in "".join(lines) else "arrives without a traceback"


def from_pool(column: Column, name: str) -> str:
    with pool_of(column, 1) as pool:
        try:
            result_of(pool, pool.apply_async(fail, (name,)))
        except BrokenPoolError:
            raise
        except BaseException as error:
            return compared(name, error)
    raise AssertionError


def from_executor(column: Column, name: str) -> str:
    with column.make_executor() as executor:
        error = executor.submit(fail, name).exception()
        return compared(name, error)


def cases(column: Column) -> Iterator[tuple[str, str]]:
    for name in ERRORS:
        yield f"pool, {name}", outcome(lambda name=name: from_pool(column, name))
        yield f"executor, {name}", outcome(lambda name=name: from_executor(column, name))
