"""How SharedMemory and the numpy arrays in it are taken apart for sending, and put together again.

What arrives is the same memory. The description says how big it is, whether it was sealed, and
where the array lies in it; the receiver checks all of it against the kernel before it maps, and
numpy checks the array against the block. A dtype travels as text and numbers, never as a pickle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from fdshare.errors import InvalidArgument, KindMismatch, UnsupportedKind
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory, array_place, is_sealed

if TYPE_CHECKING:
    import numpy

__all__ = [
    "ArraySpec",
    "MemorySpec",
    "assemble_array",
    "assemble_memory",
    "take_array_apart",
    "take_memory_apart",
]


class MemorySpec(msgspec.Struct, frozen=True, array_like=True):
    size: int
    sealed: bool


class ArraySpec(msgspec.Struct, frozen=True, array_like=True):
    size: int
    sealed: bool
    dtype: Any  # see _dtype_as_data
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def take_memory_apart(memory: SharedMemory) -> tuple[MemorySpec, int]:
    """The description and the descriptor, borrowed from *memory*. Raises: ClosedDescriptor."""
    return MemorySpec(memory.size, memory.sealed), memory.fileno()


def assemble_memory(spec: MemorySpec, descriptor: Descriptor) -> SharedMemory:
    """The memory, around *descriptor*, which is taken over unless this raises.

    The caller owns the result. Raises: KindMismatch.
    """
    return SharedMemory.adopt(descriptor, size=spec.size, sealed=spec.sealed)


def take_array_apart(array: Any) -> tuple[ArraySpec, int]:
    """The description and the descriptor, borrowed from *array*.

    Raises: UnsupportedKind: it lies in ordinary memory; ClosedDescriptor.
    """
    place = array_place(array)
    if place is None:
        raise UnsupportedKind(
            type(array).__qualname__,
            "it lies in this process's own memory; share fdshare.shared_copy(array), or make it "
            "with SharedMemory(size).as_array(dtype, shape)",
        )
    spec = ArraySpec(
        place.size,
        is_sealed(place.fd),
        _dtype_as_data(array.dtype),
        array.shape,
        place.offset,
        array.strides,
    )
    return spec, place.fd


def assemble_array(spec: ArraySpec, descriptor: Descriptor) -> numpy.ndarray[Any, Any]:
    """The array, in the memory of *descriptor*, which is taken over unless this raises.

    Raises: KindMismatch; UnsupportedKind: there is no numpy here.
    """
    try:
        import numpy
    except ImportError:
        raise UnsupportedKind("a numpy array", "numpy is not installed here") from None
    try:
        dtype = _dtype_of_data(numpy, spec.dtype)
    except (TypeError, ValueError, KeyError, RecursionError, SyntaxError) as error:
        raise KindMismatch("array", f"its dtype is none: {error}") from None
    if len(spec.strides) != len(spec.shape):
        raise KindMismatch("array", "as many strides as lengths are needed")
    memory = SharedMemory.adopt(descriptor, size=spec.size, sealed=spec.sealed)
    try:
        return memory.as_array(dtype, spec.shape, offset=spec.offset, strides=spec.strides)
    except InvalidArgument as error:
        memory.close()
        raise KindMismatch("array", error.reason) from None


def _dtype_as_data(dtype: Any) -> Any:
    """*dtype* as what msgpack can carry: "<f8", [base, shape] or {names, formats, offsets, ...}."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_dtype_as_data(base), shape]
    if dtype.names is None:
        return dtype.str
    return {
        "names": dtype.names,
        "formats": [_dtype_as_data(dtype.fields[name][0]) for name in dtype.names],
        "offsets": [dtype.fields[name][1] for name in dtype.names],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }


def _dtype_of_data(numpy: Any, data: Any) -> Any:
    """The reverse of `_dtype_as_data`. Raises: TypeError, ValueError, KeyError: it is none."""
    if isinstance(data, str):
        return numpy.dtype(data)
    if isinstance(data, list):
        base, shape = data
        return numpy.dtype((_dtype_of_data(numpy, base), tuple(shape)))
    formats = [_dtype_of_data(numpy, each) for each in data["formats"]]
    return numpy.dtype(
        {
            "names": list(data["names"]),
            "formats": formats,
            "offsets": list(data["offsets"]),
            "itemsize": data["itemsize"],
            "aligned": data["aligned"],
        }
    )
