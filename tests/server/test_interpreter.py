"""interpreter: a new interpreter that runs this fdshare, wherever it is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fdshare import version
from fdshare.server.interpreter import fresh_interpreter


def test_it_ends_with_the_status_of_the_call() -> None:
    for status in (0, 3):
        command = fresh_interpreter("os", f"_exit({status})")
        assert subprocess.run(command, check=False).returncode == status


def test_fdshare_is_found_where_it_was_found_here(folder: Path) -> None:
    """Not where the folder of the moment, or the environment, has another."""
    (folder / "fdshare").mkdir()
    (folder / "fdshare" / "__init__.py").write_text("raise SystemExit(9)")
    command = fresh_interpreter("fdshare.version", "__file__")  # sys.exit() prints a str
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert done.stderr.strip() == version.__file__


def test_it_has_the_flags_of_this_one() -> None:
    """What multiprocessing passes on."""
    code = (
        "import subprocess; from fdshare.server.interpreter import fresh_interpreter; "
        "subprocess.run(fresh_interpreter('sys', 'flags'))"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-E", "-c", code], capture_output=True, text=True, check=True
    )
    assert "optimize=2" in done.stderr
    assert "ignore_environment=1" in done.stderr


# Modules that a server imports, some of them late.
NAMES = ("msgspec", "heapq", "logging", "selectors", "resource", "grp", "fdshare", "shutil")
PROGRAM = """
import multiprocessing, os, socket
import fdshare
with fdshare.Manager() as manager:
    manager.upgrade()
    print(manager.ping() is None)
fdshare.install()
near, far = socket.socketpair()
queue = multiprocessing.get_context("fork").SimpleQueue()  # others start the resource tracker
queue.put(near)
print(queue.get().fileno() >= 0)
"""


def test_what_lies_in_the_current_folder_is_not_imported(folder: Path) -> None:
    """A server for Manager, its upgrade and the private server all run as the caller's user."""
    (folder / "program.py").write_text(PROGRAM)
    (trap := folder / "trap").mkdir()
    for name in NAMES:
        trace = f"open({str(folder / 'ran')!r}, 'a').write('{name} ')\n"
        (trap / f"{name}.py").write_text(f"{trace}raise ImportError\n")
    done = subprocess.run(
        [sys.executable, folder / "program.py"], cwd=trap, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")
    assert not (folder / "ran").exists(), (folder / "ran").read_text()
