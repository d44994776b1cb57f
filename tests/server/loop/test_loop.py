"""The event loop against peers that do everything but behave, over a real server."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from barepeer import Peer

from fdshare.client.blocking.client import Client
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, MAX_FRAME, header

KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))


def refused(reply: Any, code: str) -> m.Refused:
    assert type(reply) is m.Refused, reply
    assert reply.code == code, reply
    return reply


def test_a_request_split_at_every_byte(peer: Peer, null: int) -> None:
    length = len(peer.frame(m.Register("x", KIND, replace=True), 1, 0))
    for cut in range(1, length):
        data = peer.frame(m.Register("x", KIND, replace=True), 1)
        peer.write(data[:cut], [null])
        peer.write(data[cut:])
        id, reply, _ = peer.receive()
        assert (id, type(reply)) == (peer.last_id, m.Registered)


def test_a_request_byte_by_byte(peer: Peer, null: int) -> None:
    data = peer.frame(m.Register("x", KIND), 1)
    peer.write(data[:1], [null])
    for index in range(1, len(data)):
        peer.write(data[index : index + 1])
    assert type(peer.receive()[1]) is m.Registered


def test_many_requests_in_one_write(peer: Peer, null: int) -> None:
    data = b"".join(peer.frame(m.Ping()) for _ in range(50))
    peer.write(data + peer.frame(m.Register("x", KIND), 1), [null])
    assert [peer.receive()[0] for _ in range(51)] == list(range(1, 52))


def test_descriptors_of_several_requests_keep_their_order(peer: Peer, until: Any) -> None:
    pipes = [os.pipe() for _ in range(20)]
    try:
        for number, (_, writing) in enumerate(pipes):
            peer.write(peer.frame(m.Ping()))
            peer.write(peer.frame(m.Register(f"pipe/{number}", KIND), 1), [writing])
        for _ in range(40):
            peer.receive()
        for number, (reading, _) in enumerate(pipes):
            peer.send(m.Fetch(f"pipe/{number}"))
            _, _, (fetched,) = peer.receive()
            with fetched:
                assert os.path.samestat(os.fstat(fetched.fileno()), os.fstat(reading))
    finally:
        for reading, writing in pipes:
            os.close(reading)
            os.close(writing)


@pytest.mark.parametrize(
    ("announced", "came"), [(1, 0), (2, 1), (0, 1), (1, 2), (253, 252), (252, 253), (5, 0)]
)
def test_counts_that_lie(server: Any, peer: Peer, null: int, announced: int, came: int) -> None:
    body = m.encode(m.Register("x", KIND))
    peer.write(header(len(body), announced, 1) + body, [null] * came)
    assert peer.expelled().code == "protocol_error"
    with Client(server.address) as client:
        assert client.names() == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (HEADER.pack(0xFFFFFFFF, 0, m.VERSION, 0, 1), "protocol_error"),
        (HEADER.pack(MAX_FRAME + 1, 0, m.VERSION, 0, 1), "protocol_error"),
        (HEADER.pack(0, 254, m.VERSION, 0, 1), "protocol_error"),
        (HEADER.pack(0, 0, m.VERSION, 7, 1), "protocol_error"),
        (HEADER.pack(0, 0, m.VERSION + 1, 0, 1), "version_mismatch"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "version_mismatch"),
    ],
    ids=["longest", "long", "254", "reserved", "version", "http"],
)
@pytest.mark.parametrize("greeted", [True, False])
def test_headers_that_cannot_be(server: Any, data: bytes, code: str, greeted: bool) -> None:
    with Peer(server.address, hello=greeted) as peer:
        peer.write(data)
        assert peer.expelled().code == code


def test_a_good_request_before_a_bad_frame_is_answered(peer: Peer) -> None:
    peer.write(peer.frame(m.Ping()) + b"garbage that is no header")
    assert type(peer.receive()[1]) is m.Done
    assert peer.expelled() is not None


def test_half_a_frame_with_descriptors_and_gone(server: Any, null: int) -> None:
    """A thousand times; the fixture counts the server's descriptors afterwards."""
    with Peer(server.address) as peer:
        data = peer.frame(m.Register("x", KIND), 3)
    for number in range(1000):
        with Peer(server.address, hello=False) as peer:
            hello = peer.frame(m.Hello(m.MAGIC, m.VERSION, ""), 0, 0) if number % 2 else b""
            peer.write(hello + data[: 1 + number % (len(data) - 1)], [null] * 3)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_frames(server: Any, null: int, seed: int) -> None:
    """Good requests with bytes changed, cut out and put in, and any number of descriptors."""
    chance = random.Random(seed)
    verbs = [verb for name, verb in VERBS.items() if name not in ("Shutdown", "Upgrade")]
    verbs += [m.Register("x", KIND, replace=True), m.Register("y", KIND, lifetime="connection")]
    with Client(server.address) as client:
        for _ in range(150):
            with Peer(server.address, hello=chance.random() < 0.9) as peer:
                count = chance.choice([0, 0, 1, 2, 3])
                data = bytearray()
                for _ in range(chance.randint(1, 4)):
                    data += peer.frame(chance.choice(verbs), count)
                for _ in range(chance.choice([0, 1, 1, 3])):
                    at = chance.randrange(len(data))
                    data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
                if data:
                    peer.write(bytes(data), [null] * count)
        client.ping()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x81\xa4type\xa7explode",
        b"\x81\xa4type\xa5fetch",
        m.encode(m.Ping()) + b"\0",
        m.encode(m.Done()),
        b"\x91" * 100_000,
        b"\x82\xa4type\xa5fetch\xa4name\xa1\xff",
    ],
    ids=["empty", "never", "nil", "unknown", "missing", "more", "reply", "deep", "latin"],
)
def test_bodies_that_are_none(peer: Peer, null: int, body: bytes) -> None:
    """Are refused under their id, with descriptors or without; the connection goes on."""
    refused(peer.ask(body), "bad_request")
    refused(peer.ask(body, [null] * 3), "bad_request")
    assert type(peer.ask(m.Ping())) is m.Done


VERBS: dict[str, Any] = {
    "Fetch": m.Fetch("x"),
    "Take": m.Take("x"),
    "Wait": m.Wait("x"),
    "Follow": m.Follow("x"),
    "FetchMany": m.FetchMany(["x"]),
    "Unregister": m.Unregister("x"),
    "Rename": m.Rename("x", "y"),
    "Bind": m.Bind("x", "tcp://127.0.0.1:0"),
    "Names": m.Names(),
    "Info": m.Info("x"),
    "Infos": m.Infos(),
    "Watch": m.Watch(),
    "Cancel": m.Cancel(99),
    "Explain": m.Explain("fetch", "x", 0, 0),
    "Stats": m.Stats(),
    "Ping": m.Ping(),
    "Shutdown": m.Shutdown(),
    "Reload": m.Reload(),
    "Upgrade": m.Upgrade(),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_descriptors_with_a_verb_that_takes_none(peer: Peer, null: int, verb: Any) -> None:
    peer.ask(m.Register("x", KIND), [null])
    reply = refused(peer.ask(verb, [null] * 2), "too_many_descriptors")
    assert reply.fields == {"count": 2, "limit": 0}
    assert peer.ask(m.Names()).names == ["x"]


def test_the_verbs_above_are_all() -> None:
    names = {cls.__name__ for cls in get_args(m.AnyRequest)}
    assert names == set(VERBS) | {"Hello", "Prove", "Register"}


def test_a_register_without_or_with_too_many_descriptors(peer: Peer, null: int) -> None:
    refused(peer.ask(m.Register("x", KIND)), "invalid_argument")
    refused(peer.ask(m.Register("x", KIND, lifetime="connection"), [null]), "invalid_argument")
    reply = refused(peer.ask(m.Register("x", KIND), [null] * 251), "too_many_descriptors")
    assert reply.fields == {"count": 251, "limit": 250}
    assert type(peer.ask(m.Register("x", KIND), [null] * 250)) is m.Registered


def test_a_lifeline_that_cannot_be_watched(server: Any, peer: Peer, folder: Any) -> None:
    """A regular file never ends: it is refused, or harmless, and never breaks the table."""
    with open(folder / "file", "w") as file, Client(server.address) as client:
        reply = peer.ask(m.Register("x", KIND, lifetime="connection"), [file.fileno()] * 2)
        if type(reply) is m.Registered:
            client.fetch("x").close()
            client.unregister("x")
        else:
            refused(reply, "invalid_argument")
        client.ping()
        assert client.names() == []


def test_an_id_that_still_waits(peer: Peer, null: int) -> None:
    peer.send(m.Fetch("x", wait=60), id=7)
    peer.send(m.Fetch("y", wait=60), id=7)
    id, reply, _ = peer.receive()
    assert id == 7
    refused(reply, "invalid_argument")
    peer.send(m.Cancel(7), id=8)
    id, reply, _ = peer.receive()
    assert id == 7
    refused(reply, "fetch_timeout")
    assert type(peer.ask(m.Register("x", KIND), [null])) is m.Registered


def test_cancel_what_does_not_wait(peer: Peer) -> None:
    peer.send(m.Cancel(12345))
    assert type(peer.ask(m.Ping())) is m.Done


def test_a_connection_that_ends_while_it_waits(server: Any, peer: Peer, null: int) -> None:
    """Its waits, of several verbs for one name, end with it: nothing is leased to the dead."""
    for _ in range(20):
        with Peer(server.address) as other:
            for verb in (m.Take, m.Fetch, m.Wait, m.Take):
                other.send(verb("x", wait=60))
            other.ask(m.Ping())
        assert type(peer.ask(m.Register("x", KIND), [null])) is m.Registered
        assert type(peer.ask(m.Ping())) is m.Done
        while type(peer.ask(m.Unregister("x"))) is not m.Done:
            pass


def test_waiters_of_a_stopped_client(server: Any, peer: Peer, null: int, until: Any) -> None:
    """Several wait on connections whose other end is shut already when the name appears."""
    others = [Peer(server.address) for _ in range(5)]
    for other in others:
        other.send(m.Take("x", wait=60))
        other.send(m.Fetch("x", wait=60))
        other.ask(m.Ping())
    # One sendmsg and five closes, before the server looks again: whichever it sees first.
    peer.send(m.Register("x", KIND), [null])
    for other in others:
        other.close()
    assert type(peer.receive()[1]) is m.Registered
    until(lambda: peer.ask(m.Stats()).stats.connections == 1, "the connections to end")
    until(lambda: peer.ask(m.Names()).names == ["x"], "the entry to be back")


def test_too_many_that_wait(serve: Callable[..., Manager]) -> None:
    manager = serve(limits={"max_waiting": 3})
    with Peer(manager.address) as peer:
        for _ in range(2):
            peer.send(m.Fetch("x", wait=60))
        peer.send(m.Watch("y"))
        assert type(peer.receive()[1]) is m.SnapshotPart
        for request in (m.Fetch("x", wait=60), m.Take("z", wait=None), m.Watch()):
            reply = refused(peer.ask(request), "quota_exceeded")
            assert reply.fields == {"what": "max_waiting", "limit": 3, "used": 3}
        peer.send(m.Cancel(1), id=99)
        refused(peer.receive()[1], "fetch_timeout")
        peer.send(m.Fetch("x", wait=60))
        assert type(peer.ask(m.Ping())) is m.Done


def test_half_closed(peer: Peer) -> None:
    """A peer that will say no more still gets nothing wrong."""
    peer.send(m.Ping())
    peer.sock.shutdown(socket.SHUT_WR)
    assert type(peer.receive()[1]) is m.Done
    with pytest.raises(EOFError):
        peer.receive()


def test_gone_before_the_answer(server: Any, client: Client, null: int) -> None:
    client.register("x", null)
    for _ in range(100):
        with Peer(server.address) as other:
            for _ in range(5):
                other.send(m.Fetch("x"))
            other.send(m.Take("x"))
    client.ping()


def test_a_taker_that_is_gone_gives_back(
    server: Any, client: Client, null: int, until: Callable[..., Any]
) -> None:
    client.register("x", null)
    for _ in range(50):
        with Peer(server.address) as other:
            other.send(m.Take("x"))
        until(lambda: client.names() == ["x"], "the entry to be back")
    client.take("x").close()
