"""A table in a memfd, whose writer may die at any byte."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator

import msgspec
import pytest

from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol.messages import Kind, Registrant
from fdshare.server.core.image import image_of
from fdshare.server.core.records import Put, Record
from fdshare.server.core.table import Table
from fdshare.server.failover.table_file import Base, Frame, Step, Stored, TableFile, UnreadableTable


@pytest.fixture
def memfd() -> Iterator[Descriptor]:
    with Descriptor(os.memfd_create("table")) as made:
        yield made


def base(epoch: str = "epoch") -> Base:
    return Base(epoch, ".abc", image_of(Table())[0], [], [])


def step(name: str) -> Step:
    put = Put(name, 1, Kind("descriptor", b"\xc0"), 1, Registrant(1, 0, 0), 0.0)
    return Step(Record([put]), [f".abc{name}"])


@pytest.fixture
def file(memfd: Descriptor) -> TableFile:
    made = TableFile(memfd)
    made.rewrite(base())
    return made


def read(memfd: Descriptor) -> list[Frame]:
    return list(TableFile(memfd).read())


def same(frames: list[Frame], others: list[Frame]) -> bool:
    """Encoded, for what was read has raw parts."""
    return [*map(msgspec.msgpack.encode, frames)] == [*map(msgspec.msgpack.encode, others)]


def size(memfd: Descriptor) -> int:
    return os.fstat(memfd.fileno()).st_size


def test_what_is_written_is_read(memfd: Descriptor, file: TableFile) -> None:
    gone = Step(Record([]), [], gone=[".abcb"])
    frames = [base(), step("a"), Stored([".abca"]), step("b"), gone, Stored([], [".abca"])]
    for frame in frames[1:]:
        assert not isinstance(frame, Base)
        file.append(frame)
    assert same(read(memfd), frames)


def test_a_new_one_is_empty(memfd: Descriptor) -> None:
    assert read(memfd) == []


def test_a_frame_that_is_not_whole_was_never_written(memfd: Descriptor, file: TableFile) -> None:
    file.append(step("a"))
    begin = size(memfd) - 8
    file.append(step("b"))
    end = size(memfd) - 8
    data = os.pread(memfd.fileno(), end, 0)
    for cut in range(begin, end):
        os.ftruncate(memfd.fileno(), cut)
        assert same(read(memfd), [base(), step("a")])
    # The next one takes its place.
    again = TableFile(memfd)
    assert same(list(again.read()), [base(), step("a")])
    again.append(step("c"))
    assert same(read(memfd), [base(), step("a"), step("c")])
    # Nor was one that is not as it was written.
    os.pwrite(memfd.fileno(), data.replace(b".abcb", b".abcx"), 0)
    assert same(read(memfd), [base(), step("a")])


def test_a_base_takes_the_place_of_all_or_nothing(memfd: Descriptor, file: TableFile) -> None:
    for _ in range(20):
        file.append(step("a"))
    before = os.pread(memfd.fileno(), size(memfd), 0)
    file.rewrite(base("other"))
    assert same(read(memfd), [base("other")])
    after = os.pread(memfd.fileno(), size(memfd), 0)
    # Until the header is written, what was valid is.
    os.ftruncate(memfd.fileno(), 0)
    os.pwrite(memfd.fileno(), before[:24] + after[24:], 0)
    assert len(read(memfd)) == 21


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes pwrite(2) still writes, as at RLIMIT_FSIZE or the limit of a cgroup."""
    room = [1 << 20]
    write = os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if not room[0]:
            raise OSError(errno.EFBIG, "File too large")
        count = write(fd, memoryview(data)[: room[0]], at)
        room[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    return room


def test_what_is_written_in_part_was_never_written(
    memfd: Descriptor, file: TableFile, little_room: list[int]
) -> None:
    file.append(step("a"))
    frames = read(memfd)
    whole = size(memfd)
    for room in range(0, whole, 5):
        little_room[0] = room
        with pytest.raises(OSError, match="too large"):
            file.append(Step(Record([]), ["x" * whole]))
        assert same(read(memfd), frames)
        little_room[0] = room
        with pytest.raises(OSError, match="too large"):
            file.rewrite(base("x" * whole))
        assert same(read(memfd), frames)
    little_room[0] = 1 << 20
    file.rewrite(base("other"))
    file.append(step("b"))
    assert same(read(memfd), [base("other"), step("b")])


def test_it_does_not_grow_for_ever(memfd: Descriptor, file: TableFile) -> None:
    for _ in range(5000):
        file.append(step("a"))
        if file.full:
            file.rewrite(base())
    assert size(memfd) < 1 << 18


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0, b"another\0", "fdshare did not write it"),
        (8, (7).to_bytes(8, sys.byteorder), "it has version 7"),
        (16, (1 << 40).to_bytes(8, sys.byteorder), "it is damaged"),
        (40, b"\xff" * 8, "it is damaged"),
    ],
)
def test_what_it_cannot_read_it_says(
    memfd: Descriptor, file: TableFile, at: int, data: bytes, why: str
) -> None:
    os.pwrite(memfd.fileno(), data, at)
    with pytest.raises(UnreadableTable, match=why):
        read(memfd)


def test_a_short_file_is_damaged(memfd: Descriptor) -> None:
    os.pwrite(memfd.fileno(), b"fdshare", 0)
    with pytest.raises(UnreadableTable, match="damaged"):
        read(memfd)
