"""Kind: how the receiver rebuilds a Python object around its descriptors. Data, never a pickle."""

import msgspec

__all__ = ["Kind"]


class Kind(msgspec.Struct, frozen=True):
    """*tag* is the name of the rebuild at the receiver, *spec* the encoded Struct for it.

    The server stores both and reads neither, so it need not know the kinds of its clients.
    """

    tag: str
    spec: msgspec.Raw
