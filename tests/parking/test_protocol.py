"""The packets of the private server: written down, so that nobody changes one end alone."""

from __future__ import annotations

import struct

from fdshare.parking import protocol


def test_a_put() -> None:
    key = bytes(range(18))
    packet = protocol.put_packet(key, 1.5, 2)
    assert packet == b"P" + key + struct.pack("=dI", 1.5, 2)
    assert len(packet) == protocol.PUT_SIZE
    assert len(key) == protocol.KEY_SIZE


def test_the_first_byte_tells_packets_apart() -> None:
    requests = protocol.PUT, protocol.ONE_WAY, protocol.TAKE, protocol.REMOVE
    assert (*requests, protocol.FULL, protocol.UNKNOWN) == (b"P", b"O", b"T", b"R", b"F", b"U")


def test_the_bodies_of_answers() -> None:
    assert (protocol.CREDIT.size, protocol.USAGE.size) == (4, 8)
