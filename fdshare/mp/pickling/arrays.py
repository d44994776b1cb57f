"""numpy arrays that lie in a SharedMemory: what arrives is the same memory.

An object of a class that derives from numpy's array is more than its numbers: a mask, a unit. It
arrives as its own class, around the same memory, with what it has in its `__dict__` and slots.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from fdshare.kinds import describe
from fdshare.mp.pickling.bundle import Reduced, Transit

__all__ = ["is_array", "reduce_array"]

_METHODS: Final = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")


def reduce_array(transit: Transit, array: Any, cls: type) -> Reduced | None:
    """The reduce value of *array*, of type *cls*, which lies in a SharedMemory.

    None: it is no array of numpy's, or its class says how it is pickled, which copies the numbers.
    """
    numpy = sys.modules["numpy"]
    if cls is numpy.ndarray:
        return transit.carry(array, *describe(array))
    if not issubclass(cls, numpy.ndarray) or _pickles_itself(cls):
        return None
    return _view, (numpy.ndarray.view(array, numpy.ndarray), cls, object.__getstate__(array))


def is_array(cls: type) -> bool:
    """True if *cls* is numpy's array itself. It does not import numpy."""
    return cls.__name__ == "ndarray" and cls.__module__ == "numpy"


def _pickles_itself(cls: type) -> bool:
    """True if the program has written one of the methods of *cls* for pickling. What numpy's own
    have to say (those of masked arrays) is in the `__dict__`, too."""
    for name in _METHODS:
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if owner.__module__.partition(".")[0] not in ("numpy", "builtins"):
            return True
    return False


def _view(array: Any, cls: type, state: Any) -> Any:
    """*array* as one of *cls*. Pickles name this function."""
    view = array.view(cls)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        vars(view).update(attributes)
    for name, value in (slots or {}).items():
        setattr(view, name, value)
    return view
