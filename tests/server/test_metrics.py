"""Prometheus text, and the endpoint that serves it."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from fdshare.errors import InvalidArgument
from fdshare.protocol.messages import ServerStats
from fdshare.server.metrics import MetricsEndpoint, parse_host_port, render

STATS = ServerStats(
    server_pid=1,
    keeper_pid=2,
    redundant=True,
    uptime=1.5,
    names=3,
    descriptors=4,
    leases=0,
    connections=5,
    in_flight=6,
    generation=7,
    serial=8,
    counters={"requests": 9, "refused": 1},
    limits={"max_names": 100, "lease_timeout": 60.0},
)
SAMPLE = re.compile(r'fdshare_[a-z_]+(\{[a-z]+="[a-z_]+"\})? -?[0-9.e+]+')


def test_the_text_is_prometheus() -> None:
    lines = render(STATS).splitlines()
    assert "fdshare_names 3" in lines
    assert "fdshare_uptime_seconds 1.5" in lines
    assert "fdshare_redundant 1" in lines
    assert 'fdshare_limit{name="max_names"} 100' in lines
    assert "# TYPE fdshare_requests_total counter" in lines
    assert "fdshare_requests_total 9" in lines
    described = set()
    for line in lines:
        if line.startswith("# "):
            described.add(line.split()[2])
        else:
            assert SAMPLE.fullmatch(line)
            assert re.split("[{ ]", line)[0] in described


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("[::1]:0", ("::1", 0)),
        (":80", ("127.0.0.1", 80)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_host_port(text) == address


@pytest.mark.parametrize("text", ["", "host", "1:x", "1:99999"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_host_port(text)


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint("127.0.0.1:0", lambda: STATS, lambda call: call())
    yield endpoint
    endpoint.close()


def get(endpoint: MetricsEndpoint, path: str = "/metrics", method: str = "GET") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{endpoint.port}{path}", method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_it_is_served(endpoint: MetricsEndpoint) -> None:
    assert get(endpoint) == render(STATS)
    assert get(endpoint, "/metrics?x=y") == render(STATS)
    assert get(endpoint, method="HEAD") == ""


@pytest.mark.parametrize(("path", "method", "status"), [("/x", "GET", 404), ("/", "POST", 405)])
def test_anything_else_is_refused(
    endpoint: MetricsEndpoint, path: str, method: str, status: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(endpoint, path, method)
    with caught.value:
        assert caught.value.code == status


def test_a_client_that_says_nothing_is_gone_in_the_end(endpoint: MetricsEndpoint) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port)) as silent:
        silent.sendall(b"GET / HT")
        silent.shutdown(socket.SHUT_WR)
        assert silent.recv(100) == b""
    assert get(endpoint)


def test_stats_are_asked_for_by_the_right_thread() -> None:
    asked: list[threading.Thread] = []
    calls: list[object] = []
    wake = threading.Event()

    def post(call: object) -> None:
        calls.append(call)
        wake.set()

    def stats() -> ServerStats:
        asked.append(threading.current_thread())
        return STATS

    endpoint = MetricsEndpoint("127.0.0.1:0", stats, post)
    try:
        with socket.create_connection(("127.0.0.1", endpoint.port)) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert wake.wait(30)
            calls[0]()  # type: ignore[operator]
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert asked == [threading.current_thread()]
    finally:
        endpoint.close()
