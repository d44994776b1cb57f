"""The authkey challenge: both sides prove that they have the key, and neither shows it.

The client's nonce goes with its Hello, the server's with the Welcome. A proof is HMAC-SHA256 over
the prover's role and both nonces: with the role inside, a challenge sent back to its maker asks for
another proof than the one it would get. The client proves first, so that nobody without the key
gets a proof to guess at.
"""

from __future__ import annotations

import hmac
from typing import Final, Literal

__all__ = ["NONCE_SIZE", "prove"]

NONCE_SIZE: Final = 32  # bytes; as long as the digest


def prove(
    authkey: bytes, role: Literal["client", "server"], client_nonce: bytes, server_nonce: bytes
) -> bytes:
    """The MAC, 32 bytes. Compare it with hmac.compare_digest."""
    return hmac.digest(authkey, role.encode() + client_nonce + server_nonce, "sha256")
