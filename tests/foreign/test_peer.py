"""A peer written from docs/protocol.md alone gets along; and the page says all there is to say."""

from __future__ import annotations

import inspect
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from fdshare import errors
from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError, NameNotFound
from fdshare.manager import Manager
from fdshare.protocol import messages as m

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "protocol.md"


def peer(address: str, *arguments: str) -> str:
    """What the peer printed."""
    done = subprocess.run(
        [sys.executable, "-I", HERE / "peer.py", address, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


@pytest.fixture
def pipe(client: Client) -> Iterator[Any]:
    """The reading end; the writing one is registered as "log"."""
    reading, writing = os.pipe()
    with open(reading) as reader:
        client.register("log", writing)
        os.close(writing)
        yield reader


def test_it_knows_nothing_of_us() -> None:
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "peer.py").read_text(), re.MULTILINE)
    assert set(imports) == {"array", "hashlib", "hmac", "os", "socket", "struct", "sys"}


def test_what_it_registers_we_fetch(server: Any, client: Client) -> None:
    stranger = subprocess.Popen(
        [sys.executable, "-I", HERE / "peer.py", server.address, "register", "foreign/web"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with stranger:
        assert stranger.stdout is not None
        assert stranger.stdin is not None
        word, port = stranger.stdout.readline().split()
        assert word == "port"
        info = client.info("foreign/web")
        assert info.registrant.pid == stranger.pid
        assert info.metadata == {"by": "a stranger"}
        stranger.stdin.close()
        assert stranger.wait() == 0
    with client.fetch("foreign/web") as listener:
        assert isinstance(listener, socket.socket)
        assert listener.getsockname() == ("127.0.0.1", int(port))
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()


def test_what_we_register_it_fetches(server: Any, client: Client, pipe: Any) -> None:
    assert peer(server.address, "fetch", "log") == "fetched descriptor"
    assert pipe.readline() == "a line of a stranger\n"
    assert client.info("log").fetches == 1


def test_it_waits(server: Any, client: Client, until: Callable[..., Any]) -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as writer:
        stranger = subprocess.Popen(
            [sys.executable, "-I", HERE / "peer.py", server.address, "fetch", "later"],
            stdout=subprocess.PIPE,
        )
        with stranger:
            until(lambda: client.stats().connections == 2, "the stranger at the server")
            client.register("later", writer.fileno())
            assert stranger.wait() == 0
        assert reader.readline() == "a line of a stranger\n"


def test_it_takes(server: Any, client: Client, pipe: Any, until: Callable[..., Any]) -> None:
    assert peer(server.address, "take-and-drop", "log") == "dropped"
    assert client.names() == ["log"]
    assert peer(server.address, "take", "log") == "taken"
    assert client.names() == []
    assert pipe.readline() == "a line of its owner\n"
    # The writing end is open nowhere now, as soon as the server's thread has closed it.
    assert pipe.read() == ""


def test_it_lists_and_is_refused(server: Any, client: Client, pipe: Any) -> None:
    assert peer(server.address, "names", "*") == "names log"
    assert peer(server.address, "take", "absent").startswith("refused name_not_found: ")
    assert peer(server.address, "fetch", "../up").startswith("refused invalid_name: ")


def test_with_an_authkey(serve: Callable[..., Manager]) -> None:
    address = serve(authkey=b"secret").address
    assert peer(address, "names", "*", "secret") == "names"
    assert peer(address, "names", "*", "guess") == "refused authentication_failed"
    assert peer(address, "take", "absent").startswith("refused authentication_failed")


# The page


def sections() -> dict[str, str]:
    """message name -> what the page says of it, up to the next one."""
    found: dict[str, str] = {}
    for block in re.split(r"^(?=\*\*\w+\*\*)", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        for name in re.findall(r"\*\*(\w+)\*\*", block):
            found.setdefault(name, block)
    return found


@pytest.mark.parametrize(
    "cls", [*get_args(m.AnyRequest), *get_args(m.AnyReply)], ids=lambda cls: cls.__name__
)
def test_every_message_and_field_is_on_the_page(cls: type[Any]) -> None:
    said = sections()
    name = cls.__struct_config__.tag
    assert name in said, f"{name} is not on the page"
    section = said["fetch" if name == "take" else name]
    for field in msgspec.structs.fields(cls):
        assert re.search(rf"\b{field.encode_name}\b", section), f"{name}.{field.encode_name}"


@pytest.mark.parametrize("cls", [m.EntryInfo, m.DescriptorInfo, m.ServerStats, m.Registrant])
def test_every_field_of_the_inner_structs_is_on_the_page(cls: type[Any]) -> None:
    section = sections()["statsreply" if cls is m.ServerStats else "infolist"]
    for field in msgspec.structs.fields(cls):
        assert re.search(rf"\b{field.name}\b", section), f"{cls.__name__}.{field.name}"


def test_the_codes_of_the_page_are_ours() -> None:
    table = PAGE.read_text().partition("| code | fields | when |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    assert len(rows) > 15
    for code, fields in rows:
        cls = errors._by_code[code.strip()]
        said = re.findall(r"\w+", re.sub(r": \w+", "", fields))
        if cls is not FdshareError:
            assert sorted(said) == sorted(inspect.signature(cls).parameters), code


def test_a_refusal_is_what_the_page_says(client: Client) -> None:
    with pytest.raises(NameNotFound) as caught:
        client.fetch("absent")
    assert caught.value.fields == {"names": ["absent"]}
