"""Launch: what a program will find, and at which number."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest

from fdshare.cli.support.exec import Launch, find_program, with_own_offset
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory

# The numbers of its own descriptors are the very places that it puts others into.
SWAP = """
import os, sys
from fdshare.cli.support.exec import Launch
from fdshare.kernel.descriptor import Descriptor
os.closerange(3, 20)
for number in (3, 4, 5):
    assert os.memfd_create(f"m{number}", 0) == number
tell = (
    "import json, os;"
    "print(json.dumps({n: os.readlink('/proc/self/fd/%d' % n) for n in range(3, 6)}))"
)
launch = Launch([sys.executable, "-c", tell])
launch.passed = [("a", Descriptor(5)), ("b", Descriptor(3)), ("c", Descriptor(4))]
launch.execute()
"""


def test_descriptors_may_stand_in_each_others_places() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWAP], capture_output=True, text=True, check=True, timeout=60
    )
    links = json.loads(done.stdout)
    assert [links[n].split()[0] for n in "345"] == ["/memfd:m5", "/memfd:m3", "/memfd:m4"]


def test_placeholders_are_of_whole_names() -> None:
    launch = Launch(["{a}", "{b}{a}", "{", "{c}", "a"])
    with Descriptor(os.dup(0)) as one, Descriptor(os.dup(0)) as two:
        launch.passed = [("a", one), ("a", one), ("b", two)]
        assert launch.arguments() == ["3", "53", "{", "{c}", "a"]


def test_stale_variables_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "7")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert not [key for key in Launch(["x"]).variables() if key.startswith("LISTEN_")]
    with Descriptor(os.dup(0)) as one:
        assert Launch(["x"], [("a", one)]).variables()["LISTEN_FDS"] == "1"


def test_sealed_memory_is_read_from_its_beginning() -> None:
    with SharedMemory.from_bytes(b"hello") as memory:
        copy = with_own_offset(Descriptor(os.dup(memory.fileno())))
        with copy, copy.open("rb") as stream:
            assert stream.read() == b"hello"
        again = with_own_offset(Descriptor(os.dup(memory.fileno())))
        with again:
            assert os.read(again.fileno(), 5) == b"hello"


def test_anything_else_keeps_its_position() -> None:
    descriptor = Descriptor(os.dup(0))
    with descriptor:
        assert with_own_offset(descriptor) is descriptor


def test_programs() -> None:
    find_program(["sh"])
    find_program([sys.executable])
    with pytest.raises(click.ClickException) as missing:
        find_program(["no-such-program-anywhere"])
    assert missing.value.exit_code == 127
    with pytest.raises(click.ClickException) as folder:
        find_program(["/etc/passwd"])
    assert folder.value.exit_code == 126
