"""Each public function has an example in its docstring, and it runs."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT

import fdshare
from fdshare.aio import AsyncClient

MODULES = ["fdshare", "fdshare.kernel", "fdshare.aio", "fdshare.activation"]

# In a process and a folder of its own: examples change what multiprocessing pickles.
RUN = """
import asyncio, doctest, errno, importlib, multiprocessing, os, pickle, signal, socket, sys
import fdshare
from fdshare import aio
module = importlib.import_module(sys.argv[1])
finder = doctest.DocTestFinder(recurse=False)
runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
given = {**vars(fdshare.kernel), **{n: getattr(module, n) for n in module.__all__}, **globals()}
for name in sys.argv[2:]:
    for test in finder.find(getattr(module, name), name, module=False, globs=dict(given)):
        runner.run(test)
print(runner.summarize(verbose=False))
"""


# Beside the functions. What verbs return is shown where they are.
CLASSES = {
    "fdshare": {"Descriptor", "Manager", "ProcessPoolExecutor", "SharedMemory"},
    "fdshare.kernel": {"Listener", "Received"},
    "fdshare.aio": {"AsyncClient"},
    "fdshare.activation": set(),
}


def shown(module: str) -> dict[str, Any]:
    """What has an example: name -> function or class."""
    public = import_module(module)
    found = {name: getattr(public, name) for name in public.__all__}
    classes = CLASSES[module]
    return {n: v for n, v in found.items() if inspect.isfunction(v) or n in classes}


@pytest.mark.parametrize("module", MODULES)
def test_each_has_an_example(module: str) -> None:
    assert [n for n, value in shown(module).items() if ">>> " not in (value.__doc__ or "")] == []


@pytest.mark.parametrize("module", MODULES)
def test_each_example_runs(module: str, folder: Path) -> None:
    needs = {"shared_copy": "numpy"}
    names = [n for n in shown(module) if n not in needs or importable(needs[n])]
    assert_passes(folder, RUN, module, *names)


# Each verb with a server that has no names, a client of it and an open file.
VERBS = """
import doctest, os, sys
import fdshare
finder = doctest.DocTestFinder(recurse=False)
runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)

def run(name, manager):
    with fdshare.connect(manager.address) as client, open(os.devnull) as file:
        given = {"client": client, "file": file, "os": os, "fdshare": fdshare}
        cls = fdshare.Client if hasattr(fdshare.Client, name) else fdshare.Manager
        for test in finder.find(getattr(cls, name), name, module=False, globs=given):
            runner.run(test)

with fdshare.Manager() as manager:
    for name in sys.argv[1:]:
        run(name, manager)
        for left in manager.names() if name != "shutdown" else ():
            manager.unregister(left)
print(runner.summarize(verbose=False))
"""
WITHOUT = {"close", "reload", "get_server", "join"}


def last(verb: str) -> bool:
    """Whether it ends the server."""
    return verb == "shutdown"


def verbs() -> list[str]:
    found = {**vars(fdshare.Manager), **vars(fdshare.Client)}
    return [n for n, value in found.items() if n[0] != "_" and inspect.isfunction(value)]


def test_each_verb_has_an_example() -> None:
    classes = (fdshare.Client, fdshare.Manager)
    docs = {n: [getattr(c, n).__doc__ for c in classes if hasattr(c, n)] for n in verbs()}
    assert {n for n, texts in docs.items() if ">>> " not in "".join(texts)} == WITHOUT


def test_each_verb_is_as_its_example_says(folder: Path) -> None:
    names = [n for n in verbs() if n not in WITHOUT]
    assert_passes(folder, VERBS, *sorted(names, key=last))


# The same for the verbs of the asynchronous client, as `python -m asyncio` runs what is typed.
AWAITED = """
import ast, asyncio, doctest, inspect, io, os, sys
from contextlib import redirect_stdout
from types import FunctionType
import fdshare
from fdshare import aio
sys.path.insert(0, sys.argv[1])
from awaited import example_of

async def run(verb, manager):
    with open(os.devnull) as file:
        async with aio.connect(manager.address) as client:
            given = {"client": client, "file": file, "os": os}
            for example in doctest.DocTestParser().get_examples(example_of(verb)):
                await check(example, given)

async def check(example, given):
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(example.source, "<typed>", "single", flags)
    with redirect_stdout(io.StringIO()) as said:
        done = FunctionType(code, given)()
        if inspect.iscoroutine(done):
            await done
    checker = doctest.OutputChecker()
    assert checker.check_output(example.want, said.getvalue(), doctest.ELLIPSIS), (
        example.source, said.getvalue()
    )

with fdshare.Manager() as manager:
    for verb in sys.argv[2:]:
        if not example_of(verb):
            print(verb)
        asyncio.run(run(verb, manager))
        for left in manager.names() if verb != "shutdown" else ():
            manager.unregister(left)
"""


def test_each_awaited_verb_is_as_its_example_says(folder: Path) -> None:
    verbs = {n for n, value in vars(AsyncClient).items() if n[0] != "_"}
    said = printed(folder, AWAITED, str(ROOT / "docs" / "_ext"), *sorted(verbs, key=last))
    assert set(said.split()) == {"close", "aclose", "reload"}


def assert_passes(folder: Path, program: str, *words: str) -> None:
    said = printed(folder, program, *words)
    assert "TestResults(failed=0" in said, said


def printed(folder: Path, program: str, *words: str) -> str:
    """What *program* prints, which has no error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    return done.stdout


def importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True
