"""transport: frames out, each with its own descriptors, however little the socket takes at once."""

from __future__ import annotations

import os
import socket

import anyio
import anyio.lowlevel
import pytest
from conftest import census

from fdshare.client.asynchronous.pending import Pending, PendingRequest
from fdshare.client.asynchronous.transport import Transport
from fdshare.client.conversation import Conversation, Exchange
from fdshare.client.settings import Search
from fdshare.errors import ClosedDescriptor, ProtocolError
from fdshare.kernel.passing import recv_fds
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header

Pair = tuple[socket.socket, socket.socket]


class Refused(list[tuple[Pending, Exception]]):
    def __call__(self, pending: Pending, error: Exception) -> None:
        self.append((pending, error))


def call(fds: tuple[int, ...] = ()) -> PendingRequest:
    return PendingRequest(1, Exchange(m.Ping(), fds), Search(1.0))


def queue(transport: Transport, data: bytes, pending: PendingRequest) -> None:
    transport.queue(data, pending.exchange.fds, pending)


def received(sock: socket.socket) -> list[tuple[bytes, int]]:
    """What is there to be read: bytes, and how many descriptors came with them."""
    sock.setblocking(False)
    got = []
    while True:
        try:
            with recv_fds(sock, 1 << 16, 10) as message:
                got.append((message.data, len(message.descriptors)))
        except BlockingIOError:
            return got


def test_descriptors_go_with_their_own_frame(pair: Pair, null: int) -> None:
    near, far = pair
    transport = Transport(near, Refused())
    first, second, third = call(), call((null, null)), call((null,))
    for data, pending in ((b"one", first), (b"two", second), (b"three", third)):
        queue(transport, data, pending)
    transport.flush()
    assert received(far) == [(b"onetwo", 2), (b"three", 1)]
    assert first.sent
    assert second.sent
    assert third.sent


def test_what_was_abandoned_before_it_was_sent_never_is(pair: Pair) -> None:
    near, far = pair
    transport = Transport(near, Refused())
    gone = call((-1,))  # its descriptors may be closed by now
    gone.abandoned = True
    queue(transport, b"gone", gone)
    queue(transport, b"stays", call())
    transport.flush()
    assert received(far) == [(b"stays", 0)]
    assert not gone.sent


def test_the_descriptors_of_a_frame_that_goes_in_pieces_go_once(pair: Pair, null: int) -> None:
    near, far = pair
    transport, large = Transport(near, Refused()), call((null,))
    data = b"x" * (1 << 20)
    queue(transport, data, large)
    queue(transport, b"behind", call())
    transport.flush()
    assert large.sent
    large.abandoned = True  # which is too late: half a frame would be the end of the connection
    got = received(far)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.write)
            while sum(len(part) for part, _ in got) < len(data) + len(b"behind"):
                await anyio.wait_readable(far)
                got.extend(received(far))
            tasks.cancel_scope.cancel()

    anyio.run(main)
    assert b"".join(part for part, _ in got) == data + b"behind"
    assert [count for _, count in got if count] == [1]


def test_a_bad_descriptor_is_the_callers_alone(pair: Pair) -> None:
    near, far = pair
    refused = Refused()
    transport, bad = Transport(near, refused), call((1 << 20,))
    queue(transport, b"bad", bad)
    queue(transport, b"good", call())
    transport.flush()
    ((pending, error),) = refused
    assert pending is bad
    assert isinstance(error, ClosedDescriptor)
    assert not bad.sent
    assert received(far) == [(b"good", 0)]


def test_nothing_is_refused_when_the_connection_is_gone(pair: Pair) -> None:
    """The reader finds its end, and all that was asked is asked again."""
    near, far = pair
    refused = Refused()
    transport, first = Transport(near, refused), call()
    far.close()
    queue(transport, b"one", first)
    transport.flush()
    transport.flush()
    assert refused == []
    assert not first.sent


# Reading.


def done(id: int) -> bytes:
    body = m.encode(m.Done())
    return header(len(body), 0, id) + body


def test_reading_ends_with_the_stream(pair: Pair) -> None:
    near, far = pair

    async def main() -> None:
        transport, conversation = Transport(near, Refused()), Conversation()
        far.send(done(1) + done(2)[:5])
        assert [answer.id for answer in await transport.read(conversation) or ()] == [1]
        far.send(done(2)[5:])
        assert [answer.id for answer in await transport.read(conversation) or ()] == [2]
        far.close()
        assert await transport.read(conversation) is None

    anyio.run(main)


def test_descriptors_that_nobody_announced_are_closed(pair: Pair, null: int) -> None:
    near, far = pair
    before = census()

    async def main() -> None:
        transport = Transport(near, Refused())
        socket.send_fds(far, [done(1)], [null])
        with pytest.raises(ProtocolError):
            await transport.read(Conversation())

    anyio.run(main)
    assert census() == before
    assert os.fstat(null)
