"""Manager: a rendezvous server and a client of it, shaped like multiprocessing's BaseManager.

The first module that knows both sides. `Manager(path).start()` runs a server for as long as its
owner lives, `Manager(path).connect()` finds one that runs, `Manager(path).get_server()` is one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Collection
from typing import Final, Self

from fdshare.client.blocking.client import Client
from fdshare.client.blocking.connection import BlockingConnection
from fdshare.client.conversation import Exchange, WholeAnswer
from fdshare.errors import (
    EndpointError,
    FdshareError,
    InvalidArgument,
    NoServer,
    ServerGone,
)
from fdshare.kernel.borrowed_socket import import_ctypes
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import Listener, listen
from fdshare.kernel.plain_socket import above_standard, stream_pair
from fdshare.kernel.process_limit import why_not_forked
from fdshare.protocol import messages as m
from fdshare.protocol.auth import checked_authkey
from fdshare.server.child import read_message, remove_folder, send_message
from fdshare.server.interpreter import fresh_interpreter
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings

__all__ = ["Manager", "ManagedServer"]

log = logging.getLogger("fdshare.server")

_GRACE: Final = 5.0  # seconds a server gets to end by itself, and after it was killed


class Manager(Client):
    """Every verb of `Client`, and the server: it starts one, finds one, or is one.

    Without a *path* the server listens in a new private folder. *keeper*: run a second process, so
    that `kill -9` of either loses nothing. *mode* is that of the socket's file. *limits*: fields of
    `Limits` by name. *policy*: a TOML file. *authkey* as BaseManager's. As a context manager it
    starts the server and shuts it down, unless it was connected before: then it only closes its
    connections.

    >>> with fdshare.Manager() as manager, open(os.devnull) as file:
    ...     manager["null"] = file
    ...     with manager["null"] as again:
    ...         again.name
    '/dev/null'
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        authkey: bytes | None = None,
        *,
        keeper: bool = True,
        mode: int = 0o600,
        limits: dict[str, float | int] | None = None,
        policy: str | os.PathLike[str] | None = None,
        timeout: float | None = 30.0,
        reconnect: float = 2.0,
        trust: Collection[int] | None = None,
    ) -> None:
        self._folder: str | None = None
        checked_authkey(authkey)  # before there is a folder
        if path is None:
            # Made when the server starts: who is killed before leaves none.
            name = f"fdshare-{secrets.token_hex(4)}"
            self._folder = os.path.join(tempfile.gettempdir(), name)
            path = os.path.join(self._folder, "fdshare.sock")
        super().__init__(path, authkey=authkey, timeout=timeout, reconnect=reconnect, trust=trust)
        self._settings = Settings(
            path=self.address,
            mode=mode,
            keeper=keeper,
            limits=limits or {},
            authkey=self._authkey,
            log_level="WARNING",
            policy=None if policy is None else os.fspath(policy),
            private=self._folder is not None,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._connected = False
        self._finalizer: weakref.finalize[..., Manager] | None = None

    def start(self) -> Self:
        """Itself, when the server has started in a process of its own, which ends with this one.

        Raises: AddressInUse, EndpointError, PolicyError; InvalidArgument: started already.

        >>> manager = fdshare.Manager().start()
        >>> manager.ping()
        >>> manager.shutdown()
        """
        if self._process is not None:
            raise InvalidArgument("start", "this manager's server has been started")
        self._make_folder()
        process, control = _spawn(self._settings, self._launch)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._process, self._control = process, control
        self._finalizer = weakref.finalize(self, _end, os.getpid(), process, control, self._folder)
        return self

    def _make_folder(self) -> None:
        """Makes the private folder, which goes with this object. Raises: EndpointError."""
        if self._folder is None or self._finalizer is not None:
            return
        try:
            os.mkdir(self._folder, 0o700)
        except OSError as error:
            raise EndpointError(self._folder, str(error.strerror), error.errno) from None
        self._finalizer = weakref.finalize(self, _end, os.getpid(), None, None, self._folder)

    def connect(self) -> Self:
        """Itself, when a server has answered at the address.

        Raises: NoServer and the others of `fdshare.connect`.

        >>> with fdshare.Manager() as manager:
        ...     with fdshare.Manager(manager.address).connect() as other:
        ...         other.names()
        []
        """
        self.ping()
        self._connected = True
        return self

    def get_server(self) -> ManagedServer:
        """A server to run in this process, listening from now on. The caller owns the result."""
        self._make_folder()
        return ManagedServer(self._settings)

    def shutdown(self) -> None:
        """Ends the server: the one that was started here, or else the one at the address."""
        if self._process is None:
            super().shutdown()
        elif self._finalizer is not None:
            self._finalizer()
        self.close()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the server that was started here, at most *timeout* seconds."""
        if self._process is None:
            raise InvalidArgument("join", "this manager has started no server")
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass

    def __enter__(self) -> Self:
        if self._process is None and not self._connected:
            self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is None:  # another's server, found by connect()
            self.close()
        else:
            self.shutdown()

    def _state(self) -> str:
        if self._closed or self._connected:
            return super()._state()
        return " not started" if self._process is None else f" pid {self._process.pid}"

    def _launch(self, control: int, stderr: int) -> subprocess.Popen[bytes]:
        """A process that begins to serve, told how over its copy of the socket *control*.

        Until it runs code of ours, what it says is why it does not; then *stderr* is its own.
        """
        return subprocess.Popen(
            fresh_interpreter("fdshare.server.child", f"main({control}, {stderr})"),
            pass_fds=[control, stderr],
            stdin=subprocess.DEVNULL,
            stdout=_standard_output(),
            stderr=subprocess.PIPE,
        )

    def _exchange(
        self, connection: BlockingConnection, exchange: Exchange, reconnect: float | None = None
    ) -> WholeAnswer:
        try:
            return super()._exchange(connection, exchange, reconnect)
        except NoServer as error:
            if self._process is not None or self._connected:
                raise
            reason = (
                f"{error.reason}, and this manager was not started: call start(), or use `with`"
            )
            raise NoServer(error.address, reason, error.errno) from None

    def _after_fork(self) -> None:
        super()._after_fork()
        if self._control is not None:  # with our copy open the server would outlive the parent
            self._control.close()


class ManagedServer:
    """A server in this process: `serve_forever()` until `stop()` or a client's shutdown."""

    def __repr__(self) -> str:
        return f"<ManagedServer {self.address}>"

    def __init__(self, settings: Settings) -> None:
        import_ctypes()
        self._listener: Listener = listen(settings.path, mode=settings.mode)
        try:
            self._server = Server(self._listener.socket, settings)
        except BaseException:
            self._listener.close()
            raise
        self.address = self._listener.address

    def serve_forever(self) -> None:
        """Serves until it is stopped, then closes everything that it holds."""
        try:
            self._server.run()
        finally:
            self.close()

    def stop(self) -> None:
        """Makes `serve_forever` return; from any thread, or a signal handler."""
        self._server.stop()

    def close(self) -> None:
        """Ends a server that is not serving."""
        if self._listener.fileno() >= 0:
            self._server.shut_down()
            self._listener.close()


def _spawn(
    settings: Settings, launch: Callable[[int, int], subprocess.Popen[bytes]]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A server process that is ready, and its control socket."""
    process: subprocess.Popen[bytes] | None = None
    ours, theirs, stderr = _passed()
    try:
        with theirs, stderr:
            try:
                process = launch(theirs.fileno(), stderr.fileno())
            except BlockingIOError as error:
                why = why_not_forked(error)
                raise FdshareError(f"no server can be started: {why}") from None
        try:
            send_message(ours, settings)
            said = read_message(ours)
        except ConnectionError:
            said = b""
        _, last_words = process.communicate() if not said else (None, b"")
        if not said:
            why = last_words.decode(errors="replace").strip().rpartition("\n")[2]
            status = f"its process ended with status {process.returncode}"
            raise ServerGone(settings.path, f"{status}: {why}" if why else status)
        assert process.stderr is not None
        process.stderr.close()
        reply = m.decode_reply(said)
        if type(reply) is m.Refused:
            process.wait()
            raise m.refusal_error(reply)
        return process, ours
    except BaseException:
        ours.close()
        if process is not None:
            process.kill()
            process.wait()
        raise


def _passed() -> tuple[socket.socket, socket.socket, Descriptor]:
    """Our end of a new control socket, and what the server is passed: the other end, and a
    duplicate of descriptor 2. None has the number of a standard stream that is closed here: the
    server ends when it reads something from our end, and has streams of its own.
    """
    stderr = _standard_error()  # first: one end may get number 2
    try:
        ours, theirs = map(above_standard, stream_pair())
    except BaseException:
        stderr.close()
        raise
    return ours, theirs, stderr


def _standard_output() -> int | None:
    """None, which is descriptor 1; or the null device where that is closed: what the server opens
    next would get its number."""
    try:
        os.fstat(1)
    except OSError:
        return subprocess.DEVNULL
    return None


def _standard_error() -> Descriptor:
    """A duplicate of descriptor 2, or of the null device where that is closed."""
    try:
        return Descriptor(fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3))
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    with Descriptor(os.open(os.devnull, os.O_WRONLY)) as null:
        return Descriptor(fcntl.fcntl(null.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _end(
    owner: int,
    process: subprocess.Popen[bytes] | None,
    control: socket.socket | None,
    folder: str | None,
) -> None:
    """Ends the server with its owner; does nothing in a forked child."""
    if os.getpid() != owner:
        return
    if control is not None and process is not None:
        _wait_for_the_end(control, process)
    if folder is not None:
        remove_folder(folder)


def _wait_for_the_end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, and returns when every process of it has: the one that was started
    may be dead and followed by others, all of which hold the other end of *control*."""
    with control:
        try:
            control.shutdown(socket.SHUT_WR)
            control.settimeout(_GRACE)
            while control.recv(64):
                pass
        except OSError:  # a timeout, too
            process.kill()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        # Some file system does not answer when it closes what it held. Nobody can wait for that.
        log.warning("the server, pid %d, was killed, and hangs in its end", process.pid)
