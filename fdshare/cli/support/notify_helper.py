"""run --notify: a helper process that does for a program what a service manager would do.

The helper is a child of init. It owns the NOTIFY_SOCKET while the program lives: it forwards the
notifications of the program, and stores descriptors for it in the server.

    fdshare run ── exec ──> the program, same pid        NOTIFY_SOCKET
        └─ fork, fork ──> helper: pidfd of the program, ───┘  ── register ──> server
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import click

from fdshare.activation import Notification, NotifySocket, notify
from fdshare.cli.support.notify_store import Store, stored
from fdshare.cli.support.orphan import fork_orphan
from fdshare.cli.support.program_group import GRACE, end_group
from fdshare.errors import FdshareError
from fdshare.kernel.credentials import Credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_table import close_all_but
from fdshare.kernel.passing import send_fds
from fdshare.kernel.unix_address import is_abstract
from fdshare.printable import printable
from fdshare.server.failover.service_manager import ask_systemd, is_reported

if TYPE_CHECKING:
    from fdshare.cli.support.exec import Launch
    from fdshare.client.blocking.client import Client

__all__ = [
    "COMMITTED",
    "READY",
    "Helper",
    "notify_socket",
    "run_notified",
    "speaks_for_others",
    "take_ready_fd",
]

# What is forwarded to our own service manager, where there is one: it stores nothing, and its main
# process is the program.
_FORWARDED: Final = ("READY=", "RELOADING=", "STOPPING=", "STATUS=", "WATCHDOG=", "EXTEND_TIMEOUT_")
# What is said on the socket between the helper and who waits for the program.
READY: Final = b"R"
COMMITTED: Final = b"C"
_PREFIX: Final = "fdshare-notify-"  # of the folder of the socket
_LONGEST_ADDRESS: Final = 100  # bytes: sun_path is 108, less than that on some systems
_MOST_ANCESTORS: Final = 100


def run_notified(client: Client, launch: Launch, service: str, ready_fd: int | None) -> NoReturn:
    """Replaces this process with the program, which has a NOTIFY_SOCKET and what it stored."""
    take_ready_fd(ready_fd)
    launch.passed += stored(client, service)
    sock = notify_socket()
    launch.environment["NOTIFY_SOCKET"] = sock.address
    with Descriptor(os.pidfd_open(os.getpid())) as program:
        Helper(
            client,
            service,
            sock,
            program,
            os.getpid(),
            speaks=speaks_for_others(),
            ready_fd=ready_fd,
            stderr=launch.standard[2].fileno() if 2 in launch.standard else 2,
        ).fork()
    launch.execute()


def notify_socket() -> NotifySocket:
    """A socket that every program can reach: as short as the least sun_path, whatever TMPDIR is,
    for a program that changes its user, and without a folder where none can be written.

    The helper looks at the sender's credentials, and ignores strangers. The caller owns the result.
    """
    for parent in _folders():
        _remove_stale(parent)
        folder = ""
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            os.chmod(folder, 0o711)
            return NotifySocket(os.path.join(folder, "notify"), mode=0o666)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return NotifySocket(f"@{_PREFIX}{secrets.token_hex(8)}")


def _remove_stale(parent: str) -> None:
    """Removes the folders of this user whose socket nobody owns: of what was killed meanwhile."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(_PREFIX):
                continue
            # Others can write /tmp, and make a link of that name.
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                try:
                    sock.connect(os.path.join(entry.path, "notify"))
                except ConnectionRefusedError:
                    shutil.rmtree(entry.path, ignore_errors=True)
                except OSError:  # one that is being made has no socket yet
                    pass


def _folders() -> list[str]:
    """Where the folder of the socket may be, the first choice first."""
    first = ["/run"] if os.geteuid() == 0 else []
    folders = [*first, os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp"]
    return [f for f in folders if f[:1] == "/" and len(os.fsencode(f)) + 40 < _LONGEST_ADDRESS]


def speaks_for_others() -> bool:
    """Whether the helper may report as the program to our own service manager (unix(7),
    SCM_CREDENTIALS). Where it may not, says what the unit needs."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        try:
            send_fds(near, (), b".", credentials=Credentials(1, os.geteuid(), os.getegid()))
            return True
        except OSError:
            pass
    if is_reported() and ask_systemd("NotifyAccess").get("NotifyAccess") != "all":
        _warn("the reports of the program come from a helper: the unit needs NotifyAccess=all")
    return False


def take_ready_fd(number: int | None) -> None:
    """*number* is for the helper, not for the program. Raises: click.BadParameter."""
    if number is None:
        return
    try:
        os.set_inheritable(number, False)
    except OSError:
        raise click.BadParameter(f"descriptor {number} is not open", param_hint="--ready-fd")


@dataclass(slots=True)
class Helper:
    """The helper: all that it needs; it closes everything else.

    *says*: a socket on which it writes READY at READY=1. If its other end is closed before
    COMMITTED came, nobody waits for the program any more: the helper ends it.
    """

    client: Client
    service: str
    sock: NotifySocket
    program: Descriptor
    pid: int
    speaks: bool  # whether it reports as the program to our own service manager, or as itself
    says: Descriptor | None = None
    ready_fd: int | None = None
    stderr: int = 2

    def fork(self) -> None:
        """Starts it as a child of init, so that the program has no child that it did not start.

        Raises: OSError: it is not there.
        """
        if not fork_orphan():
            self.sock.abandon()
            return
        try:
            self._live()
        finally:
            os._exit(0)

    def _live(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it ends with the program
        os.dup2(self.stderr, 2)
        # Copies of what the program gets would keep that open after the program has closed it. The
        # objects that own the numbers do not close them a second time: this process ends by _exit.
        close_all_but(self._numbers())
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        try:
            self._run()
        except BaseException as error:
            _warn(f"the helper for notifications failed: {error!r}")
        finally:
            if not is_abstract(self.sock.address):
                shutil.rmtree(os.path.dirname(self.sock.address), ignore_errors=True)
            sys.stderr.flush()

    def _numbers(self) -> set[int]:
        """The numbers of the descriptors that it keeps."""
        kept = {self.sock.fileno(), self.program.fileno()}
        if self.says is not None:
            kept.add(self.says.fileno())
        return kept | ({self.ready_fd} if self.ready_fd is not None else set())

    def _run(self) -> None:
        """Handles notifications until the program has ended and none is left."""
        store = Store(self.client, self.service)
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLIN)
        poller.register(self.program.fileno(), select.POLLIN)
        if self.says is not None:
            poller.register(self.says.fileno(), select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self.sock.fileno() in ready:
                if self._receive(store) and self.says is not None:
                    with suppress(OSError):
                        os.write(self.says.fileno(), READY)
            elif self.program.fileno() in ready:
                return
            elif self.says is not None:
                poller.unregister(self.says.fileno())
                if not self._is_committed(self.says):
                    end_group(self.program, self.pid, GRACE, own=False)
                self.says = None

    def _receive(self, store: Store) -> bool:
        """Handles one notification; True if it says READY=1."""
        try:
            said = self.sock.receive()
        except OSError as error:  # no descriptor is free: the message stays, try again later
            _warn(str(error))
            select.poll().poll(100)
            return False
        if said is None:
            _warn("a malformed notification is ignored")
            return False
        try:
            if said.sender is not None and not self._is_heard(said.sender):
                _warn(f"a notification of uid {said.sender.uid} is ignored")
                return False
            self._forward(said)
            store.handle(said)
            return said.says("READY=1")
        except (FdshareError, OSError) as error:
            _warn(f"not stored: {error}")
            return said.says("READY=1")
        finally:
            # The sender of a barrier waits for this: all that it sent before is done.
            said.close()

    def _is_heard(self, sender: Credentials) -> bool:
        """Whether *sender* is root, this user, or the program, whatever user it has become."""
        if sender.uid in (0, os.geteuid()):
            return True
        pid = sender.pid
        for _ in range(_MOST_ANCESTORS):
            if pid <= 1:
                return False
            if pid == self.pid:
                return True
            pid = _parent(pid)
        return False

    def _forward(self, said: Notification) -> None:
        if said.says("READY=1") and self.ready_fd is not None:
            with suppress(OSError):
                os.write(self.ready_fd, b"\n")
                os.close(self.ready_fd)
            self.ready_fd = None
        lines = [line for line in said.lines if line.startswith(_FORWARDED)]
        if lines:
            notify("\n".join(lines), pid=self.pid if self.speaks else None, timeout=1.0)

    def _is_committed(self, says: Descriptor) -> bool:
        with says:
            try:
                return os.read(says.fileno(), 1) == COMMITTED
            except OSError:  # it was closed with something unread
                return False


def _parent(pid: int) -> int:
    """The parent of *pid*; 0 if that is not known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _warn(message: str) -> None:
    print(f"fdshare: {printable(message)}", file=sys.stderr, flush=True)
