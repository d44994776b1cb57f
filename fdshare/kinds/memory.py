"""SharedMemory, and the numpy arrays in it: what arrives is the same memory.

The description says how big the memory is, whether it is sealed, and where the array lies in it.
The receiver checks all of it against the kernel before it maps the memory, and numpy checks the
array against the memory. A dtype travels as text and numbers, never as a pickle.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec

from fdshare.errors import InvalidArgument, KindMismatch, UnsupportedKind
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kernel.shared_memory import SharedMemory, array_place, is_sealed
from fdshare.kinds.described import Described, kind_of, only

if TYPE_CHECKING:
    import numpy

__all__ = [
    "ArraySpec",
    "MemorySpec",
    "describe_array",
    "describe_memory",
    "rebuild_array",
    "rebuild_memory",
]


class MemorySpec(msgspec.Struct, frozen=True, array_like=True):
    """*size* in bytes."""

    size: int
    sealed: bool


class ArraySpec(msgspec.Struct, frozen=True, array_like=True):
    """*size* in bytes of the whole memory; *offset* and *strides* in bytes as numpy has them."""

    size: int
    sealed: bool
    dtype: Any  # see _dtype_as_data
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def describe_memory(memory: SharedMemory) -> Described:
    """The kind and the descriptor, borrowed from *memory*. Raises: ClosedDescriptor."""
    spec = MemorySpec(memory.size, memory.sealed)
    return kind_of("memory", spec), [memory.fileno()]


def rebuild_memory(raw: msgspec.Raw, descriptors: list[Descriptor]) -> SharedMemory:
    """The memory, which owns the descriptor now unless this raises. Raises: KindMismatch."""
    spec = msgspec.msgpack.decode(raw, type=MemorySpec)
    return SharedMemory.adopt(only("memory", descriptors), size=spec.size, sealed=spec.sealed)


def describe_array(array: Any) -> Described:
    """The kind and the descriptor, borrowed from the memory that *array* lies in.

    Raises: UnsupportedKind: it lies in ordinary memory, or is more than an array (a masked one);
    ClosedDescriptor.
    """
    place = array_place(array)
    if place is None:
        raise UnsupportedKind(
            type(array).__qualname__,
            "it lies in this process's own memory; share fdshare.shared_copy(array), or make it "
            "with SharedMemory(size).as_array(dtype, shape)",
        )
    if type(array).__module__ != "numpy" or type(array).__name__ != "ndarray":
        raise UnsupportedKind(
            type(array).__qualname__,
            "what its class adds to the numbers, such as a mask, is not in the memory; share "
            "numpy.ndarray.view(array, numpy.ndarray), and the rest beside it",
        )
    spec = ArraySpec(
        place.size,
        is_sealed(place.fd),
        _dtype_as_data(array.dtype),
        array.shape,
        place.offset,
        array.strides,
    )
    return kind_of("array", spec), [place.fd]


def rebuild_array(raw: msgspec.Raw, descriptors: list[Descriptor]) -> numpy.ndarray[Any, Any]:
    """The array, in the memory of the descriptor, which is taken over unless this raises.

    Raises: KindMismatch; UnsupportedKind: numpy cannot be imported; DescriptorLimit: that takes a
    free descriptor, and before Python 3.13 to map the memory does.
    """
    spec = msgspec.msgpack.decode(raw, type=ArraySpec)
    descriptor = only("array", descriptors)
    try:
        import numpy

        if sys.version_info < (3, 13):  # mmap keeps a duplicate
            Descriptor.dup_of(descriptor).close()
    except ModuleNotFoundError:
        raise UnsupportedKind("a numpy array", "numpy is not installed") from None
    except (ImportError, OSError) as error:
        raise _without_numpy(error) from None
    try:
        dtype = _dtype_of_data(numpy, spec.dtype)
    except (
        KeyError,
        OverflowError,  # of a number that is no C long
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise KindMismatch("array", f"its dtype is not one: {error}") from None
    if len(spec.strides) != len(spec.shape):
        raise KindMismatch("array", f"{len(spec.strides)} strides for {len(spec.shape)} lengths")
    memory = SharedMemory.adopt(descriptor, size=spec.size, sealed=spec.sealed)
    try:
        return memory.as_array(dtype, spec.shape, offset=spec.offset, strides=spec.strides)
    except InvalidArgument as error:
        memory.close()
        raise KindMismatch("array", error.reason) from None


def _without_numpy(error: ImportError | OSError) -> BaseException:
    """The error to raise where numpy cannot be imported."""
    limit = as_limit(error, "receiver")
    if limit is not error:
        return limit
    return UnsupportedKind("a numpy array", f"numpy cannot be imported: {error}")


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
    """The reverse of `_dtype_as_data`. Raises: TypeError, ValueError, KeyError,
    OverflowError ...: it is not one."""
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
