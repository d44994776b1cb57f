"""A server that answers everything wrongly: a client raises an FdshareError, and keeps nothing."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import anyio
import msgspec
import pytest

import fdshare
from chaos.test_bad_peers import ODD, Fuzzer
from fdshare.aio import AsyncFollower
from fdshare.client.blocking.client import Client
from fdshare.errors import AccessDenied, BadRequest, FdshareError, NameNotFound
from fdshare.kernel.endpoint import listen
from fdshare.kinds import discard
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, Receiver, header

WELCOME = m.Welcome(m.MAGIC, m.VERSION, 1, "", 1, 1, 1)


def kind(tag: str, spec: Any) -> m.Kind:
    return m.Kind(tag, msgspec.Raw(msgspec.msgpack.encode(spec)))


KINDS = [
    kind("descriptor", None),
    kind("socket", [1, 1, 0, None]),
    kind("file", ["reader", ["rb", None, False, None], None]),
    kind("file", ["", ["rb", None, True, 0.5], None]),
    kind("connection", ["multiprocessing", True, True]),
    kind("memory", [4096, False]),
    kind("array", [4096, False, "<f8", [8], 0, [8]]),
    kind("nobody's", {}),
]
NOBODY = m.Registrant(1, 2, 3, "x")
# What the answers are made of: every reply, with values that make sense.
GOOD: list[Any] = [
    WELCOME,
    m.Proved(b"x" * 32),
    m.Registered("a", 1),
    *(m.Given("a", 1, each, {}) for each in KINDS),
    m.Given("a", 1, KINDS[0], {}, lease=True),
    m.GivenMany([m.GivenItem("a", 1, KINDS[0], 1), m.GivenItem("b", 2, KINDS[1], 1)]),
    m.Followed(1, kind=KINDS[0]),
    m.Followed(1, slot=3, stamp=1, page=5),
    m.Followed(2, slot=3, page=5, mapped=True, kind=KINDS[0]),
    m.Done(),
    m.NameList(["a", "b"]),
    m.NameList(["a"], more=True),
    m.InfoList([]),
    m.SnapshotPart(1, {"a": 1}),
    m.Event(2, "registered", "a", 2),
    m.Overflowed(),
    m.Explained(True, "rule 1"),
    m.refusal(NameNotFound("a")),
    m.refusal(AccessDenied("fetch", "a", 1, "rule 1")),
    m.refusal(BadRequest("a")),
]


FITTING: dict[type, list[Any]] = {
    m.Register: [m.Registered("a", 1)],
    m.Rename: [m.Registered("b", 1)],
    m.Unregister: [m.Done()],
    m.Ping: [m.Done()],
    m.Names: [reply for reply in GOOD if type(reply) is m.NameList],
    m.Info: [m.InfoList([])],
    m.Infos: [m.InfoList([])],
    m.Explain: [m.Explained(True, "rule 1")],
    m.Follow: [reply for reply in GOOD if type(reply) is m.Followed],
    m.FetchMany: [reply for reply in GOOD if type(reply) is m.GivenMany],
    **{key: [r for r in GOOD if type(r) is m.Given] for key in (m.Fetch, m.Take, m.Bind)},
}


class Answers:
    """Answers from a seed, each with the descriptors that go with it."""

    def __init__(self, seed: int) -> None:
        self.fuzzer = Fuzzer(seed)
        self.random = self.fuzzer.random
        pair = socket.socketpair()
        pipe = os.pipe()
        memory = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, 4096)
        page = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        os.ftruncate(page, 4096)
        fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        files = [os.open(path, os.O_RDWR) for path in (os.devnull, "/dev/zero")]
        self.fds = [*(sock.detach() for sock in pair), *pipe, memory, page, *files]

    def close(self) -> None:
        self.fuzzer.close()
        for fd in self.fds:
            os.close(fd)

    def body(self, request: Any = None) -> bytes:
        chance = self.random.random()
        fitting = FITTING.get(type(request), GOOD) if self.random.random() < 0.8 else GOOD
        good = self.random.choice(fitting)
        if chance < 0.6:
            return m.encode(good)
        if chance < 0.65:
            return self.random.randbytes(self.random.randrange(60))
        if chance < 0.8:
            return self.fuzzer.flipped(m.encode(good))
        fields = msgspec.msgpack.decode(m.encode(good))
        fields[self.random.choice([*fields, "new"])] = self.random.choice(ODD)
        try:
            return msgspec.msgpack.encode(fields)
        except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError):
            return m.encode(good)

    def answer(self, sock: socket.socket, id: int, request: Any) -> bool:
        """False after what ends the connection."""
        if self.random.random() < 0.02:
            sock.sendall(self.fuzzer.broken_frame())
            return False
        if self.random.random() < 0.05:
            id = self.random.choice([0, id + 1, id - 1 & 0xFFFFFFFF, 2**32 - 1])
        came = announced = self.random.choice([0, 0, 1, 1, 1, 2, 3])
        if self.random.random() < 0.02:
            announced = self.random.randrange(4)
        body = self.body(request)
        fds = self.random.choices(self.fds, k=came)
        socket.send_fds(sock, [header(len(body), announced, id) + body], fds)
        return True


class HostileServer(threading.Thread):
    """Accepts, and answers each request with something."""

    def __init__(self, path: Path, answers: Answers) -> None:
        super().__init__()
        self.listener = listen(path)
        self.answers = answers
        self.inputs = 0

    def run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(20)
                try:
                    self.serve(sock)
                except OSError:
                    pass

    def serve(self, sock: socket.socket) -> None:
        receiver: Receiver[int] = Receiver()
        while True:
            data, fds, _, _ = socket.recv_fds(sock, 65536, 253)
            if not data:
                return
            frames = receiver.feed(data, fds)
            # Before any answer, at which the client may be gone.
            for fd in (*receiver.drain(), *(fd for frame in frames for fd in frame.descriptors)):
                os.close(fd)
            for frame in frames:
                if frame.id == 0:
                    body = m.encode(WELCOME)
                    sock.sendall(header(len(body), 0, 0) + body)
                    continue
                self.inputs += 1
                if not self.answers.answer(sock, frame.id, m.decode_request(frame.body)):
                    return

    def close(self) -> None:
        self.listener.socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self.listener.close()


@pytest.fixture
def hostile(folder: Path, seed: int) -> Iterator[HostileServer]:
    with ExitStack() as stack:
        answers = Answers(seed)
        stack.callback(answers.close)
        server = HostileServer(folder / "hostile.sock", answers)
        stack.callback(server.close)
        server.start()
        yield server


def let_go(found: Any) -> None:
    for obj in found.values() if isinstance(found, dict) else found if found else ():
        discard(obj)


def follow(client: Any) -> Any:
    follower = client.follow("a")
    return follower.current() if isinstance(follower, AsyncFollower) else follower


VERBS: dict[str, Callable[[Any], Any]] = {
    "follow": follow,
    "register": lambda client: client.register("a", 0),
    "fetch": lambda client: client.fetch("a"),
    "fetch_raw": lambda client: client.fetch_raw("a"),
    "fetch_many": lambda client: client.fetch_many(["a", "b"]),
    "take": lambda client: client.take("a", timeout=0),
    "unregister": lambda client: client.unregister("a"),
    "rename": lambda client: client.rename("a", "b"),
    "bind": lambda client: client.bind("a", "tcp://127.0.0.1:0"),
    "names": lambda client: client.names(),
    "info": lambda client: client.info("a"),
    "infos": lambda client: client.infos(),
    "explain": lambda client: client.explain("fetch", "a", uid=1, gid=1),
    "stats": lambda client: client.stats(),
    "ping": lambda client: client.ping(),
}


def test_every_reply_is_among_the_answers() -> None:
    made = {type(reply) for reply in GOOD}
    assert set(get_args(m.AnyReply)) - made <= {m.StatsReply}


@pytest.mark.timeout(600)
def test_a_blocking_client(
    hostile: HostileServer, times: Callable[[int], int], counted: dict[str, Any]
) -> None:
    ends: Counter[str] = Counter()
    wanted, dice = times(3_000), random.Random(hostile.answers.random.random())
    while hostile.inputs < wanted:
        with Client(hostile.listener.address, timeout=0.03, reconnect=0.0) as client:
            for _ in range(20):
                verb = dice.choice([*VERBS])
                try:
                    found = VERBS[verb](client)
                except FdshareError as error:
                    ends[type(error).__name__] += 1
                else:
                    ends["answered"] += 1
                    (let_go if verb in ("fetch_many", "fetch_raw") else discard)(found)
    counted.update({"inputs": hostile.inputs, **ends})
    assert ends["answered"]
    assert ends["ProtocolError"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_asynchronous_client(
    hostile: HostileServer, times: Callable[[int], int], counted: dict[str, Any], backend: str
) -> None:
    ends: Counter[str] = Counter()
    wanted, dice = times(1_500), random.Random(hostile.answers.random.random())

    async def main() -> None:
        while hostile.inputs < wanted:
            try:
                await some()
            except FdshareError as error:
                ends[type(error).__name__] += 1

    async def some() -> None:
        address = hostile.listener.address
        async with fdshare.aio.connect(address, timeout=0.03, reconnect=0.0) as client:
            for _ in range(20):
                verb = dice.choice([*VERBS])
                try:
                    found = await VERBS[verb](client)
                except FdshareError as error:
                    ends[type(error).__name__] += 1
                else:
                    ends["answered"] += 1
                    (let_go if verb in ("fetch_many", "fetch_raw") else discard)(found)

    anyio.run(main, backend=backend)
    counted.update({"inputs": hostile.inputs, **ends})
    assert ends["answered"]


def test_the_framing_alone(seed: int, times: Callable[[int], int], counted: dict[str, Any]) -> None:
    """Bytes of any sort, cut anywhere: frames or an error, and no descriptor is lost."""
    answers = Answers(seed)
    dice = answers.random
    frames = failures = 0
    try:
        for _ in range(times(90_000)):
            receiver: Receiver[int] = Receiver()
            stream, owed = b"", dice.randrange(4)
            for _ in range(dice.randrange(1, 4)):
                body = answers.body()
                count = dice.choice([0, 0, 1, 2])
                stream += struct.pack(HEADER.format, len(body), count, m.VERSION, 0, 1) + body
            data = answers.fuzzer.flipped(stream) if dice.random() < 0.5 else stream
            given, kept = list(range(owed)), []
            at = 0
            while at < len(data) and receiver.failure is None:
                step = dice.randrange(1, len(data) - at + 1)
                for frame in receiver.feed(data[at : at + step], given):
                    kept += frame.descriptors
                    frames += 1
                at, given = at + step, []
            failures += receiver.failure is not None
            assert sorted([*kept, *receiver.drain(), *given]) == list(range(owed))
    finally:
        answers.close()
    counted.update({"frames": frames, "failures": failures})
