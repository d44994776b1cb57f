"""auth: what is a key, and what a proof depends on."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys

import pytest

import fdshare
from fdshare.errors import InvalidArgument
from fdshare.protocol.auth import NONCE_SIZE, checked_authkey, prove

OURS, THEIRS = b"c" * NONCE_SIZE, b"s" * NONCE_SIZE


def test_a_proof_is_the_mac_of_role_and_nonces() -> None:
    expected = hmac.new(b"key", b"client" + OURS + THEIRS, hashlib.sha256).digest()
    assert prove(b"key", "client", OURS, THEIRS) == expected
    assert len(expected) == NONCE_SIZE


def test_each_part_makes_another_proof() -> None:
    """With the role inside a challenge that is sent back to its maker proves nothing."""
    proofs = {
        prove(b"key", "client", OURS, THEIRS),
        prove(b"key", "server", OURS, THEIRS),
        prove(b"other", "client", OURS, THEIRS),
        prove(b"key", "client", THEIRS, OURS),
        prove(b"key", "client", OURS, OURS),
    }
    assert len(proofs) == 5


@pytest.mark.parametrize("key", [b"secret", bytearray(b"secret"), memoryview(b"secret")])
def test_a_key_is_bytes(key: object) -> None:
    assert checked_authkey(key) == b"secret"


def test_who_has_a_key_needs_no_descriptor_for_a_proof() -> None:
    """hmac is imported by then: it is a file to open."""
    code = (
        "import sys; from fdshare.protocol.auth import checked_authkey as check\n"
        "check(None); print('hmac' in sys.modules); check(b'key'); print('hmac' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False\nTrue\n"


@pytest.mark.parametrize("key", [b"", bytearray(), "secret", 7])
def test_what_is_no_key_is_refused(key: object) -> None:
    with pytest.raises(InvalidArgument, match="authkey"):
        checked_authkey(key)


@pytest.mark.parametrize("make", [fdshare.Client, fdshare.Manager, fdshare.aio.connect])
def test_nobody_asks_for_an_empty_key(make: type[fdshare.Client]) -> None:
    """Everybody has that one: before, it let everybody in."""
    with pytest.raises(InvalidArgument, match="empty"):
        make("/nobody/there", authkey=b"")
