"""Tracebacks, as lists of file, function and line; tblib makes tracebacks of them again."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace, TracebackType
from typing import Any, TypeAlias

__all__ = ["reduce_traceback"]

# File and name of the code, line, and what of the module's globals a traceback is printed with.
Row: TypeAlias = tuple[str, str, int, dict[str, str]]

_PRINTED = ("__name__", "__file__")


def reduce_traceback(traceback: TracebackType) -> tuple[Any, tuple[list[Row]]]:
    """The reduce value of *traceback*, which can always be pickled, however long it is."""
    rows: list[Row] = []
    step: TracebackType | None = traceback
    while step is not None:
        code, module = step.tb_frame.f_code, step.tb_frame.f_globals
        named = {name: module[name] for name in _PRINTED if type(module.get(name)) is str}
        rows.append((code.co_filename, code.co_name, step.tb_lineno, named))
        step = step.tb_next
    return _rebuild_traceback, (rows,)


def _rebuild_traceback(rows: list[Row]) -> TracebackType:
    """The traceback of *rows*. Pickles name this function.

    tblib makes the frames of a traceback by raising in them, and a frame keeps the one it was
    called from: the unpickler's, whose locals have the exception, which has the traceback. CPython
    3.11.0 to 3.11.2 never collect that circle. A generator that waits was called by nobody.
    """
    waiting = _made(rows)
    traceback = next(waiting)
    # Else it ended here, and on 3.12 a generator that ends was called from here.
    traceback.tb_frame.f_globals["__fdshare__"] = waiting
    return traceback


def _made(rows: list[Row]) -> Iterator[TracebackType]:
    yield _as_tblib(rows).as_traceback()


def _as_tblib(rows: list[Row]) -> Any:
    from tblib import Traceback

    first = None
    for filename, name, line, module in reversed(rows):
        step: Any = object.__new__(Traceback)
        code = SimpleNamespace(co_filename=filename, co_name=name)
        step.tb_frame = SimpleNamespace(f_code=code, f_globals=module, f_locals={})
        step.tb_lineno, step.tb_next = line, first
        first = step
    return first
