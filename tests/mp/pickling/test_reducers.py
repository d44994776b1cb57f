"""What the picklers of our channels do with each kind of object."""

from __future__ import annotations

import io
import select
import selectors
import socket
import ssl
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from fdshare import Descriptor
from fdshare.errors import UnsupportedKind
from fdshare.kinds import register_kind, unregister_kind
from fdshare.mp.backends import backend_of
from fdshare.mp.family import Family
from fdshare.mp.pickling.reducers import dumps, encode
from mp import children
from mp.common import identity


@pytest.fixture(params=["multiprocessing", "multiprocess"])
def family(request: pytest.FixtureRequest) -> Family:
    return backend_of(request.param).FAMILY


def through(family: Family, obj: Any) -> Any:
    return dumps(family, obj).own().load(family.loads)


def test_numbers_and_text_are_bytes(family: Family) -> None:
    for obj in (1, "a", b"b", 1.5, True, None):
        message = encode(family, obj)
        assert type(message) is bytes
        assert family.loads(message) == obj


def test_plain_objects_are_what_they_were(family: Family) -> None:
    obj = {"a": [1, (2, {3})], "b": partial(int, base=2), "c": len, "d": KeyError, "e": range(3)}
    arrived = through(family, obj)
    assert arrived.pop("b")("101") == obj.pop("b")("101") == 5  # type: ignore[operator]
    assert arrived == obj


def test_reducers_registered_with_the_package_count(family: Family) -> None:
    class Local:
        pass

    for cls in (Local, WithFileno):
        family.ForkingPickler.register(cls, lambda _: (str, ("reduced",)))
        try:
            assert through(family, [cls()]) == ["reduced"]
        finally:
            del family.ForkingPickler._extra_reducers[cls]


def test_bound_methods(family: Family) -> None:
    assert through(family, [children.TwoArguments(3, "x").with_traceback])[0]


def test_a_bare_object_many_times(family: Family) -> None:
    with socket.socket() as sock, Descriptor.dup_of(sock) as descriptor:
        for obj in (sock, descriptor) * 3:
            with through(family, obj) as arrived:
                assert type(arrived) is type(obj)
                assert identity(arrived) == identity(obj)
        sock.settimeout(3)  # another kind of socket from now on
        with through(family, sock) as arrived:
            assert arrived.gettimeout() == 3
        sock.settimeout(None)


def test_what_cannot_be_pickled_at_all_but_has_a_descriptor(family: Family) -> None:
    with select.epoll() as poller, through(family, [poller])[0] as arrived:
        assert type(arrived) is Descriptor


class Rebuilt(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Arrives empty."""

    def __reduce__(self) -> Any:
        return Rebuilt, ()


def test_a_selector_is_refused_as_without_us(family: Family) -> None:
    with (
        selectors.DefaultSelector() as selector,
        pytest.raises(TypeError, match="cannot pickle 'EpollSelector' object"),
    ):
        dumps(family, [selector])
    with Rebuilt() as sent, through(family, [sent])[0] as arrived:
        assert type(arrived) is Rebuilt


class WithFileno:
    """A program's own class, which says how it is pickled."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def fileno(self) -> int:
        return self.number


def test_a_programs_own_class_with_fileno_is_pickled_as_it_wants(family: Family) -> None:
    arrived = through(family, [WithFileno(77)])[0]
    assert (type(arrived).__name__, arrived.number) == ("WithFileno", 77)


def test_temporary_files(family: Family) -> None:
    with tempfile.NamedTemporaryFile() as named, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(b"x")
        a, b = through(family, [named, spooled])
        with a, b:
            assert isinstance(a, io.BufferedRandom)
            assert b.tell() == 1


def test_a_tls_socket_is_refused(family: Family) -> None:
    context = ssl.create_default_context()
    with (
        socket.socket() as sock,
        context.wrap_socket(sock, server_hostname="x", do_handshake_on_connect=False) as tls,
        pytest.raises(UnsupportedKind),
    ):
        dumps(family, [tls])


class Session:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock


@pytest.fixture
def session_kind() -> Iterator[None]:
    register_kind(
        Session, "session", lambda s: (None, [s.sock]), lambda _, d: Session(d[0].socket())
    )
    yield
    unregister_kind("session")


@pytest.mark.usefixtures("session_kind")
def test_a_kind_of_your_own_and_its_subclasses(family: Family) -> None:
    class Special(Session):
        pass

    with socket.socket() as sock:
        for cls in (Session, Special):
            arrived = through(family, [cls(sock)])[0]
            with arrived.sock:
                assert type(arrived) is Session
                assert identity(arrived.sock) == identity(sock)


def test_a_kind_without_descriptors(family: Family) -> None:
    register_kind(Session, "session", lambda s: (s.sock, []), lambda spec, _: Session(spec))
    try:
        assert through(family, [Session(5)])[0].sock == 5  # type: ignore[arg-type]
        message = encode(family, [Session(6)])  # type: ignore[arg-type]
        assert isinstance(message, bytes)
        assert family.loads(message)[0].sock == 6
    finally:
        unregister_kind("session")
