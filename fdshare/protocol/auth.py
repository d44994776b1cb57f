"""The authkey challenge: both sides prove that they have the key, without sending it.

The client's nonce is in its Hello, the server's in the Welcome. A proof is HMAC-SHA256 over the
role of its maker and both nonces: because of the role, a proof cannot be reflected to its maker.
The client proves first, so that nobody without the key gets a proof on which to try keys.
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
