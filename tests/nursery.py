"""fdshare as processes that are forked, not started, which takes a tenth of the time.

Run as a program it imports the command line and the server once, and forks what it is sent: the
process that `python -m fdshare`, or `python -c` with code that uses fdshare, is after its imports,
with its descriptors, environment, folder and parent. Its command line in /proc is the nursery's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import pkgutil
import platform
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import fdshare.manager
from fdshare.server.interpreter import fresh_interpreter

_LONGEST = 1 << 17  # bytes of a command with its environment
_MOST = 64  # descriptors of a command
_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())
_CLONE_PARENT = 0x8000
_ORDINARY = (None, None, None, -1, False, -1)  # group, groups, user, umask, session, process group

fresh = False  # whether to start all processes instead, as users do


class Nursery:
    """Forks processes that are children of this one."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            here = Path(__file__)
            code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem}; "
            self._process = subprocess.Popen(
                [*_interpreter(), "-c", f"{code}{here.stem}.nurse({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours

    def fork(
        self, args: list[str], env: dict[str, str] | None, cwd: str | None, fds: dict[int, int]
    ) -> int:
        """The pid of a process that is what *args* would start; 0 if there is none to be had.

        *fds*: its descriptors, number there -> number here.
        """
        words = _words(args)
        if not words or os.getpid() != self._owner:  # a fork of this process has no part in it
            return 0
        env = dict(os.environ if env is None else env)
        data = {"words": words, "env": env, "cwd": str(cwd or os.getcwd()), "fds": [*fds]}
        asked = json.dumps(data).encode()
        if len(asked) > _LONGEST:
            return 0
        with self._lock:
            socket.send_fds(self._socket, [asked], list(fds.values()))
            return int(self._socket.recv(64))

    def close(self) -> None:
        if os.getpid() == self._owner:
            self._socket.close()
            self._process.wait()


@functools.cache
def nursery() -> Nursery:
    """This process's; ask for it before a test counts descriptors."""
    made = Nursery()
    atexit.register(made.close)
    return made


class Process(subprocess.Popen[Any]):
    """`subprocess.Popen`, forked from the nursery where nothing special is asked for."""

    def _execute_child(
        self,
        args: list[str],
        executable: str | None,
        preexec_fn: object,
        close_fds: bool,
        pass_fds: tuple[int, ...],
        cwd: str | None,
        env: dict[str, str] | None,
        startupinfo: object,
        creationflags: int,
        shell: bool,
        *others: Any,
    ) -> None:
        pipes, restore_signals, special = others[:6], others[6], others[7:]
        ordinary = (preexec_fn, close_fds, shell, restore_signals) == (None, True, False, True)
        if ordinary and special == _ORDINARY and not fresh:
            standard = {0: pipes[0], 1: pipes[3], 2: pipes[5]}
            fds = {number: number if fd == -1 else fd for number, fd in standard.items()}
            fds.update((fd, fd) for fd in pass_fds)
            self.pid = nursery().fork(args, env, cwd, fds)
            if self.pid:
                self._child_created = True
                self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
                return
        super()._execute_child(  # type: ignore[misc]
            args,
            executable,
            preexec_fn,
            close_fds,
            pass_fds,
            cwd,
            env,
            startupinfo,
            creationflags,
            shell,
            *others,
        )


class Manager(fdshare.manager.Manager):
    """A Manager like any other, whose `start` forks its server from the nursery."""

    def _launch(self, control: int, stderr: int) -> subprocess.Popen[bytes]:
        return Process(
            fresh_interpreter("fdshare.server.child", f"main({control}, {stderr})"),
            pass_fds=[control, stderr],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )


def _interpreter() -> list[str]:
    """This interpreter, with its flags."""
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def _words(args: list[str]) -> list[str]:
    """What the nursery knows to run: the command line without interpreter and options."""
    for interpreter in ([sys.executable], _interpreter()) if _CLONE else ():
        start, words = args[: len(interpreter)], args[len(interpreter) :]
        if words[:1] == ["-P"]:  # as fresh_interpreter() says; what is imported is imported
            del words[0]
        if start == interpreter and words[:1] == ["-c"]:
            return words
        if start == interpreter and words[:2] == ["-m", "fdshare"]:
            return words[1:]
    return []


# The nursery's own process.


def nurse(number: int) -> None:
    """Forks what is asked for, until the other end is closed."""
    for name in ("fdshare.cli", "fdshare.server"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    for name in ("rich.console", "rich.table", "rich.live", "rich.text"):
        importlib.import_module(name)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for pytest
    gc.freeze()
    with socket.socket(fileno=number) as asking:
        asking.set_inheritable(False)
        while True:
            data, fds, _, _ = socket.recv_fds(asking, _LONGEST, _MOST)
            if not data:
                return
            pid = fork_for_parent()
            if pid == 0:
                asking.close()
                signal.signal(signal.SIGINT, interrupt)
                become(json.loads(data), fds)
            for fd in fds:
                os.close(fd)
            asking.send(b"%d" % max(pid, 0))


def fork_for_parent() -> int:
    """fork(2) of a process that is not this one's child, but its parent's, who can wait for it.
    Negative where the kernel refuses."""
    clone = ctypes.pythonapi.syscall
    clone.argtypes, clone.restype = [ctypes.c_long] * 6, ctypes.c_long
    ctypes.pythonapi.PyOS_BeforeFork()
    pid: int = clone(_CLONE, _CLONE_PARENT, 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid


def become(asked: dict[str, Any], fds: list[int]) -> NoReturn:
    """This process is what was asked for, from here on."""
    close_libffi()
    place(fds, asked["fds"])
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["words"]
    # The nursery's believes that it can seek, or not, as the file could that it was opened for.
    sys.stdout = open(1, "w", closefd=False)
    try:
        run()
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise  # what the interpreter prints
        status = error.code or 0
    else:
        status = 0
    end(status)


def run() -> None:
    """What sys.argv says, as the program of this process."""
    if sys.argv[0] == "-c":
        sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        exec(sys.argv.pop(1), {"__name__": "__main__"})
        return
    from fdshare.__main__ import main

    sys.exit(main())


def end(status: int) -> NoReturn:
    """Ends as an interpreter does, but for the modules: to take hundreds of them apart, in memory
    that is shared with the nursery until it is written to, is six times the work of a process that
    does nothing else."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        sys.exit(status)  # the interpreter fails to, too, says so, and has another status
    os._exit(status)


def close_libffi() -> None:
    """Closes what ctypes has open, which this file imports and many a process does not: libffi 3.5
    and newer keep their own file open, to map trampolines of it."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "libffi" in os.readlink(f"/proc/self/fd/{number}"):
                os.close(int(number))


def place(fds: list[int], numbers: list[int]) -> None:
    """Gives the descriptors *fds* these *numbers*."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(above, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
