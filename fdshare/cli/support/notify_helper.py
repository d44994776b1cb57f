"""run --notify: a helper process that does for a program what a service manager would do.

The helper is a child of init. It owns the NOTIFY_SOCKET while the program lives: it forwards the
notifications of the program, and stores descriptors for it in the server.

    fdshare run ── exec ──> the program, same pid        NOTIFY_SOCKET
        └─ fork, fork ──> helper: pidfd of the program, ───┘  ── register ──> server

An entry under NAME/ with the metadata "fdstore" is one stored descriptor. When the program is
started again, LISTEN_FDS has them after the others, in the order in which they were stored.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import click

from fdshare.activation import STORED, Notification, NotifySocket, check_fdname, notify
from fdshare.cli.support.exec import NOT_FOUND
from fdshare.errors import FdshareError
from fdshare.kernel.ancillary import close_all, send_fds
from fdshare.kernel.credentials import Credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_table import close_all_but
from fdshare.kernel.open_file import same_open_file
from fdshare.protocol.names import literal
from fdshare.server.failover.service_manager import ask_systemd, is_reported

if TYPE_CHECKING:
    from fdshare.cli.support.exec import Launch
    from fdshare.client.blocking.client import Client

__all__ = ["Store", "run_notified", "stored"]

_MARK: Final = "fdstore"  # metadata of an entry: for which service it is stored ...
_FDNAME: Final = "fdname"  # ... and its name there
# What is forwarded to our own service manager, where there is one: it stores nothing, and its main
# process is the program.
_FORWARDED: Final = ("READY=", "RELOADING=", "STOPPING=", "STATUS=", "WATCHDOG=", "EXTEND_TIMEOUT_")


def stored(client: Client, service: str) -> list[tuple[str, Descriptor]]:
    """(fdname, descriptor) of all that is stored for *service*, in the order of storing.

    The caller owns the result.
    """
    entries = [e for e in client.infos(f"{literal(service)}/*") if e.metadata.get(_MARK) == service]
    found: list[tuple[str, Descriptor]] = []
    try:
        for entry in sorted(entries, key=lambda entry: entry.generation):
            fdname = entry.metadata.get(_FDNAME, STORED)
            found += [(fdname, descriptor) for descriptor in client.fetch_raw(entry.name)]
    except BaseException:
        close_all(descriptor for _, descriptor in found)
        raise
    return found


class Store:
    """The descriptors that one service stores: FDSTORE=1, FDSTOREREMOVE=1."""

    def __init__(self, client: Client, service: str) -> None:
        self._client = client
        self._service = service

    def handle(self, said: Notification) -> None:
        """Stores or removes what *said* asks for. Raises: FdshareError: the server refuses."""
        name = said.value("FDNAME")
        if name is not None:
            try:
                check_fdname(name)
            except FdshareError as error:
                _warn(f"{error}; the name is ignored")
                name = None
        if said.says("FDSTOREREMOVE=1"):
            if name is None:
                _warn("FDSTOREREMOVE=1 without a name is ignored")
            else:
                self._remove(name)
        elif said.says("FDSTORE=1"):
            self._add(name or STORED, said.descriptors, poll=not said.says("FDPOLL=0"))

    def _add(self, fdname: str, descriptors: Sequence[Descriptor], *, poll: bool) -> None:
        held = stored(self._client, self._service)
        try:
            for descriptor in descriptors:
                # As systemd, keep one copy of what is sent twice.
                if not any(_same(descriptor, other) for _, other in held):
                    self._register(fdname, descriptor, poll)
        finally:
            close_all(descriptor for _, descriptor in held)

    def _register(self, fdname: str, descriptor: Descriptor, poll: bool) -> None:
        """Registers it under NAME/FDNAME; the next of that name under NAME/FDNAME:2.

        No FDNAME has a colon.
        """
        taken = set(self._client.names(f"{literal(self._service)}/*"))
        name, number = f"{self._service}/{fdname}", 1
        while name in taken:
            number += 1
            name = f"{self._service}/{fdname}:{number}"
        with _with_its_kind(descriptor) as obj:
            self._client.register(
                name,
                obj,
                drop_on_hangup=poll,
                metadata={_MARK: self._service, _FDNAME: fdname},
            )

    def _remove(self, fdname: str) -> None:
        for entry in self._client.infos(f"{literal(self._service)}/*"):
            if entry.metadata.get(_MARK) == self._service and entry.metadata[_FDNAME] == fdname:
                self._client.unregister(entry.name)


@contextmanager
def _with_its_kind(descriptor: Descriptor) -> Iterator[object]:
    """A socket if *descriptor* is one, so that others fetch a socket; else *descriptor* itself."""
    copy = descriptor.dup()
    try:
        sock = copy.socket()
    except OSError:
        copy.close()
        yield descriptor
        return
    with sock:
        yield sock


def _same(one: Descriptor, other: Descriptor) -> bool:
    here = os.getpid()
    same = same_open_file(here, one.fileno(), here, other.fileno())
    if same is not None:
        return same
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


# The program and its helper.


def run_notified(
    client: Client,
    launch: Launch,
    service: str,
    *,
    detach: bool,
    ready_fd: int | None,
    timeout: float,
) -> int:
    """Replaces this process with the program, which has a NOTIFY_SOCKET; does not return.

    With *detach* the program runs in the background instead. This returns 0 when it has said
    READY=1, and 1 if it ended before, or did not say it within *timeout* seconds and was ended.
    """
    if ready_fd is not None:
        _check_ready_fd(ready_fd)
    launch.passed += stored(client, service)
    said, says = map(Descriptor, os.pipe())  # "R" when it is ready; end of file when it has ended
    folder = tempfile.mkdtemp(prefix="fdshare-notify-")
    sock = NotifySocket(os.path.join(folder, "notify"))
    launch.environment["NOTIFY_SOCKET"] = sock.address
    passed_on = _speaks_for_others()
    if not detach:
        with Descriptor(os.pidfd_open(os.getpid())) as program:
            speaker = os.getpid() if passed_on else None
            _fork_helper(_Helper(client, service, sock, program, folder, says, ready_fd, speaker))
        launch.execute()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _leave_standard_streams()
        _execute(launch)
    with said, Descriptor(os.pidfd_open(pid)) as program:
        speaker = pid if passed_on else None
        _fork_helper(_Helper(client, service, sock, program, folder, says, ready_fd, speaker))
        says.close()
        return _wait_for_ready(pid, said, timeout)


def _speaks_for_others() -> bool:
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


def _check_ready_fd(number: int) -> None:
    try:
        os.set_inheritable(number, False)  # it is for the helper, not for the program
    except OSError:
        raise click.BadParameter(f"descriptor {number} is not open", param_hint="--ready-fd")


def _leave_standard_streams() -> None:
    """Gives the program an empty standard input, and standard error as standard output.

    `pid=$(fdshare run --detach ...)` would otherwise wait until the program has ended.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)


def _execute(launch: Launch) -> NoReturn:
    """Replaces the forked child with the program."""
    try:
        launch.execute()
    except BaseException as error:
        _warn(str(error))
    finally:
        os._exit(NOT_FOUND)


def _wait_for_ready(pid: int, said: Descriptor, timeout: float) -> int:
    waiting = select.poll()
    waiting.register(said.fileno(), select.POLLIN)
    ready = bool(waiting.poll(timeout * 1000)) and os.read(said.fileno(), 1) == b"R"
    if ready:
        print(pid, flush=True)
        return 0
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        _warn(
            f"the program ended with status {os.waitstatus_to_exitcode(status)} before it was ready"
        )
    else:
        _warn(f"the program was not ready within {timeout:g} s, and is ended")
        os.kill(pid, signal.SIGTERM)
    return 1


@dataclass(slots=True)
class _Helper:
    """The helper: all that it needs; it closes everything else."""

    client: Client
    service: str
    sock: NotifySocket
    program: Descriptor
    folder: str
    says: Descriptor
    ready_fd: int | None
    speaker: int | None  # as whom it reports to our own service manager; None: as itself

    def run(self) -> None:
        """Handles notifications until the program has ended and none is left."""
        store = Store(self.client, self.service)
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLIN)
        poller.register(self.program.fileno(), select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self.sock.fileno() in ready:
                self._receive(store)
            elif ready:
                return

    def _receive(self, store: Store) -> None:
        try:
            said = self.sock.receive()
        except OSError as error:  # no descriptor is free: the message stays, try again later
            _warn(str(error))
            select.poll().poll(100)
            return
        if said is None:
            _warn("a malformed notification is ignored")
            return
        try:
            if said.sender is not None and said.sender.uid not in (0, os.geteuid()):
                _warn(f"a notification of uid {said.sender.uid} is ignored")
                return
            self._forward(said)
            store.handle(said)
        except (FdshareError, OSError) as error:
            _warn(f"not stored: {error}")
        finally:
            # The sender of a barrier waits for this: all that it sent before is done.
            said.close()

    def _forward(self, said: Notification) -> None:
        if said.says("READY=1"):
            self._is_ready()
        lines = [line for line in said.lines if line.startswith(_FORWARDED)]
        if lines:
            notify("\n".join(lines), pid=self.speaker, timeout=1.0)

    def _is_ready(self) -> None:
        """Tells those who wait for READY=1, once."""
        if not self.says.closed:
            with suppress(OSError):
                os.write(self.says.fileno(), b"R")
            self.says.close()
        if self.ready_fd is not None:
            with suppress(OSError):
                os.write(self.ready_fd, b"\n")
                os.close(self.ready_fd)
            self.ready_fd = None

    def numbers(self) -> set[int]:
        """The numbers of the descriptors that it keeps."""
        kept = {self.sock.fileno(), self.program.fileno(), self.says.fileno()}
        return kept | ({self.ready_fd} if self.ready_fd is not None else set())


def _fork_helper(helper: _Helper) -> None:
    """Starts it as a child of init, so that the program has no child that it did not start."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        helper.sock.abandon()
        return
    try:
        os.setsid()
        if os.fork() == 0:
            _be_helper(helper)
    finally:
        os._exit(0)


def _be_helper(helper: _Helper) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the program
    # Copies of what the program gets would keep that open after the program has closed it. The
    # objects that own the numbers do not close them a second time: this process ends by _exit.
    close_all_but(helper.numbers())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    try:
        helper.run()
    except BaseException as error:
        _warn(f"the helper for notifications failed: {error!r}")
    finally:
        shutil.rmtree(helper.folder, ignore_errors=True)
        sys.stderr.flush()


def _warn(message: str) -> None:
    print(f"fdshare: {message}", file=sys.stderr, flush=True)
