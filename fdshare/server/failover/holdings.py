"""Holdings: what both halves of a server hold, and what each hands to the next."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, field

from fdshare.errors import FdshareError
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kernel.endpoint import Listener
from fdshare.server.core.table import Table
from fdshare.server.settings import Settings

__all__ = ["Holdings", "bind_anew"]

log = logging.getLogger("fdshare.server")


@dataclass(slots=True)
class Holdings:
    """What outlives either half. *control* is a socket to the owner: its end is the server's end.
    *fdstore* is the memfd of the table in the service manager's store (fd_store.py), and *page* the
    one in which followers look (loop/page.py). *unfinished*: (number, owner) of what the other half
    had still to close. *dying*: processes that hang in their end, pid -> what it was: a half, or
    the trial of new code."""

    settings: Settings
    listener: Listener
    table: Table
    epoch: str
    control: socket.socket | None = None
    fdstore: Descriptor | None = None
    page: Descriptor | None = None
    unfinished: list[tuple[int, int]] = field(default_factory=list)
    dying: dict[int, str] = field(default_factory=dict)

    def descriptors(self) -> set[int]:
        """Every number that a new half must keep."""
        kept = {self.listener.fileno(), *(handle.fd for handle in self.table.handles())}
        kept.update(fd for fd, _ in self.unfinished)
        if (lock := self.listener.lock_fileno()) is not None:
            kept.add(lock)
        if self.control is not None:
            kept.add(self.control.fileno())
        if self.fdstore is not None:
            kept.add(self.fdstore.fileno())
        if self.page is not None:
            kept.add(self.page.fileno())
        return kept

    def forget_other_half(self) -> None:
        """In the forked process: the handles were watched and pinned in the other one."""
        for handle in self.table.handles():
            handle.key, handle.pins, handle.closing, handle.batch = None, 0, False, None
            handle.unsent = None

    def take_listener(self) -> None:
        """Makes this process the one that listens, as clients see it, and that removes the path.

        A Listener removes its path only in the process that made it, so it is made anew; and
        SO_PEERCRED of a listening socket is the process that called listen(2) last. One that
        another user handed to us stays his: clients believe root, not the user of a service.
        """
        address, inode = self.listener.address, self.listener.inode
        sock, lock = self.listener.detach()
        self.listener = Listener(address, sock, lock, inode)
        if peer_credentials(sock).uid == os.geteuid():
            sock.listen(self.settings.backlog)


def bind_anew(listener: Listener, settings: Settings, *, reclaim: bool = False) -> bool:
    """Whether the path of a server was gone and *listener* is bound to it again; what goes wrong is
    in the log. *reclaim*: also where another socket is there at which nobody listens."""
    try:
        bound = listener.bind_anew(
            mode=settings.mode,
            backlog=settings.backlog,
            owner=settings.owner,
            reclaim=reclaim,
        )
    except (FdshareError, OSError) as error:
        why = as_limit(error, "server")
        log.error("the path is gone and cannot be bound again: %s", why)
        return False
    if bound:
        log.warning("the path was gone and is bound again: %s", listener.address)
    elif _is_another(listener):
        log.warning(
            "something else is at %s, and stays; move it away, then send SIGHUP", listener.address
        )
    return bound


def _is_another(listener: Listener) -> bool:
    """Whether the path of *listener* leads to something else by now."""
    if listener.inode is None:
        return False
    try:
        found = os.stat(listener.address)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) != listener.inode
