"""Input: requests are served in their order, and none is forgotten."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
from barepeer import Peer
from breaking import Wire
from users import ANYBODY, AsUser, Say, needs_root

from fdshare.client.blocking.client import Client
from fdshare.kernel.ancillary import send_message
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header

KIND = m.Kind("fd", msgspec.Raw(m.encode({})))


def test_requests_of_one_read_are_served_in_their_order(peer: Peer, null: int) -> None:
    asked = [m.Ping(), m.Fetch("none"), m.Names(), m.Unregister("none"), m.Ping()] * 20
    peer.write(b"".join(map(peer.frame, asked)))
    for number in range(1, len(asked) + 1):
        assert peer.receive()[0] == number


def test_a_request_that_cannot_be_served_keeps_those_behind_it(
    client: Client, peer: Peer, null: int
) -> None:
    """Here because its client has not read the answers before."""
    for number in range(500):
        client.register(f"{number:03}" + "x" * 200, null)
    for _ in range(20):
        peer.send(m.Names())
    peer.send(m.Rename("000" + "x" * 200, "renamed"))
    peer.send(m.Names("renamed"))
    client.ping()
    answers = [peer.receive()[1] for _ in range(22)]
    assert all(len(answer.names) == 500 for answer in answers[:20])
    assert answers[20].name == "renamed"
    assert answers[21].names == ["renamed"]


@needs_root
def test_who_has_too_many_descriptors_open_is_told_why(
    folder: Path, serve: Callable[..., Manager]
) -> None:
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    limits = {"max_open_per_uid": 14}
    manager = serve(mode=0o666, policy=folder / "policy", limits=limits)

    def attack(say: Say) -> Any:
        first, second = Wire(manager.address, "one"), Wire(manager.address, "two")
        send_message(first.sock, (header(1000, 8, 1) + b"x",), [0] * 8)
        with Wire(manager.address, "between") as between:
            between.ask(1, m.Ping())  # so the server has read what came before
        send_message(second.sock, (header(1000, 8, 1) + b"x",), [0] * 8)
        say(second.receive().reply.message)
        return first, second

    with AsUser(1501, attack) as other:
        assert "max_open_per_uid" in other.hear()
        with Client(manager.address) as client:
            client.register("mine", 0)


@needs_root
def test_who_has_to_wait_for_numbers_is_served(folder: Path, small: Callable[..., Client]) -> None:
    """Few are left; this user's are not closed yet when the next request comes."""
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    root = small(512, "--policy", str(folder / "policy"), "--mode", "0666")

    def ask(say: Say) -> None:
        with Wire(root.address, "many") as wire:
            for id in range(1, 100):
                wire.send(id, m.Register("a", KIND, replace=True), [0] * 20)
            for id in range(1, 100):
                said = wire.receive()
                assert (said.id, type(said.reply)) == (id, m.Registered), said
        say("served")

    with AsUser(1501, ask) as other:
        assert other.hear() == "served"


@needs_root
def test_who_has_too_much_unread_is_refused(folder: Path, serve: Callable[..., Manager]) -> None:
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    limits = {"max_buffered": 800_000, "max_buffered_per_uid": 400_000}
    manager = serve(mode=0o666, policy=folder / "policy", limits=limits)
    with Client(manager.address) as client:
        for number in range(1000):
            client.register(f"{number:04}" + "x" * 200, 0)

        def attack(say: Say) -> Any:
            wires = []
            while True:
                wires.append(Wire(manager.address, f"{len(wires)}"))
                for id in (1, 2):
                    wires[-1].send(id, m.Names())
                with Wire(manager.address, "between") as between:
                    between.send(1, m.Ping())  # so the server has read what came before
                    if isinstance(reply := between.receive().reply, m.Refused):
                        break
            say(reply.message)
            assert len(wires) < 10
            # What it reads makes room again.
            for wire in wires:
                while wire.receive().id != 2:
                    pass
            with Wire(manager.address, "after") as after:
                say(len(after.ask(1, m.Names()).reply.names))
            return wires

        with AsUser(1501, attack) as other:
            assert "max_buffered_per_uid" in other.hear()
            assert len(client.names()) == 1000
            assert other.hear() == "1000"


@needs_root
def test_half_requests_that_are_too_long_together(
    folder: Path, serve: Callable[..., Manager]
) -> None:
    folder.chmod(0o755)
    limits = {"max_buffered": 800_000, "max_buffered_per_uid": 400_000}
    manager = serve(mode=0o666, limits=limits)

    def attack(say: Say) -> Any:
        wires = [Wire(manager.address, f"{number}") for number in range(5)]
        for wire in wires:
            with suppress(BrokenPipeError):
                wire.sock.sendall(header(100_000, 0, 1) + bytes(99_000))
        while True:
            for wire in select.select([wire.sock for wire in wires], [], [])[0]:
                said = next(each for each in wires if each.sock is wire).receive().reply
                say(said.message)
                return wires

    with AsUser(1501, attack) as other, Client(manager.address) as client:
        assert "max_buffered_per_uid" in other.hear()
        client.ping()


def test_many_requests_of_one_keep_nobody_else_waiting(
    client: Client, peer: Peer, null: int
) -> None:
    """Each of these looks at all names, and finds none."""
    for number in range(1000):
        client.register(f"{number:03}" + "x" * 200, null)
    peer.write(b"".join(peer.frame(m.Names("*x*x*x*y")) for _ in range(1500)))
    client.ping()
    peer.sock.setblocking(False)
    answered = 0
    with suppress(BlockingIOError):  # none yet
        answered = len(peer.sock.recv(1 << 20, socket.MSG_PEEK))
    peer.sock.settimeout(30)
    assert [peer.receive()[1].names for _ in range(1500)] == [[]] * 1500
    assert answered < 1500 * len(header(0, 0, 0) + m.encode(m.NameList([])))


@needs_root
def test_a_half_request_gives_way_to_those_who_need_its_numbers(
    folder: Path, small: Callable[..., Client]
) -> None:
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    root = small(512, "--policy", str(folder / "policy"), "--mode", "0666")

    def attack(say: Say) -> Any:
        wire = Wire(root.address)
        send_message(wire.sock, (header(1000, 110, 1) + b"x",), [0] * 110)
        say("sent")
        return wire

    def register(say: Say) -> None:
        with Wire(root.address) as wire:
            for id in range(1, 6):  # half of what the others leave is 73
                wire.ask(id, m.Register(str(id), KIND), [0] * 20)
        say("registered")

    with ExitStack() as others:
        for uid in (1501, 1502, 1503):
            assert others.enter_context(AsUser(uid, attack)).hear() == "sent"
        with AsUser(1504, register) as good:
            assert good.hear() == "registered"
