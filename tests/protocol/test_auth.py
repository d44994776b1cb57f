"""auth: what a proof depends on."""

from __future__ import annotations

import hashlib
import hmac

from fdshare.protocol.auth import NONCE_SIZE, prove

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
