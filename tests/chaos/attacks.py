"""What a user who may use a few names, or may only connect, does to stop everybody else.

Each attack is a call that goes on for a while, and ends by itself or with its connection.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import msgspec
from breaking import Wire, lingering_pair, reset

from fdshare.errors import FdshareError
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, send_message
from fdshare.kernel.endpoint import connect
from fdshare.protocol import messages as m
from fdshare.protocol.framing import MAX_REQUEST, header

KIND = m.Kind("fd", msgspec.Raw(m.encode({})))
_HELD: Final = 0.5  # seconds that an attack stays as it is
_SOCKETS: Final = 100  # connections of one attack at most, so that all of them find room


class Attacker:
    """One user: *name* is the folder of its names, *limits* are those of the server."""

    def __init__(self, address: str, name: str, limits: dict[str, Any], metrics: int) -> None:
        self.address = address
        self.name = name
        self.limits = limits
        self.metrics = metrics
        self.connections = min(int(limits["max_connections_per_uid"]) // 4, _SOCKETS)

    # What the attacks share.

    @contextmanager
    def wires(self, count: int, *, greet: bool = True) -> Iterator[list[Wire]]:
        """Up to *count* connections: as many as there is room for."""
        with ExitStack() as stack:
            made: list[Wire] = []
            with suppress(FdshareError, OSError, EOFError, AssertionError):
                while len(made) < count:
                    made.append(stack.enter_context(Wire(self.address, greet=greet)))
            yield made

    def entry(self, wire: Wire, what: str, count: int = 1) -> str:
        """The name of an entry of so many descriptors of this user's."""
        name = f"{self.name}/{what}"
        wire.ask(1, m.Register(name, KIND, replace=True), [0] * count)
        return name

    def stay(self) -> None:
        time.sleep(_HELD)

    # The attacks.

    def deaf(self) -> None:
        """Fetches, more than may be in flight, and never reads."""
        with Wire(self.address) as wire, self.wires(self.connections) as deaf:
            many, one = self.entry(wire, "many", 50), self.entry(wire, "one")
            for each in deaf:
                for id in range(1, 20):
                    each.send(id, m.Fetch(many if id < 3 else one))
            self.stay()

    def replaced(self) -> None:
        """Fetches what it replaces at once, again and again, and never reads."""
        with Wire(self.address) as wire, self.wires(self.connections) as deaf:
            for id, each in enumerate(deaf, 2):
                name = f"{self.name}/replaced"
                wire.ask(2 * id, m.Register(name, KIND, replace=True), [0] * 250)
                for other in range(1, 3):
                    each.send(other, m.Fetch(name))
                wire.ask(2 * id + 1, m.Ping())
            self.stay()

    def half_frames(self) -> None:
        """Descriptors of requests that never end."""
        with self.wires(self.connections) as wires:
            for wire in wires:
                half = (header(1000, MAX_DESCRIPTORS, 1) + b"x",)
                send_message(wire.sock, half, [0] * MAX_DESCRIPTORS)
            self.stay()

    def memory(self) -> None:
        """The longest requests, all but their last byte: before the first word, and after."""
        for greet in (False, True):
            with self.wires(self.connections, greet=greet) as wires:
                for wire in wires:
                    wire.sock.settimeout(0.1)  # the server may read no more of it
                    with suppress(OSError):
                        wire.sock.sendall(header(MAX_REQUEST, 0, 1) + bytes(MAX_REQUEST - 1))
                self.stay()

    def lingering(self) -> None:
        """Sockets whose close blocks: refused, replaced, and in messages that do not fit."""
        peers = []
        try:
            with Wire(self.address) as wire, Wire(self.address) as half:
                for id in range(2, 40):
                    sock, peer = lingering_pair(86400)
                    peers.append(peer)
                    with sock:
                        name = "others/name" if id % 3 else f"{self.name}/lingers"
                        wire.send(id, m.Register(name, KIND, replace=True), [sock.fileno()])
                        if not id % 10:
                            frame = (header(1000, 200, 1) + b"x",)
                            send_message(half.sock, frame, [sock.fileno()] * 200)
                    wire.receive()
        finally:
            for peer in peers:
                reset(peer)

    def leases(self) -> None:
        """Takes what it has registered, and confirms nothing."""
        with Wire(self.address) as wire:
            kept = []
            try:
                for id in range(2, 200):
                    name = f"{self.name}/leased/{id}"
                    wire.ask(2 * id, m.Register(name, KIND, replace=True), [0])
                    kept += wire.ask(2 * id + 1, m.Take(name, 0.0)).descriptors
            finally:
                self.stay()
                for descriptor in kept:
                    descriptor.close()

    def door(self) -> None:
        """All its connections wait for a name, and it knocks on."""
        with self.wires(int(self.limits["max_connections_per_uid"])) as wires:
            for wire in wires:
                wire.send(1, m.Fetch(f"{self.name}/nothing", None))
            ends = time.monotonic() + _HELD
            while time.monotonic() < ends:
                with socket.socket(socket.AF_UNIX) as sock, suppress(BlockingIOError):
                    sock.setblocking(False)
                    sock.connect(self.address)

    def waits(self) -> None:
        """As many waits as one connection may have, all ended at once by a name."""
        with Wire(self.address) as wire, Wire(self.address) as waiting:
            name = f"{self.name}/awaited"
            for id in range(1, int(self.limits["max_waiting"]) + 10):
                waiting.send(id, m.Wait(name, 60.0))
            for id in range(1, 4):
                wire.ask(2 * id, m.Register(name, KIND, replace=True), [0])
                wire.ask(2 * id + 1, m.Unregister(name))

    def watches(self) -> None:
        """As many watches as there may be, of patterns that are slow to match, and then events."""
        with Wire(self.address) as wire, Wire(self.address) as watching:
            with suppress(FdshareError):
                for id in range(1, 10_000):
                    watching.ask(id, m.Watch("*" + "a" * 100 + "b*" * 20 + str(id)))
            for id in range(2, 100):
                wire.ask(id, m.Register(f"{self.name}/" + "a" * 200, KIND, replace=True), [0])

    def probes(self) -> None:
        """Asks about all there is, again and again, and does not read the answers."""
        with Wire(self.address) as wire:
            name = self.entry(wire, "probed", 100)
            for id in range(2, 100):
                wire.send(id, m.Infos("*"))
                wire.send(1000 + id, m.Info(name))
                wire.send(2000 + id, m.Names("*"))
            self.stay()

    def long_names(self) -> None:
        """A name as long as a request, in every verb, and patterns and addresses like it."""
        long = "a" * (MAX_REQUEST - 1000)
        address = "unix:///" + "a/" * 30_000
        requests: list[m.Request] = [
            m.Fetch(long),
            m.Take(long),
            m.Wait(long),
            m.Unregister(long),
            m.Rename(long, "b"),
            m.Rename("b", long),
            m.Info(long),
            m.Bind("b", address),
            m.Bind(long, "tcp://127.0.0.1:0"),
            m.Explain("fetch", long, 0, 0),
            m.Explain(long, "b", 0, 0),
            m.FetchMany([f"{self.name}/{number}" for number in range(5000)]),
            m.Names("[a" * 60_000),
            m.Watch("*?" * 60_000),
            m.Register(long, KIND),
        ]
        with Wire(self.address) as wire:
            for id, request in enumerate(requests, 1):
                wire.send(id, request, [0] if type(request) is m.Register else ())
                assert len(m.encode(wire.receive().reply)) < 1 << 16

    def log_flood(self) -> None:
        """Whatever is refused is noted: as many refusals as there is time for."""
        with Wire(self.address) as wire:
            name = "others/" + "\x1b[2J" * 50
            for id in range(1, 2000):
                wire.send(id, m.Unregister(name[:200]))
                if not id % 50:
                    for _ in range(50):
                        wire.receive()

    def nonsense(self) -> None:
        """Bytes that are no frame, on new connections."""
        for _ in range(50):
            with suppress(OSError), connect(self.address, timeout=1) as sock:
                sock.sendall(os.urandom(1000))

    def scrape(self) -> None:
        """Requests to the metrics that never end, a byte now and then."""
        with ExitStack() as stack:
            socks = []
            for _ in range(20):
                socks.append(socket.create_connection(("127.0.0.1", self.metrics), 1))
                stack.enter_context(socks[-1])
            for _ in range(5):
                for sock in socks:
                    sock.sendall(b"G")
                time.sleep(_HELD / 5)


ATTACKS: Final[list[Callable[[Attacker], None]]] = [
    Attacker.deaf,
    Attacker.replaced,
    Attacker.half_frames,
    Attacker.memory,
    Attacker.lingering,
    Attacker.leases,
    Attacker.door,
    Attacker.waits,
    Attacker.watches,
    Attacker.probes,
    Attacker.long_names,
    Attacker.log_flood,
    Attacker.nonsense,
    Attacker.scrape,
]


def attack(attacker: Attacker, seconds: float) -> Counter[str]:
    """Runs all attacks at once, each again and again, for *seconds*: how often each was run."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ends = time.monotonic() + seconds
    counts: Counter[str] = Counter()

    def again_and_again(one: Callable[[Attacker], None]) -> None:
        while time.monotonic() < ends:
            counts[one.__name__] += 1
            try:
                one(attacker)
            except (FdshareError, OSError, EOFError, AssertionError):
                # Refused, dropped, or told so where a Wire waits for something else.
                counts[f"{one.__name__} cut short"] += 1

    threads = [
        threading.Thread(target=again_and_again, args=(one,), daemon=True) for one in ATTACKS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(ends - time.monotonic(), 0) + 1)
    return counts
