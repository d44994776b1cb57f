"""follow: the object of now, in every thread and process, and its life."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import census, wait_until
from nursery import Manager

import fdshare
from client.conftest import inode
from fdshare.client.blocking import follow as module
from fdshare.client.blocking.client import Client
from fdshare.client.blocking.follow import Follower
from fdshare.errors import (
    ClosedDescriptor,
    FetchTimeout,
    NameNotFound,
    NoServer,
)


def look(log: Follower) -> Any:
    return log.current


def asked(client: Client) -> int:
    """How many requests the server has had from others than this one."""
    return client.stats().counters["requests"]


def test_current_is_what_is_registered(client: Client, files: list[Any]) -> None:
    first = client.register("log", files[0])
    with client.follow("log") as log:
        assert inode(log.current) == inode(files[0])
        assert log.current is log.current
        assert log.generation == first.generation
        for file in files[1:]:
            registered = client.register("log", file, replace=True)
            assert inode(log.current) == inode(file)
            assert log.generation == registered.generation


def test_to_look_asks_nobody(server: Any, client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    with fdshare.connect(server.address) as other, client.follow("log") as log:
        look(log)
        client.register("another", files[1])
        before = asked(other)
        for _ in range(1000):
            look(log)
        assert asked(other) == before + 1  # for `stats`


def test_a_thousand_followers_cost_nothing(client: Client, files: list[Any]) -> None:
    """Also where the name changes, until they look; and then, one fetch each."""
    client.register("log", files[0])
    followers = [client.follow("log") for _ in range(1000)]
    before = asked(client)
    for _ in range(10):
        client.register("log", files[1], replace=True)
    assert asked(client) == before + 11
    assert {inode(follower.current) for follower in followers[:10]} == {inode(files[1])}
    assert asked(client) == before + 22
    for follower in followers:
        follower.close()


def test_the_old_object_is_closed_when_nobody_has_it(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    with client.follow("log") as log:
        old = log.current
        with log.lease() as leased:
            assert leased is old
            client.register("log", files[1], replace=True)
            assert log.current is not old
            assert not old.closed
            with log.lease() as newer:
                assert newer is log.current
        assert old.closed
        assert not log.current.closed
        new = log.current
    assert new.closed


def test_each_thread_keeps_what_it_was_given(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    given, replaced, looked, seen = (threading.Event() for _ in range(4))
    found: list[Any] = []

    def use() -> None:
        found.append(log.current)
        given.set()
        replaced.wait(20)
        found.append(found[0].closed)
        found.append(inode(log.current))
        looked.set()
        seen.wait(20)

    with client.follow("log") as log:
        thread = threading.Thread(target=use)
        thread.start()
        given.wait(20)
        client.register("log", files[1], replace=True)
        look(log)
        replaced.set()
        looked.wait(20)
        # In the thread that has fetched it: where there is no GIL, Python closes it there.
        found.append(found.pop(0).closed)
        seen.set()
        thread.join(20)
    assert found == [False, inode(files[1]), True]


def test_many_threads_ask_once(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    changes: list[Any] = []
    with client.follow("log", on_change=changes.append) as log:
        before = asked(client)
        client.register("log", files[1], replace=True)
        together = threading.Barrier(8)
        seen: list[int] = []

        def look() -> None:
            together.wait(20)
            seen.append(inode(log.current))

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert seen == [inode(files[1])] * 8
        assert asked(client) == before + 3  # register, one follow, stats
        assert changes == [log.current]


def test_on_change_is_called_with_the_new_object(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    seen: list[int] = []
    with client.follow("log", on_change=lambda obj: seen.append(inode(obj))) as log:
        look(log)
        assert seen == []
        client.register("log", files[1], replace=True)
        assert seen == []
        look(log)
        look(log)
        assert seen == [inode(files[1])]
        client.unregister("log")
        with pytest.raises(NameNotFound):
            look(log)
        assert seen == [inode(files[1])]
        client.register("log", files[1])
        look(log)
        assert seen == [inode(files[1])] * 2


def test_a_handler_may_look_while_the_handle_asks(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    seen: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(inode(log.current)))
    try:
        with client.follow("log", on_change=lambda obj: signal.raise_signal(signal.SIGUSR1)) as log:
            client.register("log", files[1], replace=True)
            assert inode(log.current) == inode(files[1])
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert seen == [inode(files[1])]


def test_a_name_that_is_missing(client: Client, files: list[Any]) -> None:
    with pytest.raises(NameNotFound):
        client.follow("log")
    with pytest.raises(FetchTimeout):
        client.follow("log", timeout=0.01)
    client.register("log", files[0])
    with client.follow("log") as log, client.follow("log", timeout=20) as patient:
        old = log.current
        client.unregister("log")
        for _ in range(2):
            with pytest.raises(NameNotFound):
                look(log)
        assert old.closed
        assert not log.stale
        threading.Timer(0.05, client.register, ("log", files[1])).start()
        assert inode(patient.current) == inode(files[1])
        assert inode(log.current) == inode(files[1])


def test_renamed_taken_and_returned(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    with client.follow("log") as log:
        client.rename("log", "old")
        with pytest.raises(NameNotFound):
            look(log)
        client.rename("old", "log")
        assert inode(log.current) == inode(files[0])
        client.take("log").close()
        with pytest.raises(NameNotFound):
            look(log)


def test_it_ends_with_its_client(server: Any, files: list[Any]) -> None:
    before = census()
    with fdshare.connect(server.address) as client:
        client.register("log", files[0])
        log = client.follow("log")
        file = log.current
    assert file.closed
    with pytest.raises(ClosedDescriptor):
        look(log)
    with pytest.raises(ClosedDescriptor), log.lease():
        pass
    assert "closed" in repr(log)
    log.close()
    del log
    assert census() == before


def test_a_handle_that_is_dropped_closes_its_object(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    log = client.follow("log")
    file = log.current
    del log
    assert file.closed


def test_a_handle_does_not_travel(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    with client.follow("log") as log, pytest.raises(TypeError):
        pickle.dumps(log)


def test_a_forked_child_has_its_own(client: Client, files: list[Any]) -> None:
    client.register("log", files[0])
    ours, theirs = os.pipe(), os.pipe()
    with client.follow("log") as log:
        mine = log.current
        pid = os.fork()
        if not pid:
            try:
                same = log.current is mine
                os.write(theirs[1], b"%d" % same)
                os.read(ours[0], 1)
                os.write(theirs[1], b" %d" % inode(log.current))
                log.close()
            finally:
                os._exit(0)
        assert os.read(theirs[0], 100) == b"1"
        client.register("log", files[1], replace=True)
        assert inode(log.current) == inode(files[1])
        os.write(ours[1], b"x")
        assert os.read(theirs[0], 100) == b" %d" % inode(files[1])
        os.waitpid(pid, 0)
        assert not log.current.closed
        client.register("log", files[2], replace=True)
        assert inode(log.current) == inode(files[2])
    for end in (*ours, *theirs):
        os.close(end)


def test_a_server_that_is_gone_and_comes_back(
    serve: Callable[..., Manager], files: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.05)  # or the test would last some seconds
    manager = serve()
    with fdshare.connect(manager.address, reconnect=0.1) as client:
        client.register("log", files[0])
        with client.follow("log") as log:
            file = log.current
            assert not log.stale
            manager.shutdown()
            assert log.current is file
            assert log.stale
            assert log.current is file
            with pytest.raises(NoServer):
                fdshare.connect(manager.address)
            again = serve(manager.address)
            with fdshare.connect(again.address) as other:
                other.register("log", files[1])
            # The same generation, of another server.
            wait_until(lambda: inode(log.current) == inode(files[1]), "the new object")
            assert log.generation == 1
            assert not log.stale
            assert file.closed


def test_a_server_without_an_end_is_missed(
    folder: Path, files: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, it marks nothing; the connection tells."""
    monkeypatch.setattr(module, "_LOOK", 0.05)
    path = str(folder / "s")
    manager = Manager(path, keeper=False).start()
    with fdshare.connect(path, reconnect=0.1) as client:
        client.register("log", files[0])
        with client.follow("log") as log:
            assert manager._process is not None
            os.kill(client.stats().server_pid, signal.SIGKILL)
            manager._process.wait()
            with Manager(path, keeper=False) as again:
                again.register("log", files[1])
                wait_until(lambda: inode(log.current) == inode(files[1]), "the new object")
    manager.shutdown()


@pytest.mark.parametrize("finder", ["current", "stale"])
def test_what_another_look_has_found_is_given_to_all(
    folder: Path, files: list[Any], monkeypatch: pytest.MonkeyPatch, finder: str
) -> None:
    """Nobody writes the page of a server that was killed any more: that of another is looked at."""
    seconds = 0.0
    monkeypatch.setattr(module, "monotonic", lambda: seconds)
    path = str(folder / "s")
    manager = Manager(path, keeper=False).start()
    with fdshare.connect(path, reconnect=0.1) as client:
        client.register("log", files[0])
        with client.follow("log") as log:
            old = log.current
            assert manager._process is not None
            os.kill(client.stats().server_pid, signal.SIGKILL)
            manager._process.wait()
            with Manager(path, keeper=False) as again:
                again.register("log", files[1])
                assert log.current is old
                if finder == "current":  # of another thread, at the next look
                    seconds = module._LOOK
                    found: list[int] = []
                    thread = threading.Thread(target=lambda: found.append(inode(log.current)))
                    thread.start()
                    thread.join(20)
                    assert found == [inode(files[1])]
                else:
                    assert not log.stale
                assert inode(log.current) == inode(files[1])
    manager.shutdown()
