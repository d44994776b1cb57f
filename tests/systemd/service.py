"""Inside the container: fdshare.service as it is shipped, and what its clients see of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from conftest import wait_until

import fdshare
from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError
from fdshare.protocol.messages import ServerStats

from .container import ROOT

UNITS: Final = Path("/etc/systemd/system")
SHIPPED: Final = ROOT / "contrib" / "systemd"
SOCKET: Final = "/run/fdshare.sock"
SERVE: Final = "/usr/bin/fdshare serve --fdstore"


def run(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A command, to its end."""
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout)


def systemctl(*words: str) -> str:
    """What it prints. Fails the test where it fails."""
    done = run("systemctl", *words)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def properties(unit: str, *names: str) -> dict[str, str]:
    """What systemd knows of *unit*."""
    lines = systemctl("show", unit, f"--property={','.join(names)}").splitlines()
    return dict(line.split("=", 1) for line in lines)


def journal(unit: str, lines: int) -> str:
    return run("journalctl", "-u", unit, "-b", "--no-pager", "-n", str(lines)).stdout


class Service:
    """fdshare.service and fdshare.socket, started by the first client."""

    def __init__(self) -> None:
        self._killed: set[int] = set()
        for unit in ("fdshare.service", "fdshare.socket"):
            shutil.copy(SHIPPED / unit, UNITS)
        self.reload()
        systemctl("start", "fdshare.socket")

    def dropin(self, service: str = "", *, unit: str = "", serve: str = "") -> None:
        """Adds lines to [Service], to [Unit], and to the command."""
        if serve:
            service += f"\nExecStart=\nExecStart={SERVE} {serve}"
        self.write("fdshare.service.d/test.conf", f"[Unit]\n{unit}\n[Service]\n{service}\n")

    def write(self, name: str, text: str) -> None:
        """A file among the units."""
        path = UNITS / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        self.reload()

    def reload(self) -> None:
        systemctl("daemon-reload")

    def restart(self) -> None:
        systemctl("restart", "fdshare.service")

    def remove(self) -> None:
        """Stops both, and leaves nothing of them."""
        run("systemctl", "stop", "fdshare.socket", "fdshare.service")
        run("systemctl", "reset-failed")
        for path in [*UNITS.glob("fdshare.*"), *UNITS.glob("example-web.*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.reload()

    # What systemd says.

    def property(self, name: str) -> str:
        return properties("fdshare.service", name)[name]

    def stored(self) -> int:
        """How many descriptors systemd holds for it."""
        return int(self.property("NFileDescriptorStore"))

    def log(self) -> str:
        return journal("fdshare.service", 200)

    # What clients see.

    def client(self, **options: Any) -> Client:
        return fdshare.connect(SOCKET, **{"timeout": 20, "reconnect": 20, **options})

    def stats(self) -> ServerStats:
        with self.client() as client:
            return client.stats()

    def names(self) -> list[str]:
        with self.client() as client:
            return sorted(client.names())

    def redundant(self) -> ServerStats:
        """The stats, when both halves hold everything, and systemd knows the keeper. A half that
        `kill` has just killed is there until the other one notices: it is waited for, too."""

        def settled() -> ServerStats | None:
            stats = self.stats()
            if not self._killed.isdisjoint((stats.server_pid, stats.keeper_pid)):
                return None
            known = self.property("MainPID") == str(stats.keeper_pid)
            return stats if stats.redundant and known else None

        try:
            return wait_until(settled, "both halves are there")
        except (AssertionError, FdshareError):
            raise AssertionError(f"no two halves:\n{self.log()}") from None

    def table(self) -> dict[str, dict[str, Any]]:
        """Every entry, with the identity of its descriptors; not what time changes."""
        with self.client() as client:
            found = {}
            for entry in client.infos():
                identities = []
                for descriptor in client.fetch_raw(entry.name):
                    with descriptor:
                        info = os.fstat(descriptor.fileno())
                        identities.append((info.st_dev, info.st_ino))
                found[entry.name] = {
                    "generation": entry.generation,
                    "kind": entry.kind,
                    "metadata": dict(entry.metadata),
                    "lifetime": entry.lifetime,
                    "grace": entry.grace,
                    "expires": entry.ttl is not None,
                    "drop_on_hangup": entry.drop_on_hangup,
                    "registrant": entry.registrant,
                    "descriptors": identities,
                }
            return found

    def memory(self, name: str, **options: Any) -> None:
        """Registers a memfd."""
        with self.client() as client, open(os.memfd_create(name), "rb") as file:
            client.register(name, file, **options)

    # How it dies.

    def kill(self, *halves: str) -> None:
        """kill -9 of "server", "keeper" or both, in the same instant."""
        stats = self.stats()
        pids = {"server": stats.server_pid, "keeper": stats.keeper_pid}
        killed = [pid for half in halves if (pid := pids[half]) is not None]
        self._killed = set(killed)
        if len(killed) > 1:
            for pid in killed:
                os.kill(pid, signal.SIGSTOP)  # neither sees the other die
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    def signal(self, number: int, half: str) -> None:
        """Sends it to "server" or "keeper"."""
        stats = self.stats()
        pid = stats.server_pid if half == "server" else stats.keeper_pid
        assert pid is not None
        os.kill(pid, number)

    def kill_both(self) -> None:
        """And waits until both are there again."""
        self.kill("keeper", "server")
        self.redundant()


class Knocker:
    """Connects to *listener* and to the rendezvous again and again; each failure is noted."""

    def __init__(self, listener: socket.socket) -> None:
        self.failures: list[str] = []
        self.connects = self.pings = 0
        self._listener = listener
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=[f]) for f in (self._tcp, self._ping)
        ]

    def _loop(self, knock: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                knock()
            except (OSError, FdshareError) as error:
                self.failures.append(repr(error))

    def _tcp(self) -> None:
        with socket.create_connection(self._listener.getsockname(), timeout=20):
            self._listener.accept()[0].close()
        self.connects += 1

    def _ping(self) -> None:
        with fdshare.connect(SOCKET, timeout=20, reconnect=20) as client:
            client.ping()
        self.pings += 1

    def __enter__(self) -> Knocker:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.connects and self.pings, "the first answers")
        return self

    def __exit__(self, *exc: object) -> None:
        connects, pings = self.connects, self.pings
        wait_until(lambda: self.connects > connects and self.pings > pings, "answers afterwards")
        self._stop.set()
        for thread in self._threads:
            thread.join()
