"""The lives of the two processes of a server. Each forks the other when that is dead:

    keeper ── fork ──> server ── fork, if the keeper dies ──> keeper ── fork, if the server dies ...

A forked process closes every descriptor that its new life does not need. If it kept one copy of a
lease's other end, for example, the lease would never end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

from fdshare.errors import FdshareError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_table import close_all_but
from fdshare.server import logs
from fdshare.server.failover.fd_store import FdStore
from fdshare.server.failover.holdings import Holdings
from fdshare.server.failover.journal import Journal
from fdshare.server.failover.keeper import Keeper
from fdshare.server.failover.processes import SIGNALS, Forked, Life, live
from fdshare.server.failover.service_manager import announce_main_pid
from fdshare.server.failover.table_file import UnreadableTable
from fdshare.server.loop.server import Server

__all__ = ["resume_keeper", "run_keeper"]

log = logging.getLogger("fdshare.server")


def run_keeper(holdings: Holdings, ready: Callable[[], None]) -> None:
    """Runs a keeper, which forks a server; returns when both have been told to end, and have.
    *ready* is called once the server serves."""
    _live(Keeper(holdings, _become_server, ready).run)


def resume_keeper(
    holdings: Holdings, journal: socket.socket, server: Descriptor, reloading: bool
) -> None:
    """Runs a keeper of new code; *server* is of the old code, and is replaced. Takes both over.
    *reloading*: see Keeper."""
    keeper = Keeper(holdings, _become_server, journal=journal, server=server, reloading=reloading)
    _live(partial(keeper.run, relieve=True))


def _live(life: Life) -> None:
    """As `live`, for a process whose end the other half waits for: what goes wrong is logged, and
    not left to the interpreter, which would print it although perhaps nobody reads."""
    try:
        live(life)
    except FdshareError:  # nobody is served yet: it is told to whoever started the server
        raise
    except Exception:
        log.critical("the keeper failed", exc_info=True)
        raise SystemExit(1) from None


def _become_server(holdings: Holdings, half: Forked) -> Life | None:
    """In the forked child of a keeper: runs a server, until it is drained."""
    _start_clean(holdings, half)
    fdstore = _store_of(holdings)
    journal = Journal(half.journal, half.other, half.pid, fdstore)
    server = Server(
        holdings.listener.socket,
        holdings.settings,
        table=holdings.table,
        journal=journal,
        epoch=holdings.epoch,
        dying=holdings.dying,
        page=holdings.page,
    )
    server.take_over(holdings.unfinished)
    holdings.unfinished = []
    journal.attach(server)
    journal.hello()
    _hear_signals(journal, holdings)
    server.service.expect(time.monotonic())
    other = None
    while other is None and server.run():
        other = journal.replace_keeper()
    if other is None:
        server.service.slots.changed_all()  # who follows asks a successor, or finds none
        logs.flush()  # the end of the journal is a reason for the keeper to kill this process
        other = journal.stand_by()
    if other is not None:
        holdings.unfinished = server.abandon()
        return partial(_become_keeper, holdings, other)
    if journal.is_alone():
        holdings.take_listener()  # nobody else removes the path
    # The end of this process may hang: nobody must wait for what is closed by then.
    journal.close()
    holdings.listener.close()
    return None


def _hear_signals(journal: Journal, holdings: Holdings) -> None:
    """The keeper obeys them. What a service manager or a terminal sends to both halves is noted
    besides, for the keeper may die of something else before it does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, journal.note_signal)
    if holdings.control is None:  # else the terminal's Ctrl-C is the owner's
        signal.signal(signal.SIGINT, journal.note_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _store_of(holdings: Holdings) -> FdStore | None:
    """The service manager's store, which holds what *holdings* do from now on."""
    if holdings.fdstore is None:
        return None
    limit = os.environ.get("FDSTORE")  # see store_state
    try:
        fdstore = FdStore(holdings.fdstore, int(limit) if limit else None, holdings.page)
    except (UnreadableTable, OSError) as error:
        log.error("nothing more goes to the store, whose table cannot be read: %s", error)
        return None
    fdstore.reconcile(holdings.table)
    return fdstore


def _become_keeper(holdings: Holdings, half: Forked) -> Life | None:
    """In the forked child of a server: runs a keeper, until it is told to end."""
    _start_clean(holdings, half)
    holdings.take_listener()
    announce_main_pid()
    return Keeper(holdings, _become_server, journal=half.journal, server=half.other).run()


def _start_clean(holdings: Holdings, half: Forked) -> None:
    close_all_but(holdings.descriptors() | {half.journal.fileno(), half.other.fileno()})
    holdings.forget_other_half()
