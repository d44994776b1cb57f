"""Where new code begins, in processes that the old code of a keeper starts (upgrade.py)."""

from __future__ import annotations

import socket
import sys
from contextlib import nullcontext

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.imports import import_all
from fdshare.protocol import messages as m
from fdshare.server import logs
from fdshare.server.core.records import Record
from fdshare.server.failover.fd_store import FdStore
from fdshare.server.failover.halves import resume_keeper
from fdshare.server.failover.upgrade import adopt, read_handover
from fdshare.server.settings import policy_of

__all__ = ["resume", "try_table"]


def try_table(fd: int) -> int:
    """The trial, in a child of the old keeper: exit status 0 if this code can read the handover in
    *fd*. It has imported by now everything that a server needs."""
    try:
        import_all()
        handover = read_handover(fd)
        handover.table()
        if handover.fdstore is not None:
            FdStore(Descriptor(handover.fdstore))
        policy_of(handover.settings)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def resume(fd: int) -> int:
    """After the exec, in the process of the old keeper: runs a keeper; exit status 0."""
    import_all()
    handover = read_handover(fd)
    logs.configure(handover.settings)
    journal, server = socket.socket(fileno=handover.journal), Descriptor(handover.server)
    holdings = adopt(handover)
    if handover.session:
        done = Record([], handover.session, handover.id, m.encode(m.Done()))
        holdings.table.apply(done, [])
    with nullcontext() if holdings.control is None else holdings.control:
        resume_keeper(holdings, journal, server, handover.reloading)
    return 0
