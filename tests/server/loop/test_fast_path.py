"""The fast path recognises one frame that fetches, and nothing else."""

from __future__ import annotations

import os
from typing import Any

import pytest

from fdshare.client.blocking.client import Client
from fdshare.errors import NameNotFound
from fdshare.protocol import messages as m
from fdshare.protocol.framing import HEADER, header
from fdshare.server.loop.fast_path import FetchFrames


def frame(request: Any, id: int = 7, count: int = 0) -> bytes:
    body = m.encode(request)
    return header(len(body), count, id) + body


def test_name_of_a_fetch_whatever_its_id() -> None:
    frames = FetchFrames()
    for id in (1, 2, 0xFFFFFFFF):
        assert frames.names_in(frame(m.Fetch("web"), id)) == "web"
    assert frames.names_in(frame(m.Fetch("dns"), 3)) == "dns"
    assert frames.names_in(frame(m.Fetch("x" * 255), 3)) == "x" * 255


def test_names_that_are_fetched_together() -> None:
    frames = FetchFrames()
    for id in (1, 2, 0xFFFFFFFF):
        assert frames.names_in(frame(m.FetchMany(["web", "dns"]), id)) == ("web", "dns")
    assert frames.names_in(frame(m.FetchMany(["dns", "web"]), 1)) == ("dns", "web")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        frame(m.Ping()),
        frame(m.Take("web")),
        frame(m.FetchMany(["web"]))[:-1],
        frame(m.FetchMany(["x" * 255] * 253)),
        frame(m.Fetch("web", look=True)),
        frame(m.Fetch("web"), count=1),
        frame(m.Fetch("web"))[:-1],
        frame(m.Fetch("web")) + b"\0",
        frame(m.Fetch("web")) * 2,
        frame(m.Fetch("x" * 20_000)),
        header(5, 0, 7) + b"\xc1" * 5,
    ],
)
def test_all_else_is_not_on_the_fast_path(data: bytes) -> None:
    frames = FetchFrames()
    for _ in range(2):
        assert frames.names_in(data) is None
    # Not even when its like was seen before.
    assert frames.names_in(frame(m.Fetch("web"))) == "web"
    assert frames.names_in(data) is None


def test_what_it_remembers_is_bounded() -> None:
    frames = FetchFrames()
    most = 0
    for number in range(20_000):
        assert frames.names_in(frame(m.Fetch(name := "n" * 100 + str(number)))) == name
        most = max(most, len(frames))
    assert 5000 < most < 10_000
    for number in range(500):
        names = tuple(f"{number}/{i}/" + "n" * 200 for i in range(64))
        assert frames.names_in(frame(m.FetchMany(list(names)))) == names
        most = max(most, sum(map(len, frames)))
    assert most <= 1 << 20


def test_header_has_the_id_where_it_is_cut_out() -> None:
    assert HEADER.size == 12
    assert header(1, 2, 0x01020304)[8:12] == b"\1\2\3\4"


def test_a_fetch_after_every_change_is_of_what_is_held_now(client: Client) -> None:
    """The answer kept beside an entry is never another's."""

    def inode(name: str) -> int:
        with client.fetch(name) as found, client.fetch_many([name])[name] as also:
            assert os.path.samestat(os.fstat(found.fileno()), os.fstat(also.fileno()))
            return os.fstat(found.fileno()).st_ino

    files = [os.memfd_create("a"), os.memfd_create("b")]
    one, other = (os.fstat(fd).st_ino for fd in files)
    try:
        client.register("x", files[0])
        assert [inode("x") for _ in range(3)] == [one] * 3
        client.register("x", files[1], replace=True)
        assert [inode("x") for _ in range(3)] == [other] * 3
        client.rename("x", "y")
        assert [inode("y") for _ in range(3)] == [other] * 3
        with pytest.raises(NameNotFound):
            client.fetch("x")
        client.register("x", files[0])
        assert [inode("x"), inode("y"), inode("x"), inode("y")] == [one, other] * 2
        client.take("x").close()
        for verb in (client.fetch, lambda name: client.fetch_many([name])):
            with pytest.raises(NameNotFound):
                verb("x")
        client.unregister("y")
        with pytest.raises(NameNotFound):
            client.fetch("y")
    finally:
        for fd in files:
            os.close(fd)
