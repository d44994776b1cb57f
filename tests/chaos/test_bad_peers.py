"""Peers that break every rule: the worst that comes of it is that they are shown the door."""

from __future__ import annotations

import os
import random
import resource
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args

import msgspec
import pytest
from breaking import Halves, Wire, resident
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import BadRequest
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.endpoint import connect
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, header

KIND = m.Kind("fd", msgspec.Raw(m.encode({})))
# What the fuzzer starts from: every request, with values that make sense.
GOOD: list[m.Request] = [
    m.Hello(m.MAGIC, m.VERSION, "fuzz"),
    m.Prove(b"x" * 32),
    m.Register("fuzz/1", KIND, replace=True, metadata={"a": "b"}, ttl=60.0),
    m.Fetch("good", 0.001),
    m.Take("fuzz/1", 0.001),
    m.Wait("fuzz/2", 0.001),
    m.Follow("good", 0.001, 1, "epoch", 5),
    m.FetchMany(["good", "fuzz/1"]),
    m.Unregister("fuzz/1"),
    m.Rename("fuzz/1", "fuzz/2"),
    m.Bind("fuzz/3", "tcp://127.0.0.1:0"),
    m.Names("*"),
    m.Info("good"),
    m.Infos("good"),
    m.Watch("fuzz/*"),
    m.Cancel(3),
    m.Explain("fetch", "good", 1, 1),
    m.Stats(),
    m.Ping(),
    m.Shutdown(),
    m.Reload(),
    m.Upgrade(),
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 255, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1),
    *(0.0, -0.5, 1e308, float("inf"), float("-inf"), float("nan"), 5e-324),
    *("", "a", "good", "\x00", "\n", "../..", "a/../b", "é" * 128, "x" * 300, "*", "[", "[!a-"),
    *("*a" * 200, "server", "connection", "process", "tcp://[::1]:0", "udp://127.0.0.1:0"),
    *(b"", b"\xff" * 40, [], [[]], ["good"] * 300, {}, {"a": 1}, {"a": "b"}, {"x": "y" * 5000}),
]


def test_the_fuzzer_knows_every_request() -> None:
    assert {type(request) for request in GOOD} == set(get_args(m.AnyRequest))


class Fuzzer:
    """Frames from a seed. *wrong* ones cannot be right, whatever the server thinks of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.null = os.open(os.devnull, os.O_RDWR)

    def close(self) -> None:
        os.close(self.null)

    def body(self) -> bytes:
        choice = self.random.random()
        good = self.random.choice(GOOD)
        if choice < 0.1:
            return self.random.randbytes(self.random.randrange(60))
        if choice < 0.4:
            return self.flipped(m.encode(good))
        fields = msgspec.to_builtins(good, builtin_types=(bytes, msgspec.Raw))
        if "kind" in fields:
            fields["kind"] = {"tag": "fd", "spec": {}}
        for _ in range(self.random.randrange(3)):
            name = self.random.choice([*fields, "new"])
            if self.random.random() < 0.2:
                fields.pop(name, None)
            else:
                fields[name] = self.random.choice(ODD)
        try:
            return msgspec.msgpack.encode(fields)
        except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError):
            return m.encode(good)

    def flipped(self, data: bytes) -> bytes:
        data = bytearray(data)
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(data))
            what = self.random.randrange(4)
            if what == 0:
                data[at] ^= 1 << self.random.randrange(8)
            elif what == 1:
                data[at] = self.random.randrange(256)
            elif what == 2:
                del data[at:]
            else:
                data[at:at] = self.random.randbytes(self.random.randrange(1, 8))
            if not data:
                break
        return bytes(data)

    def is_safe(self, body: bytes) -> bool:
        """False for what would end the server, bind paths of this machine, or do away with what
        the good client fetches."""
        try:
            request = m.decode_request(body)
        except BadRequest:
            return True
        if isinstance(request, m.Bind):
            return not request.address.startswith("unix:")
        if isinstance(request, m.Register | m.Unregister | m.Take):
            return request.name != "good"
        if isinstance(request, m.Rename):
            return request.old != "good"
        return not isinstance(request, m.Shutdown | m.Upgrade)

    def broken_frame(self) -> bytes:
        """A header that lies, with something behind it."""
        length = self.random.choice([0, 1, 2**16, 2**20 + 1, 2**31, 2**32 - 1, 50])
        count = self.random.choice([0, 1, 3, 253, 254, 65535])
        version = self.random.choice([0, 1, 1, 2, 255])
        zero = self.random.choice([0, 0, 1, 255])
        start = struct.pack(">IHBBI", length, count, version, zero, self.random.randrange(2**32))
        return start + self.random.randbytes(self.random.randrange(200))


class Batch:
    """Some frames on one connection, and everything that was said to them."""

    def __init__(self, address: str, fuzzer: Fuzzer, said: Counter[str]) -> None:
        self.fuzzer = fuzzer
        self.said = said
        self.wire = Wire(address, f"fuzz {fuzzer.random.randrange(5)}")
        self.sent = 0

    def run(self, most: int) -> int:
        """How many frames were sent."""
        with self.wire:
            try:
                for _ in range(self.fuzzer.random.randrange(1, most)):
                    if not self.send_one():
                        return self.sent
                self.wire.send(2**32 - 1, m.Ping())
                self.read_to(2**32 - 1)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                self.said["close"] += 1
        return self.sent

    def send_one(self) -> bool:
        """False after what ends a connection."""
        chance = self.fuzzer.random
        self.sent += 1
        if chance.random() < 0.02:
            self.wire.sock.sendall(self.fuzzer.broken_frame())
            if chance.random() < 0.5:
                self.wire.sock.shutdown(socket.SHUT_WR)
                self.read_to(None)
            return False
        body = self.fuzzer.body()
        while not self.fuzzer.is_safe(body):
            body = self.fuzzer.body()
        came = announced = chance.choice([0, 0, 0, 0, 0, 1, 1, 2])
        if chance.random() < 0.01:
            announced = chance.randrange(4)
        frame = header(len(body), announced, self.sent) + body
        sent = send_message(self.wire.sock, (frame,), [self.fuzzer.null] * came)
        if sent < len(frame):
            self.wire.sock.sendall(frame[sent:])
        return True

    def read_to(self, last: int | None) -> None:
        """Everything up to the answer to *last*; the wire checks that it can be read."""
        while True:
            said = self.wire.receive()
            for descriptor in said.descriptors:
                descriptor.close()
            refused = isinstance(said.reply, m.Refused)
            if refused and said.reply.message.startswith("the server failed"):
                raise AssertionError(said.reply)
            self.said["refused" if refused else type(said.reply).__name__] += 1
            if said.id == last:
                return


class GoodClient(threading.Thread):
    """Fetches, some hundred times a second, and notes how long that takes."""

    def __init__(self, address: str, fd: int) -> None:
        super().__init__()
        self.address = address
        self.fd = fd
        self.took: list[float] = []
        self.failure: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> None:
        try:
            with Client(self.address) as client:
                while not self._done.is_set():
                    began = time.monotonic()
                    (descriptor,) = client.fetch_raw("good")
                    self.took.append(time.monotonic() - began)
                    with descriptor:
                        assert os.fstat(descriptor.fileno()) == os.fstat(self.fd)
                    self._done.wait(0.002)
        except BaseException as error:
            self.failure = error

    def stop(self) -> int:
        """The median of its times, in microseconds."""
        self._done.set()
        self.join()
        assert self.failure is None, self.failure
        assert self.took
        return round(statistics.median(self.took) * 1e6)


@pytest.fixture
def fuzzer(seed: int) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(seed)
    yield fuzzer
    fuzzer.close()


@pytest.fixture
def good() -> Iterator[int]:
    fd = os.memfd_create("good")
    yield fd
    os.close(fd)


@pytest.mark.timeout(600)
def test_fuzz(
    good: int, fuzzer: Fuzzer, times: Callable[[int], int], counted: dict[str, Any]
) -> None:
    said: Counter[str] = Counter()
    with Manager() as manager:
        halves = Halves(manager)
        pids = halves.pids()
        manager.register("good", good)
        wanted, frames = times(100_000), 0
        while frames < wanted // 10:
            frames += Batch(manager.address, fuzzer, said).run(40)
        before = {half: resident(pid) for half, pid in pids.items()}
        usual = beside_good_peers(manager.address, good)
        client = GoodClient(manager.address, good)
        client.start()
        while frames < wanted and client.failure is None:
            frames += Batch(manager.address, fuzzer, said).run(40)
        counted.update(frames=frames, **said, fetches=len(client.took))
        counted.update(usual_us=usual, meanwhile_us=client.stop())
        for name in manager.names("*"):
            if name != "good":
                manager.unregister(name)
        wait_until(lambda: manager.stats().leases == 0)
        assert halves.pids() == pids, "a half was replaced"
        halves.check_census()
        for half, pid in pids.items():
            counted[f"{half}_grew_kb"] = (resident(pid) - before[half]) >> 10
            assert resident(pid) < before[half] + (16 << 20)


def beside_good_peers(address: str, fd: int) -> int:
    """What a fetch takes while others send as much as the fuzzer, of what is right."""
    client = GoodClient(address, fd)
    client.start()
    for _ in range(200):
        with Wire(address, "good") as wire:
            for id in range(1, 20):
                wire.send(id, m.Ping())
            for _ in range(19):
                wire.receive()
    return client.stop()


def test_half_frames_with_descriptors(
    good: int, times: Callable[[int], int], counted: dict[str, Any]
) -> None:
    body = m.encode(m.Register("a", KIND))
    with Manager() as manager:
        halves = Halves(manager)
        for index in range(times(1000)):
            frame = header(len(body), 5, 1) + body
            with Wire(manager.address) as wire:
                send_message(wire.sock, (frame[: index % (len(frame) - 1) + 1],), [good] * 5)
        counted["halves"] = times(1000)
        wait_until(lambda: manager.stats().connections == 1)
        halves.check_census()
        assert manager.names() == []


def test_descriptors_on_every_verb(good: int) -> None:
    with Manager() as manager:
        halves = Halves(manager)
        for request in GOOD:
            if isinstance(request, m.Register | m.Hello | m.Prove):
                continue
            with Wire(manager.address) as wire:
                wire.send(1, request, [good] * 253)
                assert isinstance(wire.receive().reply, m.Refused), request
                wire.ask(2, m.Ping())
        wait_until(lambda: manager.stats().connections == 1)
        halves.check_census()


def test_every_length(good: int, counted: dict[str, Any]) -> None:
    """Up to 2**32 - 1 bytes: nobody reserves memory for what was only announced."""
    with Manager() as manager:
        server = manager.stats().server_pid
        manager.register("good", good)
        before = resident(server)
        lengths = [2**bits + more for bits in range(33) for more in (-1, 0, 1)]
        for length in (n for n in lengths if 0 <= n < 2**32):
            with Wire(manager.address) as wire:
                wire.sock.sendall(HEADER.pack(length, 0, 1, 0, 1))
                if length > 2**20:
                    assert isinstance(wire.receive().reply, m.Refused)
                    with pytest.raises((EOFError, ConnectionResetError)):
                        wire.receive()
                manager.fetch_raw("good")[0].close()
        counted["lengths"] = len(lengths)
        assert resident(server) < before + (8 << 20)


def test_slow_loris(good: int, times: Callable[[int], int], counted: dict[str, Any]) -> None:
    """Requests that come byte by byte, or not to their end, are given up in time; who is idle
    between two requests is not."""
    with Manager(limits={"request_timeout": 0.5}) as manager, Wire(manager.address) as idle:
        manager.register("good", good)
        frame = header(len(m.encode(m.Ping())), 0, 1) + m.encode(m.Ping())
        slow = [Wire(manager.address, greet=index % 2 == 0) for index in range(times(100))]
        for index in range(len(frame) - 1):
            for wire in slow:
                try:
                    wire.sock.send(frame[index : index + 1])
                except OSError:
                    pass
            manager.fetch_raw("good")[0].close()
        wait_until(lambda: manager.stats().connections == 2, "the slow are dropped")
        counted["slow"] = len(slow)
        for wire in slow:
            wire.close()
        idle.ask(1, m.Ping())


def test_a_reader_that_never_reads(good: int, counted: dict[str, Any]) -> None:
    with Manager(limits={"request_timeout": 2.0}) as manager, Client(manager.address) as other:
        halves = Halves(manager)
        server = halves.pids()["server"]
        for index in range(500):
            manager.register(f"n/{index}", good, metadata={"x": "y" * 1000})
        other.infos()
        before = resident(server)
        deaf = [Wire(manager.address) for _ in range(10)]
        sent = 0
        for index, wire in enumerate(deaf):
            wire.sock.setblocking(False)
            request = [m.Infos(), m.Names(), m.FetchMany([f"n/{i}" for i in range(250)])][index % 3]
            try:
                for id in range(10_000):
                    wire.send(id + 1, request)
                    sent += 1
            except OSError:
                pass
        for _ in range(100):
            other.fetch_raw("n/1")[0].close()
        counted.update(requests=sent, grew_kb=(resident(server) - before) >> 10)
        assert resident(server) < before + (64 << 20)
        wait_until(lambda: manager.stats().connections == 2, "the deaf are dropped")
        for wire in deaf:
            wire.close()
        wait_until(lambda: manager.stats().in_flight == 0)
        halves.check_census()


def test_connects_without_a_greeting(
    good: int, times: Callable[[int], int], counted: dict[str, Any]
) -> None:
    """10,000 of them, as many at once as the limit of this process allows."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = min(soft - 200, 10_000)
    silent: list[socket.socket] = []
    with Manager() as manager, Client(manager.address) as other:
        manager.register("good", good)
        server = manager.stats().server_pid
        before = resident(server)
        total = times(10_000)
        for index in range(total):
            if len(silent) == most:
                silent.pop(0).close()
            silent.append(connect(manager.address, timeout=20))
            if index % 500 == 0:
                other.fetch_raw("good")[0].close()
        stats = other.stats()
        limit = stats.limits["max_connections"]
        counted.update(connects=total, at_once=len(silent), limit=int(limit))
        counted.update(evicted=stats.counters["evicted"])
        assert stats.connections <= limit
        for sock in silent:
            sock.close()
        wait_until(lambda: other.stats().connections <= 2)
        counted["grew_kb"] = (resident(server) - before) >> 10
        assert resident(server) < before + (32 << 20)
        Halves(other).check_census()
