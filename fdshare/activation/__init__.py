"""Service managers: take passed descriptors (LISTEN_FDS), report (sd_notify); and the other side.

A program calls `listen_fds()` and `notify("READY=1")`, under systemd or under `fdshare run`, which
speaks the same protocols.

FIRST is the number of the first descriptor that is passed, STORED the name of a stored one that
came without a name.
"""

from fdshare.activation.notify_socket import Notification, NotifySocket
from fdshare.activation.sd_listen_fds import (
    FIRST,
    STORED,
    check_fdname,
    child_environment,
    listen_fds,
    listen_fds_in_order,
    own_pidfd_id,
)
from fdshare.activation.sd_notify import barrier, notify, store, unstore, watchdog_seconds

__all__ = [
    "FIRST",
    "STORED",
    "Notification",
    "NotifySocket",
    "barrier",
    "check_fdname",
    "child_environment",
    "listen_fds",
    "listen_fds_in_order",
    "notify",
    "own_pidfd_id",
    "store",
    "unstore",
    "watchdog_seconds",
]
