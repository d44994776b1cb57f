"""Runs a server as its settings say: it listens, reports that it is ready, serves, and cleans up.

The command line and `Manager.start()` both start a server here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from fdshare.errors import PolicyError, UnsupportedPlatform
from fdshare.kernel.descriptor_limit import raise_descriptor_limit
from fdshare.kernel.endpoint import Listener, listen
from fdshare.kernel.imports import import_all
from fdshare.server.core.table import Table
from fdshare.server.failover.fd_store import FdStore
from fdshare.server.failover.halves import run_keeper
from fdshare.server.failover.holdings import Holdings, bind_anew
from fdshare.server.failover.labels import MOST
from fdshare.server.failover.service_manager import Watchdog, report
from fdshare.server.limits import Limits
from fdshare.server.loop.page import new_page
from fdshare.server.loop.poller import READ
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings, read_policy

__all__ = ["serve"]

log = logging.getLogger("fdshare.server")


def serve(
    settings: Settings,
    ready: Callable[[], None],
    listener: Listener | None = None,
    control: socket.socket | None = None,
    *,
    fdstore: FdStore | None = None,
    table: Table | None = None,
) -> None:
    """Serves until SIGTERM, SIGINT, a shutdown request or the end of *control*; in the main thread.

    *ready* is called once clients can connect. *listener*, which is taken over, replaces
    `settings.path`. *control* is borrowed. With a keeper, *fdstore* keeps the table in the service
    manager's store, and *table* is what was restored from it: then a faulty policy is no reason not
    to start.
    Raises: AddressInUse, EndpointError, PolicyError, InvalidArgument; UnsupportedPlatform: there is
    no /proc for a keeper.
    """
    settings.refuse_what_cannot_be_sent()  # they may have been changed since they were made
    if settings.keeper and not os.path.exists("/proc/self/fdinfo"):
        # What lists its descriptors for a process that is to have few, and names a pidfd's process.
        raise UnsupportedPlatform(
            "a keeper", "no /proc: mount it, or ask for a server alone (--no-keeper, keeper=False)"
        )
    import_all()
    limits = Limits.for_rlimit(raise_descriptor_limit(), **settings.limits)
    if fdstore is not None:
        # What a registration is told, in time: more than that would never be in the store.
        most = min(limits.max_descriptors, MOST)
        settings.limits = {"max_descriptors": most, **settings.limits}
    try:
        settings.policy_text = read_policy(settings)[1]
    except PolicyError:
        if table is None and not settings.closed:
            raise
        # A start that fails may be the end of what a service manager holds for us.
    bound = listener or listen(settings.path, mode=settings.mode, backlog=settings.backlog)
    if settings.keeper:
        table = Table() if table is None else table
        if fdstore is None:
            holdings = Holdings(settings, bound, table, os.urandom(8).hex(), control)
        else:
            holdings = Holdings(settings, bound, table, fdstore.epoch, control, fdstore.memfd)
            holdings.page = fdstore.page
        holdings.page = holdings.page or new_page()
        run_keeper(holdings, ready)
        return
    with bound:
        server = Server(bound.socket, settings)
        if control is not None:
            server.loop.poller.register(control.fileno(), READ, lambda events, now: server.stop())
        try:
            with _Signals(server, bound):
                ready()
                _feed(Watchdog(), server)
                server.run()
                report("STOPPING=1\nSTATUS=Ending")
        finally:
            server.shut_down()


def _feed(watchdog: Watchdog, server: Server) -> None:
    """Feeds *watchdog* from the server's loop, now and each time it is due."""
    watchdog.feed()
    if watchdog.due is not None:
        delay = watchdog.due - time.monotonic()
        server.loop.later(max(delay, 0.0), lambda now: _feed(watchdog, server))


class _Signals:
    """SIGTERM and SIGINT stop the server, SIGHUP reloads the policy and binds a path anew that is
    gone; the former handlers are restored at the end."""

    def __init__(self, server: Server, listener: Listener) -> None:
        self._server = server
        self._listener = listener
        self._former: dict[int, object] = {}
        self._former_wakeup = -1

    def __enter__(self) -> None:
        ours = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGHUP: self._reload}
        for number, handler in ours.items():
            self._former[number] = signal.signal(number, handler)
        # A handler in Python runs only after epoll_wait(2) returns, which is not interrupted by a
        # signal that came just before it, or to another thread.
        self._former_wakeup = self._server.loop.wake_on_signals()

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._former_wakeup)
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: object) -> None:
        self._server.stop()

    def _reload(self, number: int, frame: object) -> None:
        self._server.loop.post(self._reload_now)

    def _reload_now(self) -> None:
        self._server.try_to_reload()
        self._server.loop.acceptor.close()
        bind_anew(self._listener, self._server.settings)
        self._server.loop.acceptor.accept_at(self._listener.socket)
