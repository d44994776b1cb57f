"""How children and programs end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from parity.columns import Column, outcome

CHILDREN: dict[str, Callable[[], Any]] = {
    "it returns": lambda: 1,
    "it raises": lambda: 1 / 0,
    "sys.exit()": lambda: sys.exit(),
    "sys.exit(3)": lambda: sys.exit(3),
    "sys.exit(text)": lambda: sys.exit("text"),
    "os._exit(4)": lambda: os._exit(4),
    "it is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def exit_code(column: Column, target: Callable[[], Any]) -> Any:
    process = column.context.Process(target=target)
    process.start()
    process.join()
    return process.exitcode


def terminated(column: Column) -> Any:
    process = column.context.Process(target=time.sleep, args=(60,), daemon=True)
    before = process.is_alive(), process.exitcode, process.pid is None
    process.start()
    during = process.is_alive(), process.exitcode
    process.terminate()
    process.join()
    process.close()
    return before, during


def started_twice(column: Column) -> Any:
    process = column.context.Process(target=int)
    process.start()
    process.join()
    process.start()


# Each ends by itself; it prints what it has to say.
PROGRAMS = {
    "a daemonic child is left": "ctx.Process(target=time.sleep, args=(60,), daemon=True).start()",
    "a child is waited for": "ctx.Process(target=print, args=('child',)).start()",
    "a pool is left": "p = ctx.Pool(2); print(p.apply(abs, (-3,)))",
    "a pool is left at work": "p = ctx.Pool(2); r = p.map_async(time.sleep, [60] * 9)",
    "an executor is left": "e = Executor(1, mp_context=ctx); print(e.submit(abs, -3).result())",
    "an executor is left at work": "e = Executor(1, mp_context=ctx); f = e.submit(print, 'task')",
    "an error in the program": "p = ctx.Pool(1); p.apply(abs, (1,)); raise SystemExit(5)",
    "items are left in a queue": "q = ctx.Queue(); q.put(b'x' * 100)",
}
PROLOGUE = """
import concurrent.futures, multiprocessing, sys, time
Executor = concurrent.futures.ProcessPoolExecutor
kind, package = sys.argv[1].split()
if kind != "standard":
    import fdshare
if kind == "context":
    Executor, ctx = fdshare.ProcessPoolExecutor, fdshare.get_context("fork", backend=package)
else:
    ctx = __import__(package).get_context("fork")
if kind == "install":
    fdshare.install()
"""


ERRORS: list[str] = []  # what each program has printed to its error output


def run_program(column: Column, text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROLOGUE + text, column.name],
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    said = "quietly" if not done.stderr else "with errors"
    if done.stderr:
        ERRORS.append(f"{column.name}: {text}:\n{done.stderr}")
    return f"ends {said} with {done.returncode} and prints {done.stdout!r}"


def cases(column: Column) -> Iterator[tuple[str, str]]:
    for name, target in CHILDREN.items():
        yield f"ending, child: {name}", outcome(lambda target=target: exit_code(column, target))
    yield "ending, child: terminated", outcome(lambda: terminated(column))
    yield "ending, child: started twice", outcome(lambda: started_twice(column))
    for name, text in PROGRAMS.items():
        yield f"ending, program: {name}", outcome(lambda text=text: run_program(column, text))
