"""References: picklable, resolved where they are used, and only on the machine they are of."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fdshare
from fdshare.client.blocking.client import Client
from fdshare.errors import DescriptorLimit, ForeignHost, InvalidName, NameNotFound, NoServer


@pytest.fixture
def sock(client: Client) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        client.register("web", sock)
        yield sock


def in_another_process(code: str, obj: Any) -> str:
    """What *code* prints, in a fresh interpreter that has unpickled *obj*."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, pickle, fdshare\nobj = pickle.load(sys.stdin.buffer)\n{code}",
        ],
        input=pickle.dumps(obj),
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.decode().strip()


def test_fetched_where_it_is_used(client: Client, sock: socket.socket) -> None:
    reference = fdshare.ref("web", client.address)
    with reference.fetch() as fetched:
        assert os.path.samestat(os.fstat(fetched.fileno()), os.fstat(sock.fileno()))
    printed = in_another_process(
        "with obj.fetch() as sock: print(sock.getsockname()[1])", reference
    )
    assert int(printed) == sock.getsockname()[1]


def test_as_an_argument_it_arrives_as_the_object(client: Client, sock: socket.socket) -> None:
    argument = {"listener": fdshare.ref("web", client.address).as_object()}
    assert "web" in repr(argument)
    code = "with obj['listener'] as sock: print(type(sock).__name__, sock.getsockname()[1])"
    printed = in_another_process(code, argument)
    assert printed == f"socket {sock.getsockname()[1]}"
    with pickle.loads(pickle.dumps(argument))["listener"] as again:
        assert again.getsockname() == sock.getsockname()


def test_it_waits_for_its_name(client: Client) -> None:
    reference = fdshare.ref("absent", client.address)
    with pytest.raises(NameNotFound):
        reference.fetch()
    with pytest.raises(fdshare.errors.FetchTimeout):
        reference.fetch(timeout=0.01)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"boot_id": "11111111-2222"}, False),  # another machine, or this one after a reboot
        ({"host": "container"}, True),  # they share a kernel, and perhaps a server
        ({"host": "elsewhere", "boot_id": ""}, False),
    ],
)
def test_on_another_machine_it_says_so(
    client: Client, sock: socket.socket, changed: dict[str, str], same: bool
) -> None:
    here = fdshare.ref("web", client.address)
    reference = dataclasses.replace(here, **changed)
    if same:
        reference.fetch().close()
        return
    with pytest.raises(ForeignHost) as refused:
        reference.fetch()
    assert refused.value.name == "web"
    assert reference.host in refused.value.made_on
    assert socket.gethostname() in refused.value.here
    with pytest.raises(ForeignHost):
        pickle.loads(pickle.dumps(reference.as_object()))


def test_at_the_descriptor_limit_it_names_it(folder: Path) -> None:
    """A reference that was made there was of another machine everywhere, and one that was used
    there, too."""
    reference = fdshare.ref("x", folder / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(DescriptorLimit):
            fdshare.ref("x", folder / "s")
        with pytest.raises(DescriptorLimit):
            reference.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    reference.check()


def test_the_path_is_decided_where_it_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDSHARE_PATH", str(folder / "default"))
    assert fdshare.ref("x").path == str(folder / "default")
    monkeypatch.chdir(folder)
    assert fdshare.ref("x", "here").path == str(folder / "here")
    assert fdshare.ref("x", "@abstract").path == "@abstract"
    assert fdshare.ref("x", folder / "p").path == str(folder / "p")
    with pytest.raises(NoServer):
        fdshare.ref("x").fetch()


def test_a_name_that_is_none(folder: Path) -> None:
    with pytest.raises(InvalidName):
        fdshare.ref("", folder)


def test_it_can_be_compared_and_read(folder: Path) -> None:
    one, two = fdshare.ref("x", folder / "s"), fdshare.ref("x", folder / "s")
    assert one == two
    assert len({one, two}) == 1
    assert pickle.loads(pickle.dumps(one)) == one
    assert str(one) == f"x at {folder}/s on {socket.gethostname()}"


def test_a_reference_is_followed(client: Client) -> None:
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        client.register("log", one)
        with fdshare.ref("log", client.address).follow() as log:
            file = log.current
            assert os.fstat(file.fileno()).st_ino == os.fstat(one.fileno()).st_ino
            client.register("log", other, replace=True)
            now = os.fstat(log.current.fileno()).st_ino
            assert now == os.fstat(other.fileno()).st_ino
        assert file.closed
        client.unregister("log")
        with pytest.raises(NameNotFound):
            fdshare.ref("log", client.address).follow()
    elsewhere = dataclasses.replace(fdshare.ref("log", client.address), boot_id="another")
    with pytest.raises(ForeignHost):
        elsewhere.follow()
