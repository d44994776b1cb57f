"""What a peer may say of its descriptors: whatever is not so is KindMismatch, at once.

The file behind a descriptor is never read: /dev/zero would have no end.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fdshare.errors import KindMismatch, UnknownKind
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, rebuild

INF, NAN = float("inf"), float("nan")


def zeros() -> int:
    return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)


def connected() -> int:
    near, far = socket.socketpair()
    far.close()
    return near.detach()


def memory(flags: int = 0) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, 4096 if not flags else 1 << 21)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def rebuilt(make: Callable[[], int], tag: str, spec: object) -> Any:
    raw = spec if isinstance(spec, bytes) else msgspec.msgpack.encode(spec)
    return rebuild(Kind(tag, msgspec.Raw(raw)), [Descriptor(make())])


def file(buffer: str = "reader", mode: str = "rb", text: Any = None, **raw: Any) -> Any:
    return [buffer, [mode, None, raw.get("is_socket", False), raw.get("timeout")], text]


def text(encoding: str = "utf-8", errors: str = "strict", newline: Any = None, state: Any = None):
    return [encoding, errors, newline, False, False, None, state]


@pytest.mark.parametrize("state", [-1, 2**31, 2**63 - 1, 1.5, "1", "9" * 5000])
def test_states_of_a_decoder(state: object) -> None:
    with pytest.raises(KindMismatch):
        rebuilt(zeros, "file", file(text=text(state=state)))


@pytest.mark.parametrize("state", [0, 1, 2**16, 2**31 - 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-7", "iso2022_jp"])
def test_a_state_reads_nothing(encoding: str, state: int) -> None:
    """Before, it could be a position, a count of bytes to read (2 GB), and characters to skip."""
    try:
        rebuilt(zeros, "file", file(text=text(encoding, state=state))).close()
    except KindMismatch:
        pass  # the decoder has no such state


@pytest.mark.parametrize(
    "spec",
    [
        file(text=text("no such")),
        file(text=text("rot13")),
        file(text=text("a\0b")),
        file(text=text("x" * 100_000)),
        file(text=text(errors="a\0b")),
        file(text=text(newline="x")),
        file(mode="zz"),
        file(mode="r" * 100_000),
        file(buffer="pair"),
        file(buffer="no such"),
        ["reader"],
        {},
        None,
        b"",
        b"\x93",
    ],
)
def test_files(spec: object) -> None:
    with pytest.raises(KindMismatch):
        rebuilt(zeros, "file", spec)


@pytest.mark.parametrize("timeout", [NAN, INF, -INF, -1.0, 1e300, -1e300])
@pytest.mark.parametrize("tag", ["socket", "file"])
def test_timeouts(tag: str, timeout: float) -> None:
    as_file = file(mode="rb", is_socket=True, timeout=timeout)
    with pytest.raises(KindMismatch):
        rebuilt(connected, tag, [1, 1, 0, timeout] if tag == "socket" else as_file)


@pytest.mark.parametrize(
    "spec",
    [
        [2, 1, 0, None],
        [1, 2, 0, None],
        [-1, -1, -1, None],
        [2**40, 1, 0, None],
        [1, 2**62, 0, None],
        [1, 1, 2**62, None],
        [1, 1, 0],
        [1, 1, 0, None, 5],
        b"\x94\x01",
    ],
)
def test_sockets(spec: object) -> None:
    try:
        rebuilt(connected, "socket", spec).close()
        assert spec == [1, 1, 0, None, 5]  # a later version may say more
    except KindMismatch:
        pass


@pytest.mark.parametrize("size", [0, -1, 2**40, 2**63 - 1, 2**63, 4096.5])
def test_sizes_of_memory(size: float) -> None:
    with pytest.raises(KindMismatch):
        rebuilt(memory, "memory", [size, False])


def test_memory_that_can_vanish_under_a_seal() -> None:
    """A huge page that was given back is SIGBUS where no other is free."""
    try:
        fd = memory(os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    with pytest.raises(KindMismatch, match="huge pages"):
        rebuilt(lambda: fd, "memory", [1 << 21, False])


def record(offset: int, itemsize: int) -> dict[str, object]:
    """A type of numpy with one field, of one byte."""
    names = {"names": ["a"], "formats": ["u1"], "offsets": [offset]}
    return {**names, "itemsize": itemsize, "aligned": False}


DEEP = b"\x96\xcd\x10\x00\xc2" + b"\x92" * 100_000 + b"\xa3<f8" + b"\x91\x01" * 100_000


@pytest.mark.parametrize(
    "spec",
    [
        *([4096, False, dtype, [10], 0, [8]] for dtype in ("O", "x" * 100_000, [], ["<f8"], {}, 5)),
        [4096, False, "__import__('os')", [10], 0, [8]],
        [4096, False, ["<f8", [10**9, 10**9]], [10], 0, [8]],
        [4096, False, {"names": ["a"], "formats": ["O"], "offsets": [0]}, [10], 0, [8]],
        *(
            [4096, False, record(offset, itemsize), [1], 0, [1]]
            for offset, itemsize in ((2**64 - 1, 1), (0, 2**63), (0, 2**31), (-1, 1), (1, 1))
        ),
        *([4096, False, "<f8", shape, 0, [8]] for shape in ([-1], [2**62], [2**31, 2**31], [])),
        *([4096, False, "<f8", [10], offset, [8]] for offset in (-8, 4096, 2**63)),
        *([4096, False, "<f8", [10], 0, strides] for strides in ([2**62], [-8], [], [8, 8])),
        [4096, False, "<f8", [1] * 100, 0, [0] * 100],
        DEEP,
    ],
    ids=lambda spec: repr(spec)[:40],
)
def test_arrays(spec: object) -> None:
    pytest.importorskip("numpy")
    with pytest.raises(KindMismatch):
        rebuilt(memory, "array", spec)


@pytest.mark.parametrize(
    "spec", [["os", True, True], ["", 1, 1], ["fdshare", False, False], ["fdshare", True, True]]
)
def test_connections(spec: object) -> None:
    with pytest.raises(KindMismatch):
        rebuilt(zeros, "connection", spec)


@pytest.mark.parametrize("tag", ["", "x" * 100_000, "__class__", "Socket"])
def test_tags(tag: str) -> None:
    with pytest.raises(UnknownKind):
        rebuilt(zeros, tag, None)
