"""Managers: proxies that carry, in the processes they are sent to."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from fdshare import SharedMemory, get_context, kinds
from fdshare.errors import DescriptorLimit
from fdshare.mp.channels.connection import turned_into
from fdshare.mp.pickling.large import LARGE
from fdshare.mp.workers import managers
from fdshare.mp.workers.managers import Serializer, register_serializer
from mp import children
from mp.common import (
    PACKAGES,
    descriptor_limit_reached,
    ends,
    identity,
    trackers,  # noqa: F401
)
from mp.interrupts import SIGNAL, Interrupt, handled_by, interrupt
from mp.pickling.test_large import is_mapped


@pytest.fixture(params=PACKAGES)
def ctx(request: pytest.FixtureRequest) -> Any:
    return get_context("fork", backend=request.param)


def test_every_container(ctx: Any) -> None:
    with ctx.Manager() as manager, socket.socket() as sock:
        queue, mapping, items, space = (
            manager.Queue(),
            manager.dict(a=1),
            manager.list([1]),
            manager.Namespace(),
        )
        queue.put({"deep": [sock]})
        mapping["sock"] = sock
        items.append(sock)
        space.sock = sock
        for arrived in (queue.get()["deep"][0], mapping["sock"], items[1], space.sock):
            with arrived:
                assert identity(arrived) == identity(sock)
        for arrived in (mapping.pop("sock"), items.pop()):
            arrived.close()


def test_a_proxy_in_another_process(ctx: Any) -> None:
    with ctx.Manager() as manager, socket.socket() as sock:
        inbox, outbox = manager.Queue(), manager.Queue()
        process = ctx.Process(target=children.echo, args=(inbox, outbox))
        process.start()
        inbox.put(sock)
        with outbox.get() as arrived:
            assert identity(arrived) == identity(sock)
        inbox.put(None)
        process.join()
        assert process.exitcode == 0


def test_a_proxy_through_a_queue_of_ours(ctx: Any) -> None:
    queue = ctx.Queue()
    with ctx.Manager() as manager, socket.socket() as sock:
        items = manager.list([sock])  # who sends a proxy keeps it until it has arrived
        queue.put(items)
        with queue.get(timeout=30)[0] as arrived:
            assert identity(arrived) == identity(sock)
    queue.close()
    queue.join_thread()


def test_locks_and_pools_of_a_manager(ctx: Any) -> None:
    with ctx.Manager() as manager:
        with manager.Lock():
            assert manager.Value("i", 3).value == 3
        pool = manager.Pool(1)
        assert pool.apply(children.same, (4,)) == 4
        pool.close()
        pool.join()


def test_a_reply_that_finds_no_room_is_an_error_and_not_the_next_reply(
    ctx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(managers, "PATIENCE", 0.1)  # or every refusal takes 5 s
    with ctx.Manager() as manager:
        with socket.socket() as sock:
            items = manager.list([sock])
        assert len(items) == 1  # the connection of this thread is open
        with descriptor_limit_reached(), pytest.raises(DescriptorLimit):
            items[0]
        items.append("after")
        assert items[1] == "after"
        items[0].close()


def test_a_reply_that_cannot_be_made_for_long_is_not_the_next_reply(
    ctx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one descriptor for it, and none for the module that it takes."""
    monkeypatch.setattr(managers, "PATIENCE", 0.1)
    left, right = ctx._classes.Pipe()
    with left, turned_into(ctx._classes.ManagerConnection, right) as ours:
        with SharedMemory(1) as memory:
            left.send(memory)
        left.send("next")
        spare = os.dup(0)
        with monkeypatch.context() as patched, descriptor_limit_reached():
            patched.delitem(sys.modules, "fdshare.kinds.memory")
            patched.delattr(kinds, "memory")
            os.close(spare)
            with pytest.raises(DescriptorLimit):
                ours.recv()
        assert ours.recv() == "next"


def _at_the_limit() -> None:
    raise DescriptorLimit(errno.EMFILE, "RLIMIT_NOFILE", 9, None, "receiver")


class AtTheLimit:
    def __reduce__(self) -> Any:
        return _at_the_limit, ()


def test_a_reply_that_is_gone_is_not_waited_for(ctx: Any) -> None:
    left, right = ctx._classes.Pipe()
    with left, turned_into(ctx._classes.ManagerConnection, right) as ours:
        left.send(AtTheLimit())

        def receive() -> None:
            with pytest.raises(DescriptorLimit):
                ours.recv()

        ends(receive)


def test_the_serializer_brings_its_registration(ctx: Any) -> None:
    name = register_serializer(ctx._classes.ManagerConnection)
    assert isinstance(name, Serializer)
    known = ctx._family.managers.listener_client
    former = known.pop(name)
    arrived = ctx._family.loads(ctx._family.ForkingPickler.dumps(name))
    assert arrived == name
    assert name in known
    known[name] = former


# Large arrays


def array() -> Any:
    numpy = pytest.importorskip("numpy")
    return numpy.ones(LARGE // 8)


def test_an_array_is_mapped_by_both_ends(ctx: Any) -> None:
    sent = array()
    with ctx.Manager() as manager:
        space = manager.dict()
        for value in 5, 6:
            sent[0] = value
            space["array"] = sent
            sent[0] = 0  # it was copied
            arrived = space["array"]
            assert arrived[0] == value
            assert is_mapped(arrived)
            arrived[0] = 7  # it is its own
            assert space["array"][0] == value
        maps = Path(f"/proc/{manager._process.pid}/maps").read_text()
        assert "fdshare-message" in maps
        space.clear()
        wait_until(lambda: not memory_of(manager._process.pid), "the memory is gone")


def memory_of(pid: int) -> list[str]:
    """What a process has of the memory of messages, but for what it keeps to send more."""
    folder = Path(f"/proc/{pid}")
    open_now = [os.readlink(link) for link in (folder / "fd").iterdir() if link.is_symlink()]
    found = [target for target in open_now if "fdshare-messages" not in target]
    found += (folder / "maps").read_text().splitlines()
    return [one for one in found if "fdshare-message" in one]


def test_nothing_is_left_of_a_server_that_was_killed(ctx: Any) -> None:
    manager = ctx.Manager()
    space = manager.dict(array=array())
    arrived = space["array"]
    os.kill(manager._process.pid, signal.SIGKILL)
    manager._process.join()
    assert arrived.sum() == len(arrived)
    with pytest.raises((OSError, EOFError)):
        space["array"]
    manager.shutdown()
    del arrived
    assert not memory_of(os.getpid())


def interrupt_when_it_waits(pid: int) -> None:
    def waits() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    wait_until(waits, "the wait for an address")
    os.kill(pid, SIGNAL)


def test_a_start_that_is_interrupted_leaves_no_server(ctx: Any) -> None:
    """The program did not end: it waited for a server that ignores SIGINT."""
    manager = ctx._classes.SyncManager(ctx=ctx)
    with handled_by(interrupt), pytest.raises(Interrupt):
        manager.start(interrupt_when_it_waits, (os.getpid(),))
    assert not manager._process.is_alive()
    with ctx._classes.SyncManager(ctx=ctx) as manager:
        with pytest.raises(ctx.ProcessError, match="Already started"):
            manager.start()
        assert manager.list([1])[0] == 1


def test_a_start_that_makes_no_process_says_why(ctx: Any) -> None:
    manager = ctx._classes.SyncManager(ctx=ctx)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        manager.start(initializer=5)
    ctx._family.util.get_temp_dir()  # which start() makes first
    with descriptor_limit_reached(), pytest.raises(OSError, match="Too many open files"):
        manager.start()
    with manager:
        assert manager.list([1])[0] == 1


@pytest.mark.parametrize("stock_end", ["client", "server"])
def test_the_other_end_may_be_of_the_package(ctx: Any, stock_end: str) -> None:
    ours = ctx.Manager
    stock = import_module(ctx._family.package).get_context("fork").Manager
    serve, join = (ours, stock) if stock_end == "client" else (stock, ours)
    with serve() as server, join() as other:
        near = type(other)(server.address, bytes(server._authkey))
        near.connect()
        space = near.dict()
        space["array"] = array()
        assert space["array"].sum() == LARGE // 8
        assert not is_mapped(space["array"])
        assert not memory_of(server._process.pid)
