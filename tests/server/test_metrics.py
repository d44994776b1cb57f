"""Prometheus text, and the addresses at which it is served."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fdshare.errors import InvalidArgument
from fdshare.protocol.messages import ServerStats
from fdshare.server.metrics import parse_host_port, render

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
    log_dropped=10,
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
    assert "fdshare_log_dropped_total 10" in lines
    described = set()
    for line in lines:
        if line.startswith("# "):
            described.add(line.split()[2])
        else:
            assert SAMPLE.fullmatch(line)
            assert re.split("[{ ]", line)[0] in described


def test_each_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    for line in render(STATS).splitlines():
        if line.startswith("# HELP"):
            _, _, name, text = line.split(" ", 3)
            assert re.search(rf"`{name}[`{{].*\| {re.escape(text)} \|", page), line


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
