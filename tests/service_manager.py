"""A service manager that the tests play: it keeps what a service stores, as systemd does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from commandline import Shell

from fdshare.activation import Notification, NotifySocket
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.open_file import same_open_file

START = """
import json, os, sys
names, numbers = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import fcntl
moved = [fcntl.fcntl(n, fcntl.F_DUPFD, 500) for n in numbers]
for at, number in enumerate(moved):
    os.dup2(number, 3 + at)
    os.close(number)
if names:
    os.environ.update(
        LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names), LISTEN_PID=str(os.getpid())
    )
os.execv(sys.executable, [sys.executable, "-m", "fdshare", "serve", *sys.argv[3:]])
"""


class Store:
    """What was stored, in order."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self.held: list[tuple[str, Descriptor]] = []

    def handle(self, said: Notification) -> None:
        """Does what *said* asks for, and closes what it does not keep."""
        name = said.value("FDNAME") or "stored"
        if said.says("FDSTOREREMOVE=1"):
            self.remove(name)
        elif said.says("FDSTORE=1"):
            while said.descriptors:
                self._add(name, said.descriptors.pop(0))
        said.close()

    def _add(self, name: str, descriptor: Descriptor) -> None:
        """As service_add_fd_store (src/core/service.c): without a word about what is dropped."""
        if len(self.held) >= self.limit or any(same(descriptor, d) for _, d in self.held):
            descriptor.close()
        else:
            self.held.append((name, descriptor))

    def remove(self, name: str) -> None:
        for kept, descriptor in self.held:
            if kept == name:
                descriptor.close()
        self.held = [(kept, d) for kept, d in self.held if kept != name]

    def names(self) -> list[str]:
        return sorted(name for name, _ in self.held)

    def close(self) -> None:
        for _, descriptor in self.held:
            descriptor.close()


def same(one: Descriptor, other: Descriptor) -> bool:
    here = os.getpid()
    return same_open_file(here, one.fileno(), here, other.fileno()) is True


class ServiceManager:
    """Hears what is said to `address` in a thread of its own, and stores what it is given."""

    def __init__(self, folder: Path) -> None:
        self.sock = NotifySocket(str(folder / "notify"))
        self.store = Store()
        self.said: list[str] = []
        self.ready = threading.Event()
        self.lock = threading.Lock()
        self._synced = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def names(self) -> list[str]:
        """Of what is stored, when all that was said by now is done."""
        self._synced.clear()
        self._say(b"SYNC=1")
        assert self._synced.wait(30)
        with self.lock:
            return self.store.names()

    def close(self) -> None:
        self._stop.set()
        self._say(b"STOP=1")
        self._thread.join()
        self.sock.close()
        self.store.close()

    def _say(self, what: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(what, self.sock.address)

    def _run(self) -> None:
        while not self._stop.is_set():
            said = self.sock.receive()
            assert said is not None
            self.said += said.lines
            with self.lock:
                self.store.handle(said)
            if said.says("READY=1"):
                self.ready.set()
            elif said.says("SYNC=1"):
                self._synced.set()


class Manager(ServiceManager):
    """Also starts `fdshare serve`, and passes what is stored to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shell = Shell(folder)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> None:
        """Starts the service with all that is stored, the last first as systemd does; returns when
        it is ready."""
        self.launch("--fdstore", *options)
        assert self.ready.wait(30)

    def launch(self, *options: str) -> subprocess.Popen[bytes]:
        """As `start`, and does not wait."""
        self.ready.clear()
        with self.lock:
            passed = list(reversed(self.store.held))
            numbers = [d.fileno() for _, d in passed]
            names = [name for name, _ in passed]
            command = [sys.executable, "-c", START, json.dumps(names), json.dumps(numbers)]
            process = subprocess.Popen(
                [*command, "--log-level", "warning", *options],
                env={
                    **self.shell.environment,
                    "NOTIFY_SOCKET": self.sock.address,
                    "FDSTORE": str(self.store.limit),
                },
                pass_fds=numbers,
            )
        self._processes.append(process)
        return process

    def kill_all(self) -> None:
        """kill -9 of both halves, as nearly at once as can be."""
        stats = self.shell.json("stats")
        pids = [stats["keeper_pid"], stats["server_pid"]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # neither sees the other die
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            if process.pid in pids:
                process.wait(30)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)
        super().close()
        self.shell.close()
