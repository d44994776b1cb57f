"""new_code: its first words, before it may have anything that is not a copy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fdshare.kernel.endpoint import listen
from fdshare.protocol import messages as m
from fdshare.server.core.records import Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover.holdings import Holdings
from fdshare.server.failover.new_code import try_table
from fdshare.server.failover.upgrade import Handover, make_handover
from fdshare.server.loop.closing import Handle
from fdshare.server.settings import Settings
from server.orders import KIND


@pytest.fixture
def handover(folder: Path, pair: object, null: int) -> Iterator[Handover]:
    """That of a server with one entry; its descriptors are this process's."""
    near, far = pair  # type: ignore[misc]
    (folder / "policy").write_text('[[rule]]\neffect = "allow"\nverbs = ["fetch"]\n')
    settings = Settings(path=str(folder / "s"), policy=str(folder / "policy"))
    with listen(folder / "s") as listener:
        table = Table()
        table.apply(Record([Put("a", 1, KIND, 1, m.Registrant(1, 0, 0), 0.0)]), [Handle(null)])
        yield make_handover(Holdings(settings, listener, table, "epoch"), near, far, "", 0)


def memfd(data: bytes) -> int:
    fd = os.memfd_create("handover")
    os.write(fd, data)
    return fd


def tried(handover: object) -> int:
    return try_table(memfd(msgspec.msgpack.encode(handover)))


def test_a_table_that_it_can_read(handover: Handover) -> None:
    """It takes nothing over: all that it reads of are numbers."""
    assert tried(handover) == 0
    os.fstat(handover.handles[0])
    os.fstat(handover.listener)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"epoch": 5}, "epoch"),
    ],
)
def test_a_table_that_it_cannot_read(
    handover: Handover, capsys: pytest.CaptureFixture[str], change: dict[str, object], says: str
) -> None:
    """The last line of what it says is what the old code reports."""
    assert tried({**msgspec.msgpack.decode(msgspec.msgpack.encode(handover)), **change}) == 1
    assert says in capsys.readouterr().err


def test_a_policy_that_it_cannot_read(
    handover: Handover, capsys: pytest.CaptureFixture[str]
) -> None:
    handover.settings.policy_text = b"[[rule]]\neffect = 5\n"
    assert tried(handover) == 1
    assert capsys.readouterr().err.startswith("PolicyError")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80"])
def test_what_is_no_handover(capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    assert try_table(memfd(data)) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_it_ends_without_a_warning() -> None:
    """What it was given, the control socket among it, is closed at its end."""
    code = "import fdshare\nwith fdshare.Manager() as manager:\n    manager.upgrade()\n"
    command = [sys.executable, "-X", "dev", "-c", code]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=True, timeout=60)
    assert done.stderr == b""
