"""TableFile: a table in a memfd, as an image and the records since. Its labels stand for handles.

Both halves of a server hold the memfd, and so does the service manager; the server alone writes.
A writer may die at any moment: what it had not written to its end was never written.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import Final, TypeAlias

import msgspec

from fdshare.kernel.descriptor import Descriptor
from fdshare.server.core.image import Image
from fdshare.server.core.records import Record

__all__ = ["VERSION", "Base", "Frame", "Step", "Stored", "TableFile", "UnreadableTable"]

VERSION: Final = 1  # of the frames; the header keeps its form for ever
_MAGIC: Final = b"fdshare\0"
_HEADER: Final = struct.Struct("=8sQQ")  # magic, version, where the image is
_START: Final = struct.Struct("=Q")
_START_AT: Final = _HEADER.size - _START.size
_FRAME: Final = struct.Struct("=II")  # length and CRC-32 of what follows
_END: Final = bytes(_FRAME.size)
_SLACK: Final = 1 << 16  # bytes of records, and three times the image: then a new image is due


class UnreadableTable(Exception):
    """Other code wrote it, or it is damaged."""


class Base(msgspec.Struct, tag="base"):
    """The table at some moment. *prefix* is that of its labels; *labels* are what the image's
    record draws, *missing* those of them that the service manager does not hold, and *leftover*
    others that it may hold."""

    epoch: str
    prefix: str
    image: Image
    labels: list[str]
    missing: list[str]
    leftover: list[str] = []


class Step(msgspec.Struct, tag="step", omit_defaults=True):
    """A record since then; *labels* are what it draws. The service manager was told to let go of
    *gone* before."""

    record: Record
    labels: list[str]
    missing: list[str] = []
    gone: list[str] = []


class Stored(msgspec.Struct, tag="stored", omit_defaults=True):
    """What was missing, and is not any more; *gone* as in a Step."""

    labels: list[str]
    gone: list[str] = []


Frame: TypeAlias = Base | Step | Stored

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Frame).decode


class TableFile:
    """The memfd."""

    def __init__(self, memfd: Descriptor) -> None:
        """Takes *memfd* over."""
        self.memfd = memfd
        self._at = _HEADER.size  # where the next frame goes
        self._base = 0  # bytes of the image

    @property
    def full(self) -> bool:
        """Whether there are so many records that a new image takes less room."""
        return self._at > self._base * 4 + _SLACK

    def read(self) -> Iterator[Frame]:
        """The base and what follows, up to the first frame that is not whole; nothing of a file
        that is new. Raises: UnreadableTable."""
        fd = self.memfd.fileno()
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        if not data:
            return
        at = _start_of(data)
        bodies = list(_whole_frames(data, at))
        if not bodies:
            raise UnreadableTable("it is damaged")
        self._base = len(bodies[0])
        for body in bodies:
            at += _FRAME.size + len(body)
            self._at = at
            yield _frame_in(body)

    def rewrite(self, base: Base) -> None:
        """Puts *base* in the place of all that is there. Raises: OSError; what was valid is."""
        fd = self.memfd.fileno()
        frame = _framed(_encode(base))
        header = os.pread(fd, _HEADER.size, 0)
        start = _HEADER.unpack(header)[2] if len(header) == _HEADER.size else 0
        # Never over the image and the records that are valid until the start is written.
        fits = _HEADER.size + len(frame) + len(_END) <= start
        at = _HEADER.size if fits else max(self._at + len(_END), _HEADER.size)
        _write(fd, frame + _END, at)
        if len(header) < _HEADER.size:
            _write(fd, _HEADER.pack(_MAGIC, VERSION, at), 0)
        else:
            _write(fd, _START.pack(at), _START_AT)
        self._at, self._base = at + len(frame), len(frame)
        os.ftruncate(fd, self._at + len(_END))

    def append(self, frame: Step | Stored) -> None:
        """Raises: OSError; it was not written then."""
        body = _framed(_encode(frame))
        _write(self.memfd.fileno(), body + _END, self._at)
        self._at += len(body)


def _write(fd: int, data: bytes, at: int) -> None:
    """Writes all of *data*. Raises: OSError."""
    left = memoryview(data)
    while left:  # a write that meets a limit is a short one; the next says why
        count = os.pwrite(fd, left, at)
        left, at = left[count:], at + count


def _start_of(data: bytes) -> int:
    """Where the base is. Raises: UnreadableTable."""
    if len(data) < _HEADER.size:
        raise UnreadableTable("it is damaged")
    magic, version, start = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise UnreadableTable("fdshare did not write it")
    if version != VERSION:
        raise UnreadableTable(f"it has version {version}, this code reads {VERSION}")
    return int(start)


def _whole_frames(data: bytes, at: int) -> Iterator[bytes]:
    """Their bodies, from *at* on."""
    while at + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if not length or len(body) < length or zlib.crc32(body) != crc:
            return
        yield body
        at += _FRAME.size + length


def _frame_in(body: bytes) -> Frame:
    try:
        frame: Frame = _decode(body)
        return frame
    except msgspec.MsgspecError as error:
        raise UnreadableTable(str(error)) from None


def _framed(body: bytes) -> bytes:
    return _FRAME.pack(len(body), zlib.crc32(body)) + body
