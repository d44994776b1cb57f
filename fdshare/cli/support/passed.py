"""What a service manager passes to `fdshare serve`: a socket, and what it held meanwhile."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

import click

from fdshare.activation import listen_fds_in_order
from fdshare.errors import EndpointError
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import raise_descriptor_limit
from fdshare.kernel.endpoint import Listener
from fdshare.printable import printable
from fdshare.server.core.table import Table
from fdshare.server.failover.fd_store import FdStore, let_go
from fdshare.server.failover.labels import PAGE, TABLE, is_label
from fdshare.server.failover.service_manager import store_state
from fdshare.server.failover.table_file import UnreadableTable
from fdshare.server.loop.page import is_page
from fdshare.server.settings import Settings

__all__ = ["Passed"]


class Passed:
    """Takes over what LISTEN_FDS says. *listener* is None where no socket is among it."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self._tables: list[Descriptor] = []
        self._pages: list[Descriptor] = []
        self._held: dict[str, list[Descriptor]] = {}
        for name, descriptor in listen_fds_in_order():
            if name == TABLE:
                self._tables.append(descriptor)
            elif name == PAGE:
                self._pages.append(descriptor)
            elif is_label(name):
                self._held.setdefault(name, []).append(descriptor)
            else:
                with descriptor:
                    self._take_listener(name, descriptor)

    def _take_listener(self, name: str, descriptor: Descriptor) -> None:
        try:
            sock = descriptor.socket()
        except OSError:
            _warn(f"the descriptor {name!r} that was passed is no socket")
            return
        try:
            listener = Listener.adopt(sock)
        except EndpointError as error:
            sock.close()
            _warn(f"the socket {name!r} that was passed is not used: {error}")
            return
        if self.listener is None:
            self.listener = listener
        else:
            _warn(f"{listener.address} is not served: a server has one socket")
            listener.close()

    def restore(
        self, options: dict[str, Any], settings: Settings
    ) -> tuple[FdStore | None, Table | None]:
        """The store, and the table of the former start.

        If this code cannot read that, *settings* say that nobody is served, and it stays where it
        is: a start that fails may be the end of it.
        """
        if self._tables or options["fdstore"]:
            if not options["keeper"]:
                raise click.UsageError("--fdstore, and a table in the store, go with --keeper")
            if not os.environ.get("NOTIFY_SOCKET"):
                raise click.UsageError(
                    "--fdstore needs a service manager: NOTIFY_SOCKET is not set"
                )
        if self._tables:
            try:
                fdstore, table = self._restore()
                fdstore.page = self._take_page()
                return fdstore, table
            except UnreadableTable as error:
                settings.closed = (
                    f"the table in the service manager's store cannot be read: {error}. It stays "
                    "there for the code that wrote it: install that and restart the service"
                )
                return None, None
            finally:
                close_all([*self._tables, *self._pages])
                close_all(d for each in self._held.values() for d in each)
        for label, descriptors in self._held.items():
            _warn(f"a descriptor came back as {label}, and no table with it")
            close_all(descriptors)
            let_go(label)
        if self._pages:
            close_all(self._pages)
            let_go(PAGE)
        if not options["fdstore"]:
            return None, None
        return FdStore.new(secrets.token_hex(8), store_state().limit), None

    def _take_page(self) -> Descriptor | None:
        """The page in which the clients of the former start look, if it came back."""
        if len(self._pages) == 1 and is_page(self._pages[0]):
            return self._pages.pop()
        if self._pages:
            let_go(PAGE)
        return None

    def _restore(self) -> tuple[FdStore, Table]:
        """Raises: UnreadableTable."""
        if len(self._tables) > 1:
            _warn(f"{len(self._tables)} tables came back, the first one is used")
        raise_descriptor_limit()  # entries that share an open file have a number each
        fdstore = FdStore(self._tables[0], store_state().limit)
        del self._tables[0]  # it is the store's now
        held, self._held = self._held, {}
        return fdstore, fdstore.restore(held)


def _warn(message: str) -> None:
    print(f"fdshare: {printable(message)}", file=sys.stderr)
