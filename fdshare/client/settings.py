"""What every client has: the address of its server, the uids it trusts, and its lifeline."""

from __future__ import annotations

import os
import socket
import sys
import time
from _thread import RLock  # threading imports more, and adds nothing to it
from collections.abc import Collection
from typing import Any

from fdshare.client.conversation import check_seconds
from fdshare.client.default_path import default_path
from fdshare.errors import (
    ClosedDescriptor,
    FdshareError,
    InvalidArgument,
    NoServer,
    UntrustedServer,
)
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.kernel.credentials import is_overflow_uid, peer_credentials
from fdshare.kernel.descriptor_limit import descriptor_limit, is_descriptor_limit
from fdshare.kernel.endpoint import connect as connect_socket
from fdshare.kernel.plain_socket import stream_pair
from fdshare.printable import printable
from fdshare.protocol.auth import checked_authkey

__all__ = ["BaseClient", "Dialer", "Lifeline", "Search"]


class BaseClient:
    """The settings of a client, which also are its pickle: it travels as its address."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        authkey: bytes | None = None,
        timeout: float | None = 30.0,
        reconnect: float = 2.0,
        trust: Collection[int] | None = None,
    ) -> None:
        if path is not None and not isinstance(path, str | os.PathLike):
            raise InvalidArgument(
                "path", f"{path!r} is not a path: a server listens on a UNIX socket, write its path"
            )
        if timeout is not None:
            check_seconds("timeout", timeout)
        check_seconds("reconnect", reconnect)
        if trust is not None and not isinstance(trust, Collection):
            raise InvalidArgument("trust", f"{trust!r} is no list of uids; write [{trust!r}]")
        self.address = default_path() if path is None else os.fspath(path)
        self.timeout = timeout
        self.reconnect = reconnect
        self._authkey = checked_authkey(authkey)
        self._trust = frozenset((0, os.geteuid()) if trust is None else trust)
        self._dialer = Dialer(self.address, self._trust)
        self._closed = False

    def __bool__(self) -> bool:
        return True  # an empty server is still one

    def __repr__(self) -> str:
        return printable(f"<{type(self).__name__} of {self.address}{self._state()}>")

    def _state(self) -> str:
        """What is not as usual, for repr()."""
        return " closed" if self._closed else ""

    def __getstate__(self) -> dict[str, Any]:
        if self._authkey is not None and not _spawning():
            raise InvalidArgument(
                "authkey", "a client with one is pickled only while a child is spawned"
            )
        return {
            "path": self.address,
            "authkey": self._authkey,
            "timeout": self.timeout,
            "reconnect": self.reconnect,
            "trust": self._trust,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("path"), **state)  # type: ignore[misc]


class Dialer:
    """Makes the connections of a client, and knows whether there ever was a server."""

    def __init__(self, address: str, trust: Collection[int]) -> None:
        self.address = address
        self._trust = trust
        self.reached = False  # a connection was made, perhaps long ago

    def dial(self, timeout: float | None) -> socket.socket:
        """A blocking socket connected to a server that is trusted. The caller owns the result.

        Raises: UntrustedServer, NoServer, EndpointError; ServerTimeout: its backlog stayed full for
        *timeout* seconds; DescriptorLimit: this process's.
        """
        try:
            sock = connect_socket(self.address, timeout=timeout)
        except NoServer as error:
            # Only here is it known which program has to listen there.
            advice = f"start one with: fdshare serve {self.address}"
            raise NoServer(error.address, error.reason, error.errno, advice) from None
        except OSError as error:
            if isinstance(error, FdshareError) or not is_descriptor_limit(error):
                raise
            raise descriptor_limit(error.errno, "client") from None
        try:
            who = peer_credentials(sock)
            if is_overflow_uid(who.uid):
                reason = "as every user is shown that has no number in this user namespace"
                raise UntrustedServer(self.address, who.uid, reason)
            if who.uid not in self._trust:
                raise UntrustedServer(self.address, who.uid)
        except BaseException:
            sock.close()
            raise
        self.reached = True
        return sock


class Search:
    """How long a server that was lost is looked for: *seconds* from the moment it was missed. If
    it answers in between, the time starts again, however often it dies."""

    __slots__ = ("_found_at", "_until", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until: float | None = None
        self._found_at = 0.0

    def found(self) -> None:
        """A connection was made."""
        self._found_at = time.monotonic()

    def answered(self) -> None:
        """The server said something on the connection that was made."""
        self._until = None

    def missed(self) -> bool:
        """There is no server, or the connection ended. True where it is time to give up."""
        now = time.monotonic()
        # A connection that held for a while: the server is not one that dies again and again.
        if self._until is None or (self._found_at and now - self._found_at > self.seconds):
            self._until = now + self.seconds
        self._found_at = 0.0
        return now >= self._until


class Lifeline:
    """A socket pair: the server gets one end with each entry of lifetime "connection", and keeps
    the entry as long as the other end is open.

    The server sees it closed when the last copy of our end is, so a forked child closes its copy at
    once.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # a signal's handler may close it during a call of ours
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._closed = False
        forget_after_fork(self)

    def end(self) -> int:
        """The number of the server's end, made at the first call; still owned by this object.

        Raises: ClosedDescriptor; DescriptorLimit.
        """
        with self._lock:
            if self._ends is None and not self._closed:
                try:
                    self._ends = stream_pair()
                except OSError as error:
                    if not is_descriptor_limit(error):
                        raise
                    raise descriptor_limit(error.errno, "client") from None
            if self._closed:  # perhaps since it was made
                self._close_ends()
            ends = self._ends
            if ends is None:
                raise ClosedDescriptor("the client is closed")
            return ends[1].fileno()

    def hand_over(self) -> socket.socket:
        """Our end, for entries that are registered: they live as long as it is open, and it hangs
        up when the last of them is gone. The next entry gets another pair. The caller owns the
        result. Raises: as `end`."""
        with self._lock:
            self.end()
            ends, self._ends = self._ends, None
        if ends is None:  # a signal's handler has closed it
            raise ClosedDescriptor("the client is closed")
        ends[1].close()
        return ends[0]

    def close(self) -> None:
        """Ends the lifetime of the entries; there is no other end after it."""
        self._closed = True
        self._close_ends()

    def _close_ends(self) -> None:
        with self._lock:
            ends, self._ends = self._ends, None
        for end in ends or ():
            end.close()

    def _after_fork(self) -> None:
        self._lock = RLock()  # another thread of the parent may have held it
        self._close_ends()


def _spawning() -> bool:
    """True while multiprocessing, of either family, pickles for a child."""
    for family in ("multiprocessing", "multiprocess"):
        context = sys.modules.get(f"{family}.context")
        if context is not None and context.get_spawning_popen() is not None:
            return True
    return False
