"""The page: what the server writes is there for every reader, and nobody else can write."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest
from conftest import census
from users import as_user, needs_root

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.shared_memory import SharedMemory
from fdshare.server.core.slots import FIRST, SHARED
from fdshare.server.loop import page as module
from fdshare.server.loop.page import MemoryPage, is_page, new_page


@pytest.fixture
def memfd() -> Iterator[Descriptor]:
    made = new_page()
    assert made is not None
    with made:
        yield made


@pytest.fixture
def page(memfd: Descriptor) -> Iterator[MemoryPage]:
    page = MemoryPage(memfd)
    yield page
    os.close(page.handle.fd)


def words(page: MemoryPage) -> memoryview:
    """As a client maps it."""
    with SharedMemory.adopt(Descriptor.dup_of(page.handle.fd)) as memory:
        assert memory.readonly
        return memory.buf.cast("Q")


def test_what_is_written_is_read(page: MemoryPage) -> None:
    seen = words(page)
    assert len(seen) == page.size
    assert seen[0] == page.id
    page.write(FIRST, 5)
    page.write(page.size - 1, 1 << 63)
    assert (seen[FIRST], seen[page.size - 1]) == (5, 1 << 63)


def test_a_successor_finds_every_slot_that_was_used(page: MemoryPage, memfd: Descriptor) -> None:
    page.write(SHARED, 7)
    page.write(FIRST + 1000, 9)
    successor = MemoryPage(memfd)
    os.close(successor.handle.fd)
    assert successor.id == page.id
    stamp = successor.write_all()
    seen = words(page)
    assert stamp > 9
    assert seen[FIRST + 1000] == seen[SHARED] == stamp
    assert seen[FIRST + 1001] == 0
    assert successor.write_all() > stamp


def test_memory_is_taken_as_it_is_used(page: MemoryPage, memfd: Descriptor) -> None:
    page.write_all()
    assert os.fstat(memfd.fileno()).st_blocks * 512 <= mmap.PAGESIZE
    page.write(page.size - 1, 1)
    assert os.fstat(memfd.fileno()).st_blocks * 512 <= 2 * mmap.PAGESIZE


def test_a_reader_can_write_nothing(page: MemoryPage) -> None:
    fd, size = page.handle.fd, page.size * 8
    with pytest.raises(PermissionError):
        mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    for length in (0, 2 * size):
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(fd, length)


@needs_root
def test_another_user_cannot_open_it_anew(page: MemoryPage) -> None:
    def attempt() -> str:
        for flags in (os.O_RDWR, os.O_WRONLY):
            try:
                os.open(f"/proc/self/fd/{page.handle.fd}", flags)
            except PermissionError:
                continue
            return "opened"
        try:
            os.fchmod(page.handle.fd, 0o777)
        except PermissionError:
            return "refused"
        return "its mode was changed"

    assert as_user(1001, attempt) == "refused"


def test_its_size_stays(memfd: Descriptor) -> None:
    for length in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(memfd.fileno(), length)


def test_only_a_page_is_one(memfd: Descriptor) -> None:
    before = census()
    assert is_page(memfd)
    with SharedMemory(1 << 12) as memory, SharedMemory(4) as small:
        for other in (memory, small):
            with Descriptor.dup_of(other) as descriptor:
                assert not is_page(descriptor)
    with Descriptor(os.open(os.devnull, os.O_RDWR)) as null:
        assert not is_page(null)
    with Descriptor(os.open(f"/proc/self/fd/{memfd.fileno()}", os.O_RDONLY)) as copy:
        assert not is_page(copy)
    assert census() == before


def test_where_there_is_none_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORDS", 1 << 62)  # ftruncate(2) refuses it
    assert new_page() is None
