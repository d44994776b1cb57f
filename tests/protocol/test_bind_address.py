"""address: one spelling for each address of `bind`."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import InvalidArgument
from fdshare.protocol.bind_address import BindAddress, parse_address


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("tcp://127.0.0.1:8080", BindAddress("tcp", "127.0.0.1", 8080)),
        ("tcp://0.0.0.0:0", BindAddress("tcp", "0.0.0.0", 0)),
        ("udp://[::1]:53", BindAddress("udp", "::1", 53)),
        ("tcp://[::]:80", BindAddress("tcp", "::", 80)),
        ("tcp://[fe80::1%eth0]:80", BindAddress("tcp", "fe80::1%eth0", 80)),
        ("tcp://[fe80::1%Eth0]:80", BindAddress("tcp", "fe80::1%Eth0", 80)),
        ("unix:///run/a.sock", BindAddress("unix", path="/run/a.sock")),
        ("unix:///run/a.sock?mode=0660", BindAddress("unix", path="/run/a.sock", mode=0o660)),
        ("unix:///run/a?group=www-data", BindAddress("unix", path="/run/a", group="www-data")),
        ("unix:///a?mode=0660&group=33", BindAddress("unix", path="/a", mode=0o660, group="33")),
        ("tcp://*:80", BindAddress("tcp", "*", 80)),
        ("udp://*:0", BindAddress("udp", "*", 0)),
        ("unix:///run/wha?t", BindAddress("unix", path="/run/wha?t")),
        ("unix:@name", BindAddress("unix", path="@name")),
    ],
)
def test_addresses_that_are_read(text: str, parsed: BindAddress) -> None:
    assert parse_address(text) == parsed
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tcp://localhost:80", "tcp://127.0.0.1:80"),
        ("unix:///run/a?mode=660", "unix:///run/a?mode=0660"),
        ("tcp://[FE80::1%Eth0]:80", "tcp://[fe80::1%Eth0]:80"),
    ],
)
def test_what_has_two_spellings_is_turned_into_one(text: str, canonical: str) -> None:
    assert str(parse_address(text)) == canonical


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write tcp://HOST:PORT"),
        ("8080", "write tcp://HOST:PORT"),
        ("http://127.0.0.1:80", "write tcp://HOST:PORT"),
        ("TCP://127.0.0.1:80", "write tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "write tcp://127.0.0.1:PORT"),
        ("tcp://:80", "write tcp://127.0.0.1:PORT"),
        ("tcp://::1:80", "write tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:080", "write tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:80/", "write tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:-1", "write tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:٨", "write tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:65536", "at most 65535"),
        ("tcp://example.org:80", "names other than localhost are not looked up"),
        ("tcp://LOCALHOST:80", "not a numeric address"),
        ("tcp://eth0:80", "all interfaces are 0.0.0.0, [::] or * (both)"),
        ("tcp://[*]:80", "not an IPv6 address"),
        ("tcp://127.1:80", "not a numeric address"),
        ("tcp://0x7f.0.0.1:80", "not a numeric address"),
        ("tcp://127.0.0.01:80", "not a numeric address"),
        ("tcp://2130706433:80", "not a numeric address"),
        ("tcp://[::ffff:127.0.0.1]:80", "write the IPv4 address: 127.0.0.1"),
        ("tcp://[0:0::1]:80", "write [::1]"),
        ("tcp://[::1%lo]:80", "only a link-local address"),
        ("tcp://[nonsense]:80", "not an IPv6 address"),
        ("tcp://[]:80", "write tcp://"),
        ("unix:", "absolute path"),
        ("unix://", "absolute path"),
        ("unix:///", "absolute path"),
        ("unix://run/a", "absolute path"),
        ("unix:/run/a", "absolute path"),
        ("unix:///run//a", "a path without"),
        ("unix:///run/./a", "a path without"),
        ("unix:///run/../etc/a", "a path without"),
        ("unix:///run/a/", "a path without"),
        ("unix:///run/\ud800", "UTF-8"),
        ("tcp://[fe80::1%\ud800]:80", "UTF-8"),
        ("unix:///run/a\nb", "control character"),
        ("unix:///run/a\0b", "control character"),
        ("unix:@", "empty"),
        ("unix:@@@", "empty"),
        ("unix:@a?mode=0600", "no mode"),
        ("unix:@a?group=web", "no group"),
    ],
)
def test_what_is_no_address(text: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_address(text)
    assert says in str(caught.value)
    assert caught.value.argument == "address"
    str(caught.value).encode()


@pytest.mark.parametrize("address", [("127.0.0.1", 80), 8080, b"tcp://*:80", None])
def test_what_is_no_text_is_told_how_to_write_it(address: Any) -> None:
    with pytest.raises(InvalidArgument, match="write tcp://HOST:PORT"):
        parse_address(address)


hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
)


@given(st.sampled_from(["tcp", "udp"]), hosts, st.integers(0, 65535))
def test_every_numeric_address_has_exactly_one_spelling(scheme: str, host: str, port: int) -> None:
    text = f"{scheme}://{host}:{port}"
    bare = ipaddress.ip_address(host.strip("[]"))
    if bare.version == 6 and bare.ipv4_mapped:
        with pytest.raises(InvalidArgument):
            parse_address(text)
        return
    assert str(parse_address(text)) == text


@given(st.text(max_size=60) | st.text("tcp://udx:@[]0123456789.?mode=", max_size=40))
def test_what_is_read_reads_again(text: str) -> None:
    try:
        parsed = parse_address(text)
    except InvalidArgument:
        return
    assert parse_address(str(parsed)) == parsed
