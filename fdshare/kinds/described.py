"""What a describer returns, and what each kind needs to make it and to check what arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec

from fdshare.errors import KindMismatch
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol.kind import Kind

__all__ = ["Described", "Describer", "Rebuilder", "kind_of", "only"]

Described: TypeAlias = tuple[Kind, list[int]]
Describer: TypeAlias = Callable[[Any], Described]
Rebuilder: TypeAlias = Callable[[msgspec.Raw, list[Descriptor]], Any]

_encode: Final = msgspec.msgpack.Encoder().encode


def kind_of(tag: str, spec: object) -> Kind:
    """The Kind of *tag*, with *spec*, a Struct or plain data, encoded."""
    return Kind(tag, msgspec.Raw(_encode(spec)))


def only(tag: str, descriptors: list[Descriptor]) -> Descriptor:
    """The one descriptor of *descriptors*. Raises: KindMismatch: there are none, or more."""
    if len(descriptors) != 1:
        raise KindMismatch(tag, f"{len(descriptors)} descriptors instead of 1")
    return descriptors[0]
