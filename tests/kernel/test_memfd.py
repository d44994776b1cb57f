"""memfds, and maps of files."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import census

from fdshare.kernel.memfd import create_memfd, private_map, shared_map

PAGE = mmap.PAGESIZE


@pytest.fixture
def pages() -> Iterator[int]:
    """A memfd: a page of a, one of b."""
    fd = create_memfd("test")
    os.write(fd, b"a" * PAGE + b"b" * PAGE)
    yield fd
    os.close(fd)


def test_a_memfd_can_be_sealed_and_is_not_inherited(pages: int) -> None:
    assert fcntl.fcntl(pages, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    fcntl.fcntl(pages, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert fcntl.fcntl(pages, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK


def test_a_kernel_that_knows_no_noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    # A flag that no kernel knows yet, so that this one refuses it as an older one refuses ours.
    monkeypatch.setattr("fdshare.kernel.memfd._NOEXEC_SEAL", 1 << 24)
    os.close(create_memfd("test"))


def test_what_is_written_to_a_map_stays_in_it(pages: int) -> None:
    mapping, second = private_map(pages, 0, 2 * PAGE), private_map(pages, PAGE, 1)
    mapping[0] = mapping[PAGE] = ord("x")
    assert os.pread(pages, 1, 0) + os.pread(pages, 1, PAGE) == b"ab"
    assert second[:] == b"b"


def test_what_is_written_to_a_shared_map_is_in_the_file(pages: int) -> None:
    mapping = shared_map(pages, PAGE + 1)
    assert len(mapping) == PAGE + 1
    mapping[0] = mapping[PAGE] = ord("x")
    assert os.pread(pages, 1, 0) + os.pread(pages, 2, PAGE) == b"xxb"


def test_on_a_kernel_that_populates_no_map(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    monkeypatch.setattr("fdshare.kernel.memfd._POPULATE_WRITE", 1 << 20)
    assert shared_map(pages, 1)[:] == b"a"


# The first maps of a process, without a free descriptor.
FIRST_MAPS = """\
import mmap, os, resource
from fdshare.kernel.memfd import create_memfd, private_map
memory, second = create_memfd("test"), mmap.PAGESIZE
os.write(memory, b"a" * second + b"b")
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (memory + 1, limits[1]))
first, rest = private_map(memory, 0, second + 1), private_map(memory, second, 1)
print(first[:] == b"a" * second + b"b", rest[:])
first[0] = ord("x")
print(os.pread(memory, 1, 0), first[:1])
"""


def test_the_first_maps_without_a_free_descriptor() -> None:
    """Before Python 3.13 a map imports ctypes."""
    said = subprocess.run([sys.executable, "-c", FIRST_MAPS], capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("True b'b'\nb'a' b'x'\n", "")


def test_a_map_keeps_no_descriptor(pages: int) -> None:
    private_map(pages, 0, 1)  # what it imports has one
    before = census()
    maps = [private_map(pages, 0, PAGE) for _ in range(10)]
    maps += [shared_map(pages, PAGE) for _ in range(10)]
    assert census() == before
    assert [mapping[:1] for mapping in maps] == [b"a"] * 20


def test_it_is_unmapped_with_its_last_view(pages: int) -> None:
    inode = os.fstat(pages).st_ino

    def mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return any(line.split()[4] == str(inode) for line in maps)

    view = memoryview(private_map(pages, 0, PAGE))
    assert mapped()
    del view
    assert not mapped()


def test_what_cannot_be_mapped(pages: int) -> None:
    for fd, offset in (pages, 1), (-1, 0):
        with pytest.raises(OSError):
            private_map(fd, offset, PAGE)
    with pytest.raises(OSError):
        shared_map(-1, PAGE)
