"""A server as a child process, of `Manager.start()` for example; `main` runs in a new interpreter.

The owner has the other end of a control socket. It sends the settings, and is sent "ready" or the
error. When its end is closed, on purpose or because its process died, the server ends.
"""

from __future__ import annotations

import os
import signal
import socket
import struct

import msgspec

from fdshare.errors import FdshareError
from fdshare.protocol import messages as m
from fdshare.server import logs
from fdshare.server.failover.service_manager import leave_service
from fdshare.server.serve import serve
from fdshare.server.settings import Settings

__all__ = ["main", "read_message", "remove_folder", "send_message"]

_LENGTH = struct.Struct(">I")


def send_message(control: socket.socket, message: object) -> None:
    """Sends a Struct over the control socket."""
    body = msgspec.msgpack.encode(message)
    control.sendall(_LENGTH.pack(len(body)) + body)


def read_message(control: socket.socket) -> bytes:
    """The body of the next message; empty at the end of the stream."""
    with control.makefile("rb") as stream:
        start = stream.read(_LENGTH.size)
        return stream.read(_LENGTH.unpack(start)[0]) if len(start) == _LENGTH.size else b""


def main(fd: int, stderr: int) -> int:
    """Runs the server of the control socket *fd*: exit status 0, or 1 if it could not start. The
    owner is sent the error.

    *stderr* is the owner's, and from now on this process's too.
    """
    leave_service()  # the owner's end is reported by the owner
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by an owner, exec(3) keeps it so
    os.dup2(stderr, 2)
    os.close(stderr)
    with socket.socket(fileno=fd) as control:
        control.set_inheritable(False)
        return _serve(control)


def _serve(control: socket.socket) -> int:
    settings = msgspec.msgpack.decode(read_message(control), type=Settings)
    logs.configure(settings)

    def ready() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the owner's
        send_message(control, m.Done())

    try:
        serve(settings, ready, control=control)
    except FdshareError as error:
        send_message(control, m.refusal(error))
        return 1
    if settings.private:  # its owner may have been killed, and remove nothing
        remove_folder(os.path.dirname(settings.path))
    return 0


def remove_folder(folder: str) -> None:
    """Removes the private folder of a server that has ended."""
    for name in ("fdshare.sock.lock", "fdshare.sock"):
        try:
            os.unlink(os.path.join(folder, name))
        except FileNotFoundError:
            pass
    try:
        os.rmdir(folder)
    except OSError:
        pass
