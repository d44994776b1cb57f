"""Endpoints with a name: listen, connect and datagram sockets on a path, and unnamed pairs.

Where bind(2) says "Address already in use", `listen` says what is there: a live server (its pid), a
dead one's socket (which it replaces), or a file that is not a socket (which it never touches).
path_lock.py has the rules.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from contextlib import nullcontext, suppress
from typing import Final

from fdshare.errors import EndpointError, NoServer, ServerTimeout
from fdshare.kernel.bound_path import Owner, bind_path
from fdshare.kernel.credentials import Credentials, peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.path_lock import (
    Inode,
    clear,
    is_lock,
    is_stale,
    live,
    lock,
    refuse_other_files,
    remove,
    unlock,
)
from fdshare.kernel.unix_address import (
    UnixAddress,
    absolute,
    file_type,
    is_abstract,
    sockaddr,
    trouble,
)

__all__ = [
    "Listener",
    "cli_conn",
    "connect",
    "datagram",
    "listen",
    "s_pipe",
    "serv_accept",
    "serv_listen",
]

BACKLOG: Final = 1024  # the kernel cuts it to net.core.somaxconn
_FIRST_WAIT: Final = 0.001  # seconds between tries on a full backlog, doubled each time ...
_LONGEST_WAIT: Final = 0.05  # ... up to this


class Listener:
    """Owns a bound socket, and PATH.lock where it took one.

    close() removes the path only while it is still our inode, and only in the process that made
    this object: a forked child that drops its copy leaves the path alone. To hand the endpoint to
    another process pass it `fileno()`, `lock_fileno()`, `address` and `inode`, and build a Listener
    of the four there.

    >>> with listen("s") as listener, connect("s"):
    ...     conn, who = listener.accept()
    ...     conn.close()
    >>> os.path.exists("s")
    False
    """

    def __init__(
        self,
        address: str,
        sock: socket.socket,
        lock: Descriptor | None = None,
        inode: Inode | None = None,
    ) -> None:
        """Takes *sock* and *lock* over. Without *inode* the path is never removed."""
        self.address = address
        self.socket = sock
        self.lock = lock
        self.inode = inode
        self._pid = os.getpid()

    @classmethod
    def adopt(cls, sock: socket.socket) -> Listener:
        """A Listener for a listening UNIX socket that somebody else bound (LISTEN_FDS).

        There is no lock, and the path is never removed: both are the binder's. Takes *sock* over.
        Raises: EndpointError: *sock* is not a listening UNIX socket; it is still the caller's.
        """
        if sock.family != socket.AF_UNIX:
            raise EndpointError(
                str(sock.getsockname()), "it is not a UNIX socket", errno.EAFNOSUPPORT
            )
        name = sock.getsockname()
        address = "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else name
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise EndpointError(address, "the inherited socket does not listen", errno.EINVAL)
        return cls(address, sock)

    def fileno(self) -> int:
        """The socket's descriptor; still owned by this object."""
        return self.socket.fileno()

    def lock_fileno(self) -> int | None:
        """The descriptor of PATH.lock, or None; still owned by this object."""
        return None if self.lock is None else self.lock.fileno()

    def accept(self) -> tuple[socket.socket, Credentials]:
        """The next connection and the credentials of who made it, from the kernel.

        The caller owns the result. Raises: OSError of accept(2).
        """
        connection, _ = self.socket.accept()
        try:
            return connection, peer_credentials(connection)
        except BaseException:
            connection.close()
            raise

    def detach(self) -> tuple[socket.socket, Descriptor | None]:
        """The socket and the lock, which the caller owns now; the path stays."""
        lock, self.lock, self.inode = self.lock, None, None
        return socket.socket(fileno=self.socket.detach()), lock

    def bind_anew(
        self, *, mode: int, backlog: int, owner: Owner | None = None, reclaim: bool = False
    ) -> bool:
        """Whether a new socket is bound to the path now, because nothing was there any more.

        It takes the place of `socket`; other processes that have the old one keep it. With
        *reclaim* it is bound also in the place of another's at which nobody listens. The other
        arguments are those of `listen`. A path that is not ours to remove is not ours to bind
        either. Raises: as `listen`, OSError of socket(2); nothing has changed then.
        """
        if self.inode is None:
            return False
        if os.path.lexists(self.address) and not (
            reclaim and is_stale(self.address, self.socket.type, self.inode)
        ):
            return False
        sock = socket.socket(socket.AF_UNIX, self.socket.type)
        try:
            # Whoever removed the path may have removed the lock: it excludes nobody any more.
            held = (
                None
                if self.lock is None or is_lock(self.address, self.lock)
                else lock(self.address)
            )
            try:
                clear(self.address, self.socket.type, reclaim)
                inode = bind_path(self.address, sock, mode, owner)
                _start(sock, backlog)
            except BaseException:
                if held is not None:
                    held.close()
                raise
        except BaseException:
            sock.close()
            raise
        self.socket.close()
        self.socket, self.inode = sock, inode
        if held is not None and self.lock is not None:
            self.lock.close()
            self.lock = held
        return True

    def leave_path(self) -> None:
        """The path stays when this is closed: another process serves it on."""
        self.inode = None

    def close(self) -> None:
        """Removes the path if it is still ours, closes the socket, releases the lock."""
        inode = self.inode if self._pid == os.getpid() else None
        try:
            # Before the socket closes: until then its inode's number cannot be used again.
            if inode is not None:
                remove(self.address, inode)
        finally:
            self.inode = None
            self.socket.close()
            if self.lock is not None:
                if inode is not None:
                    unlock(self.lock)
                self.lock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Listener {self.address}{' closed' if self.socket.fileno() < 0 else ''}>"


def listen(
    path: UnixAddress,
    *,
    mode: int = 0o600,
    backlog: int = BACKLOG,
    kind: int = socket.SOCK_STREAM,
    reclaim: bool = True,
    locked: bool = True,
    owner: Owner | None = None,
) -> Listener:
    """A socket bound to *path* (a pathname, or `@name`), listening unless it is SOCK_DGRAM.

    A dead server's socket on the path is replaced, unless *reclaim* is false. *mode* is that of the
    file from its first moment on. Without *locked* there is no PATH.lock, which only *reclaim*
    needs. *owner* is the (uid, gid) that the file gets, -1 to keep one; nobody else may connect
    before. The caller owns the result.

    Raises:
        AddressInUse: a live server (`pid`), a stale socket and no *reclaim*, or another file.
        EndpointError: the folder is missing, not writable or not a directory; another user's lock;
            somebody replaced the file while it was bound; no right to change the owner.

    >>> with listen("s", mode=0o660) as listener:
    ...     oct(os.stat("s").st_mode)
    '0o140660'
    """
    address = absolute(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        if is_abstract(address):
            return _listen_abstract(address, sock, backlog)
        refuse_other_files(address)  # before PATH.lock is made beside something not ours
        with lock(address) if locked else nullcontext() as held:
            clear(address, kind, reclaim)
            inode = bind_path(address, sock, mode, owner)
            _start(sock, backlog)
            return Listener(address, sock, held and Descriptor(held.detach()), inode)
    except BaseException:
        sock.close()
        raise


def datagram(path: UnixAddress | None = None, *, mode: int = 0o600) -> Listener:
    """A datagram socket bound to a name of its own, to which answers can be sent.

    For a client: no lock, and nothing on *path* is ever replaced (a server's well-known name is
    for `listen(path, kind=SOCK_DGRAM)`). Without *path* the kernel chooses an abstract name
    (Linux). The caller owns the result. Raises: AddressInUse, EndpointError.

    >>> with datagram("one") as one, datagram("other") as other:
    ...     send_fds(one.socket, [], b"hello", address=other.address)
    ...     got = recv_fds(other.socket, 100, 0)
    ...     got.data, got.address == one.address
    (b'hello', True)
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        if path is None:
            absolute("@any")  # UnsupportedPlatform outside Linux
            sock.bind("")
            return Listener("@" + os.fsdecode(sock.getsockname()[1:]), sock)
        address = absolute(path)
        if is_abstract(address):
            return _listen_abstract(address, sock, 0)
        clear(address, socket.SOCK_DGRAM, reclaim=False)
        return Listener(address, sock, None, bind_path(address, sock, mode, None))
    except BaseException:
        sock.close()
        raise


def connect(
    path: UnixAddress, *, timeout: float | None = None, kind: int = socket.SOCK_STREAM
) -> socket.socket:
    """A blocking socket connected to the server at *path* (a pathname, or `@name`).

    It waits while the backlog is full, at most *timeout* seconds (None: without limit).
    The caller owns the result.

    Raises:
        NoServer: nothing is there, or its server died.
        ServerTimeout: the backlog stayed full.
        EndpointError: not a socket, no permission, a socket of another type.

    >>> with listen("s") as listener, connect("s", timeout=5) as conn:
    ...     os.path.basename(conn.getpeername())
    's'
    """
    address = absolute(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        # Not blocking: a blocking connect that a signal interrupts returns to Python as if done.
        sock.setblocking(False)
        with sockaddr(address, exists=True) as name:
            _connect_within(sock, address, name, timeout)
        sock.setblocking(True)
        return sock
    except OSError as error:
        sock.close()
        if isinstance(error, (EndpointError, ServerTimeout)):
            raise
        raise _unreachable(address, error) from None
    except BaseException:
        sock.close()
        raise


def s_pipe() -> tuple[socket.socket, socket.socket]:
    """A full-duplex pipe: two connected stream sockets that carry descriptors both ways.

    The caller owns the result.

    >>> one, other = s_pipe()
    >>> with one, other:
    ...     one.sendall(b"hello")
    ...     other.recv(100)
    b'hello'
    """
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


# The textbook's names, Stevens and Rago, "Advanced Programming in the UNIX Environment", 17.3.


def serv_listen(path: UnixAddress) -> Listener:
    """The Listener of `listen(path)`. The caller owns the result.

    >>> with serv_listen("s") as listener:
    ...     os.path.basename(listener.address)
    's'
    """
    return listen(path)


def serv_accept(listener: Listener) -> tuple[socket.socket, Credentials]:
    """The next connection, and the credentials of who made it, from the kernel.

    The caller owns the result.

    >>> with serv_listen("s") as listener, cli_conn("s"):
    ...     conn, who = serv_accept(listener)
    ...     conn.close()
    ...     who.pid == os.getpid()
    True
    """
    return listener.accept()


def cli_conn(path: UnixAddress) -> socket.socket:
    """A connection to the server at *path*, as `connect` makes it. The caller owns the result.

    >>> with serv_listen("s") as listener, cli_conn("s") as conn:
    ...     os.path.basename(conn.getpeername())
    's'
    """
    return connect(path)


def _listen_abstract(address: str, sock: socket.socket, backlog: int) -> Listener:
    """Bound and listening. No lock: the kernel frees an abstract name with its last socket."""
    with sockaddr(address, exists=False) as name:
        try:
            sock.bind(name)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise live(address, sock.type) from None
            raise trouble(address, error) from None
    _start(sock, backlog)
    return Listener(address, sock)


def _start(sock: socket.socket, backlog: int) -> None:
    if sock.type != socket.SOCK_DGRAM:
        sock.listen(backlog)


def _connect_within(sock: socket.socket, address: str, name: bytes, timeout: float | None) -> None:
    """connect(2), again and again while the backlog is full."""
    deadline = None if timeout is None else time.monotonic() + timeout
    wait = _FIRST_WAIT
    while True:
        try:
            sock.connect(name)
            return
        except BlockingIOError:
            # Full backlog: EAGAIN at once, and the socket never becomes writable for it.
            if deadline is not None and time.monotonic() >= deadline:
                raise ServerTimeout(address, timeout or 0) from None
        if deadline is not None:
            wait = min(wait, max(0.0, deadline - time.monotonic()))
        time.sleep(wait)
        wait = min(max(wait * 2, _FIRST_WAIT), _LONGEST_WAIT)


def _unreachable(address: str, error: OSError) -> EndpointError:
    """The error for a connect(2) that failed."""
    code = error.errno or errno.EIO
    if is_abstract(address) and code == errno.ECONNREFUSED:
        return NoServer(address, "no process listens on that abstract name", code)
    if code in (errno.ENOENT, errno.ENOTDIR):
        return NoServer(address, "there is no such file", code)
    if code == errno.ECONNREFUSED:
        with suppress(OSError):  # another server may have removed it since, to bind the path anew
            mode = os.stat(address).st_mode
            if not stat.S_ISSOCK(mode):
                return EndpointError(address, f"it is {file_type(mode)}, not a socket", code)
        return NoServer(address, "the process that bound the socket is gone", code)
    if code in (errno.EACCES, errno.EPERM):
        return EndpointError(address, _who_may_connect(address), code)
    if code == errno.EPROTOTYPE:
        return EndpointError(address, "the socket there is of another type", code)
    return EndpointError(address, error.strerror or str(error), code)


def _who_may_connect(address: str) -> str:
    me = f"uid {os.geteuid()} may not connect"
    try:
        found = os.stat(address)
    except OSError:
        return f"{me}: its folder cannot be searched"
    return (
        f"{me}: it belongs to uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}; "
        "connecting needs write permission"
    )
