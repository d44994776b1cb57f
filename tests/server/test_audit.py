"""The audit log: every hand-over and every refusal, at a level that is on by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from breaking import Halves, Wire
from conftest import wait_until
from nursery import Process

from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError, NoServer
from fdshare.kernel.endpoint import connect
from fdshare.protocol import messages as m


@pytest.fixture
def served(folder: Path) -> Iterator[Client]:
    """A client of a server with default options but for the format of its log, `folder`/log."""
    command = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), "--log-format", "json"]
    with open(folder / "log", "wb") as log:
        process = Process(command, stdin=subprocess.DEVNULL, stderr=log)

    def answers() -> bool:
        try:
            connect(folder / "s").close()
        except NoServer:
            return False
        return True

    wait_until(answers, "the server answers")
    with Client(folder / "s") as client:
        yield client
        client.shutdown()
    process.wait()


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


def test_a_name_cannot_forge_a_line(served: Client, folder: Path) -> None:
    with Wire(served.address) as wire:
        wire.refused(1, m.Fetch("x\npid 1 uid 0 fetch 'a': given"))
    wait_until(lambda: audit(folder))
    assert audit(folder)[-1]["message"].count("\n") == 0


def test_an_entry_that_came_back_is_noted(served: Client, folder: Path) -> None:
    read, write = os.pipe()
    served.register("a", read)
    with Wire(served.address) as wire:
        for descriptor in wire.ask(1, m.Take("a")).descriptors:
            descriptor.close()
    wait_until(lambda: audit(folder)[-1]["outcome"] == "returned")
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
