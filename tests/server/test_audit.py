"""The audit log: every hand-over and every refusal, at a level that is on by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from breaking import Halves, Wire
from conftest import wait_until
from nursery import Process

from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from server.conftest import answers

# A title for the terminal, a line of its own, C1, bidirectional marks.
EVIL = "\x1b]0;owned\x07\x1b[31m\nfdshare[1] INFO: forged\r\x7f\x85\u200b\u2028\u202e\u2066"
FIELDS = {
    *("time", "level", "logger", "process", "message"),
    *("verb", "entry", "outcome", "pid", "uid"),
}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Client]:
    """A client of a server that logs into `folder`/log, and has ended afterwards."""
    command = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), *options]
    with open(folder / "log", "wb") as log:
        process = Process(command, stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_until(lambda: answers(folder / "s"), "the server answers")
        with Client(folder / "s") as client:
            yield client
            client.shutdown()
        process.wait()
    finally:
        process.terminate()  # where the test has failed
        process.wait()


@pytest.fixture
def served(folder: Path) -> Iterator[Client]:
    """A client of a server with default options but for the format of its log, `folder`/log."""
    with serving(folder, "--log-format", "json") as client:
        yield client


def audit(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [line for line in lines if line["logger"] == "fdshare.audit"]


def said(folder: Path, verb: str, entry: str) -> str:
    """The outcome of the last line that is of *verb* and *entry*, which must be about us."""

    def find() -> dict[str, Any] | None:
        found = [a for a in audit(folder) if (a["verb"], a["entry"]) == (verb, entry)]
        return found[-1] if found else None

    line = wait_until(find)
    assert (line["pid"], line["uid"]) == (os.getpid(), os.geteuid())
    assert line["level"] == "info"
    outcome = line["outcome"]
    assert isinstance(outcome, str)
    return outcome


def test_every_hand_over_is_noted(served: Client, folder: Path) -> None:
    read, write = os.pipe()
    served.register("a", read)
    assert said(folder, "register", "a") == "generation 1"
    for _ in range(3):  # the first fetch goes another way through the server than the next
        served.fetch_raw("a")[0].close()
        assert said(folder, "fetch", "a") == "given"
    wait_until(lambda: len([line for line in audit(folder) if line["verb"] == "fetch"]) == 3)
    served.fetch_many(["a"])["a"].close()
    wait_until(lambda: len([line for line in audit(folder) if line["verb"] == "fetch"]) == 4)
    with served.follow("a") as followed:
        followed.current.fileno()
    wait_until(lambda: len([line for line in audit(folder) if line["verb"] == "fetch"]) == 5)
    served.rename("a", "b")
    assert said(folder, "rename", "a") == "to b"
    served.take_raw("b")[0].close()
    assert said(folder, "take", "b").startswith("leased")
    served.bind("web", "tcp://127.0.0.1:0").close()
    assert said(folder, "bind", "web") == "tcp://127.0.0.1:0"
    assert said(folder, "fetch", "web") == "given"
    served.unregister("web")
    assert said(folder, "unregister", "web") == "removed"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_every_refusal_is_noted(served: Client, folder: Path, timeout: float) -> None:
    for verb, refuse in {
        "fetch": lambda: served.fetch("missing", timeout=timeout),
        "take": lambda: served.take("missing", timeout=timeout),
        "follow": lambda: served.follow("missing", timeout=timeout),
        "unregister": lambda: served.unregister("missing"),
        "rename": lambda: served.rename("missing", "other"),
        "info": lambda: served.info("missing"),
    }.items():
        with pytest.raises(FdshareError) as caught:
            refuse()
        wait_until(lambda verb=verb: audit(folder)[-1:] and audit(folder)[-1]["verb"] == verb)
        assert said(folder, verb, "missing") == f"refused: {caught.value}"


def test_what_cannot_be_read_is_noted(served: Client, folder: Path) -> None:
    with Wire(served.address) as wire:
        wire.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert isinstance(wire.receive().reply, m.Refused)
    assert said(folder, "request", "").startswith("refused: the peer speaks protocol version")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_text_of_a_client_is_noted_as_it_came(folder: Path, log_format: str) -> None:
    """Whatever part of a request it is in. Nor does an answer carry it so."""
    kind = m.Kind(EVIL, msgspec.Raw(m.encode(None)))
    odd = f"a/{EVIL}"
    with serving(folder, "--log-format", log_format) as client:
        with Wire(client.address) as wire:
            for id, request in enumerate(
                (
                    m.Fetch(odd),
                    m.Take(odd),
                    m.FetchMany([odd]),
                    m.Rename(odd, odd),
                    m.Rename("a", odd),
                    m.Bind("b", f"unix://{EVIL}"),
                    m.Bind(odd, EVIL),
                    m.Info(odd),
                    m.Unregister(odd),
                    m.Register(odd, kind),
                    m.Register("c", kind, metadata={EVIL: EVIL * 1000}),
                ),
                start=1,
            ):
                assert str(wire.refused(id, request)).isprintable()
            body = m.encode({"type": EVIL})
            wire.sock.sendall(header(len(body), 0, 20) + body)
            assert wire.receive().reply.message.isprintable()
        with Wire(client.address, EVIL[:20]) as wire:
            body = m.encode({"type": "fetch", EVIL: EVIL, "name": [EVIL]})
            wire.sock.sendall(header(len(body), 0, 20) + body)
            wire.receive()
        with Wire(client.address, greet=False) as wire:
            wire.send(0, m.Hello(EVIL, m.VERSION, EVIL))
            assert wire.receive().reply.message.isprintable()
        client.register("\u202ename\u2028", 0)
        client.fetch_raw("\u202ename\u2028")[0].close()
    lines = (folder / "log").read_bytes().decode().split("\n")
    assert len(lines) > 14
    assert [line for line in lines if not line.isprintable()] == []
    assert not any("forged" in line[:20] for line in lines)


def test_what_is_too_long_is_not_noted(served: Client, folder: Path) -> None:
    with Wire(served.address) as wire:
        wire.refused(1, m.Fetch("x" * 100_000))
    (line,) = wait_until(lambda: audit(folder))
    assert len(json.dumps(line)) < 700


def test_refusals_do_not_fill_the_log(folder: Path) -> None:
    """Those that have no line of their own are counted."""
    with serving(folder, "--log-format", "json") as client:
        for _ in range(500):
            with pytest.raises(FdshareError):
                client.fetch_raw("missing", timeout=0)
    refusals = [line for line in audit(folder) if line["outcome"].startswith("refused")]
    assert 100 <= len(refusals) < 300
    left_out = [line for line in refusals if line["verb"] == "request"]
    for line in left_out:
        assert set(line) == FIELDS - {"pid"}
        assert line["uid"] == os.geteuid()
        assert line["message"] == f"uid {line['uid']} request '': {line['outcome']}"
    counted = sum(int(line["outcome"].split()[1]) for line in left_out)
    assert len(refusals) - len(left_out) + counted == 500


def test_a_connection_that_makes_room_is_noted(folder: Path) -> None:
    options = ("--log-format", "json", "--limit", "max_connections=3")
    outcome = "closed: it was idle, and there were too many connections"
    with serving(folder, *options) as client, ExitStack() as wires:
        for _ in range(4):
            wires.enter_context(Wire(client.address))
        assert said(folder, "connect", "") == outcome


def test_the_form_of_a_line(folder: Path) -> None:
    with serving(folder, "--log-format", "json") as client:
        client.register("a", 0)
        server = client.stats().server_pid
    (line,) = (line for line in audit(folder) if line["verb"] == "register")
    assert set(line) == FIELDS
    assert line["process"] == server
    assert abs(line["time"] - time.time()) < 3600
    me = f"pid {os.getpid()} uid {os.geteuid()}"
    assert line["message"] == f"{me} register 'a': generation 1"
    with serving(folder) as client:
        client.register("a", 0)
        server = client.stats().server_pid
    lines = (folder / "log").read_text().splitlines()
    lines = [line for line in lines if "serving at" not in line]  # of the keeper
    assert lines == [f"fdshare[{server}] INFO: {me} register 'a': generation 1"]


def test_an_entry_that_came_back_is_noted(served: Client, folder: Path) -> None:
    read, write = os.pipe()
    served.register("a", read)
    with Wire(served.address) as wire:
        for descriptor in wire.ask(1, m.Take("a")).descriptors:
            descriptor.close()
    wait_until(lambda: audit(folder)[-1:] and audit(folder)[-1]["outcome"] == "returned")
    line = audit(folder)[-1]
    assert "pid" not in line
    os.close(read)
    os.close(write)


def test_successors_go_on_with_it(served: Client, folder: Path) -> None:
    read, write = os.pipe()
    halves = Halves(served)
    halves.kill("keeper")
    halves.kill("server")
    served.register("a", read)
    assert said(folder, "register", "a") == "generation 1"
    os.close(read)
    os.close(write)
