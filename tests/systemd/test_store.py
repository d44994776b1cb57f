"""systemd's file descriptor store: what it drops without a word, and what it passes back."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest
from conftest import wait_until

from fdshare.client.blocking.client import Client
from fdshare.server.failover.labels import MOST

from .service import Service, run, systemctl


@pytest.fixture
def web() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


# One open file description is stored once.


def two_names(client: Client, web: socket.socket) -> None:
    client.register("one", web)
    client.register("two", web)


def first_of_two_names(client: Client, web: socket.socket) -> None:
    two_names(client, web)
    client.unregister("one")


def replaced_by_itself(client: Client, web: socket.socket) -> None:
    client.register("web", web, ttl=100)
    client.register("web", web, ttl=200, replace=True)


def fetched_and_registered(client: Client, web: socket.socket) -> None:
    client.register("web", web)
    with client.fetch("web") as fetched:
        client.register("web/v2", fetched)


def taken_and_registered(client: Client, web: socket.socket) -> None:
    client.register("web", web)
    with client.take("web") as taken:
        client.register("web", taken)


def renamed(client: Client, web: socket.socket) -> None:
    two_names(client, web)
    client.rename("one", "three")
    client.unregister("two")


WAYS = [
    two_names,
    first_of_two_names,
    replaced_by_itself,
    fetched_and_registered,
    taken_and_registered,
    renamed,
]


@pytest.mark.parametrize("way", WAYS)
def test_one_open_file_in_several_ways(
    service: Service, web: socket.socket, way: Callable[[Client, socket.socket], None]
) -> None:
    with service.client() as client:
        way(client, web)
    before = service.table()
    assert service.stored() == 3
    service.kill_both()
    assert service.table() == before
    service.restart()
    assert service.table() == before
    # And the copy goes with the last of its names.
    with service.client() as client:
        for name in client.names():
            client.unregister(name)
    wait_until(lambda: service.stored() == 2, "the table and the page alone")


# The limit.


def registered(service: Service, count: int) -> None:
    for number in range(count):
        service.memory(f"n{number}")


def missing(service: Service) -> list[str]:
    with service.client() as client:
        return [entry.name for entry in client.infos() if not entry.stored]


def test_what_is_beyond_the_limit_is_told(service: Service) -> None:
    service.dropin("FileDescriptorStoreMax=5")
    registered(service, 6)
    assert service.stored() == 5
    assert missing(service) == ["n3", "n4", "n5"]
    store = service.stats().store
    assert store is not None
    assert (store.descriptors, store.limit, store.missing) == (5, 5, 3)
    wait_until(lambda: "'n3' is not in the store" in service.log(), "the line of 'n3'")
    assert "FileDescriptorStoreMax" in run("fdshare", "doctor").stdout
    # Room that appears is used, and a replacement has that of what it replaces.
    with service.client() as client:
        client.unregister("n0")
    service.memory("n1", replace=True)
    assert missing(service) == ["n4", "n5"] or missing(service) == ["n1", "n5"]
    lost = missing(service)
    before = service.table()
    service.kill_both()
    assert service.table() == {name: entry for name, entry in before.items() if name not in lost}
    assert missing(service) == []


def test_a_higher_limit_is_used_after_a_reload(service: Service) -> None:
    service.dropin("FileDescriptorStoreMax=3")
    registered(service, 4)
    assert missing(service) == ["n1", "n2", "n3"]
    before = service.table()
    service.dropin("FileDescriptorStoreMax=100")
    systemctl("reload", "fdshare.service")
    wait_until(lambda: not missing(service), "all is stored")
    service.kill_both()
    assert service.table() == before


def test_what_a_lower_limit_drops_is_known_after_a_reload(service: Service) -> None:
    registered(service, 6)
    before = service.table()
    service.dropin("FileDescriptorStoreMax=4")
    systemctl("reload", "fdshare.service")
    wait_until(lambda: len(missing(service)) == 4, "what is dropped is known")
    lost = missing(service)
    service.kill_both()
    assert service.table() == {name: entry for name, entry in before.items() if name not in lost}


def test_a_unit_without_a_store_says_so(service: Service) -> None:
    service.dropin("FileDescriptorStoreMax=0")
    registered(service, 2)
    wait_until(lambda: "FileDescriptorStoreMax= is 0" in service.log(), "the reason")
    assert missing(service) == ["n0", "n1"]


def test_no_name_comes_back_with_another_ones_descriptor(service: Service) -> None:
    registered(service, 6)
    # systemd drops what is beyond the new limit; what it keeps is not for us to choose.
    service.dropin("FileDescriptorStoreMax=4")
    service.kill_both()
    left = service.table()
    service.dropin()
    service.restart()
    for number in range(6):
        service.memory(f"n{number}", replace=True)
    service.kill_both()
    after = service.table()
    assert sorted(after) == [f"n{number}" for number in range(6)]
    with service.client() as client:
        for name in after:
            (descriptor,) = client.fetch_raw(name)
            with descriptor:
                target = os.readlink(f"/proc/self/fd/{descriptor.fileno()}")
            assert target == f"/memfd:{name} (deleted)"
    assert service.stored() == 8
    assert len(left) < 6


def test_some_thousands_come_back(service: Service) -> None:
    # systemd compares each with all that it holds; test_labels.py has as many as can be passed.
    service.dropin("FileDescriptorStoreMax=20000", serve="--log-level warning")
    count = 2000
    with service.client() as client:
        assert client.stats().limits["max_descriptors"] <= MOST
        for number in range(count):
            with open(os.devnull, "rb", buffering=0) as each:
                client.register(f"n{number}", each)
    assert service.stored() == count + 2
    service.kill_both()
    assert service.stats().names == count
    assert service.stored() == count + 2
