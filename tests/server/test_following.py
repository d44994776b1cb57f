"""What followers see, over the death of either half, an upgrade, a restart and another policy."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from breaking import Half, Halves, Wire, identity
from conftest import wait_until
from installed import Installed
from nursery import Manager
from service_manager import Manager as ServiceManager
from users import AsUser, Say, needs_root

import fdshare
from fdshare.client.blocking.client import Client
from fdshare.client.blocking.follow import Follower
from fdshare.errors import AccessDenied
from fdshare.protocol import messages as m
from fdshare.server.core.slots import FIRST
from fdshare.server.failover.labels import PAGE
from fdshare.server.loop import page as page_module
from server.orders import SOME, deaths

USER = 1501
_CLONE_NEWNS = 0x20000  # <linux/sched.h>
_PRIVATE = 0x44000  # <linux/mount.h>: MS_REC | MS_PRIVATE
RULE = f'[[rule]]\neffect = "allow"\nverbs = ["fetch"]\nusers = [{USER}]\n'


@pytest.fixture
def files() -> Iterator[list[int]]:
    made = [os.memfd_create(str(number)) for number in range(8)]
    yield made
    for fd in made:
        os.close(fd)


def page_of(follower: Follower) -> int:
    """The number of the page in which it looks."""
    return follower._state._page.now[1][0]


def is_fresh(follower: Follower) -> bool:
    """Whether it would ask nobody now."""
    seen = follower._state.seen
    return seen is not None and seen.is_current()


@deaths(SOME)
def test_each_half_may_die(
    manager: Manager,
    files: list[int],
    break_: Callable[[list[Half]], None],
    order: list[Half],
) -> None:
    manager.register("log", files[0])
    with fdshare.connect(manager.address) as client, client.follow("log") as log:
        page = page_of(log)
        for fd, half in zip(files[1:], order, strict=False):
            break_([half])
            first = log.current
            assert identity(first) == identity(files[files.index(fd) - 1])
            assert is_fresh(log)
            manager.register("log", fd, replace=True)
            assert not is_fresh(log)
            assert identity(log.current) == identity(fd)
            assert page_of(log) == page
        manager.unregister("log")


def test_the_object_stays_where_the_server_is_another(
    manager: Manager, files: list[int], break_: Callable[[list[Half]], None]
) -> None:
    """To be sure costs a question, and no descriptor moves."""
    manager.register("log", files[0])
    with manager.follow("log") as log:
        first = log.current
        break_(["server"])
        assert not is_fresh(log)
        assert log.current is first
        assert manager.info("log").fetches == 0
        manager.unregister("log")


def test_it_survives_an_upgrade(folder: Path, files: list[int]) -> None:
    installed = Installed(folder)
    installed.start()
    try:
        with Client(installed.path) as client:
            client.register("log", files[0])
            with client.follow("log") as log:
                page = page_of(log)
                for word, fd in (("second", files[1]), ("third", files[2])):
                    installed.name_it(word)
                    client.upgrade()
                    assert not is_fresh(log)
                    client.register("log", fd, replace=True)
                    assert identity(log.current) == identity(fd)
                    assert page_of(log) == page
            Halves(client).redundant()
    finally:
        installed.end()


@pytest.fixture
def service_manager(folder: Path) -> Iterator[ServiceManager]:
    manager = ServiceManager(folder)
    yield manager
    manager.close()


def test_it_survives_both_halves_in_the_store(
    service_manager: ServiceManager, files: list[int]
) -> None:
    """The very first `current` knows: nobody looked whether the connection has ended."""
    service_manager.start()
    path = service_manager.shell.path
    with fdshare.connect(path) as client, fdshare.connect(path) as other:
        client.register("log", files[0])
        with client.follow("log") as log:
            page = page_of(log)
            service_manager.kill_all()
            assert is_fresh(log)
            service_manager.start()
            assert not is_fresh(log)
            other.register("log", files[1], replace=True)
            log._due = float("inf")
            assert identity(log.current) == identity(files[1])
            assert page_of(log) == page


def test_without_its_page_in_the_store_there_is_another(
    service_manager: ServiceManager, files: list[int]
) -> None:
    service_manager.start()
    with fdshare.connect(service_manager.shell.path) as client:
        client.register("log", files[0])
        with client.follow("log") as log:
            page = page_of(log)
            service_manager.kill_all()
            with service_manager.lock:
                service_manager.store.remove(PAGE)
            service_manager.start()
            log._due = 0.0
            assert identity(log.current) == identity(files[0])
            assert page_of(log) != page
    wait_until(lambda: PAGE in service_manager.names(), "the new page is stored")


@needs_root
def test_a_right_that_is_revoked_and_given_again(
    folder: Path, small: Callable[..., Client], files: list[int]
) -> None:
    folder.chmod(0o755)
    policy = folder / "policy"
    policy.write_text(RULE)
    root = small(1024, "--policy", str(policy), "--mode", "0666")
    root.register("log", files[0])

    def look(say: Say) -> None:
        with Client(root.address) as client, client.follow("log") as log:
            last = ""
            while True:
                try:
                    now = f"given {identity(log.current)[1]}"
                except AccessDenied as error:
                    now = f"may not {error.verb}"
                if now != last:
                    say(now)
                last = now

    with AsUser(USER, look) as other:
        for _ in range(2):
            policy.write_text(RULE)
            root.reload()
            assert other.hear() == f"given {identity(files[0])[1]}"
            policy.write_text("")
            root.reload()
            assert other.hear() == "may not fetch"


def _without_proc() -> None:
    """In the process that is to be the server: it sees no /proc."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.unshare(_CLONE_NEWNS)
    assert not libc.mount(b"none", b"/", None, _PRIVATE, None)
    assert not libc.mount(b"none", b"/proc", b"tmpfs", 0, None)


@needs_root
def test_a_server_without_a_page_is_asked_each_time(
    small: Callable[..., Client], files: list[int]
) -> None:
    client = small(1024, "--no-keeper", prepare=_without_proc)
    client.register("log", files[0])
    with client.follow("log") as log:
        first = log.current
        assert not is_fresh(log)
        before = client.stats().counters["requests"]
        assert log.current is first
        assert client.stats().counters["requests"] == before + 2
        client.register("log", files[1], replace=True)
        assert identity(log.current) == identity(files[1])
        assert client.info("log").fetches == 1


def test_a_client_that_asks_for_the_page_gets_it_once(manager: Manager, files: list[int]) -> None:
    manager.register("log", files[0])
    with Wire(manager.address) as wire:
        said = wire.ask(1, m.Follow("log"))
        assert said.reply.mapped
        assert len(said.descriptors) == 2
        for descriptor in said.descriptors:
            descriptor.close()
        again = wire.ask(2, m.Follow("log", page=said.reply.page))
        assert not again.reply.mapped
        again.descriptors[0].close()
    manager.unregister("log")


def test_more_names_than_slots(
    folder: Path, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two have their own; the others see each change of any name, and miss none of theirs."""
    monkeypatch.setattr(page_module, "_WORDS", FIRST + 2)
    server = fdshare.Manager(folder / "s").get_server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Client(folder / "s") as client, ExitStack() as stack:
            names = [f"name {number}" for number in range(6)]
            for name in names:
                client.register(name, files[0])
            followers = {name: stack.enter_context(client.follow(name)) for name in names}
            assert all(is_fresh(follower) for follower in followers.values())
            for fd, name in zip(files[1:], names, strict=False):
                client.register(name, fd, replace=True)
                assert not is_fresh(followers[name])
                for follower in followers.values():
                    wanted = fd if follower.name == name else None
                    before = follower.generation
                    obj = follower.current
                    assert is_fresh(follower)
                    assert wanted is None or identity(obj) == identity(wanted)
                    assert (follower.generation != before) == (follower.name == name)
            assert max(entry.fetches for entry in client.infos()) == 1
    finally:
        server.stop()
        thread.join(20)
        server.close()
