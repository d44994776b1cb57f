"""What every client does alike: one contract, kept by the blocking one, on asyncio and on trio."""

from __future__ import annotations

import inspect
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
from conftest import census
from nursery import Manager

import fdshare
from fdshare.client.asynchronous.client import AsyncClient
from fdshare.client.asynchronous.watch import AsyncWatcher
from fdshare.client.blocking.client import Client
from fdshare.client.blocking.watch import Watcher
from fdshare.errors import (
    AuthenticationFailed,
    ClosedDescriptor,
    EndpointError,
    FetchTimeout,
    GenerationMismatch,
    InvalidArgument,
    InvalidName,
    KindMismatch,
    NameNotFound,
    NameTaken,
    NoServer,
    ServerGone,
    ServerTimeout,
    TooManyDescriptors,
    UnknownKind,
    UnsupportedKind,
    UntrustedServer,
    WatchTimeout,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory

Body: TypeAlias = Callable[[Any], Awaitable[None]]


class Awaited:
    """The blocking client in the clothes of the other: each verb can be awaited, and is done."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, verb: str) -> Any:
        call = getattr(self._client, verb)

        async def do(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        return do

    def watch(self, *args: Any, **kwargs: Any) -> Any:
        return AwaitedWatch(self._client.watch(*args, **kwargs))


class AwaitedWatch:
    def __init__(self, watch: Watcher) -> None:
        self._watch = watch

    @property
    def held(self) -> dict[str, int]:
        return self._watch.held

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._watch)
        except StopIteration:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        self._watch.close()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._watch.close()


class Runner:
    """Runs a body with a client of its kind."""

    def __init__(self, kind: str, address: str) -> None:
        self.kind = kind
        self.address = address

    def __call__(self, body: Body, **options: Any) -> None:
        if self.kind == "blocking":
            with fdshare.connect(options.pop("path", self.address), **options) as client:
                coroutine = body(Awaited(client))
                with pytest.raises(StopIteration):
                    coroutine.send(None)  # type: ignore[attr-defined]
        else:
            anyio.run(self._run, body, options, backend=self.kind)

    async def _run(self, body: Body, options: dict[str, Any]) -> None:
        async with fdshare.aio.connect(options.pop("path", self.address), **options) as client:
            await body(client)


@pytest.fixture(params=["blocking", "asyncio", "trio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(kind: str, server: Any) -> Runner:
    return Runner(kind, server.address)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def same(a: Any, b: Any) -> bool:
    """True where both are descriptors of one file, socket or pipe."""
    return os.path.samestat(os.fstat(a.fileno()), os.fstat(b.fileno()))


def later(client: Client, call: Callable[[Client], object]) -> threading.Thread:
    """*call* in a thread, at some time."""
    thread = threading.Thread(target=call, args=(client,))
    thread.start()
    return thread


# The shape of it


def public(cls: type) -> dict[str, Any]:
    """The methods that a user calls, without the mapping protocol, which has no `await`."""
    return {
        name: member
        for name, member in inspect.getmembers(cls, callable)
        if not name.startswith("_") and name not in OF_ONE
    }


# What one of them has, and why: `await` has no mapping.
OF_ONE = {"aclose", "keys", "values", "items", "get", "pop"}


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Watcher, AsyncWatcher)])
def test_both_clients_have_the_same_verbs_with_the_same_arguments(one: type, other: type) -> None:
    assert public(one).keys() == public(other).keys()
    for name, verb in public(one).items():
        mine, theirs = inspect.signature(verb), inspect.signature(public(other)[name])
        assert list(mine.parameters.values()) == list(theirs.parameters.values()), name


def test_both_ways_to_connect_have_the_same_arguments() -> None:
    mine, theirs = inspect.signature(fdshare.connect), inspect.signature(fdshare.aio.connect)
    assert list(mine.parameters.values()) == list(theirs.parameters.values())


# Register and fetch


def test_a_fetched_socket_is_the_registered_one(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        entry = await client.register("web", sock, metadata={"a": "b"})
        assert (entry.name, entry.generation) == ("web", (await client.info("web")).generation)
        with await client.fetch("web") as fetched:
            assert type(fetched) is socket.socket
            assert same(fetched, sock)
            assert fetched.getsockname() == sock.getsockname()
            assert not os.get_inheritable(fetched.fileno())

    run(body)


def test_bare_descriptors(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        await client.register("web", sock)
        (fetched,) = await client.fetch_raw("web")
        with fetched:
            assert same(fetched, sock)
        (taken,) = await client.take_raw("web")
        with taken:
            assert same(taken, sock)
        assert await client.names() == []

    run(body)


def test_many_at_once(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        names = [f"n{i}" for i in range(300)]  # more than one message carries
        for name in names:
            await client.register(name, sock)
        found = await client.fetch_many(names)
        with ExitStack() as stack:
            for fetched in found.values():
                stack.enter_context(fetched)
            assert list(found) == names
            assert all(same(fetched, sock) for fetched in found.values())
        with pytest.raises(NameNotFound) as refused:
            await client.fetch_many(["n1", "absent", "n2", "missing"])
        assert refused.value.names == ["absent", "missing"]

    run(body)


def test_the_first_refusal_of_a_client_is_no_consequence(run: Runner) -> None:
    async def body(client: Any) -> None:
        with pytest.raises(NameNotFound) as refused:
            await client.fetch("nothing")
        assert refused.value.__context__ is None

    run(body)


def test_a_taken_entry_is_gone(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        await client.register("web", sock)
        with await client.take("web") as taken:
            assert same(taken, sock)
        with pytest.raises(NameNotFound):
            await client.fetch("web")

    run(body)


def test_refusals_of_a_registration(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        first = await client.register("web", sock)
        with pytest.raises(NameTaken) as taken:
            await client.register("web", sock)
        assert taken.value.generation == first.generation
        second = await client.register("web", sock, replace=True)
        assert second.generation > first.generation
        with pytest.raises(GenerationMismatch) as mismatch:
            await client.register("web", sock, if_generation=first.generation)
        assert mismatch.value.current == second.generation
        with pytest.raises(InvalidName):
            await client.register("", sock)
        with pytest.raises(InvalidArgument):
            await client.register("x", sock, ttl=-1)
        with pytest.raises(UnsupportedKind):
            await client.register("x", object())
        with pytest.raises(ClosedDescriptor):
            await client.register("x", -1)
        with pytest.raises(ClosedDescriptor):
            await client.register("x", 2**31)
        assert await client.names() == ["web"]

    run(body)


def test_a_descriptor_that_is_not_open_harms_nobody(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        with pytest.raises(ClosedDescriptor):
            await client.register("x", 12345)
        await client.register("x", sock)

    run(body)


def test_too_many_descriptors(run: Runner, sock: socket.socket) -> None:
    class Many:
        pass

    fdshare.register_kind(Many, "test.many", lambda many: (None, [sock] * 251), lambda _, ds: ds)
    try:

        async def body(client: Any) -> None:
            with pytest.raises(TooManyDescriptors):
                await client.register("x", Many())
            await client.ping()

        run(body)
    finally:
        fdshare.unregister_kind("test.many")


def test_what_was_fetched_before_a_failure_is_closed(run: Runner, sock: socket.socket) -> None:
    """A numpy array among it, which has no close()."""
    numpy = pytest.importorskip("numpy")

    class Mine:
        pass

    async def body(client: Any) -> None:
        with SharedMemory(64) as memory:
            await client.register("a", memory.as_array(numpy.uint8, (64,)))
        await client.register("b", sock)
        fdshare.register_kind(Mine, "test.mine", lambda mine: (None, [sock]), lambda _, ds: ds)
        await client.register("c", Mine())
        fdshare.unregister_kind("test.mine")
        with pytest.raises(UnknownKind):
            await client.fetch_many(["a", "b", "c"])

    run(body)


def test_unregister_and_rename(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        first = await client.register("a", sock)
        await client.register("c", sock)
        moved = await client.rename("a", "b")
        assert moved.name == "b"
        assert moved.generation > first.generation
        with pytest.raises(NameTaken):
            await client.rename("b", "c")
        with pytest.raises(NameNotFound):
            await client.rename("a", "d")
        with pytest.raises(GenerationMismatch):
            await client.unregister("b", if_generation=first.generation)
        await client.unregister("b", if_generation=moved.generation)
        with pytest.raises(NameNotFound):
            await client.unregister("b")
        assert await client.names() == ["c"]

    run(body)


def test_names_and_infos(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        for name in ("web/http", "web/https", "log"):
            await client.register(name, sock)
        assert await client.names() == ["log", "web/http", "web/https"]
        assert await client.names("web/*") == ["web/http", "web/https"]
        info = await client.info("log")
        assert info.registrant.pid == os.getpid()
        assert info.descriptors[0].listening
        assert [info.name for info in await client.infos("w*")] == ["web/http", "web/https"]
        with pytest.raises(NameNotFound):
            await client.info("absent")

    run(body)


def test_an_answer_in_many_parts(run: Runner, client: Client, sock: socket.socket) -> None:
    wanted = sorted(f"part/{i:04}" for i in range(1100))
    for name in wanted:
        client.register(name, sock)

    async def body(client: Any) -> None:
        assert await client.names() == wanted
        assert [info.name for info in await client.infos()] == wanted
        async with client.watch() as watch:
            assert sorted((await anext(watch)).entries) == wanted

    run(body)


def test_bind_gives_all_the_same_listener(run: Runner) -> None:
    async def body(client: Any) -> None:
        address = "tcp://127.0.0.1:0"
        with await client.bind("web", address) as one, await client.bind("web", address) as two:
            assert same(one, two)
        with pytest.raises(InvalidArgument):
            await client.bind("other", "nonsense")

    run(body)


def test_bind_returns_a_socket_or_refuses(run: Runner, sock: socket.socket, null: int) -> None:
    async def body(client: Any) -> None:
        with Descriptor.dup_of(sock) as number:
            await client.register("by its number", number)
        with await client.bind("by its number", "tcp://127.0.0.1:0") as found:
            assert type(found) is socket.socket
            assert same(found, sock)
        await client.register("null", null)
        with pytest.raises(KindMismatch, match="registered as a descriptor"):
            await client.bind("null", "tcp://127.0.0.1:0")
        with open(os.devnull) as file:
            await client.register("file", file)
        with pytest.raises(KindMismatch, match="registered as a file"):
            await client.bind("file", "tcp://127.0.0.1:0")

    run(body)


def test_bind_binds_a_path_that_is_gone_anew(run: Runner, folder: Path) -> None:
    async def body(client: Any) -> None:
        path = folder / "bound"
        address = f"unix://{path}"
        (await client.bind("app", address)).close()
        first = await client.info("app")
        path.unlink()
        with await client.bind("app", address) as found:
            with socket.socket(socket.AF_UNIX) as near:
                near.connect(str(path))
                found.accept()[0].close()
            second = await client.info("app")
            assert second.generation > first.generation
            with await client.bind("app", address) as again:
                assert same(found, again)
        assert (await client.info("app")).generation == second.generation

    run(body)


def test_bind_refuses_what_nobody_can_connect_to(run: Runner, folder: Path) -> None:
    async def body(client: Any) -> None:
        path = folder / "bound"
        for name, address in (("web", "tcp://127.0.0.1:0"), ("app", f"unix://{path}")):
            with await client.bind(name, address) as sock:
                sock.shutdown(socket.SHUT_RDWR)
            with pytest.raises(EndpointError, match="unregister it, and bind again"):
                await client.bind(name, address)
            await client.unregister(name)
            (await client.bind(name, address)).close()

    run(body)


def test_what_a_server_says_of_itself(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        await client.register("web", sock)
        await client.ping()
        assert (await client.stats()).names == 1
        explained = await client.explain("fetch", "web", os.geteuid(), os.getegid())
        assert explained.allowed
        await client.reload()

    run(body)


def test_a_lifetime_ends_with_its_client(
    run: Runner, client: Client, sock: socket.socket, until: Callable[..., Any]
) -> None:
    async def body(client: Any) -> None:
        await client.register("mine", sock, lifetime="connection")
        await client.register("all", sock)
        assert await client.names() == ["all", "mine"]

    run(body)
    until(lambda: client.names() == ["all"])


# Waiting


def test_a_fetch_waits_for_its_name(run: Runner, client: Client, sock: socket.socket) -> None:
    thread = later(client, lambda client: client.register("late", sock))

    async def body(client: Any) -> None:
        with await client.fetch("late", timeout=20) as fetched:
            assert same(fetched, sock)
        with pytest.raises(FetchTimeout) as refused:
            await client.fetch("never", timeout=0.01)
        assert refused.value.name == "never"
        with pytest.raises(NameNotFound):
            await client.fetch("never")

    run(body)
    thread.join()


def test_a_take_waits_for_its_name(run: Runner, client: Client, sock: socket.socket) -> None:
    thread = later(client, lambda client: client.register("late", sock))

    async def body(client: Any) -> None:
        with await client.take("late", timeout=None) as taken:
            assert same(taken, sock)
        assert await client.names() == []

    run(body)
    thread.join()


def test_wait_moves_no_descriptor(run: Runner, client: Client, sock: socket.socket) -> None:
    thread = later(client, lambda client: client.register("late", sock))

    async def body(client: Any) -> None:
        entry = await client.wait("late")
        info = await client.info("late")
        assert entry.generation == info.generation
        assert info.fetches == 0
        assert await client.wait("late", timeout=0) == entry
        with pytest.raises(FetchTimeout):
            await client.wait("never", timeout=0.01)
        with pytest.raises(NameNotFound):
            await client.wait("never", timeout=0)
        with pytest.raises(InvalidName):
            await client.wait("x\n")

    run(body)
    thread.join()


# Watching


def test_a_watch_starts_with_what_is_held(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        held = await client.register("web/a", sock)
        await client.register("log", sock)
        async with client.watch("web/*", timeout=20) as watch:
            snapshot = await anext(watch)
            assert (snapshot.event, snapshot.reason) == ("snapshot", "start")
            assert snapshot.entries == {"web/a": held.generation}

            replaced = await client.register("web/a", sock, replace=True)
            await client.register("log/2", sock)
            await client.rename("log", "web/b")
            await client.rename("web/b", "gone")
            (await client.take("web/a")).close()
            seen = [await anext(watch) for _ in range(4)]
            assert [(e.event, e.name, e.old) for e in seen] == [
                ("replaced", "web/a", ""),
                ("registered", "web/b", "log"),
                ("unregistered", "web/b", ""),
                ("taken", "web/a", ""),
            ]
            assert seen[0].generation == replaced.generation
            serials = [snapshot.serial, *(e.serial for e in seen)]
            assert serials == sorted(set(serials))
            assert watch.held == {}

    run(body)


def test_a_watch_that_timed_out_goes_on(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        async with client.watch("web", timeout=0.05) as watch:
            await anext(watch)
            for _ in range(2):
                with pytest.raises(WatchTimeout) as refused:
                    await anext(watch)
                assert refused.value.pattern == "web"
            await client.register("web", sock)
            assert (await anext(watch)).event == "registered"

    run(body)


def test_a_closed_watch_has_no_more(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        watch = client.watch()
        await anext(watch)
        await watch.close()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        await client.register("web", sock)
        await client.ping()

    run(body)


def test_watches_of_one_client_are_apart(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        async with client.watch("a*", timeout=20) as one, client.watch("*b", timeout=20) as two:
            await anext(one)
            await client.register("ab", sock)
            assert (await anext(two)).entries.keys() == {"ab"}
            assert (await anext(one)).name == "ab"
            await client.unregister("ab")
            assert (await anext(one)).event == (await anext(two)).event == "unregistered"

    run(body)


# Coming and going


def test_a_closed_client_says_so(run: Runner, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        watch = client.watch()
        await anext(watch)
        await client.close()
        await client.close()
        before = census()
        for call in (
            client.ping(),
            client.fetch("x"),
            client.register("x", sock, lifetime="connection"),
            anext(watch),
        ):
            with pytest.raises(ClosedDescriptor):
                await call
        assert census().items() <= before.items()
        await watch.close()

    run(body)


def test_no_server(run: Runner) -> None:
    async def body(client: Any) -> None:
        raise AssertionError

    with pytest.raises(NoServer):
        run(body, path=run.address + ".none")


def test_a_server_of_somebody_else(run: Runner) -> None:
    async def body(client: Any) -> None:
        raise AssertionError

    with pytest.raises(UntrustedServer):
        run(body, trust=(12345,))


def test_authkeys(kind: str, sock: socket.socket) -> None:
    async def body(client: Any) -> None:
        await client.register("web", sock)
        (await client.fetch("web")).close()

    with Manager(authkey=b"right", keeper=False) as manager:
        run = Runner(kind, manager.address)
        run(body, authkey=b"right")
        with pytest.raises(AuthenticationFailed):
            run(body, authkey=b"wrong")
        with pytest.raises(AuthenticationFailed):
            run(body)


def test_a_key_for_a_server_without_one(run: Runner) -> None:
    async def body(client: Any) -> None:
        raise AssertionError

    with pytest.raises(AuthenticationFailed):
        run(body, authkey=b"mine")


def test_the_bodys_own_exception_comes_out_as_it_is(run: Runner) -> None:
    async def body(client: Any) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run(body)


def test_shutdown(kind: str) -> None:
    async def body(client: Any) -> None:
        await client.shutdown()

    with Manager(keeper=False) as manager:
        Runner(kind, manager.address)(body)
        manager.join(20)


def test_a_server_that_is_gone(kind: str, sock: socket.socket, folder: Path) -> None:
    async def body(client: Any) -> None:
        watch = client.watch()
        await anext(watch)
        manager.shutdown()
        with pytest.raises(ServerGone):
            await client.names()
        with pytest.raises(ServerGone):
            await anext(watch)
        with Manager(manager.address, keeper=False):
            await client.register("web", sock)
            snapshot = await anext(watch)
            assert snapshot.reason == "reconnect"
            assert watch.held.keys() == {"web"}
            await watch.close()

    with Manager(folder / "s", keeper=False) as manager:
        Runner(kind, manager.address)(body, reconnect=0.05)


def test_a_server_that_does_not_answer(kind: str, folder: Path) -> None:
    async def body(client: Any) -> None:
        raise AssertionError

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "silent"))
        listener.listen()
        with pytest.raises(ServerTimeout) as refused:
            Runner(kind, str(folder / "silent"))(body, timeout=0.05)
        assert refused.value.timeout == pytest.approx(0.05)


def test_a_half_that_dies_is_not_noticed(kind: str, sock: socket.socket) -> None:
    """The server proper is killed again and again; its keeper makes another one."""

    async def body(client: Any) -> None:
        watch = client.watch(timeout=20)
        await anext(watch)
        for i in range(4):  # with the fifth its keeper would take it for a crash loop
            await client.register(f"n{i}", sock)
            os.kill((await client.stats()).server_pid, 9)
            await client.register(f"m{i}", sock)
            await client.rename(f"m{i}", f"o{i}")
            await client.unregister(f"n{i}")
        wanted = [f"o{i}" for i in range(4)]
        assert await client.names() == wanted
        while sorted(watch.held) != wanted:
            await anext(watch)
        await watch.close()

    with Manager() as manager:
        Runner(kind, manager.address)(body)
