"""The authkey challenge: both sides prove that they have the key, without sending it.

The client's nonce is in its Hello, the server's in the Welcome. A proof is HMAC-SHA256 over the
role of its maker and both nonces: because of the role, a proof cannot be reflected to its maker.
The client proves first, so that nobody without the key gets a proof on which to try keys.
"""

from __future__ import annotations

from typing import Final, Literal

from fdshare.errors import InvalidArgument

__all__ = ["NONCE_SIZE", "checked_authkey", "prove"]

NONCE_SIZE: Final = 32  # bytes; as long as the digest


def checked_authkey(authkey: object) -> bytes | None:
    """*authkey* as bytes, or None for no authkey. Raises: InvalidArgument: text; empty, which
    everybody knows."""
    if authkey is None:
        return None
    if not isinstance(authkey, bytes | bytearray | memoryview):
        hint = "; write b'...', or call .encode()" if isinstance(authkey, str) else ""
        raise InvalidArgument("authkey", f"it is {type(authkey).__name__}, not bytes{hint}")
    if not authkey:
        raise InvalidArgument("authkey", "it is empty, so everybody would have it")
    import hmac  # noqa: F401  # a proof can be made now, also without a free descriptor

    return bytes(authkey)


def prove(
    authkey: bytes, role: Literal["client", "server"], client_nonce: bytes, server_nonce: bytes
) -> bytes:
    """The MAC, 32 bytes. Compare it with hmac.compare_digest."""
    import hmac

    return hmac.digest(authkey, role.encode() + client_nonce + server_nonce, "sha256")
