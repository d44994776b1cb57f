"""imports: a server imports nothing while it serves: without a free descriptor it could not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import Halves

import fdshare

lazy = pytest.mark.skipif(sys.version_info < (3, 15), reason="no lazy imports before Python 3.15")

# Notes each module that is looked for from now on, and in which process.
TRACE = """\
import os, sys
def trace(event, args, path={path!r}, os=os):
    if event == "import":
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{{args[0]}}\\n".encode())
        os.close(fd)
sys.addaudithook(trace)
"""


@pytest.fixture(params=["normal", pytest.param("all", marks=lazy)])
def imported(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """What new interpreters have imported since this was last called."""
    monkeypatch.setenv("PYTHON_LAZY_IMPORTS", request.param)
    (folder / "sitecustomize.py").write_text(TRACE.format(path=str(folder / "trace")))
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def imported() -> list[str]:
        names = (folder / "trace").read_text().split()
        (folder / "trace").write_text("")
        return names

    return imported


@pytest.mark.parametrize("keeper", [True, False])
def test_a_server_that_serves(imported: Callable[[], list[str]], keeper: bool) -> None:
    near, far = socket.socketpair()
    with near, far, fdshare.Manager(keeper=keeper) as manager:
        assert "fdshare.server.serve" in imported()
        use(manager, near)
        assert imported() == []
        if keeper:
            halves = Halves(manager)
            for half in ("server", "keeper"):
                halves.kill(half)
                use(manager, near)
            assert imported() == []
            manager.upgrade()
            assert "fdshare.server.failover.new_code" in imported()
            use(manager, near)
            assert imported() == []


def test_garbage_collections_do_not_look_at_what_was_imported() -> None:
    code = """
import gc
import fdshare.server.serve
from fdshare.kernel.imports import import_all
before = len(gc.get_objects())
import_all()
print(before, len(gc.get_objects()))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, after = map(int, said.stdout.split())
    assert after < before / 10


def use(manager: fdshare.Manager, sock: socket.socket) -> None:
    """Every verb, and some refusals."""
    manager.register("a", sock, metadata={"k": "v"}, ttl=60)
    manager.register("b", sock, lifetime="process", grace=1)
    for name in ("a", "b"):
        manager.fetch(name).close()
    for made in manager.fetch_many(["a", "b"]).values():
        made.close()
    manager.rename("b", "c")
    with manager.watch("*") as watch:
        next(watch)
    for ask in (manager.names, manager.infos, manager.stats, manager.ping):
        ask()
    manager.info("a")
    manager.explain("fetch", "a", 1, 1)
    manager.bind("d", "tcp://localhost:0").close()
    manager.bind("e", f"unix://{os.path.dirname(manager.address)}/e").close()
    manager.reload()
    for wrong in (lambda: manager.fetch("z"), lambda: manager.register("a", sock)):
        with pytest.raises(fdshare.FdshareError):
            wrong()
    manager.take("a").close()
    for name in ("c", "d", "e"):
        manager.unregister(name)
