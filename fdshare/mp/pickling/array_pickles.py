"""Pickles of arrays of numpy by themselves, which are not made twice.

All but the numbers is the same bytes for all arrays of a type and a shape. So who sends one looks
the bytes up (plain.py). Where the numbers lie in a memfd (large.py), who receives one looks up what
the bytes say: pickler and unpickler take longer than all system calls of such a message.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

from fdshare.kernel.memfd import private_map

__all__ = [
    "NUMBERS",
    "Key",
    "array_maps",
    "key_of",
    "may_be_remembered",
    "remember_array",
    "room_in",
]

# What the pickle of an array depends on, besides its numbers.
Key: TypeAlias = tuple[Any, ...]

# By the pickle that arrived, what returns the array. The number of the memfd, which holds nothing
# else, is borrowed for the call.
array_maps: Final[dict[bytes, Callable[[int], Any]]] = {}
_REMEMBERED: Final = 256
# The letters of numpy's types of numbers. They are compared as what they are, and cannot change.
NUMBERS: Final = "?bhilqpBHILQPefdgFDG"


def room_in(known: dict[Any, Any]) -> bool:
    """True if one more may be remembered."""
    return len(known) < _REMEMBERED


def key_of(array: Any) -> Key | None:
    """The Key of an array of numpy. None: the pickle depends on more."""
    dtype = array.dtype
    # Neither C nor Fortran order: numpy's pickle has a copy in another order, or a transposed view.
    if not array.flags.forc:
        return None
    # Types that are compared as equal may have different metadata, or such fields.
    if dtype.char not in NUMBERS or dtype.metadata is not None:
        return None
    return dtype, array.shape, array.strides, array.flags.writeable


def may_be_remembered(obj: Any) -> bool:
    """True if *obj* is an array that `remember_array` takes."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(obj) is not getattr(numpy, "ndarray", None):
        return False
    # What is read-only is a view of the map that is.
    if not obj.flags.writeable or key_of(obj) is None or not room_in(array_maps):
        return False
    return type(obj) not in copyreg.dispatch_table  # functions of the program


def remember_array(arrived: bytes, array: Any, inner: bytes, size: int) -> None:
    """Remembers *arrived*, of which *array* was loaded, if the pickle *inner* in it, whose only
    buffer of *size* bytes was in the memfd, is that of an array, and nothing else."""
    # Other functions that return an array may be in the pickle, to be called each time: only the
    # bytes tell that there are none.
    buffers: list[pickle.PickleBuffer] = []
    if pickle.dumps(array, 5, buffer_callback=buffers.append) == inner:
        build, (_, *arguments) = array.__reduce_ex__(5)
        array_maps[arrived] = partial(_map_array, size, build, arguments)


def _map_array(size: int, build: Callable[..., Any], arguments: list[Any], memory: int) -> Any:
    return build(private_map(memory, 0, size), *arguments)
