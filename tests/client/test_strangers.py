"""Servers that are not ours, not well or not there; and the way back to one that is."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import fdshare.aio
import fdshare.client.asynchronous.pipeline
import fdshare.client.blocking.client
from fdshare.client.blocking.client import Client
from fdshare.errors import (
    AuthenticationFailed,
    EndpointError,
    FdshareError,
    FetchTimeout,
    NoServer,
    ProtocolError,
    QuotaExceeded,
    ServerGone,
    ServerTimeout,
    UntrustedServer,
    VersionMismatch,
)
from fdshare.kernel.endpoint import listen
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, Receiver, header

KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))
WELCOME = m.Welcome(m.MAGIC, m.VERSION, 1, "epoch", 1 << 20, 253, 100)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


def frame(reply: Any, id: int = 0, count: int = 0) -> bytes:
    body = reply if isinstance(reply, bytes) else m.encode(reply)
    return header(len(body), count, id) + body


class Stranger:
    """A server that does with each connection what it is told to, in a thread."""

    def __init__(self, address: Any, behave: Callable[[socket.socket], None]) -> None:
        self.listener = listen(address)
        self.address = self.listener.address
        self.behave = behave
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self.behave(connection)
                except OSError:
                    pass

    def close(self) -> None:
        self.listener.socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.thread.join()
        self.listener.close()


@pytest.fixture
def stranger(folder: Path) -> Iterator[Callable[..., Stranger]]:
    with ExitStack() as stack:

        def make(behave: Callable[[socket.socket], None]) -> Stranger:
            made = Stranger(folder / "stranger.sock", behave)
            stack.callback(made.close)
            return made

        yield make


def requests(connection: socket.socket) -> Iterator[tuple[int, Any]]:
    """(id, request) of all that come, the Hello first; their descriptors are closed."""
    receiver: Receiver[int] = Receiver()
    while True:
        data, fds, _, _ = socket.recv_fds(connection, 65536, 253)
        if not data:
            return
        for each in receiver.feed(data, fds):
            for fd in each.descriptors:
                os.close(fd)
            yield each.id, m.decode_request(each.body)


def answering(reply: Any, fds: int = 0, *, announce: int | None = None) -> Any:
    """A server that answers every request so, with so many descriptors."""

    def behave(connection: socket.socket) -> None:
        for id, request in requests(connection):
            if type(request) is m.Hello:
                connection.sendall(frame(WELCOME))
                continue
            answer = reply(id, request) if callable(reply) else reply
            data = frame(answer, id, fds if announce is None else announce)
            with open(os.devnull) as null:
                socket.send_fds(connection, [data], [null.fileno()] * fds)

    return behave


def hang_up(connection: socket.socket) -> None:
    pass


def say(data: bytes) -> Callable[[socket.socket], None]:
    """Says *data*, then nothing, until the client goes."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(data)
        while connection.recv(65536):
            pass

    return behave


# Not well


def test_one_that_closes_at_once(stranger: Callable[..., Stranger]) -> None:
    with Client(stranger(hang_up).address, reconnect=0.05) as client:
        with pytest.raises(ServerGone) as caught:
            client.ping()
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.address == client.address


@pytest.mark.parametrize("cut", [1, HEADER.size - 1, HEADER.size, HEADER.size + 5])
def test_one_that_closes_in_the_middle(stranger: Callable[..., Stranger], cut: int) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(frame(WELCOME)[:cut])

    with Client(stranger(behave).address, reconnect=0.05) as client, pytest.raises(ServerGone):
        client.ping()


def test_one_that_ends_in_the_middle_of_any_verb(stranger: Callable[..., Stranger]) -> None:
    """The request arrived, with its descriptors; the answer never comes."""
    arrived: set[str] = set()

    def behave(connection: socket.socket) -> None:
        for _, request in requests(connection):
            if type(request) is not m.Hello:
                arrived.add(type(request).__name__)
                return

    with Client(stranger(behave).address, reconnect=0.02) as client:
        for verb, _ in VERBS.values():
            with pytest.raises(ServerGone):
                verb(client)
    assert len(arrived) == len(VERBS)


@pytest.mark.parametrize("said", [b"", frame(WELCOME)[:20], frame(WELCOME)], ids=len)
def test_one_that_says_no_more(stranger: Callable[..., Stranger], said: bytes) -> None:
    with Client(stranger(say(said)).address, timeout=0.1) as client:
        start = time.monotonic()
        with pytest.raises(ServerTimeout) as caught:
            client.ping()
        assert time.monotonic() - start >= 0.1
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.timeout == pytest.approx(0.1)
        with pytest.raises(ServerTimeout) as caught:
            client.fetch("x", timeout=0.1)
        assert caught.value.timeout == pytest.approx(0.2)


def silent_after_one_answer() -> Callable[[socket.socket], None]:
    """A server that answers one request on its first connection, and every one on the next."""

    def fall_silent(connection: socket.socket) -> None:
        for id, request in requests(connection):
            if id < 2:
                connection.sendall(frame(WELCOME if type(request) is m.Hello else m.Done(), id))

    behave = iter((fall_silent, answering(m.Done())))
    return lambda connection: next(behave)(connection)


def test_a_connection_without_answers_is_given_up(stranger: Callable[..., Stranger]) -> None:
    """A server that hangs in its end does not close it; another one answers at the path."""
    with Client(stranger(silent_after_one_answer()).address, timeout=1.0) as client:
        client.ping()
        with pytest.raises(ServerTimeout):
            client.ping()
        client.ping()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_asynchronous_client_gives_it_up_too(
    stranger: Callable[..., Stranger], backend: str
) -> None:
    address = stranger(silent_after_one_answer()).address

    async def main() -> None:
        async with fdshare.aio.connect(address, timeout=1.0) as client:
            with pytest.raises(ServerTimeout):
                await client.ping()
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(client.ping)

    anyio.run(main, backend=backend)


def silent_after_a_snapshot(successor: float = 0.0) -> Callable[[socket.socket], None]:
    """A server that sends a watch a snapshot on its first connection, and another on the next, to
    who stays for *successor* seconds."""

    def watched(serial: int) -> Callable[[socket.socket], None]:
        def behave(connection: socket.socket) -> None:
            for id, request in requests(connection):
                if type(request) is m.Hello:
                    connection.sendall(frame(WELCOME))
                elif type(request) is m.Watch:
                    if serial > 1:
                        select.select([connection], [], [], successor)
                    connection.sendall(frame(m.SnapshotPart(serial, {"x": serial}), id))
                elif serial > 1 or id < 2:
                    connection.sendall(frame(m.Done(), id))

        return behave

    behave = iter((watched(1), watched(2)))
    return lambda connection: next(behave)(connection)


def quiet(connection: socket.socket) -> None:
    """A server where nothing changes before a watch has asked three times whether it is there."""
    watch, asked = 0, 0
    for id, request in requests(connection):
        if type(request) is m.Hello:
            connection.sendall(frame(WELCOME))
        elif type(request) is m.Watch:
            watch = id
            connection.sendall(frame(m.SnapshotPart(1, {"x": 1}), id))
        else:
            asked += bool(watch)
            connection.sendall(frame(m.Done(), id))
            if asked == 3:
                connection.sendall(frame(m.Event(2, "registered", "y", 2)))


def deaf_to_watches(connection: socket.socket) -> None:
    for _, request in requests(connection):
        if type(request) is m.Hello:
            connection.sendall(frame(WELCOME))


def test_a_watch_says_how_long_it_has_waited(stranger: Callable[..., Stranger]) -> None:
    with (
        Client(stranger(deaf_to_watches).address, timeout=0.3) as client,
        client.watch() as watch,
        pytest.raises(ServerTimeout, match=r"did not answer within 0\.3 s"),
    ):
        next(watch)


@pytest.mark.parametrize(
    ("behave", "held"),
    [
        (silent_after_a_snapshot, {"x": 2}),
        (lambda: silent_after_a_snapshot(0.1), {"x": 2}),
        (lambda: quiet, {"x": 1, "y": 2}),
    ],
    ids=["silent", "successor", "quiet"],
)
def test_a_watch_gives_up_a_connection_without_answers(
    stranger: Callable[..., Stranger], behave: Callable[[], Any], held: dict[str, int]
) -> None:
    """A server that hangs in its end will never tell it that it has ended."""
    with Client(stranger(behave()).address, timeout=1.5) as client, client.watch() as watch:
        next(watch)
        assert watch.held == {"x": 1}
        next(watch)
        assert watch.held == held


def test_a_watch_looks_for_a_server_that_ended_while_nobody_listened(
    stranger: Callable[..., Stranger],
) -> None:
    """The time that its user takes for an item is not the server's."""

    def snapshot(serial: int) -> Callable[[socket.socket], None]:
        def behave(connection: socket.socket) -> None:
            for id, request in requests(connection):
                if type(request) is m.Hello:
                    connection.sendall(frame(WELCOME))
                else:
                    connection.sendall(frame(m.SnapshotPart(serial, {"x": serial}), id))
                    if serial == 1:
                        return

        return behave

    behave = iter((snapshot(1), snapshot(2)))
    address = stranger(lambda connection: next(behave)(connection)).address
    with Client(address, timeout=5.0) as client, client.watch() as watch:
        next(watch)
        watch._heard_at -= 1000  # seconds for this item
        assert next(watch).reason == "reconnect"
        assert watch.held == {"x": 2}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("behave", "held"),
    [
        (silent_after_a_snapshot, {"x": 2}),
        (lambda: silent_after_a_snapshot(0.1), {"x": 2}),
        (lambda: quiet, {"x": 1, "y": 2}),
    ],
    ids=["silent", "successor", "quiet"],
)
def test_an_asynchronous_watch_gives_it_up_too(
    stranger: Callable[..., Stranger],
    backend: str,
    behave: Callable[[], Any],
    held: dict[str, int],
) -> None:
    address = stranger(behave()).address

    async def main() -> None:
        async with fdshare.aio.connect(address, timeout=1.5) as client, client.watch() as watch:
            await anext(watch)
            assert watch.held == {"x": 1}
            await anext(watch)
            assert watch.held == held

    anyio.run(main, backend=backend)


def silent_to_a_wait() -> Callable[[socket.socket], None]:
    """A server that answers nothing from a wait on, on its first connection; then one that does."""

    def fall_silent(connection: socket.socket) -> None:
        waits = False
        for id, request in requests(connection):
            waits = waits or type(request) is m.Wait
            if not waits:
                connection.sendall(frame(WELCOME if type(request) is m.Hello else m.Done(), id))

    behave = iter((fall_silent, answering(m.Registered("x", 7))))
    return lambda connection: next(behave)(connection)


def registered_late(connection: socket.socket) -> None:
    """A server where a name is registered when it was asked twice whether it is there."""
    waits, asked = 0, 0
    for id, request in requests(connection):
        if type(request) is m.Hello:
            connection.sendall(frame(WELCOME))
        elif type(request) is m.Wait:
            waits = id
        else:
            asked += bool(waits)
            connection.sendall(frame(m.Done(), id))
            if asked == 2:
                connection.sendall(frame(m.Registered("x", 7), waits))


WAITED_FOR = pytest.mark.parametrize(
    "behave", [silent_to_a_wait, lambda: registered_late], ids=["silent", "late"]
)
WAITS = pytest.mark.parametrize("timeout", [None, 3600])


@WAITS
@WAITED_FOR
def test_a_wait_gives_up_a_connection_without_answers(
    stranger: Callable[..., Stranger], behave: Callable[[], Any], timeout: float | None
) -> None:
    """It may last for ever, so it would never notice."""
    with Client(stranger(behave()).address, timeout=0.4) as client:
        assert client.wait("x", timeout=timeout).generation == 7


@WAITS
def test_a_wait_gives_up_a_server_that_never_said_anything(
    stranger: Callable[..., Stranger], timeout: float | None
) -> None:
    """Who has not said whether it has the key is asked nothing else."""
    sent: list[Any] = []

    def silent(connection: socket.socket) -> None:
        sent.extend(request for _, request in requests(connection))

    behave = iter((silent, say(frame(WELCOME))))
    address = stranger(lambda connection: next(behave)(connection)).address
    with (
        Client(address, authkey=b"k" * 32, timeout=0.3) as client,
        pytest.raises(AuthenticationFailed),
    ):
        client.wait("x", timeout=timeout)
    assert [type(request) for request in sent] == [m.Hello]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@WAITS
@WAITED_FOR
def test_an_asynchronous_wait_gives_it_up_too(
    stranger: Callable[..., Stranger],
    backend: str,
    behave: Callable[[], Any],
    timeout: float | None,
) -> None:
    address = stranger(behave()).address

    async def main() -> None:
        async with fdshare.aio.connect(address, timeout=0.4) as client:
            assert (await client.wait("x", timeout=timeout)).generation == 7

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_server_that_ends_each_connection_at_once_for_long(
    stranger: Callable[..., Stranger], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The pause was a power of two: OverflowError, after three minutes."""
    monkeypatch.setattr(fdshare.client.asynchronous.pipeline, "_FIRST_PAUSE", 0.0)
    behave = iter((*[hang_up] * 1100, answering(m.Done())))
    address = stranger(lambda connection: next(behave)(connection)).address

    async def main() -> None:
        async with fdshare.aio.connect(address, timeout=None, reconnect=60) as client:
            await client.ping()

    anyio.run(main, backend=backend)


GARBAGE = {
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "long": HEADER.pack(0xFFFFFFFF, 0, m.VERSION, 0, 0),
    "many": HEADER.pack(4, 254, m.VERSION, 0, 0) + b"body",
    "reserved": HEADER.pack(0, 0, m.VERSION, 9, 0),
    "body": frame(b"\xc1"),
    "no-map": frame(b"\x01"),
    "request": frame(m.encode(m.Ping())),
    "unknown": frame(b"\x81\xa4type\xa7explode"),
    "magic": frame(m.Welcome("ftp", m.VERSION, 1, "", 1, 1, 1)),
    "lost": frame(WELCOME, count=3),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
def test_one_that_speaks_something_else(stranger: Callable[..., Stranger], said: bytes) -> None:
    with Client(stranger(say(said)).address, timeout=5, reconnect=0.05) as client:
        for _ in range(2):
            with pytest.raises(ProtocolError) as caught:
                client.ping()
            assert isinstance(caught.value, ConnectionError)


def test_one_of_another_version(stranger: Callable[..., Stranger]) -> None:
    newer = m.Welcome(m.MAGIC, m.VERSION + 1, 1, "", 1, 1, 1)
    for said in (HEADER.pack(0, 0, m.VERSION + 1, 0, 0), frame(newer)):
        made = Stranger(f"{stranger.__name__}-{os.getpid()}.sock", say(said))
        try:
            with (
                Client(made.address, timeout=5) as client,
                pytest.raises(VersionMismatch) as caught,
            ):
                client.ping()
        finally:
            made.close()
            os.unlink(made.address + ".lock")
        assert (caught.value.theirs, caught.value.ours) == (m.VERSION + 1, m.VERSION)


ANSWERS = {
    "done": m.Done(),
    "registered": m.Registered("x", 1),
    "given": m.Given("x", 1, KIND),
    "givenmany": m.GivenMany([]),
    "followed": m.Followed(1),
    "names": m.NameList(["x"]),
    "infos": m.InfoList([]),
    "explained": m.Explained(True, ""),
    "snapshot": m.SnapshotPart(1, {}),
}
VERBS: dict[str, tuple[Callable[[Client], Any], str]] = {
    "ping": (lambda c: c.ping(), "done"),
    "register": (lambda c: c.register("x", 0), "registered"),
    "fetch": (lambda c: c.fetch("x"), "given"),
    "fetch_many": (lambda c: c.fetch_many(["x"]), ""),
    "follow": (lambda c: c.follow("x"), ""),
    "take": (lambda c: c.take("x"), ""),
    "unregister": (lambda c: c.unregister("x"), "done"),
    "rename": (lambda c: c.rename("x", "y"), "registered"),
    "names": (lambda c: c.names(), "names"),
    "info": (lambda c: c.info("x"), ""),
    "infos": (lambda c: c.infos(), "infos"),
    "bind": (lambda c: c.bind("x", "tcp://127.0.0.1:0"), "given"),
    "explain": (lambda c: c.explain("fetch", "x", 0, 0), "explained"),
    "stats": (lambda c: c.stats(), ""),
}


@pytest.mark.parametrize("fds", [0, 1, 5])
@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_do_not_fit(stranger: Callable[..., Stranger], answer: str, fds: int) -> None:
    """Every verb meets every answer, with descriptors or without: an error, and none is left."""
    with Client(stranger(answering(ANSWERS[answer], fds)).address, timeout=5) as client:
        for verb, fitting in VERBS.values():
            if answer == fitting and fds == (answer == "given"):
                continue
            try:
                result = verb(client)
            except (FdshareError, KeyError):
                continue
            assert answer == fitting or result is None
            if hasattr(result, "close"):
                result.close()


@pytest.mark.parametrize(
    "items",
    [
        [m.GivenItem("y", 1, KIND, 1)],
        [m.GivenItem("x", 1, KIND, 2)],
        [m.GivenItem("x", 1, KIND, -1)],
        [m.GivenItem("x", 1, KIND, 1), m.GivenItem("z", 1, KIND, 0)],
    ],
    ids=["name", "more", "less", "others"],
)
def test_items_that_do_not_fit(stranger: Callable[..., Stranger], items: list[m.GivenItem]) -> None:
    address = stranger(answering(m.GivenMany(items), 1)).address
    with Client(address, timeout=5) as client, pytest.raises(ProtocolError):
        client.fetch_many(["x", "y"])


def test_announced_and_not_sent(stranger: Callable[..., Stranger]) -> None:
    behave = answering(m.Given("x", 1, KIND), 0, announce=1)
    with Client(stranger(behave).address, timeout=5) as client, pytest.raises(ProtocolError):
        client.fetch("x")


def test_answers_to_what_was_not_asked(stranger: Callable[..., Stranger]) -> None:
    """They are closed and passed over; the right one comes after them."""

    def behave(connection: socket.socket) -> None:
        for id, request in requests(connection):
            if type(request) is m.Hello:
                connection.sendall(frame(WELCOME))
                continue
            with open(os.devnull) as null:
                late = frame(m.Given("x", 1, KIND), id + 7, 2)
                socket.send_fds(connection, [late], [null.fileno()] * 2)
                socket.send_fds(connection, [frame(m.Given("x", 1, KIND), id, 1)], [null.fileno()])

    with Client(stranger(behave).address, timeout=5) as client:
        client.fetch("x").close()
        client.fetch("x").close()


def test_the_reason_for_the_closed_door(stranger: Callable[..., Stranger]) -> None:
    full = m.refusal(QuotaExceeded("max_connections", 5, 5))

    def behave(connection: socket.socket) -> None:
        connection.sendall(frame(full))

    with Client(stranger(behave).address, reconnect=0.1) as client:
        with pytest.raises(QuotaExceeded) as caught:
            client.ping()
        assert caught.value.what == "max_connections"


# Not ours


@needs_root
def test_one_of_another_user(folder: Path, child: Any) -> None:
    folder.chmod(0o777)
    address = str(folder / "other.sock")
    process = child(
        """
        import os, sys
        from fdshare.kernel.endpoint import listen
        from barepeer import Peer
        os.setgid(12345); os.setuid(12345)
        listener = listen(sys.argv[1], mode=0o666)
        print("listening", flush=True)
        kept = []
        while True:
            kept.append(listener.accept())
        """,
        address,
    )
    assert process.stdout.readline() == "listening\n"
    with Client(address) as client:
        with pytest.raises(UntrustedServer) as caught:
            client.ping()
        assert isinstance(caught.value, PermissionError)
        assert caught.value.uid == 12345
    with Client(address, trust=[12345], timeout=0.1) as client, pytest.raises(ServerTimeout):
        client.ping()


@needs_root
def test_a_user_who_may_not_connect(
    folder: Path, serve: Callable[..., Manager], child: Any
) -> None:
    folder.chmod(0o755)
    process = child(
        """
        import os, sys
        from fdshare.client.blocking.client import Client
        from fdshare.errors import EndpointError
        os.setgid(12345); os.setuid(12345)
        try:
            Client(sys.argv[1]).ping()
        except EndpointError as error:
            print(error.errno, error, flush=True)
        """,
        serve().address,
    )
    said = process.stdout.readline()
    assert said.startswith("13 ")
    assert "mode 0600" in said


@needs_root
def test_a_user_whom_the_policy_refuses(
    folder: Path, serve: Callable[..., Manager], child: Any
) -> None:
    folder.chmod(0o755)
    process = child(
        """
        import os, sys
        from fdshare.client.blocking.client import Client
        from fdshare.errors import AccessDenied
        os.setgid(12345); os.setuid(12345)
        client = Client(sys.argv[1])
        client.ping()
        for call in (lambda: client.fetch("x"), lambda: client.register("x", 0), client.names,
                     lambda: client.take("x"), client.stats, client.shutdown, client.infos):
            try:
                call()
            except AccessDenied as error:
                assert error.uid == 12345 and error.rule, error
                print(error.verb, flush=True)
        """,
        serve(mode=0o666).address,
    )
    said = process.stdout.read().split()
    assert said == ["fetch", "register", "list", "take", "stats", "shutdown", "list"]


@needs_root
def test_a_user_who_may_not_bind_anew_what_is_gone(
    folder: Path, serve: Callable[..., Manager], child: Any
) -> None:
    """The refusal of that was raised, which is about binding and not about what is held."""
    folder.chmod(0o755)
    policy = folder / "policy.toml"
    policy.write_text('[[rule]]\neffect = "allow"\nverbs = ["*"]\n')
    server = serve(mode=0o666, policy=policy)
    address = f"unix://{folder}/bound"
    with Client(server.address) as client:
        client.bind("app", address).close()
    (folder / "bound").unlink()
    process = child(
        """
        import anyio, asyncio, os, sys
        import fdshare.aio
        from fdshare.errors import EndpointError
        anyio.run(anyio.sleep, 0)  # imports what others could not: it may be under /root
        os.setgid(12345); os.setuid(12345)
        async def bind():
            async with fdshare.aio.connect(sys.argv[1]) as client:
                await client.bind("app", sys.argv[2])
        for call in (lambda: fdshare.connect(sys.argv[1]).bind("app", sys.argv[2]),
                     lambda: asyncio.run(bind())):
            try:
                call()
            except EndpointError as error:
                print(error, flush=True)
        """,
        server.address,
        address,
    )
    said = process.stdout.read().splitlines()
    assert len(said) == 2
    assert all("'app' is held, but" in line for line in said)


# Not there


@pytest.mark.parametrize("make", ["nothing", "folder", "file", "directory", "stale"])
def test_paths_without_a_server(folder: Path, make: str) -> None:
    path = folder / "x.sock"
    expected: type[Exception] = NoServer
    if make == "folder":
        path = folder / "absent" / "x.sock"
    elif make == "file":
        path.write_text("keep me")
        expected = EndpointError
    elif make == "directory":
        path.mkdir()
        expected = EndpointError
    elif make == "stale":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    with Client(path) as client, pytest.raises(expected) as caught:
        client.ping()
    assert isinstance(caught.value, OSError)
    assert caught.value.errno
    assert str(path) in str(caught.value)
    if make in ("nothing", "folder", "stale"):
        assert isinstance(caught.value, FileNotFoundError)
        assert "fdshare serve" in str(caught.value)


@pytest.mark.parametrize("length", [107, 108, 109, 200])
def test_long_paths(folder: Path, serve: Callable[..., Manager], length: int) -> None:
    name = "x.sock"
    path = f"{folder}/{'d' * (length - len(str(folder)) - len(name) - 2)}/{name}"
    os.mkdir(os.path.dirname(path))
    assert len(path) == length
    with Client(serve(path).address) as client:
        client.ping()
        assert client.address == path


def test_abstract_names(serve: Callable[..., Manager]) -> None:
    name = f"@fdshare-test-{os.getpid()}"
    with Client(serve(name).address) as client:
        client.ping()
    with Client(name + "-absent") as client, pytest.raises(NoServer):
        client.ping()


def test_connect_says_at_once(folder: Path, server: Any) -> None:
    with pytest.raises(NoServer):
        fdshare.client.blocking.client.connect(folder / "absent")
    fdshare.client.blocking.client.connect(server.address).close()


# Authkeys


def test_authkeys(serve: Callable[..., Manager]) -> None:
    address = serve(authkey=b"secret").address
    with Client(address, authkey=b"secret") as client, socket.socket() as sock:
        client.register("x", sock)
        client.fetch("x").close()
        client.take("x").close()
    for wrong in (b"guess", b"Secret"):
        with Client(address, authkey=wrong) as client:
            for _ in range(2):
                with pytest.raises(AuthenticationFailed) as caught:
                    client.ping()
                assert isinstance(caught.value, PermissionError)
    with Client(address) as client, socket.socket() as sock:
        for call in (client.ping, client.names, lambda: client.register("y", sock)):
            with pytest.raises(AuthenticationFailed) as caught:
                call()
            assert "authkey=" in str(caught.value)


def test_a_server_without_an_authkey(server: Any) -> None:
    """Proves nothing, so a client that was given one does not believe it."""
    with Client(server.address, authkey=b"x") as client, pytest.raises(AuthenticationFailed):
        client.ping()


def challenged(answer: Callable[[m.Hello, m.Prove], Any]) -> Callable[[socket.socket], None]:
    """A server that asks for an authkey and has none."""

    def behave(connection: socket.socket) -> None:
        hello: Any = None
        for id, request in requests(connection):
            if type(request) is m.Hello:
                hello = request
                connection.sendall(
                    frame(msgspec.structs.replace(WELCOME, nonce=hello.nonce))  # reflected
                )
            elif type(request) is m.Prove:
                connection.sendall(frame(answer(hello, request), id))

    return behave


@pytest.mark.parametrize(
    "answer",
    [
        lambda hello, prove: m.Proved(prove.mac),  # reflected, for the same nonces
        lambda hello, prove: m.Proved(b""),
        lambda hello, prove: m.Done(),
        lambda hello, prove: WELCOME,
        lambda hello, prove: m.Given("x", 1, KIND),
    ],
    ids=["reflect", "empty", "done", "welcome", "given"],
)
def test_a_server_that_pretends_to_know(
    stranger: Callable[..., Stranger], answer: Callable[..., Any]
) -> None:
    address = stranger(challenged(answer)).address
    client = Client(address, authkey=b"secret", timeout=1)
    with client, pytest.raises((AuthenticationFailed, ProtocolError, ServerTimeout)):
        client.ping()


# The way back


def killed(manager: Manager) -> None:
    process = manager._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_server_that_comes_back(folder: Path, serve: Callable[..., Manager]) -> None:
    path = str(folder / "again.sock")
    first = serve(path)
    with Client(path, reconnect=20) as client, socket.socket() as sock:
        client.register("x", sock)
        killed(first)
        second = Manager(path, keeper=False)
        thread = threading.Thread(target=second.start)
        thread.start()
        try:
            client.register("y", sock)  # looked for it, found it, registered once
        finally:
            thread.join()
        with second:
            assert client.names() == ["y"]


def test_a_server_that_does_not_come_back(folder: Path, serve: Callable[..., Manager]) -> None:
    manager = serve(str(folder / "gone.sock"))
    with Client(manager.address, reconnect=0.1) as client:
        client.ping()
        killed(manager)
        start = time.monotonic()
        with pytest.raises(ServerGone) as caught:
            client.ping()
        assert time.monotonic() - start >= 0.1
        assert caught.value.address == manager.address


def test_a_server_that_ends_while_somebody_waits(
    folder: Path, serve: Callable[..., Manager], until: Callable[..., Any]
) -> None:
    manager = serve(str(folder / "gone.sock"))
    caught: list[Exception] = []

    def wait() -> None:
        with Client(manager.address, reconnect=0.1) as client:
            try:
                client.fetch("x", timeout=60)
            except ServerGone as error:
                caught.append(error)

    thread = threading.Thread(target=wait)
    with Client(manager.address) as client:
        thread.start()
        until(lambda: client.stats().connections == 2, "the other to wait")
    killed(manager)
    thread.join()
    assert len(caught) == 1


def test_a_repeat_is_the_same_request(stranger: Callable[..., Stranger]) -> None:
    """The answer is lost with the connection: again under its session and id, with its
    descriptors, and of the wait what is left."""
    seen: list[tuple[str, int, Any]] = []
    session = ""

    def behave(connection: socket.socket) -> None:
        nonlocal session
        for id, request in requests(connection):
            if type(request) is m.Hello:
                session = request.session
                connection.sendall(frame(WELCOME))
                continue
            seen.append((session, id, request))
            if len(seen) % 3 == 0:
                reply = m.Registered("x", 5) if type(request) is m.Register else m.Done()
                connection.sendall(frame(reply, id))
            else:
                return

    with Client(stranger(behave).address, reconnect=20) as client:
        with open(os.devnull) as null:
            assert client.register("x", null).generation == 5
        assert len({(session, id, m.encode(request)) for session, id, request in seen}) == 1
        client.ping()
        assert [id for _, id, _ in seen] == [1, 1, 1, 2, 2, 2]
        seen.clear()
        with pytest.raises(ProtocolError):  # it answers Done
            client.fetch("x", timeout=1000.0)
        waits = [request.wait for _, _, request in seen]
        assert waits == sorted(waits, reverse=True)
        assert 900 < waits[-1] < 1000 == waits[0]


def test_a_wait_ends_in_time_over_lost_connections(stranger: Callable[..., Stranger]) -> None:
    """A server that flickers cannot make a wait endless."""

    def behave(connection: socket.socket) -> None:
        for id, request in requests(connection):
            if type(request) is m.Hello:
                connection.sendall(frame(WELCOME))
            elif request.wait > 0.05:
                return
            else:
                connection.sendall(frame(m.refusal(FetchTimeout("x", request.wait)), id))

    client = Client(stranger(behave).address, reconnect=0.5)
    with client, pytest.raises((FetchTimeout, ServerGone)):
        client.fetch("x", timeout=0.2)


def test_an_interrupted_call_leaves_no_answer_behind(
    server: Any, child: Any, until: Callable[..., Any]
) -> None:
    """A signal handler that raises in the middle of a wait: the next call gets its own answer."""
    process: subprocess.Popen[str] = child(
        """
        import os, signal, socket, sys
        from fdshare.client.blocking.client import Client
        class Stop(Exception): pass
        def stop(*args): raise Stop
        signal.signal(signal.SIGUSR1, stop)
        with Client(sys.argv[1]) as client, socket.socket() as sock:
            print("waiting", flush=True)
            try:
                client.take("x", timeout=60)
            except Stop:
                client.register("x", sock)
                client.take("x", timeout=10).close()
                print(client.names(), flush=True)
        """,
        server.address,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    with Client(server.address) as client:
        until(lambda: client.stats().connections == 2, "the child to wait")
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "[]\n"
