"""The verbs of the blocking client, over a real server: what each does, and how each refuses."""

from __future__ import annotations

import errno
import io
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import pytest
from barepeer import Peer

import fdshare.client.blocking.client
from fdshare.client.blocking.client import Client
from fdshare.errors import (
    ClosedDescriptor,
    FetchTimeout,
    GenerationMismatch,
    InvalidArgument,
    InvalidName,
    KindMismatch,
    NameNotFound,
    NameTaken,
    TooManyDescriptors,
    UnknownKind,
    UnreadData,
    UnsupportedKind,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import register_kind, unregister_kind
from fdshare.protocol import messages as m


def same(a: Any, b: Any) -> bool:
    """True where both are descriptors of one file, socket or pipe."""
    return os.path.samestat(os.fstat(a.fileno()), os.fstat(b.fileno()))


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """A listening socket: one that outlives its server would keep its port, so it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def other() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield sock


class Bundle:
    """As many descriptors as it is given, of a kind of its own."""

    def __init__(self, descriptors: list[Any]) -> None:
        self.descriptors = descriptors

    def close(self) -> None:
        for descriptor in self.descriptors:
            descriptor.close()


@pytest.fixture
def bundles() -> Iterator[None]:
    register_kind(
        Bundle,
        "test.bundle",
        lambda bundle: (len(bundle.descriptors), bundle.descriptors),
        lambda spec, descriptors: Bundle(descriptors),
    )
    yield
    unregister_kind("test.bundle")


# Register and fetch


def test_what_is_fetched_is_what_was_registered(client: Client, sock: socket.socket) -> None:
    entry = client.register("web", sock)
    assert entry.name == "web"
    assert entry.generation > 0
    with client.fetch("web") as fetched:
        assert type(fetched) is socket.socket
        assert same(fetched, sock)
        assert fetched.getsockname() == sock.getsockname()
        assert not os.get_inheritable(fetched.fileno())


def test_the_server_has_its_own_copy(client: Client, sock: socket.socket) -> None:
    client.register("web", sock)
    address = sock.getsockname()
    sock.close()
    with client.fetch("web") as fetched, socket.create_connection(address) as caller:
        accepted, _ = fetched.accept()
        with accepted:
            assert accepted.getpeername() == caller.getsockname()


def test_every_fetch_is_a_new_object(client: Client, sock: socket.socket) -> None:
    client.register("web", sock)
    with client.fetch("web") as one, client.fetch("web") as two:
        assert one.fileno() != two.fileno()
        assert same(one, two)


def test_generations_grow_over_all_names(client: Client, sock: socket.socket) -> None:
    first = client.register("a", sock).generation
    second = client.register("b", sock).generation
    third = client.register("a", sock, replace=True).generation
    fourth = client.rename("b", "c").generation
    assert first < second < third < fourth


def test_a_name_is_taken_once(client: Client, sock: socket.socket, other: socket.socket) -> None:
    generation = client.register("web", sock).generation
    with pytest.raises(NameTaken) as caught:
        client.register("web", other)
    assert isinstance(caught.value, FileExistsError)
    assert (caught.value.name, caught.value.generation) == ("web", generation)
    assert caught.value.errno == errno.EEXIST
    with client.fetch("web") as fetched:
        assert same(fetched, sock)


def test_replace(client: Client, sock: socket.socket, other: socket.socket) -> None:
    client.register("web", sock)
    client.register("web", other, replace=True)
    with client.fetch("web") as fetched:
        assert same(fetched, other)
    assert client.names() == ["web"]


def test_if_generation_replaces_only_what_was_seen(
    client: Client, sock: socket.socket, other: socket.socket
) -> None:
    first = client.register("web", sock, if_generation=0).generation
    with pytest.raises(GenerationMismatch) as caught:
        client.register("web", other, if_generation=0)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.expected, caught.value.current) == (0, first)
    second = client.register("web", other, if_generation=first).generation
    with pytest.raises(GenerationMismatch) as caught:
        client.register("web", sock, if_generation=first)
    assert (caught.value.name, caught.value.current) == ("web", second)
    with pytest.raises(GenerationMismatch) as caught:
        client.register("absent", sock, if_generation=7)
    assert (caught.value.expected, caught.value.current) == (7, 0)
    with client.fetch("web") as fetched:
        assert same(fetched, other)


def test_two_replacements_at_once_leave_one_of_the_two(
    server: Any, client: Client, sock: socket.socket, other: socket.socket
) -> None:
    first = client.register("web", sock).generation
    outcomes: list[str] = []
    barrier = threading.Barrier(2)

    def replace(mine: socket.socket) -> None:
        barrier.wait()
        try:
            client.register("web", mine, if_generation=first)
            outcomes.append("replaced")
        except GenerationMismatch:
            outcomes.append("refused")

    threads = [threading.Thread(target=replace, args=(s,)) for s in (sock, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "replaced"]


def test_one_socket_under_two_names(client: Client, sock: socket.socket) -> None:
    client.register("a", sock)
    client.register("b", sock)
    client.unregister("a")
    with client.fetch("b") as fetched:
        assert same(fetched, sock)


def test_metadata_and_info(client: Client, sock: socket.socket) -> None:
    before = client.stats().generation
    client.register("web", sock, metadata={"owner": "Jürgen", "": "empty key"}, ttl=1000)
    with client.fetch("web"):
        pass
    info = client.info("web")
    assert (info.name, info.kind, info.count) == ("web", "socket", 1)
    assert info.generation == before + 1
    assert info.metadata == {"owner": "Jürgen", "": "empty key"}
    assert info.registrant.pid == os.getpid()
    assert (info.registrant.uid, info.registrant.gid) == (os.geteuid(), os.getegid())
    assert info.registrant.command
    assert 0 <= info.age < 100
    assert info.ttl is not None
    assert 900 < info.ttl <= 1000
    assert info.fetches == 1
    assert not info.leased
    (seen,) = info.descriptors
    assert (seen.type, seen.family, seen.socket_type) == ("socket", "inet", "stream")
    assert seen.listening
    assert seen.local == f"127.0.0.1:{sock.getsockname()[1]}"


def test_names_and_infos_by_pattern(client: Client, sock: socket.socket) -> None:
    for name in ("web/http", "web/https", "db", "we[b]"):
        client.register(name, sock)
    assert client.names() == ["db", "we[b]", "web/http", "web/https"]
    assert client.names("web/*") == ["web/http", "web/https"]
    assert client.names("*http") == ["web/http"]
    assert client.names("web/http?") == ["web/https"]
    assert client.names("[!w]*") == ["db"]
    assert client.names("nothing*") == []
    assert [info.name for info in client.infos("web/*")] == ["web/http", "web/https"]
    assert client.infos("nothing*") == []


def test_rename(client: Client, sock: socket.socket, other: socket.socket) -> None:
    before = client.register("old", sock, metadata={"a": "b"}).generation
    entry = client.rename("old", "new")
    assert entry.name == "new"
    assert entry.generation > before
    assert client.names() == ["new"]
    assert client.info("new").metadata == {"a": "b"}
    with client.fetch("new") as fetched:
        assert same(fetched, sock)
    client.register("other", other)
    with pytest.raises(NameTaken):
        client.rename("new", "other")
    with pytest.raises(NameTaken):
        client.rename("new", "new")
    with pytest.raises(NameNotFound) as caught:
        client.rename("absent", "present")
    assert caught.value.names == ["absent"]
    with pytest.raises(InvalidName):
        client.rename("new", "")
    assert client.names() == ["new", "other"]


def test_unregister(client: Client, sock: socket.socket) -> None:
    generation = client.register("web", sock).generation
    with pytest.raises(GenerationMismatch):
        client.unregister("web", if_generation=generation + 1)
    client.unregister("web", if_generation=generation)
    with pytest.raises(NameNotFound):
        client.unregister("web")
    with pytest.raises(NameNotFound):
        client.unregister("web", if_generation=generation)
    assert client.names() == []


def test_take_removes(client: Client, sock: socket.socket) -> None:
    client.register("web", sock)
    with client.take("web") as taken:
        assert same(taken, sock)
    with pytest.raises(NameNotFound):
        client.fetch("web")
    with pytest.raises(NameNotFound):
        client.take("web")
    client.register("web", sock)


def test_bind_once(client: Client) -> None:
    with client.bind("web", "tcp://127.0.0.1:0") as one, client.bind("web", "tcp://[::1]:1") as two:
        assert same(one, two)
        assert one.getsockname()[1] != 0
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    with pytest.raises(InvalidArgument):
        client.bind("other", "http://example.org")
    assert client.names() == ["web"]


def test_fetch_many(client: Client, sock: socket.socket, other: socket.socket) -> None:
    assert client.fetch_many([]) == {}
    client.register("a", sock)
    client.register("b", other)
    found = client.fetch_many(["b", "a", "b"])
    assert list(found) == ["b", "a"]
    with found["a"], found["b"]:
        assert same(found["a"], sock)
        assert same(found["b"], other)
    with pytest.raises(NameNotFound) as caught:
        client.fetch_many(["a", "x", "b", "y"])
    assert caught.value.names == ["x", "y"]


def test_fetch_many_of_more_than_one_message_carries(client: Client, sock: socket.socket) -> None:
    names = [f"name/{n:03}" for n in range(600)]
    for name in names:
        client.register(name, sock)
    requests = client.stats().counters["requests"]
    found = client.fetch_many(names)
    try:
        assert list(found) == names
        assert all(same(fetched, sock) for fetched in found.values())
    finally:
        for fetched in found.values():
            fetched.close()
    assert client.stats().counters["requests"] - requests == 4  # 253 + 253 + 94, and stats itself


def test_fetch_many_of_large_entries(client: Client, sock: socket.socket, bundles: None) -> None:
    for name, count in (("a", 200), ("b", 250), ("c", 3), ("d", 1)):
        client.register(name, Bundle([sock] * count))
    with ExitStack() as stack:
        for name, bundle in client.fetch_many("abcd").items():
            stack.callback(bundle.close)
            assert len(bundle.descriptors) == {"a": 200, "b": 250, "c": 3, "d": 1}[name]


def test_fetch_many_is_all_or_nothing_at_the_receiver_too(
    client: Client, sock: socket.socket, bundles: None
) -> None:
    client.register("a", sock)
    client.register("b", Bundle([sock] * 3))
    client.register("c", sock)
    unregister_kind("test.bundle")
    try:
        with pytest.raises(UnknownKind) as caught:  # the census finds what it would leave open
            client.fetch_many("abc")
        assert caught.value.tag == "test.bundle"
    finally:
        register_kind(Bundle, "test.bundle", lambda bundle: (0, []), lambda spec, d: None)


def test_fetch_raw(client: Client, sock: socket.socket, bundles: None) -> None:
    client.register("a", Bundle([sock] * 2))
    descriptors = client.fetch_raw("a")
    with descriptors[0] as one, descriptors[1] as two:
        assert same(one, sock)
        assert same(two, sock)


def test_ping_and_stats(client: Client, sock: socket.socket) -> None:
    client.ping()
    before = client.stats()
    client.register("web", sock)
    after = client.stats()
    assert after.names - before.names == 1
    assert after.descriptors - before.descriptors == 1
    assert after.generation - before.generation == 1
    assert after.serial - before.serial == 1
    assert after.counters["registered"] - before.counters["registered"] == 1
    assert after.connections >= 1
    assert after.leases == 0
    assert after.uptime > 0
    assert after.keeper_pid is None
    assert not after.redundant


def test_explain(client: Client) -> None:
    assert client.explain("fetch", "web", 0, 0).allowed
    refused = client.explain("fetch", "web", 54321, 54321)
    assert not refused.allowed
    assert refused.rule


# The mapping protocol


def test_as_a_mapping(client: Client, sock: socket.socket, other: socket.socket) -> None:
    assert len(client) == 0
    assert client  # an empty one is still a client
    assert list(client) == []
    client["web"] = sock
    client["web"] = other
    client["*"] = sock
    assert "web" in client
    assert "w*" not in client
    assert "[w]eb" not in client
    assert "*" in client
    assert 5 not in client
    assert len(client) == 2
    assert sorted(client) == ["*", "web"]
    with client["web"] as fetched:
        assert same(fetched, other)
    del client["*"]
    assert "*" not in client
    with pytest.raises(KeyError):
        client["absent"]
    with pytest.raises(KeyError):
        del client["absent"]


@pytest.mark.parametrize(
    "name", ["[", "]", "a[b]c", "*", "?", "[!a]", "[^a]", "a-z", "\\", "[[a]]"]
)
def test_special_characters_of_patterns_in_names(
    client: Client, sock: socket.socket, name: str
) -> None:
    assert name not in client
    client[name] = sock
    assert name in client


# Waiting


def waiters(client: Client, until: Callable[..., Any], count: int) -> None:
    """Returns when *count* requests wait at the server: its connections were opened for them."""
    before = client.stats().counters["requests"]
    until(lambda: client.stats().counters["requests"] - before >= count, f"{count} requests")


def test_fetch_waits_for_the_name(
    server: Any, client: Client, sock: socket.socket, until: Callable[..., Any]
) -> None:
    found: list[socket.socket] = []

    def wait() -> None:
        with Client(server.address) as mine:
            found.append(mine.fetch("web", timeout=60))

    requests = client.stats().counters["requests"]
    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: client.stats().connections >= 6, "five clients that wait")
    assert client.stats().counters["requests"] > requests
    client.register("web", sock)
    for thread in threads:
        thread.join()
    assert len(found) == 5
    for fetched in found:
        with fetched:
            assert same(fetched, sock)


def test_one_of_two_takers_that_wait_gets_it(
    server: Any, client: Client, sock: socket.socket, until: Callable[..., Any]
) -> None:
    results: list[Any] = []

    def wait(seconds: float) -> None:
        with Client(server.address) as mine:
            try:
                results.append(mine.take("web", timeout=seconds))
            except FetchTimeout as error:
                results.append(error)

    threads = [threading.Thread(target=wait, args=(0.5,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: client.stats().connections >= 3, "two clients that wait")
    client.register("web", sock)
    for thread in threads:
        thread.join()
    (taken,) = [result for result in results if isinstance(result, socket.socket)]
    with taken:
        assert same(taken, sock)
    (refused,) = [result for result in results if isinstance(result, FetchTimeout)]
    assert isinstance(refused, TimeoutError)
    assert (refused.name, refused.timeout) == ("web", 0.5)


@pytest.mark.parametrize("verb", ["fetch", "take"])
def test_a_wait_ends_in_time(client: Client, verb: str) -> None:
    start = time.monotonic()
    with pytest.raises(FetchTimeout) as caught:
        getattr(client, verb)("web", timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert (caught.value.name, caught.value.timeout) == ("web", 0.05)
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("timeout", [0, -1, 1e-9])
def test_a_wait_of_nothing(client: Client, timeout: float) -> None:
    with pytest.raises((NameNotFound, FetchTimeout)):
        client.fetch("web", timeout=timeout)


def test_a_wait_that_is_no_number(client: Client) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.fetch("web", timeout=float("nan"))
    assert caught.value.argument == "timeout"


@pytest.mark.parametrize("timeout", [None, 1e7, 1e300, float("inf")])
def test_a_wait_of_ages(
    server: Any,
    client: Client,
    sock: socket.socket,
    timeout: float | None,
    until: Callable[..., Any],
) -> None:
    found: list[Any] = []

    def wait() -> None:
        with Client(server.address) as mine:
            found.append(mine.fetch("web", timeout=timeout))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: client.stats().connections >= 2, "a client that waits")
    client.register("web", sock)
    thread.join()
    with found[0]:
        assert same(found[0], sock)


def test_waiters_that_are_gone_harm_nobody(
    server: Any, client: Client, sock: socket.socket, until: Callable[..., Any]
) -> None:
    """Two waits of a connection that is closed, between two of others: the server lives on."""
    results: list[Any] = []

    def wait() -> None:
        with Client(server.address) as mine:
            results.append(mine.fetch("web", timeout=60))

    first = threading.Thread(target=wait)
    first.start()
    until(lambda: client.stats().connections >= 2, "a client that waits")
    client.register("web", sock)
    first.join()
    results.pop().close()
    client.ping()


# Names


NAMES = {
    "one": "a",
    "longest": "x" * 255,
    "longest-utf8": "é" * 127,
    "slash": "/",
    "slashes": "a//b/",
    "colon": "a:b",
    "dash": "-rf",
    "dots": "...",
    "space": " ",
    "utf8": "näme/日本/🚀",
    "quote": "'\"",
    "dot-dot-in-a-word": "a..b/..c",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_that_are_names(client: Client, sock: socket.socket, name: str) -> None:
    assert client.register(name, sock).name == name
    assert client.names() == [name]
    client.fetch(name).close()
    assert client.info(name).name == name
    assert client.rename(name, "b").name == "b"
    assert client.rename("b", name).name == name
    client.take(name).close()


BAD_NAMES = {
    "empty": "",
    "too-long": "x" * 256,
    "too-long-utf8": "é" * 128,
    "nul": "a\0b",
    "newline": "a\n",
    "escape": "\x1b[31m",
    "delete": "\x7f",
    "c1": "\x9b",
    "not-utf8": "\udcff",
    "parent": "..",
    "up": "a/../b",
    "up-first": "../a",
    "up-last": "a/..",
}


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES)
def test_names_that_are_none(client: Client, sock: socket.socket, name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        client.register(name, sock)
    assert isinstance(caught.value, ValueError)
    assert caught.value.reason
    with pytest.raises(InvalidName):
        client.fetch(name)
    with pytest.raises(InvalidName):
        client.take(name, timeout=1)
    client.register("a", sock)
    with pytest.raises(InvalidName):
        client.rename("a", name)
    for refuse in (client.unregister, client.info):
        with pytest.raises((InvalidName, NameNotFound)):
            refuse(name)
    with pytest.raises((InvalidName, NameNotFound)):
        client.fetch_many(["a", name])
    assert client.names() == ["a"]


@pytest.mark.parametrize("name", [None, 5, b"bytes", ["list"]])
def test_names_that_are_no_str(client: Client, sock: socket.socket, name: Any) -> None:
    for call in (
        lambda: client.register(name, sock),
        lambda: client.fetch(name),
        lambda: client.take(name),
        lambda: client.unregister(name),
        lambda: client.rename("a", name),
        lambda: client.info(name),
    ):
        with pytest.raises(ValueError):
            call()
    assert name not in client


# Bad arguments


def test_closed_descriptors(client: Client, sock: socket.socket) -> None:
    number = 19_999
    pipe = os.pipe()
    file = open(pipe[0])
    file.close()
    os.close(pipe[1])
    descriptor = Descriptor.dup_of(sock)
    descriptor.close()
    copy = sock.dup()
    copy.close()
    for closed in (number, -1, file, descriptor, copy):
        with pytest.raises(ClosedDescriptor) as caught:
            client.register("web", closed)
        assert isinstance(caught.value, ValueError)
    assert client.names() == []
    client.ping()


@pytest.mark.parametrize("obj", [object(), "text", None, io.BytesIO(b"x"), True])
def test_things_without_a_descriptor(client: Client, obj: Any) -> None:
    with pytest.raises((UnsupportedKind, ClosedDescriptor)):
        client.register("web", obj)
    assert client.names() == []


def test_a_tls_socket(client: Client, sock: socket.socket) -> None:
    context = ssl.create_default_context()
    with context.wrap_socket(socket.socket(), server_hostname="example.org") as wrapped:
        with pytest.raises(UnsupportedKind) as caught:
            client.register("web", wrapped)
        assert isinstance(caught.value, TypeError)
        assert "wrapping" in caught.value.reason


def test_a_file_that_has_read_ahead(client: Client) -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as writer:
        writer.write("one\ntwo\n")
        writer.flush()
        reader.readline()
        with pytest.raises(UnreadData) as caught:
            client.register("web", reader)
        assert caught.value.count == 4
    assert client.names() == []


def test_250_descriptors_and_251(client: Client, sock: socket.socket, bundles: None) -> None:
    client.register("most", Bundle([sock] * 250), lifetime="connection")
    with closing(client.fetch("most")) as bundle:
        assert len(bundle.descriptors) == 250
    with closing(client.take("most")) as bundle:
        assert len(bundle.descriptors) == 250
    for count in (251, 253, 254, 1000):
        with pytest.raises(TooManyDescriptors) as caught:
            client.register("more", Bundle([sock] * count))
        assert (caught.value.count, caught.value.limit) == (count, 250)
    assert client.names() == []


def test_no_descriptors_at_all(client: Client, bundles: None) -> None:
    with pytest.raises(InvalidArgument):
        client.register("none", Bundle([]))


def test_what_is_imported_by_its_first_use_names_the_limit(client: Client) -> None:
    """A module is a file to open; where no descriptor is free, that is a DescriptorLimit, too."""
    code = f"""
import os, resource, fdshare
client = fdshare.connect({client.address!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
said = []
verbs = (
    lambda: client.watch("*"),
    lambda: client.follow("n"),
    lambda: client.bind("b", "tcp://127.0.0.1:0"),
)
for verb in verbs:
    try:
        verb()
    except fdshare.DescriptorLimit as error:
        said.append(f"{{error.whose}} {{error.limit}}")
os.closerange(held[0], held[-1] + 1)
client.watch("*")
print(*said, sep=", ")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("client 64, client 64, client 64\n", "")


def test_one_that_is_left_to_the_end_of_the_interpreter(client: Client) -> None:
    """The modules of Python have lost what is in them by then: with the GIL off most clients of a
    program that has threads are left so long."""
    code = f"""
import _weakrefset, gc
from fdshare import connect
client = connect({client.address!r})
client.ping()
vars(_weakrefset).pop("_IterationGuard", None)  # 3.14 has none
del client
"""
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"grace": -1},
        {"grace": float("nan")},
        {"grace": float("inf")},
        {"metadata": {"key": "x" * 4094}},
        {"metadata": {"key": 5}},
        {"metadata": {5: "value"}},
        {"metadata": {"key": "\udcff"}},
        {"lifetime": "for ever"},
        {"ttl": "soon"},
        {"if_generation": "first"},
        {"if_generation": 1 << 70},
    ],
    ids=str,
)
def test_bad_options(client: Client, sock: socket.socket, options: dict[str, Any]) -> None:
    for lifetime in ("server", "connection", "process"):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            client.register("web", sock, **{"lifetime": lifetime, **options})
    assert client.names() == []
    client.ping()


def test_metadata_of_4096_bytes(client: Client, sock: socket.socket) -> None:
    client.register("web", sock, metadata={"é" * 48: "x" * 4000})
    assert client.info("web").metadata == {"é" * 48: "x" * 4000}


def test_patterns_that_are_too_long(client: Client) -> None:
    for verb in (client.names, client.infos):
        with pytest.raises(InvalidArgument) as caught:
            verb("[" * 5000)
        assert caught.value.argument == "pattern"


# Kinds, from the other side


def test_files_arrive_where_they_were(client: Client) -> None:
    with tempfile.TemporaryFile("w+") as file:
        file.write("one\ntwo\nthree\n")
        file.seek(0)
        assert file.readline() == "one\n"
        client.register("log", file)
        with client.fetch("log") as fetched:
            assert fetched.readline() == "two\n"


def test_a_number_is_a_descriptor(client: Client, sock: socket.socket) -> None:
    client.register("number", sock.fileno())
    with client.fetch("number") as fetched:
        assert type(fetched) is Descriptor
        assert same(fetched, sock)


@pytest.mark.parametrize("tag", ["socket", "file", "connection", "no such kind"])
def test_a_kind_that_does_not_fit(client: Client, peer: Peer, tag: str) -> None:
    """The receiver looks; what it cannot rebuild it has not taken, and has not left open."""
    spec = msgspec.msgpack.encode([1, 2, 3, None])
    with open(os.devnull) as null:
        reply = peer.ask(m.Register("odd", m.Kind(tag, msgspec.Raw(spec))), [null.fileno()] * 2)
    assert type(reply) is m.Registered
    for verb in (client.fetch, client.take, lambda name: client.fetch_many([name])):
        with pytest.raises((KindMismatch, UnknownKind)) as caught:
            verb("odd")
        assert caught.value.tag == tag
    for descriptor in client.take_raw("odd", timeout=20):
        descriptor.close()


# Its own life


def test_a_closed_client_says_so(server: Any) -> None:
    client = Client(server.address)
    client.ping()
    client.close()
    client.close()
    with pytest.raises(ClosedDescriptor):
        client.ping()
    assert "closed" in repr(client)


def test_idle_connections_are_few(server: Any, client: Client) -> None:
    barrier = threading.Barrier(20)

    def ping() -> None:
        barrier.wait()
        client.ping()

    threads = [threading.Thread(target=ping) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Client(server.address) as other:
        assert other.stats().connections <= 1 + fdshare.client.blocking.client._POOL
