"""memory: memory and arrays through describe and rebuild, and descriptions that lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mp.common import descriptor_limit_reached

from fdshare.errors import (
    ClosedDescriptor,
    DescriptorLimit,
    FdshareError,
    KindMismatch,
    UnsupportedKind,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory, array_place, shared_copy
from fdshare.kinds import Kind, describe, in_shared_memory, rebuild
from fdshare.kinds.memory import ArraySpec, MemorySpec
from kinds.common import through

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd here")


def test_memory_arrives_as_the_same_memory() -> None:
    with SharedMemory(100) as memory, through(memory) as other:
        memory.buf[3] = 7
        assert isinstance(other, SharedMemory)
        assert other.buf[3] == 7
        other.buf[4] = 8
        assert memory.buf[4] == 8


def test_sealed_memory_arrives_sealed() -> None:
    with SharedMemory.from_bytes(b"abc") as memory, through(memory) as other:
        assert other.sealed
        assert bytes(other.buf) == b"abc"


def test_closed_memory() -> None:
    memory = SharedMemory(1)
    memory.close()
    with pytest.raises(ClosedDescriptor):
        describe(memory)


@pytest.mark.parametrize(
    "dtype",
    [
        "f8",
        ">i2",
        "?",
        "U3",
        "S5",
        "V7",
        "M8[ns]",
        "c16",
        [("a", "i4"), ("b", "f8")],
        [("a", "i4", (2, 3)), ("b", [("c", "u1"), ("d", "S2")])],
        np.dtype([("a", "u1"), ("b", "f8")], align=True),
        {"names": ["x"], "formats": ["f4"], "offsets": [4], "itemsize": 12},
    ],
)
def test_an_array_arrives_in_the_same_memory(dtype: Any) -> None:
    with SharedMemory(4096) as memory:
        given = memory.as_array(dtype, (3, 4), offset=16)
        view = given[::-2, 1:]
        arrived = through(view)
        assert arrived.dtype == view.dtype
        assert arrived.shape == view.shape
        assert arrived.strides == view.strides
        here, there = array_place(view), array_place(arrived)
        assert here is not None
        assert there is not None
        assert here.offset == there.offset
        memory.buf[:] = b"\1" * 4096
        arrived[...] = np.zeros((), dtype)
        assert (given[2, 1:] == np.zeros((), dtype)).all()


def test_an_array_that_was_received_can_be_sent_on() -> None:
    given = shared_copy(np.arange(5))
    first = through(given)
    second = through(first[1:])
    assert second.tolist() == [1, 2, 3, 4]
    assert not second.flags.writeable
    place = array_place(second)
    assert place is not None
    assert os.fstat(place.fd).st_size == 40


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_arrays_of_no_length(shape: tuple[int, ...]) -> None:
    with SharedMemory(64) as memory:
        arrived = through(memory.as_array("f8", shape))
        assert arrived.shape == shape


def test_an_array_in_ordinary_memory_says_what_to_do() -> None:
    with pytest.raises(UnsupportedKind, match="shared_copy"):
        describe(np.arange(3))


def test_what_lies_in_shared_memory() -> None:
    array = shared_copy(np.arange(3))
    assert in_shared_memory(array[1:])
    assert not in_shared_memory(array + 1)
    assert not in_shared_memory(np.float64(1))
    with SharedMemory(8) as memory:
        array = memory.as_array()
    assert not in_shared_memory(array)  # closed: it is copied like any other


CROSSING = """
import multiprocessing, sys
import numpy as np
import fdshare
from fdshare.mp import get_context

def work(queue, back):
    array, memory = queue.get(timeout=60)
    array[0] = 42
    back.put((type(array).__name__, array.flags.writeable, bytes(memory.buf[:3])))
    back.put(array[1:])

if __name__ == "__main__":
    context = get_context("spawn")
    queue, back = context.Queue(), context.Queue()
    child = context.Process(target=work, args=(queue, back))
    child.start()
    with fdshare.SharedMemory(80) as memory, fdshare.SharedMemory.from_bytes(b"abc") as other:
        array = memory.as_array("f8")
        queue.put((array, other))
        print(back.get(timeout=60), array[0])
        tail = back.get(timeout=60)
        tail[0] = 7
        print(array[1])
    child.join()
"""


def test_arrays_cross_a_queue_without_a_copy(tmp_path: Path) -> None:
    program = tmp_path / "crossing.py"
    program.write_text(CROSSING)
    run = [sys.executable, str(program)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.stdout == "('ndarray', True, b'abc') 42.0\n7.0\n", done.stderr


# Descriptions that lie. The descriptor is closed whatever they say.


def lie(tag: str, spec: Any) -> None:
    with SharedMemory(80) as memory:
        kind = Kind(tag, msgspec.Raw(msgspec.msgpack.encode(spec)))
        with pytest.raises(KindMismatch):
            rebuild(kind, [Descriptor.dup_of(memory)])


@pytest.mark.parametrize("spec", [MemorySpec(81, False), MemorySpec(80, True), None, [1], "x"])
def test_memory_that_is_not_what_it_was_said_to_be(spec: Any) -> None:
    lie("memory", spec)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 81),
        ("sealed", True),
        ("dtype", "O"),
        ("dtype", "nonsense"),
        ("dtype", 3),
        ("dtype", []),
        ("dtype", {}),
        ("dtype", ["f8", "x"]),
        ("dtype", {"names": ["a"], "formats": ["O"], "offsets": [0], "itemsize": 8, "aligned": 0}),
        ("dtype", {"names": ["a"], "formats": ["f8"], "offsets": [4], "itemsize": 8, "aligned": 0}),
        ("shape", (11,)),
        ("shape", (-1,)),
        ("shape", (2, 5)),
        ("shape", (2**62,)),
        ("offset", 8),
        ("offset", -8),
        ("offset", 2**62),
        ("strides", (9,)),
        ("strides", (-8,)),
        ("strides", (2**62,)),
        ("strides", ()),
    ],
)
def test_an_array_that_is_not_what_it_was_said_to_be(field: str, value: Any) -> None:
    spec = ArraySpec(80, False, "<f8", (10,), 0, (8,))
    lie("array", msgspec.structs.replace(spec, **{field: value}))


def test_an_array_of_something_else() -> None:
    reader, writer = os.pipe()
    spec = ArraySpec(80, False, "<f8", (10,), 0, (8,))
    with Descriptor(writer), pytest.raises(KindMismatch, match="no seals"):
        rebuild(Kind("array", msgspec.Raw(msgspec.msgpack.encode(spec))), [Descriptor(reader)])


numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-20, 100)
dtypes = st.sampled_from(["<f8", "u1", "V0", "S0", "U1", "i4,f4"]) | st.text(max_size=6)


@given(
    st.builds(
        ArraySpec,
        st.just(80),
        st.just(False),
        dtypes | st.recursive(dtypes | numbers | st.none(), st.lists, max_leaves=5),
        st.lists(numbers, max_size=4).map(tuple),
        numbers,
        st.lists(numbers, max_size=4).map(tuple),
    )
)
def test_no_description_reaches_outside_the_memory(spec: ArraySpec) -> None:
    with SharedMemory(80) as memory:
        try:
            made = rebuild(
                Kind("array", msgspec.Raw(msgspec.msgpack.encode(spec))),
                [Descriptor.dup_of(memory)],
            )
        except FdshareError:
            return
        place = array_place(made)
        if place is None or not made.nbytes:
            return
        reach = [(n - 1) * step for n, step in zip(made.shape, made.strides, strict=True)]
        assert place.offset + sum(step for step in reach if step < 0) >= 0
        assert place.offset + sum(step for step in reach if step > 0) + made.itemsize <= 80


class Broken:
    """Finds modules, none of which can be imported."""

    def find_spec(self, name: str, *_: object) -> None:
        raise ImportError(f"{name}: its library cannot be opened")


def test_numpy_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the descriptor limit that is why, and the memory can be kept for later."""
    with SharedMemory(8) as memory:
        kind, fds = describe(memory.as_array())
        with monkeypatch.context() as patched:
            patched.delitem(sys.modules, "numpy")
            patched.setattr(sys, "meta_path", [Broken()])
            with pytest.raises(UnsupportedKind, match="numpy: its library cannot be opened"):
                rebuild(kind, [Descriptor.dup_of(fds[0])])
            kept, lost = Descriptor.dup_of(fds[0]), Descriptor.dup_of(fds[0])
            with descriptor_limit_reached():
                with pytest.raises(DescriptorLimit):
                    rebuild(kind, [kept], keep=True)
                assert not kept.closed
                with pytest.raises(DescriptorLimit):
                    rebuild(kind, [lost])
                assert lost.closed
        assert len(rebuild(kind, [kept], keep=True)) == 8
