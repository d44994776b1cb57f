"""The textbook's hand-over: send_fd, send_err and recv_fd over any connected UNIX socket.

Byte for byte what "Advanced Programming in the UNIX Environment" (Stevens, Rago; 17.4) does in C,
so that either end may be that program::

    any bytes, for people | NUL | status

Status 0: a descriptor rides along. 1 to 255: refused, and the bytes before the NUL say why; they
have no NUL themselves. The textbook's calls take and return these numbers as -1 to -255. Nothing
follows the status until the other side has answered, or the reader reads exactly up to the status,
as `recv_fd` does.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from fdshare.errors import InvalidArgument, ProtocolError, RemoteError, ServerGone
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, discard_all
from fdshare.kernel.descriptor import Descriptor, HasFileno
from fdshare.kernel.passing import peer_name, recv_fds, send_fds

__all__ = ["recv_fd", "send_err", "send_fd"]

MAXLINE: Final = 4096  # bytes looked at in one go; the textbook's constant
MAX_MESSAGE: Final = 1 << 20  # bytes of a refusal that are kept; the rest is read and dropped


def send_fd(conn: socket.socket, fd: HasFileno | int) -> None:
    """Send *fd* with the two bytes that say so: NUL, status 0.

    *fd* is borrowed for the call: it is safe to close it after it.
    Raises: as `send_fds`.

    >>> one, other = s_pipe()
    >>> with one, other, open(os.devnull) as file:
    ...     send_fd(one, file)
    ...     recv_fd(other).close()
    """
    send_fds(conn, [fd], b"\0\0")


def send_err(conn: socket.socket, status: int, message: str | BaseException) -> None:
    """Send a refusal: *message*, NUL, *status* (1 to 255, an errno for example).

    -1 to -255, as the textbook has it, is sent as the same byte as 1 to 255. An exception is sent
    as its type and text: `FileNotFoundError: ...`. A NUL in the text becomes a question mark.
    Raises: InvalidArgument: status; OSError of send(2).

    >>> one, other = s_pipe()
    >>> with one, other:
    ...     send_err(one, errno.EACCES, "not you")
    ...     other.recv(100)
    b'not you\\x00\\r'
    """
    if not 1 <= abs(status) <= 255:
        raise InvalidArgument(
            "status", f"{status} is not within 1 to 255 or -1 to -255; 0 means a descriptor"
        )
    if isinstance(message, BaseException):
        kind, reason = type(message).__name__, str(message)
        message = f"{kind}: {reason}" if reason else kind
    text = message.encode(errors="replace").replace(b"\0", b"?")
    send_fds(conn, (), text + bytes((0, abs(status))))


def recv_fd(conn: socket.socket, on_data: Callable[[bytes], object] | None = None) -> Descriptor:
    """The descriptor that the peer sent with `send_fd`, or its C original.

    Bytes before the NUL go to *on_data*, in pieces as they come. Exactly the bytes up to the status
    are read: what follows is the next one's. The caller owns the result, which is close-on-exec.

    Raises:
        RemoteError: the peer sent a status and a text.
        ServerGone: the connection ended before the status.
        ProtocolError: status 0 without a descriptor, or with more than one.
        DescriptorLimit: no descriptors free here; call again when there are.
        DescriptorRefused: a security module does not let this process have it.
        OSError, TimeoutError, BlockingIOError of recvmsg(2).

    >>> one, other = s_pipe()
    >>> with one, other:
    ...     send_err(one, errno.EACCES, "not you")
    ...     recv_fd(other)
    Traceback (most recent call last):
    fdshare.errors.RemoteError: not you
    """
    came: list[Descriptor] = []
    try:
        said, status = _read_status(conn, came, on_data)
        if status:
            raise RemoteError(status, said.decode(errors="replace"))
        if len(came) != 1:
            raise ProtocolError(f"status 0 came with {len(came)} descriptors instead of 1")
        return came.pop()
    finally:
        discard_all(came)


def _read_status(
    conn: socket.socket, came: list[Descriptor], on_data: Callable[[bytes], object] | None
) -> tuple[bytes, int]:
    """(the bytes before the NUL, the byte after it); descriptors are added to *came*."""
    said = bytearray()
    after_nul = False
    while True:
        size = _next_size(conn, after_nul)
        got = recv_fds(conn, size, MAX_DESCRIPTORS)
        came += got.descriptors
        data = got.data
        if not data:
            raise ServerGone(peer_name(conn), f"it closed the connection after {len(said)} bytes")
        if not after_nul:
            text, nul, data = data.partition(b"\0")
            after_nul = bool(nul)
            said += text[: MAX_MESSAGE - len(said)]
            if text and on_data is not None:
                on_data(text)
        if len(data) > 1:  # a record socket: one message, one hand-over
            raise ProtocolError(f"{len(data) - 1} bytes after the status")
        if data:
            return bytes(said), data[0]


def _next_size(conn: socket.socket, after_nul: bool) -> int:
    """How many bytes to read: up to the status at most, where the socket is a stream."""
    if conn.type != socket.SOCK_STREAM:
        return MAX_MESSAGE
    if after_nul:
        return 1
    # Without a control buffer a peek brings no descriptors, and waits as the read would.
    seen = conn.recv(MAXLINE, socket.MSG_PEEK)
    nul = seen.find(b"\0")
    if nul < 0:
        return max(1, len(seen))
    return min(nul + 2, len(seen))
