"""Signals that arrive before a chosen instruction of the interpreter (interrupts.c)."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SIGNAL = signal.SIGUSR1
_TOOL = 4  # of sys.monitoring, which leaves 3 and 4 to anybody


class Interrupt(BaseException):
    """What the handler of a signal raises."""


class Interrupter:
    """Calls functions into which a signal comes."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._library = library
        library.start.argtypes = [ctypes.c_long, ctypes.c_int]
        library.stop.restype = ctypes.c_long
        library.callback.restype = ctypes.py_object
        # Absent before Python 3.12, where the library traces by itself.
        self._monitoring: Any = getattr(sys, "monitoring", None)
        if self._monitoring is not None and self._monitoring.get_tool(_TOOL) is None:
            self._monitoring.use_tool_id(_TOOL, __name__)

    def arrives(self, instructions: int, function: Callable[[], object]) -> bool:
        """Calls *function*; False if it was over before *instructions* were.

        Raises: what *function* raises, or the handler.
        """
        self._library.start(instructions, SIGNAL)
        try:
            if self._monitoring is not None:
                event = self._monitoring.events.INSTRUCTION
                self._monitoring.register_callback(_TOOL, event, self._library.callback())
                self._monitoring.set_events(_TOOL, event)
            function()
        finally:
            if self._monitoring is not None:
                self._monitoring.set_events(_TOOL, 0)
            left = self._library.stop()
        return bool(left == 0)


@contextmanager
def handled_by(handler: Callable[[], object]) -> Iterator[list[int]]:
    """*handler* is that of SIGNAL. Yields the signals that came."""
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        handler()

    former = signal.signal(SIGNAL, handle)
    try:
        yield came
    finally:
        signal.signal(SIGNAL, former)


def interrupt() -> None:
    raise Interrupt


@pytest.fixture(scope="session", name="interrupter")
def make_interrupter(tmp_path_factory: pytest.TempPathFactory) -> Interrupter:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    headers = sysconfig.get_path("include")
    if compiler is None or not Path(headers, "Python.h").is_file():
        pytest.skip("no C compiler, or no headers of Python")
    library = tmp_path_factory.mktemp("interrupts") / "interrupts.so"
    source = Path(__file__).with_suffix(".c")
    command: list[Any] = [compiler, "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{headers}"]
    subprocess.run([*command, "-o", library, source], check=True)
    interrupter = Interrupter(ctypes.PyDLL(str(library)))
    with handled_by(list) as came:
        interrupter.arrives(1, lambda: sum([1]))
    assert came == [SIGNAL]  # else no test that has it shows anything
    return interrupter
