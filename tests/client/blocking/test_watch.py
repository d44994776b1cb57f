"""watch: the items of a watch as they come, over the death of a server and a fork."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from nursery import Manager

import fdshare
from client.churn import Follower, churn, kill_and_change
from fdshare.client.blocking.client import Client
from fdshare.errors import ClosedDescriptor


def test_a_watch_under_churn_misses_nothing(server: Any, client: Client, pipe: int) -> None:
    follower = Follower()
    with fdshare.connect(server.address) as other:
        thread = threading.Thread(target=churn, args=(other, pipe, 1, 600))
        with client.watch(timeout=30) as watch:
            thread.start()
            while not follower.follow(next(watch)):
                assert watch.held == follower.table
            assert watch.held == follower.table
        thread.join()
    assert sorted(follower.table) == client.names()


def test_a_slow_watcher_is_told_and_converges(server: Any, client: Client, pipe: int) -> None:
    with client.watch(timeout=30) as watch:
        assert next(watch).event == "snapshot"
        # More than the socket, and what the server keeps for it, can hold.
        for i in range(6000):
            client.register(f"{i % 50:03}".ljust(255, "-"), pipe, replace=True)
        client.register("end", pipe)
        reasons = []
        while "end" not in watch.held:
            change = next(watch)
            if change.event == "snapshot":
                reasons.append(change.reason)
        assert reasons
        assert set(reasons) == {"overflow"}
        assert sorted(watch.held) == client.names()
        client.unregister("end")
        while "end" in watch.held:
            assert next(watch).event == "unregistered"


def test_the_state_converges_while_the_server_is_killed(pipe: int) -> None:
    """Its keeper makes another one each time; nothing that is held is lost."""
    with Manager() as manager, manager.watch(timeout=30) as watch:
        next(watch)
        thread = threading.Thread(target=kill_and_change, args=(manager.address, pipe))
        thread.start()
        while "end" not in watch.held:
            next(watch)
        assert watch.held == {e.name: e.generation for e in manager.infos()}
        thread.join()


def test_the_state_of_another_server_is_the_new_one(folder: Path, pipe: int) -> None:
    """Serials of the new server may be below those of the old."""
    with Manager(folder / "s", keeper=False) as first:
        watch = first.watch(timeout=30)
        next(watch)
        for i in range(10):
            first.register(f"old{i}", pipe)
        while len(watch.held) < 10:
            next(watch)
    with pytest.raises(ClosedDescriptor):  # the manager that it belongs to is closed
        next(watch)
    watch.close()
    with fdshare.Client(folder / "s") as client:
        watch = client.watch(timeout=30)
        with Manager(folder / "s", keeper=False) as second:
            second.register("one", pipe)
            next(watch)
        with Manager(folder / "s", keeper=False) as third:
            third.register("new", pipe)
            assert next(watch).reason == "reconnect"
            assert watch.held.keys() == {"new"}
            third.unregister("new")
            assert next(watch).event == "unregistered"
        watch.close()


def test_a_forked_child_does_not_read_its_parents_watch(server: Any, client: Client) -> None:
    with socket.socket() as sock, client.watch(timeout=30) as watch:
        next(watch)
        pid = os.fork()
        if not pid:
            try:
                change = next(watch)  # on a connection of its own
                os._exit(0 if change.event == "snapshot" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        client.register("x", sock)
        assert next(watch).name == "x"
