"""memory: blocks, seals and arrays, with a second process where it matters."""

from __future__ import annotations

import array
import gc
import mmap
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.errors import (
    ClosedDescriptor,
    InvalidArgument,
    KindMismatch,
    MemoryBusy,
    UnsupportedPlatform,
)
from fdshare.kernel import system
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory, array_place, shared_copy

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd here")


def adopt(memory: SharedMemory, **said: object) -> SharedMemory:
    """What a receiver makes of it."""
    descriptor = Descriptor.dup_of(memory)
    try:
        return SharedMemory.adopt(descriptor, **said)  # type: ignore[arg-type]
    finally:
        if not descriptor.closed:
            descriptor.close()


def run_with(fd: int, program: str) -> str:
    """What *program* prints in another process, in which `fd` is the descriptor."""
    head = f"import os\nfrom fdshare.errors import *\nfd = {fd}\n"
    head += "from fdshare.kernel.shared_memory import *\n"
    head += "from fdshare.kernel.descriptor import Descriptor\n"
    done = subprocess.run(
        [sys.executable, "-c", head + program],
        pass_fds=[fd],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# A block.


def test_a_new_block_is_zero_and_writable() -> None:
    with SharedMemory(5000) as memory:
        assert len(memory) == memory.size == len(memory.buf) == 5000
        assert bytes(memory.buf) == bytes(5000)
        assert not memory.readonly
        assert not memory.sealed
        memory.buf[10:13] = b"abc"
        assert bytes(memory.buf[9:14]) == b"\0abc\0"


def test_its_descriptor_is_close_on_exec_and_named_for_proc() -> None:
    with SharedMemory(1, name="rows") as memory:
        assert not os.get_inheritable(memory.fileno())
        if sys.platform == "linux":
            assert os.readlink(f"/proc/self/fd/{memory.fileno()}") == "/memfd:rows (deleted)"


def test_nobody_can_change_its_size() -> None:
    with SharedMemory(100) as memory:
        for size in (0, 99, 101):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fileno(), size)
        with pytest.raises(PermissionError):
            os.pwrite(memory.fileno(), b"x", 100)


def test_both_see_what_either_writes() -> None:
    with SharedMemory(100) as memory, adopt(memory, size=100) as other:
        memory.buf[0:2] = b"ab"
        assert bytes(other.buf[:2]) == b"ab"
        other.buf[0:1] = b"x"
        assert bytes(memory.buf[:2]) == b"xb"


def test_another_process_sees_it_and_writes() -> None:
    with SharedMemory(100) as memory:
        memory.buf[:5] = b"hello"
        program = (
            "m = SharedMemory.adopt(Descriptor(fd))\n"
            "print(bytes(m.buf[:5]).decode()); m.buf[:5] = b'world'"
        )
        assert run_with(memory.fileno(), program) == "hello"
        assert bytes(memory.buf[:5]) == b"world"


@pytest.mark.parametrize("size", [-1, sys.maxsize + 1])
def test_a_size_that_is_none(size: int) -> None:
    with pytest.raises(InvalidArgument):
        SharedMemory(size)


def test_an_empty_block() -> None:
    with SharedMemory(0) as memory:
        assert bytes(memory.buf) == b""
        memory.seal()
        assert memory.sealed
        assert memory.as_array().shape == (0,)
        with adopt(memory, size=0, sealed=True) as other:
            assert len(other.buf) == 0


@given(st.binary(max_size=9000))
def test_from_bytes_is_a_sealed_copy(data: bytes) -> None:
    with SharedMemory.from_bytes(data) as memory:
        assert memory.sealed
        assert memory.readonly or not data
        assert bytes(memory.buf) == data


def test_from_any_contiguous_buffer() -> None:
    numbers = array.array("d", [1.5, 2.5])
    with SharedMemory.from_bytes(numbers) as memory:
        assert memory.buf.cast("d").tolist() == [1.5, 2.5]
    numbers.append(3.5)  # nothing of ours is left on it
    with pytest.raises(TypeError):
        SharedMemory.from_bytes(memoryview(b"abcd")[::2])
    with pytest.raises(TypeError):
        SharedMemory.from_bytes(5)


# Seals.


def test_a_sealed_block_cannot_be_written_by_anybody() -> None:
    with SharedMemory(100) as memory:
        memory.buf[:3] = b"abc"
        memory.seal()
        assert memory.sealed
        assert memory.readonly
        memory.seal()  # again: nothing
        assert bytes(memory.buf[:3]) == b"abc"
        with pytest.raises(TypeError):
            memory.buf[0] = 1
        with pytest.raises(PermissionError):
            os.pwrite(memory.fileno(), b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(memory.fileno(), 100)
        program = (
            "m = SharedMemory.adopt(Descriptor(fd), size=100, sealed=True)\n"
            "print(bytes(m.buf[:3]).decode(), m.readonly)"
        )
        assert run_with(memory.fileno(), program) == "abc True"


def test_a_view_of_our_own_is_in_the_way_of_sealing() -> None:
    with SharedMemory(100) as memory:
        view = memory.buf
        with pytest.raises(MemoryBusy, match="this process has views"):
            memory.seal()
        assert not memory.sealed
        view[0] = 7  # still there, and still writable
        view.release()
        memory.seal()
        assert memory.buf[0] == 7


def test_another_mapping_is_in_the_way_of_sealing() -> None:
    with SharedMemory(100) as memory, adopt(memory) as other:
        other.buf[0] = 1
        with pytest.raises(MemoryBusy, match="another process"):
            memory.seal()
        assert not memory.sealed
        memory.buf[0] = 2  # writable as before
    assert issubclass(MemoryBusy, BufferError)


def test_keep_writing() -> None:
    with SharedMemory(100) as memory, adopt(memory) as early:
        early.buf[0] = 1
        memory.seal(keep_writing=True)
        memory.buf[1] = 2
        early.buf[2] = 3
        assert not memory.sealed
        assert not memory.readonly
        with adopt(memory, size=100) as late:
            assert late.readonly
            assert bytes(late.buf[:3]) == b"\1\2\3"
            memory.buf[0] = 9
            assert late.buf[0] == 9
        with pytest.raises(PermissionError):
            mmap.mmap(memory.fileno(), 100)


def test_keep_writing_and_then_no_more() -> None:
    with SharedMemory(100) as memory:
        memory.seal(keep_writing=True)
        memory.buf[0] = 1
        memory.seal()
        assert memory.sealed
        assert memory.readonly


# What a receiver refuses.


def memfd(flags: int = os.MFD_ALLOW_SEALING if hasattr(os, "memfd_create") else 0) -> Descriptor:
    descriptor = Descriptor(os.memfd_create("foreign", flags))
    os.ftruncate(descriptor.fileno(), 10)
    return descriptor


@pytest.mark.parametrize(
    ("make", "said", "reason"),
    [
        (lambda: Descriptor(os.open("/dev/null", os.O_RDWR)), {}, "no seals"),
        (lambda: Descriptor(os.open(__file__, os.O_RDONLY)), {}, "no seals"),
        (lambda: Descriptor(os.eventfd(0)), {}, "no seals"),
        (memfd, {}, "size is not sealed"),
        (lambda: memfd(0), {}, "size is not sealed"),
    ],
)
def test_what_is_no_block_is_refused_unmapped(make: object, said: dict, reason: str) -> None:
    with make() as descriptor:  # type: ignore[operator]
        with pytest.raises(KindMismatch, match=reason):
            SharedMemory.adopt(descriptor, **said)
        os.fstat(descriptor.fileno())  # still the caller's


@pytest.mark.parametrize(
    ("said", "reason"),
    [({"sealed": True}, "somebody can still write"), ({"size": 99}, "100 bytes, the sender said")],
)
def test_a_sender_that_lies(said: dict, reason: str) -> None:
    with SharedMemory(100) as memory, pytest.raises(KindMismatch, match=reason):
        adopt(memory, **said)


def test_keep_writing_is_not_sealed() -> None:
    with SharedMemory(100) as memory:
        memory.seal(keep_writing=True)
        with pytest.raises(KindMismatch, match="somebody can still write"):
            adopt(memory, sealed=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reopens through /proc")
def test_a_descriptor_that_was_reopened() -> None:
    with SharedMemory(100) as memory:
        link = f"/proc/self/fd/{memory.fileno()}"
        with SharedMemory.adopt(Descriptor(os.open(link, os.O_RDONLY))) as reader:
            assert reader.readonly
            memory.buf[0] = 5
            assert reader.buf[0] == 5
        writer = Descriptor(os.open(link, os.O_WRONLY))
        with writer, pytest.raises(KindMismatch, match="writing only"):
            SharedMemory.adopt(writer)
        with Descriptor(os.open(link, os.O_PATH)) as path, pytest.raises(KindMismatch):
            SharedMemory.adopt(path)


# Ends.


def test_views_outlive_close() -> None:
    memory = SharedMemory(100)
    view = memory.buf
    memory.close()
    memory.close()
    assert memory.closed
    view[0] = 1
    assert view[0] == 1
    for use in (lambda: memory.buf, memory.fileno, memory.seal, lambda: memory.readonly):
        with pytest.raises(ClosedDescriptor):
            use()
    assert repr(memory) == "<SharedMemory 100 bytes closed>"


def test_it_goes_quietly_with_the_last_reference() -> None:
    before = os.listdir("/dev/fd")
    memory = SharedMemory(100)
    view = memory.buf
    del memory
    assert view[0] == 0
    del view
    assert os.listdir("/dev/fd") == before


def test_it_is_no_pickle() -> None:
    with SharedMemory(1) as memory, pytest.raises(TypeError, match="call fdshare"):
        pickle.dumps(memory)


def test_the_end_of_a_with_closes_it() -> None:
    with SharedMemory(8) as memory:
        fd = memory.fileno()
    assert memory.closed
    assert not os.path.lexists(f"/proc/self/fd/{fd}")
    assert repr(memory) == "<SharedMemory 8 bytes closed>"


def test_a_failure_leaves_no_descriptor() -> None:
    before = os.listdir("/dev/fd")
    with pytest.raises(OSError):
        SharedMemory(1, name="n" * 300)
    memory = SharedMemory(1 << 62)  # more than any address space has room for
    with pytest.raises(OSError):
        memory.buf  # noqa: B018
    memory.close()
    assert os.listdir("/dev/fd") == before


def test_a_system_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedMemory(1) as memory:
        monkeypatch.setattr(system, "HAS_SEALS", False)  # that of macOS
        with pytest.raises(UnsupportedPlatform, match="memfd_create"):
            SharedMemory(1)
        with pytest.raises(UnsupportedPlatform):
            adopt(memory)


# Arrays.


def test_an_array_is_the_memory() -> None:
    with SharedMemory(80) as memory:
        numbers = memory.as_array("f8", (2, 5))
        numbers[1, 4] = 2.5
        assert np.frombuffer(memory.buf, "f8")[9] == 2.5
        assert memory.as_array("f8").shape == (10,)
        assert memory.as_array("u1", offset=79).shape == (1,)
        assert memory.as_array("f8", 3, offset=8).shape == (3,)


def test_an_array_of_sealed_memory_is_read_only() -> None:
    with SharedMemory.from_bytes(np.arange(4)) as memory:
        numbers = memory.as_array(int)
        assert numbers.tolist() == [0, 1, 2, 3]
        assert not numbers.flags.writeable
        with pytest.raises(ValueError):
            numbers.flags.writeable = True


def test_an_array_outlives_its_memory() -> None:
    numbers = SharedMemory.from_bytes(np.arange(4)).as_array(int)
    gc.collect()
    assert numbers.tolist() == [0, 1, 2, 3]
    place = array_place(numbers)
    assert place is not None
    os.fstat(place.fd)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [("f8", (11,), 0), ("f8", (10,), 8), ("f8", (-1,), 0), ("O", None, 0), ("u1", None, 81)],
)
def test_an_array_that_does_not_fit(dtype: str, shape: tuple[int, ...] | None, offset: int) -> None:
    with SharedMemory(80) as memory, pytest.raises(InvalidArgument):
        memory.as_array(dtype, shape, offset=offset)


def test_where_an_array_lies() -> None:
    with SharedMemory(80) as memory:
        numbers = memory.as_array("f8", (2, 5))
        fd = memory.fileno()
        assert array_place(numbers) == (fd, 80, 0)
        assert array_place(numbers[1, 2:]) == (fd, 80, 56)
        assert array_place(numbers[:, ::-1]) == (fd, 80, 32)
        assert array_place(numbers.T.view("i8")) == (fd, 80, 0)
        assert array_place(np.frombuffer(memory.buf[8:], "f8")) == (fd, 80, 8)
        for elsewhere in (numbers.copy(), numbers + 1, np.arange(3), np.frombuffer(b"abc", "u1")):
            assert array_place(elsewhere) is None
        memory.close()
        with pytest.raises(ClosedDescriptor):
            array_place(numbers)


@pytest.mark.parametrize(
    "dtype", ["f8", "i2", "?", "U3", "M8[ns]", "c16", [("a", "i4"), ("b", "f8")]]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_a_shared_copy(dtype: object, shape: tuple[int, ...]) -> None:
    given = np.ones(shape, dtype)  # type: ignore[call-overload]
    copy = shared_copy(given)
    expected = given.tolist()
    given[...] = np.zeros(shape, dtype)  # type: ignore[call-overload]
    assert copy.dtype == given.dtype
    assert copy.shape == given.shape
    assert copy.tolist() == expected
    assert not copy.flags.writeable or not copy.size
    if copy.size:
        assert array_place(copy) is not None


def test_a_shared_copy_of_a_view_and_of_pointers() -> None:
    whole = np.arange(12).reshape(3, 4)
    for one in whole[::2, ::-1], whole[1:], np.asfortranarray(whole), whole.astype(">i4"):
        copy = shared_copy(one)
        assert copy.tolist() == one.tolist()
        assert copy.flags.c_contiguous
    for pointers in np.array([{}]), np.zeros(2, [("a", object)]), np.array({}):
        with pytest.raises(InvalidArgument):
            shared_copy(pointers)


def test_numpy_is_imported_only_for_arrays() -> None:
    program = (
        "import sys; from fdshare.kernel.shared_memory import SharedMemory\n"
        "SharedMemory.from_bytes(b'abc').buf\nprint('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
