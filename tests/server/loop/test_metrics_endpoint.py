"""MetricsEndpoint: metrics over HTTP, for each client whatever the others do."""

from __future__ import annotations

import resource
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeAlias

import pytest
from breaking import Half, Halves

from fdshare.client.blocking.client import Client

Serve: TypeAlias = Callable[..., Client]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def port(small: Serve) -> int:
    """Where a server answers."""
    port = free_port()
    small(1024, "--no-keeper", "--metrics", f"127.0.0.1:{port}").ping()
    return port


def get(port: int, path: str = "/metrics", method: str = "GET") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def test_it_is_served(port: int) -> None:
    assert "\nfdshare_names 0\n" in get(port)
    assert "\nfdshare_names 0\n" in get(port, "/metrics?x=y")
    assert get(port, method="HEAD") == ""


@pytest.mark.parametrize(("path", "method", "status"), [("/x", "GET", 404), ("/", "POST", 405)])
def test_anything_else_is_refused(port: int, path: str, method: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(port, path, method)
    with caught.value:
        assert caught.value.code == status


def test_a_request_byte_by_byte(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for byte in b"GET / HTTP/1.0\r\nX: y\r\n\r\n":
            sock.sendall(bytes([byte]))
            get(port)  # nobody waits for it
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_request_without_end(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET /" + b"x" * 8200)
        assert sock.recv(100).startswith(b"HTTP/1.1 404")


def test_a_client_that_goes_before_its_answer(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET / HT")
        silent.shutdown(socket.SHUT_WR)
        assert silent.recv(100) == b""
    assert get(port)


def test_many_that_say_nothing(port: int) -> None:
    """The oldest makes room, and the others are closed when their time is over."""
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)
        ]
        assert get(port)
        for sock in silent:
            sock.settimeout(30)
            assert sock.recv(1) == b""


def test_no_descriptor_for_another_client(small: Serve) -> None:
    """It waits until there is one."""
    port = free_port()
    client = small(1024, "--no-keeper", "--metrics", f"127.0.0.1:{port}")
    pid = client.stats().server_pid
    former = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, former[1]))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        for _ in range(10):
            client.ping()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, former)
        sock.settimeout(30)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_an_address_in_use_is_said(small: Serve) -> None:
    """The server runs on without."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        client = small(1024, "--no-keeper", "--metrics", address)
        assert address in client.stats().notes["metrics"]


def test_it_is_served_after_either_half_was_replaced(small: Serve) -> None:
    port = free_port()
    client = small(1024, "--metrics", f"127.0.0.1:{port}")
    halves = Halves(client)
    order: list[Half] = ["server", "keeper"]
    for half in order:
        halves.kill(half)
        halves.redundant()
        assert get(port)
