"""Descriptor passing without a server: system calls about descriptors; no names, no protocol.

The calls of the textbook, the general pair `send_fds` and `recv_fds` (at most MAX_DESCRIPTORS with
one message), sockets on a path, and the credentials of the other end.
"""

from fdshare.kernel.ancillary import MAX_DESCRIPTORS, Received, close_all
from fdshare.kernel.credentials import (
    Credentials,
    enable_credentials,
    own_credentials,
    peer_credentials,
    peer_pidfd,
)
from fdshare.kernel.descriptor import Descriptor, HasFileno, borrow
from fdshare.kernel.endpoint import (
    Listener,
    cli_conn,
    connect,
    datagram,
    listen,
    s_pipe,
    serv_accept,
    serv_listen,
)
from fdshare.kernel.handoff import recv_fd, send_err, send_fd
from fdshare.kernel.passing import recv_fds, send_fds

__all__ = [
    # one descriptor, owned
    "Descriptor",
    "HasFileno",
    "borrow",
    "close_all",
    # the textbook's calls
    "s_pipe",
    "serv_listen",
    "serv_accept",
    "cli_conn",
    "send_fd",
    "send_err",
    "recv_fd",
    # the general pair
    "MAX_DESCRIPTORS",
    "Received",
    "send_fds",
    "recv_fds",
    # endpoints
    "Listener",
    "listen",
    "connect",
    "datagram",
    # who is there
    "Credentials",
    "enable_credentials",
    "own_credentials",
    "peer_credentials",
    "peer_pidfd",
]
