"""Kind: how the receiver rebuilds a Python object around its descriptors. Data, never a pickle."""

from __future__ import annotations

import msgspec

__all__ = ["Kind"]


class Kind(msgspec.Struct, frozen=True):
    """*tag* says which rebuild to look up at the receiver, *spec* is that rebuild's own Struct.

    The rendezvous stores both and reads neither, so a server need not know the kinds of its
    clients.
    """

    tag: str
    spec: msgspec.Raw
