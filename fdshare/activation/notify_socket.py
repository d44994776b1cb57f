"""The manager's side of sd_notify(3): the socket to which services report, and what they said."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Final, Self

from fdshare.errors import DescriptorRefused, FdshareError
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, close_all, discard_all
from fdshare.kernel.credentials import Credentials, enable_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import Listener, datagram
from fdshare.kernel.passing import recv_fds

__all__ = ["Notification", "NotifySocket"]

_MAX_NOTIFICATION: Final = 4096  # NOTIFY_BUFFER_MAX; systemd refuses what is longer


@dataclass(frozen=True, slots=True)
class Notification:
    """One datagram of a service: *lines* as sent, *sender* as the kernel says.

    The caller owns *descriptors*.
    """

    lines: list[str]
    descriptors: list[Descriptor] = field(default_factory=list)
    sender: Credentials | None = None

    def says(self, line: str) -> bool:
        """True if *line* ("READY=1") is among them."""
        return line in self.lines

    def value(self, key: str) -> str | None:
        """The value of the first KEY=, or None."""
        for line in self.lines:
            if line.startswith(f"{key}="):
                return line[len(key) + 1 :]
        return None

    @property
    def is_barrier(self) -> bool:
        """True for a BARRIER=1, which is alone and has one descriptor.

        Close it when all that came before is done.
        """
        return self.lines == ["BARRIER=1"] and len(self.descriptors) == 1

    def close(self) -> None:
        """Closes the descriptors that are still open."""
        close_all(self.descriptors)


class NotifySocket:
    """Owns a socket whose address is the NOTIFY_SOCKET of a child."""

    def __init__(self, path: str, *, mode: int = 0o600) -> None:
        """Binds *path* with *mode*, or `@name`. Raises: AddressInUse, EndpointError."""
        self._listener: Listener = datagram(path, mode=mode)
        enable_credentials(self._listener.socket)
        self.address = self._listener.address

    def fileno(self) -> int:
        """The number of the socket, readable when there is a notification."""
        return self._listener.fileno()

    def receive(self) -> Notification | None:
        """The next notification; None for one that systemd would not accept either.

        That is one that is too long, has a NUL or more than 253 descriptors, or is not UTF-8; or a
        security module refuses one of its descriptors.
        Blocks. The caller owns its descriptors.

        Raises: DescriptorLimit: no descriptor is free; the notification is still there.
        """
        try:
            got = recv_fds(self._listener.socket, _MAX_NOTIFICATION, MAX_DESCRIPTORS)
        except FdshareError as error:
            if isinstance(error, OSError) and not isinstance(error, DescriptorRefused):
                raise
            return None
        try:
            text = got.data.decode()
            if got.flags & socket.MSG_TRUNC or "\0" in text.rstrip("\0"):
                raise UnicodeError
        except UnicodeError:
            discard_all((got,))
            return None
        lines = [line for line in text.rstrip("\0").split("\n") if line]
        return Notification(lines, got.descriptors, got.credentials)

    def abandon(self) -> None:
        """Closes this process's copy, for a forked child that uses the other; the path stays."""
        sock, _ = self._listener.detach()
        sock.close()

    def close(self) -> None:
        """Closes the socket and removes its path."""
        self._listener.close()

    def __repr__(self) -> str:
        return f"<NotifySocket {self.address}{' closed' if self.fileno() < 0 else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
