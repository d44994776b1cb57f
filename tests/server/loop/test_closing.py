"""What came from outside is closed where nobody has to wait for it."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest
from breaking import lingering_pair
from conftest import census, wait_until

from fdshare.kernel.ancillary import send_message
from fdshare.server.loop.closing import (
    OURS,
    Closer,
    Handle,
    close_quietly,
    close_within,
    receive_handles,
)
from fdshare.server.loop.lanes import Lanes

ME, OTHER = os.geteuid(), 54321


class Closing:
    """A closer and its lanes; `wait` stands for the loop that makes its calls."""

    def __init__(self, *, alone: bool = False) -> None:
        self.lanes = Lanes()
        self.notified = threading.Event()
        self.closer = Closer(self.lanes, self.notified.set, alone=alone)
        self.called: list[str] = []

    def close(self, *handles: Handle, word: str = "closed", **options: bool) -> object:
        return self.closer.close(handles, lambda: self.called.append(word), **options)

    def wait(self) -> None:
        assert self.notified.wait(20)
        self.notified.clear()
        self.closer.collect(0.0)

    def hang(self, uid: int, gate: threading.Event) -> None:
        """Makes a close of *uid* hang until *gate* is open."""
        self.lanes.put(uid, gate.wait)
        wait_until(lambda: self.lanes.hangs(uid))


@pytest.fixture
def closing() -> Iterator[Closing]:
    closing = Closing()
    yield closing
    closing.lanes.stop(5)


@pytest.fixture
def alone() -> Iterator[Closing]:
    """Where nobody but root and we are served."""
    closing = Closing(alone=True)
    yield closing
    closing.lanes.stop(5)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def null(uid: int) -> Handle:
    return Handle(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), uid)


def test_what_is_ours_is_closed_at_once(closing: Closing) -> None:
    handle = null(OURS)
    fd = handle.fd
    closing.close(handle)
    assert closing.called == ["closed"]
    assert fd not in census()
    assert handle.fd < 0
    closing.close(handle)  # once more: nothing happens to whoever has the number now
    assert closing.called == ["closed", "closed"]


def test_what_is_others_is_closed_by_a_thread(closing: Closing) -> None:
    handles = [null(OTHER) for _ in range(5)]
    fds = {handle.fd for handle in handles}
    closing.close(*handles)
    while not closing.called:
        closing.wait()
    assert not fds & census().keys()
    assert closing.called == ["closed"]
    assert closing.closer.due is None


def test_a_socket_that_lingers_is_not_waited_for(closing: Closing) -> None:
    """Half a minute: SO_LINGER is taken from it."""
    sock, peer = lingering_pair(30)
    closing.close(Handle(sock.detach(), OTHER))
    closing.wait()
    assert closing.called == ["closed"]
    peer.close()


def test_the_reset_of_a_socket_stays(closing: Closing) -> None:
    """SO_LINGER with no time is what its owner wants the peer to see."""
    sock, peer = lingering_pair(0)
    closing.close(Handle(sock.detach(), OTHER))
    closing.wait()
    with peer, pytest.raises(ConnectionResetError):
        while peer.recv(1 << 20):
            pass


def test_a_close_that_hangs_is_its_users_alone(closing: Closing, gate: threading.Event) -> None:
    closing.hang(OTHER, gate)
    mine, others = null(OTHER), null(OTHER + 1)
    fd = mine.fd
    closing.close(mine, word="not waited for")
    assert closing.called == ["not waited for"]
    closing.close(others, word="closed")
    closing.wait()
    assert closing.called == ["not waited for", "closed"]
    assert fd in census()
    assert closing.closer.hanging(OTHER) == closing.closer.all_hanging() == 1
    assert closing.closer.hanging(OTHER + 1) == 0
    gate.set()
    wait_until(lambda: fd not in census())
    assert closing.closer.hanging(OTHER) == 0


def test_many_are_closed_in_their_order(closing: Closing, gate: threading.Event) -> None:
    """Each is known until it is closed: a forked child has a copy of it."""
    handles = [null(OTHER) for _ in range(100)]
    fds = [handle.fd for handle in handles]
    closing.lanes.put(OTHER, gate.wait)
    closing.close(*handles)
    assert closing.closer.unfinished() == [(fd, OTHER) for fd in fds]
    assert closing.closer.left(OTHER) == 100
    assert closing.closer.owners() == {OTHER}
    assert not closing.called
    gate.set()
    while not closing.called:
        closing.wait()
    assert not census().keys() & set(fds)
    assert closing.closer.unfinished() == []
    assert closing.closer.owners() == set()


def test_what_is_in_use_is_not_closed_yet(closing: Closing) -> None:
    """... and counts against its owner: whoever replaces it has more than the table says."""
    handle = null(OTHER)
    fd, handle.pins = handle.fd, 1
    for _ in range(2):
        closing.closer.close([handle])
        assert closing.closer.left(OTHER) == 1
        assert closing.closer.owners() == {OTHER}
        assert not closing.closer.is_done
    assert fd in census()
    handle.pins = 0
    closing.close(handle)
    while not closing.called:
        closing.wait()
    assert fd not in census()
    assert closing.closer.left(OTHER) == 0
    assert closing.closer.owners() == set()
    assert closing.closer.is_done


def test_a_wait_has_an_end(closing: Closing, gate: threading.Event) -> None:
    """For one that begins to hang."""
    closing.lanes.put(OTHER, gate.wait)
    closing.close(null(OTHER))
    due = closing.closer.due
    assert due is not None
    closing.closer.collect(due - 0.001)
    assert closing.called == []
    closing.closer.collect(due)
    assert closing.called == ["closed"]
    gate.set()
    closing.wait()
    assert closing.called == ["closed"]  # not once more


def test_what_is_still_to_be_sent_is_closed_after_it(closing: Closing) -> None:
    handle = null(OTHER)
    fd, handle.pins = handle.fd, 1
    closing.close(handle)
    assert (handle.closing, handle.fd, closing.called) == (True, fd, [])
    assert (fd, OTHER) in closing.closer.unfinished()
    handle.pins = 0
    closing.closer.close([handle])
    closing.wait()
    assert closing.called == ["closed"]
    assert fd not in census()


def test_the_other_half_is_waited_for(closing: Closing) -> None:
    handle = null(OURS)
    elsewhere = closing.close(handle, elsewhere=True)
    assert closing.called == []
    elsewhere()  # type: ignore[operator]
    assert closing.called == ["closed"]


def test_a_forked_child_takes_over_what_is_unfinished(
    closing: Closing, gate: threading.Event
) -> None:
    closing.hang(OTHER, gate)
    copies = [os.dup(0) for _ in range(3)]
    closing.closer.close([Handle(fd, OTHER) for fd in copies])
    unfinished = closing.closer.unfinished()
    assert sorted(unfinished) == sorted((fd, OTHER) for fd in copies)
    gate.set()
    wait_until(lambda: not census().keys() & set(copies))
    again = [os.dup(0) for _ in range(3)]
    closing.closer.take_over([(fd, OTHER) for fd in again])
    wait_until(lambda: not census().keys() & set(again))
    assert closing.closer.unfinished() == []


# At once, where nobody else is served.


def unread_descriptor() -> socket.socket:
    near, far = socket.socketpair()
    send_message(far, (b"x",), [0])
    far.close()
    return near


def memfd(size: int) -> int:
    fd = os.memfd_create("memory")
    os.write(fd, bytes(size))
    return fd


def test_nobody_waits_for_what_cannot_block(alone: Closing) -> None:
    read, write = os.pipe()
    with select.epoll() as epoll:
        harmless = [
            read,
            write,
            socket.socket().detach(),
            socket.socket(socket.AF_UNIX).detach(),
            socket.create_server(("127.0.0.1", 0)).detach(),
            os.pidfd_open(os.getpid()),
            os.dup(epoll.fileno()),
            os.eventfd(0),
            memfd(1 << 16),
        ]
        for fd in harmless:
            alone.close(Handle(fd, ME))
            assert fd not in census()
    assert len(alone.called) == len(harmless)


def test_what_may_block_is_closed_by_a_thread(alone: Closing) -> None:
    sock, peer = lingering_pair(30)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        unknown = [
            os.open(__file__, os.O_RDONLY),  # on who knows what
            memfd(2 << 20),  # which takes long
            unread_descriptor().detach(),
            os.dup(listener.fileno()),  # somebody in its queue may have sent a descriptor
            sock.detach(),
        ]
        for fd in unknown:
            alone.close(Handle(fd, ME))
            assert alone.called == []
            alone.wait()
            assert alone.called.pop() == "closed"
    peer.close()


def test_a_stranger_is_never_closed_at_once(alone: Closing) -> None:
    """Who has another copy can set SO_LINGER between our look and our close."""
    alone.close(Handle(socket.socket().detach(), OTHER))
    assert alone.called == []
    alone.wait()


def test_without_threads_what_cannot_block_is_closed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:

        def full(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", full)
        closing = Closing()
        fd = socket.socket().detach()
        closing.close(Handle(fd, OTHER))
        assert fd not in census()
        file = null(OTHER)
        closing.close(file, word="later")
        assert closing.called == ["closed"]
    closing.close(null(OTHER), word="later")  # there is room for a thread again
    while len(closing.called) < 3:
        closing.wait()
    closing.lanes.stop(5)
    assert closing.closer.unfinished() == []


def test_what_waits_for_a_thread_is_closed_when_there_is_room(
    closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing else is closed meanwhile."""

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    closing.lanes.rest()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        closing.lanes.resume()
        handle = null(OTHER)
        fd = handle.fd
        closing.close(handle)
        now = closing.closer.due
        assert now is not None
        closing.closer.collect(now)
        assert now < closing.closer.due
    later = closing.closer.due
    closing.closer.collect((now + later) / 2)
    assert "fdshare-lane" not in [thread.name for thread in threading.enumerate()]
    closing.closer.collect(later)
    wait_until(lambda: fd not in census())


# Receiving, and starting.


def test_those_that_had_fitted_are_handed_out_too() -> None:
    """Closing them here could block."""
    near, far = socket.socketpair()
    with near, far:
        send_message(far, (b"x",), [0] * 10)
        count, handles, lost = receive_handles(near, bytearray(10), OTHER, 0, 4)
        assert (count, len(handles)) == (1, 4)
        assert lost is not None
        assert {handle.uid for handle in handles} == {OTHER}
        for handle in handles:
            os.close(handle.fd)


def test_before_serving_closes_are_waited_for() -> None:
    files = [null(OTHER) for _ in range(3)]
    fds = {file.fd for file in files}
    close_within(5, files)
    assert not fds & census().keys()


# Others.


def test_quietly_means_all_of_them() -> None:
    closed = []

    class Owner:
        def close(self) -> None:
            closed.append(self)
            raise OSError("the disk is full")

    close_quietly(Owner(), Owner())
    assert len(closed) == 2


def test_a_close_that_fails_is_not_the_last(closing: Closing) -> None:
    closing.close(Handle(1 << 20, OTHER), null(OTHER))
    while not closing.called:
        closing.wait()


def test_a_handle_says_what_becomes_of_it() -> None:
    handle = Handle(7, 5)
    assert repr(handle) == "<Handle fd=7 of uid 5>"
    handle.closing = True
    assert repr(handle) == "<Handle fd=7 of uid 5 closing>"
