"""One duplicate for all that keep the same open file description."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from fdshare.errors import ClosedDescriptor
from fdshare.kernel import shared_duplicate
from fdshare.kernel.open_file import same_here
from fdshare.kernel.shared_duplicate import share

pytestmark = pytest.mark.skipif(same_here(0, 0) is None, reason="kcmp(2) is not allowed here")


def open_now() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_all_of_one_description_have_one_duplicate_which_the_last_closes() -> None:
    near, far = socket.socketpair()
    copy = far.dup()
    first, second = share(far.fileno()), share(copy.fileno())
    assert first is second
    assert first.fileno() not in (far.fileno(), copy.fileno())
    assert not os.get_inheritable(first.fileno())
    far.close()
    copy.close()
    del first
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        near.recv(1)
    assert share(second.fileno()) is second
    del second
    assert near.recv(1) == b""
    near.close()
    assert not shared_duplicate._held


def new_epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


@pytest.fixture
def several(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """Descriptions of one file, whose number says nothing."""
    makers = {
        "file": lambda: os.open(os.devnull, os.O_RDONLY),
        "eventfd": lambda: os.eventfd(0),
        "epoll": new_epoll,
    }
    made = [makers[request.param]() for _ in range(9)]
    yield made
    for fd in made:
        os.close(fd)


@pytest.mark.parametrize("several", ["file", "eventfd", "epoll"], indirect=True)
def test_other_descriptions_of_the_same_file_have_their_own(several: list[int]) -> None:
    before = open_now()
    shared = [share(fd) for fd in several * 20]
    assert shared == shared[:9] * 20
    assert len(set(shared)) == 9
    assert all(same_here(fd, shared[at].fileno()) for at, fd in enumerate(several))
    assert open_now() == before + 9
    # One in the middle goes, and is made again.
    gone = id(shared[4])
    shared = [duplicate for duplicate in shared if id(duplicate) != gone]
    assert open_now() == before + 8
    assert share(several[3]) is shared[3]
    shared.append(share(several[4]))
    assert same_here(shared[-1].fileno(), several[4])
    del shared
    assert open_now() == before
    assert not shared_duplicate._held


def test_a_number_that_is_another_description_now() -> None:
    with open(os.devnull) as null:
        fd = os.dup(null.fileno())
        first = share(fd)
        with socket.socket() as sock:
            os.dup2(sock.fileno(), fd)
        second = share(fd)
        assert second is not first
        assert same_here(second.fileno(), fd)
        assert same_here(first.fileno(), null.fileno())
        os.close(fd)


def test_so_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_duplicate, "_LOOKED_AT", 2)  # thousands take long
    fds = [os.eventfd(0) for _ in range(3)]
    shared = [share(fd) for fd in fds]
    assert share(fds[2]) is shared[2]
    assert share(fds[1]) is shared[1]
    assert share(fds[0]) is not shared[0]
    for fd in fds:
        os.close(fd)


def test_one_that_is_closed() -> None:
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(ClosedDescriptor):
        share(fd)
    assert not shared_duplicate._held
