"""Connections of multiprocessing, of multiprocess and of fdshare: each arrives as its own class."""

from __future__ import annotations

import importlib
import os
import stat
import sys
from functools import partial
from typing import Any, Final

import msgspec

from fdshare.errors import KindMismatch, UnsupportedKind
from fdshare.kernel.descriptor import Descriptor, borrow
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kinds.described import Described, kind_of, only

__all__ = ["CONNECTIONS", "ConnectionSpec", "describe_connection", "rebuild_connection"]


class ConnectionSpec(msgspec.Struct, frozen=True, array_like=True):
    """Which class to make, and the directions it is open for."""

    family: str  # a key of CONNECTIONS
    readable: bool
    writable: bool


# The module and the name of each family's class. It is found by name, so that neither multiprocess
# (which imports dill) nor multiprocessing is imported before one of their objects is seen.
CONNECTIONS: Final = {
    "multiprocessing": ("multiprocessing.connection", "Connection"),
    "multiprocess": ("multiprocess.connection", "Connection"),
    "fdshare": ("fdshare.mp.on_multiprocessing", "Connection"),
    "fdshare-multiprocess": ("fdshare.mp.on_multiprocess", "Connection"),
}
_FAMILIES: Final = {name: family for family, name in CONNECTIONS.items()}
_decode_connection: Final = msgspec.msgpack.Decoder(ConnectionSpec).decode


def describe_connection(connection: Any) -> Described:
    """The kind and descriptor of *connection*, borrowed from it. Raises: ClosedDescriptor."""
    fd = borrow(connection)
    for cls in type(connection).__mro__:
        family = _FAMILIES.get((cls.__module__, cls.__qualname__))
        if family is not None:
            break
    else:
        raise UnsupportedKind(
            type(connection).__qualname__, "it is not a Connection that fdshare knows"
        )
    spec = ConnectionSpec(family, connection.readable, connection.writable)
    return kind_of("connection", spec), [fd]


def rebuild_connection(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    """The Connection, which owns the descriptor now. Raises: KindMismatch; DescriptorLimit: none is
    free to import its class with."""
    spec = _decode_connection(raw)
    descriptor = only("connection", descriptors)
    if spec.family not in CONNECTIONS:
        raise KindMismatch("connection", f"fdshare knows no family {spec.family!r}")
    if not (spec.readable or spec.writable):
        raise KindMismatch("connection", "the kind says neither readable nor writable")
    mode = os.fstat(descriptor.fileno()).st_mode
    if not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
        raise KindMismatch("connection", "it is neither a socket nor a pipe")
    module, name = CONNECTIONS[spec.family]
    try:
        cls = getattr(sys.modules.get(module) or importlib.import_module(module), name)
    except (ImportError, OSError) as error:
        raise as_limit(error, "receiver") from None
    # Not a lambda, in which a signal's handler could raise: as in files.py.
    return descriptor.hand_to(partial(cls, readable=spec.readable, writable=spec.writable))
