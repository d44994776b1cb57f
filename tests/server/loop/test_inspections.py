"""inspections: long answers, and descriptors that nobody can look at at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from barepeer import Peer
from conftest import line

from fdshare.client.blocking.client import Client
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.protocol.framing import MAX_FRAME
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User
from fdshare.server.loop import inspections
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.inspections import _Inspection, _parts

Pair = tuple[socket.socket, socket.socket]


def test_infos_with_much_metadata(client: Client, null: int) -> None:
    """No part of an answer is longer than a frame may be."""
    for number in range(400):
        client.register(f"{number}", null, metadata={"key": "x" * 4000})
    assert len(client.infos()) == 400


def info(name: str, path: str = "", count: int = 1, metadata: str = "") -> m.EntryInfo:
    described = [m.DescriptorInfo("file", path=path, local=path)] * count
    who = m.Registrant(1, 0, 0)
    return m.EntryInfo(
        name, 1, "fd", who, 0.0, count, metadata={"k": metadata}, descriptors=described
    )


def test_parts_are_full_and_fit_into_frames() -> None:
    infos = [info(f"{number:05}", "/" * 1000, metadata="m" * 3000) for number in range(2000)]
    parts = _parts(infos)
    assert [each.name for part in parts for each in part] == [each.name for each in infos]
    sizes = [len(m.encode(m.InfoList(part, more=True))) for part in parts]
    assert max(sizes) <= MAX_FRAME
    assert min(sizes[:-1]) > MAX_FRAME // 5  # and not a frame for each


def test_one_that_is_too_long_for_a_frame_keeps_the_ends_of_its_paths() -> None:
    long = info("long", "/" + "x" * 4000 + "/end", count=250)
    assert len(m.encode(long)) > MAX_FRAME
    parts = _parts([info("a"), long, info("b")])
    assert [each.name for part in parts for each in part] == ["a", "long", "b"]
    short = parts[0][1]
    assert len(m.encode(m.InfoList([short]))) < MAX_FRAME
    assert len(short.descriptors) == 250
    assert all(each.path.endswith("x/end") for each in short.descriptors)
    assert all(each.local.endswith("x/end") for each in short.descriptors)


def test_nobody_looks_for_a_client_that_is_gone() -> None:
    """However many entries it has asked about."""
    session = Session(Subject(1501, 1501), 1, User(1501, False))
    with open(os.devnull) as file:
        asked = _Inspection(session, 1, [info("a")], [(Handle(file.fileno()),)], 0.0)
        asked.describe([0], look_up=True)
        assert asked.found == [None]
        session.route = object()
        asked.describe([0], look_up=True)
        assert asked.found != [None]


def test_the_loop_gets_its_turn_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspections, "_WORK", 0.0)  # there is time for one
    session = Session(Subject(1501, 1501), 1, User(1501, False), route=object())
    rests: list[float] = []
    with open(os.devnull) as file:
        handles = [(Handle(file.fileno()),) * 3, (Handle(file.fileno()),)]
        asked = _Inspection(session, 1, [info("a"), info("b")], handles, 0.0)
        asked.describe([0, 1], look_up=True, give_way=rests.append)
    assert len(rests) == 4
    assert all(worked > 0 for worked in rests)
    assert [each and len(each) for each in asked.found] == [3, 1]


def test_no_entries_are_one_empty_part() -> None:
    assert _parts([]) == [[]]


def test_each_entry_is_answered_with_what_the_kernel_says(
    client: Client, folder: Path, pair: Pair
) -> None:
    path = folder / "f"
    with open(path, "w") as file:
        client.register("file", file, metadata={"k": "v"}, ttl=500, grace=2.5)
    client.register("sock", pair[0], drop_on_hangup=True)
    client.fetch("sock").close()
    one, two = client.infos("*")
    assert (one.name, one.descriptors[0].path, one.metadata) == ("file", str(path), {"k": "v"})
    assert one.ttl is not None
    assert 400 < one.ttl <= 500
    assert (one.grace, one.drop_on_hangup, one.fetches) == (2.5, False, 0)
    assert (two.name, two.descriptors[0].type, two.ttl) == ("sock", "socket", None)
    assert (two.drop_on_hangup, two.fetches, two.leased) == (True, 1, False)
    assert one.registrant.pid == os.getpid()
    assert 0 <= two.age <= one.age


def test_what_is_looked_at_stays_open_meanwhile(client: Client, peer: Peer, null: int) -> None:
    """It is unregistered before its `info` can be answered."""
    client.register("x", null)
    frames = peer.frame(m.Infos("*"), 0, 1) + peer.frame(m.Unregister("x"), 0, 2)
    peer.sock.sendall(frames)
    said = {id: reply for id, reply, _ in (peer.receive() for _ in range(2))}
    assert said[2] == m.Done()
    assert [d.path for d in said[1].entries[0].descriptors] == ["/dev/null"]


ASK = """
    import os, sys
    from fdshare.client.blocking.client import Client
    os.setgroups([])
    os.setresgid(12345, 12345, 12345)
    os.setresuid(12345, 12345, 12345)
    with Client(sys.argv[1], trust=[0]) as client:
        print(repr(client.info("web").descriptors[0].health), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_who_may_not_see_a_path_is_not_told_of_it(
    folder: Path, serve: Callable[..., Manager], child: Callable[..., Any]
) -> None:
    """The path of a socket may lead, by a link, to where only the server can look."""
    folder.chmod(0o755)
    (folder / "policy").write_text('[[rule]]\neffect = "allow"\nverbs = ["info"]\n')
    manager = serve(mode=0o666, policy=folder / "policy")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "web"))
        sock.listen()
        manager.register("web", sock)
    (folder / "web").unlink()
    assert "nothing is at" in manager.info("web").descriptors[0].health
    assert line(child(ASK, manager.address)) == "''"
