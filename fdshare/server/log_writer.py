"""A writer of lines that nobody waits for.

write(2) to standard error waits where that is a pipe that nobody reads, a terminal that is stopped
or a journal that hangs; it fails where the disk is full. So a thread makes the call, again and
again until it succeeds, and what is not written yet is bounded: when there is no room, a line is
dropped, and counted. One line says how many were when there is room again.
"""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final, Generic, Protocol, TypeVar

from fdshare.kernel.thread_signals import start_without_signals

__all__ = ["ROOM", "Form", "LogWriter"]

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

ROOM: Final = 8 << 20  # bytes of lines that wait
# Bytes after which a piece is written. With a usual line it has less than PIPE_BUF, so that the
# lines of two processes do not mix in a pipe (pipe(7)); in a file they do not (the inode is locked
# for the whole write). Between two pieces the other threads run.
_PIECE: Final = 3500
_PIECE_OF_FILE: Final = 1 << 15
_GATHER: Final = 0.02  # seconds after a write for which lines are gathered
_AGAIN: Final = 1.0  # seconds after which a write that failed is tried again
_STUCK: Final = 0.1  # seconds after which a write is taken for one that hangs
_PAUSE: Final = 0.001  # seconds between two looks


class Form(Protocol[T_contra]):
    """What the lines look like. One is made in each process."""

    def render(self, item: T_contra) -> bytes:
        """The line or lines that *item* becomes, which is not bytes."""

    def lost(self, count: int) -> bytes:
        """The line that says that *count* lines were dropped."""


class LogWriter(Generic[T]):
    """Writes the items that any thread gives it to *fd*, which stays the caller's, in order."""

    def __init__(self, fd: int, form: Callable[[], Form[T]], room: int = ROOM) -> None:
        self._fd = fd
        self._new_form = form
        self.form: Form[T]
        self._room = room
        self._enough = _PIECE_OF_FILE if stat.S_ISREG(os.fstat(fd).st_mode) else _PIECE
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self.form = self._new_form()
        self._lock = threading.Lock()  # of the thread's start, and of what is dropped
        self._items: deque[tuple[T | bytes, int]] = deque()  # with what it counts
        # How many bytes were given, and how many are written. No lock guards what was given: it
        # would cost as much as the rest of `put`. A number that two threads have spoiled is right
        # again when all is written.
        self._given = 0
        self._done = 0
        self._dropped = 0
        self._told = 0  # how many of those a line has told
        self._piece = memoryview(b"")  # what is left of the piece that is being written,
        self._size = 0  # and how many of the given bytes it is
        self._writing = False  # a piece is being put together, or written
        self._signal: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._idle = False
        self._resting = False
        self.failure = ""  # why the last write failed; empty if it did not

    @property
    def dropped(self) -> int:
        """How many lines were lost."""
        return self._dropped

    @property
    def full(self) -> bool:
        """True if there may be no room for all that one request is noted with."""
        return self._given - self._done > self._room - self._room // 8

    @property
    def _waits(self) -> bool:
        """Whether there is something to write."""
        return bool(self._items) or self._writing or self._dropped != self._told

    def put(self, item: T | bytes, size: int, lines: int = 1) -> None:
        """Has *item* written soon, which becomes so many *lines*, or is one as it is, and takes
        *size* bytes until then; drops it if there is no room. Never waits."""
        if self._given - self._done + size > self._room:
            with self._lock:
                self._dropped += lines
            return
        self._given += size
        self._items.append((item, size))
        if self._idle:
            self._idle = False
            self._signal.put(None)
        elif self._thread is None:
            self.resume()

    def flush(self, seconds: float) -> None:
        """Waits until what was given is written, *seconds* at most; not where writing fails."""
        deadline = time.monotonic() + seconds
        while self._waits and not self.failure:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if self._thread is not None:
                time.sleep(_PAUSE)
            elif self._has_room(left):  # none could be started
                self._write(select.PIPE_BUF)

    def rest(self) -> None:
        """Ends the thread, unless its write hangs; what it has not written waits for `resume`. To
        be called before a fork."""
        self._resting = True
        self._signal.put(None)
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(_STUCK)

    def resume(self) -> None:
        """Starts the thread again after `rest`. In a forked child: forgets what the parent writes
        itself."""
        if os.getpid() != self._pid:
            self._begin()
        with self._lock:
            self._resting = False
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="fdshare-log", daemon=True)
            self._thread = thread
            try:
                start_without_signals(thread)
            except RuntimeError:  # there is no room for one: the next line tries again
                self._thread = None

    # In the thread.

    def _run(self) -> None:
        while not self._has_to_end():
            self._idle = True
            if not (self._waits or self._resting):
                self._done = self._given
                self._signal.get()
            self._idle = False
            while self._waits and not self._resting:
                if not self._write():
                    self._wait()
            if not self._resting:
                time.sleep(_GATHER)

    def _has_to_end(self) -> bool:
        with self._lock:
            if self._resting:
                self._thread = None
            return self._resting

    def _write(self, most: int | None = None) -> bool:
        """Writes some of what waits, *most* bytes at most. False if that failed."""
        self._writing = True  # before anything is taken from the others
        if not self._piece:
            self._next_piece()
        try:
            self._piece = self._piece[os.write(self._fd, self._piece[:most]) :]
        except BlockingIOError:  # somebody made it non-blocking
            self._has_room(_AGAIN)
            return True
        except OSError as error:
            self.failure = error.strerror or str(error)
            return False
        self.failure = ""
        if not self._piece:
            self._done += self._size
            self._size = 0
            self._writing = False
        return True

    def _next_piece(self) -> None:
        dropped = self._dropped
        has_room = self._given - self._done <= self._room // 2 or not self._items
        if dropped != self._told and has_room:
            self._piece = memoryview(self.form.lost(dropped - self._told))
            self._told = dropped
            return
        lines: list[bytes] = []
        length = 0
        while self._items and length < self._enough:
            item, size = self._items.popleft()
            text = item if isinstance(item, bytes) else self._rendered(item)
            lines.append(text)
            length += len(text)
            self._size += size
        self._piece = memoryview(b"".join(lines))

    def _rendered(self, item: T) -> bytes:
        try:
            return self.form.render(item)
        except Exception as error:  # a line must not be the end of the log
            return f"a line could not be made: {error!r}\n".encode("ascii", "backslashreplace")

    def _wait(self) -> None:
        """Waits before the next attempt, or for `rest`."""
        try:
            self._signal.get(timeout=_AGAIN)
        except Empty:
            pass

    def _has_room(self, seconds: float) -> bool:
        """Waits until something can be written, *seconds* at most."""
        wait = select.poll()
        wait.register(self._fd, select.POLLOUT)
        return bool(wait.poll(seconds * 1000))
