"""A client of the rendezvous for tests that have to misbehave."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.unix_address import sockaddr
from fdshare.protocol import messages as m
from fdshare.protocol.framing import Frame, Receiver, header


class Peer:
    """A client that says exactly what it is told to, and reads only when it is told to."""

    def __init__(self, address: str, *, hello: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        with sockaddr(address, exists=True) as name:
            self.sock.connect(name)
        self.receiver: Receiver[int] = Receiver()
        self.frames: list[Frame[int]] = []
        self.last_id = 0
        if hello:
            self.send(m.Hello(m.MAGIC, m.VERSION, ""), id=0)
            assert type(self.receive()[1]) is m.Welcome

    def frame(self, request: Any, count: int = 0, id: int | None = None) -> bytes:
        if id is None:
            self.last_id += 1
            id = self.last_id
        body = request if isinstance(request, bytes) else m.encode(request)
        return header(len(body), count, id) + body

    def send(self, request: Any, fds: Sequence[int] = (), id: int | None = None) -> int:
        """Sends a request, or a body, with *fds*; its id."""
        self.write(self.frame(request, len(fds), id), fds)
        return self.last_id if id is None else id

    def write(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends *data* with *fds* beside its first byte."""
        sent = socket.send_fds(self.sock, [data], list(fds)) if fds else 0
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def receive(self) -> tuple[int, Any, list[Descriptor]]:
        """(id, reply, descriptors) of the next frame; EOFError at the end."""
        while not self.frames:
            data, fds, flags, _ = socket.recv_fds(self.sock, 1 << 20, 253)
            if not data:
                raise EOFError
            assert not flags & socket.MSG_CTRUNC
            self.frames = self.receiver.feed(data, fds)
            assert self.receiver.failure is None, self.receiver.failure
        frame = self.frames.pop(0)
        return frame.id, m.decode_reply(frame.body), list(map(Descriptor, frame.descriptors))

    def ask(self, request: Any, fds: Sequence[int] = ()) -> Any:
        """The reply to *request*; descriptors that come with it are closed."""
        id = self.send(request, fds)
        while True:
            found, reply, descriptors = self.receive()
            for descriptor in descriptors:
                descriptor.close()
            if found == id:
                return reply

    def expelled(self) -> Any:
        """The reason that the server gave before it closed the door."""
        reason = None
        with suppress(EOFError, ConnectionResetError):
            while True:
                id, reply, _ = self.receive()
                if id == 0 and type(reply) is m.Refused:
                    reason = reply
        return reason

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
