"""What the tests of all kinds share."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, describe, rebuild

__all__ = ["same_file", "through"]


def through(obj: Any) -> Any:
    """*obj* described, its descriptors duplicated as the kernel would, and rebuilt."""
    kind, fds = describe(obj)
    wire = msgspec.msgpack.encode(kind)
    return rebuild(
        msgspec.msgpack.decode(wire, type=Kind), [Descriptor.dup_of(number) for number in fds]
    )


def same_file(a: Any, b: Any) -> bool:
    return os.path.samestat(os.fstat(a.fileno()), os.fstat(b.fileno()))
