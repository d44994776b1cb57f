"""OutcomePipe: the small outcomes of a pool's jobs go through a pipe, which needs no lock.

A write of at most PIPE_BUF bytes to a pipe is done as a whole or not at all, whoever else writes
(pipe(7)). So a worker sends a small outcome with one write(2), and a larger one in a few parts. One
that is killed leaves no lock behind, and nothing that others have to wait for. For the kernel it is
less work than a send on a socket. The pool takes up to 64 KiB of the pipe with one read(2).

Any other outcome, with descriptors or longer, goes over the stream, under a lock. It is announced
in the pipe under the same lock, so the announcements are in the order of the stream. An outcome
that one send takes as a whole is announced after that. Any other is announced before, since there
may be no room for all of it until the pool reads. So outcomes arrive in the order in which a worker
has sent them, and the pool does not have to wait for both the pipe and the stream.

After an announcement the pool waits for the stream. If nothing comes for a second, the worker may
have been killed. Then the outcome is late: the pool takes what is in the pipe, and looks at the
stream each time. Where a send has failed after the announcement, a void message follows.

Writers do not wait in the write. They wait for room or for the end of the stream: a pipe has no
shutdown(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinFunctionType
from typing import Any, Final, TypeAlias

from fdshare.kernel import system
from fdshare.mp.channels.connection import ConnectionMixin
from fdshare.mp.channels.framing import WHOLE
from fdshare.mp.pickling.bundle import Bundle, Encoded
from fdshare.mp.workers.tasks import RAISED, Pickled, beheaded, receive_patiently

__all__ = ["LONGEST", "VOID", "Outcome", "OutcomePipe", "is_short"]

# RETURNED or RAISED, job, index, pickle.
Outcome: TypeAlias = tuple[int, int, int, Pickled]

_read: Final[Callable[[Any, int], bytes]] = os.read
_write: Final[Callable[[Any, bytes], int]] = os.write

# How many bytes follow, form, job, index, how many parts came before.
_FRAME: Final = struct.Struct("=HBqqB")
_SIZE: Final = _FRAME.size
_pack: Final = _FRAME.pack
_unpack: Final = _FRAME.unpack_from
_ROOM: Final = min(select.PIPE_BUF, 4096) - _SIZE
# Bytes of a pickle in the pipe.
LONGEST: Final = 4 * _ROOM

# Forms beside those of tasks.py. The last one is of a message on the stream.
_ANNOUNCED: Final = 6
_PART: Final = 7
_END: Final = 8
VOID: Final = 9

# Bytes: about what a stream has room for. A part takes a page of 4 KiB, of which a new pipe has 16.
_CAPACITY: Final = 1 << 18
_CHUNK: Final = 1 << 16  # bytes of a read
_ONE_SECOND: Final = struct.pack("@ll", 1, 0)  # struct timeval


def is_short(message: Encoded) -> bool:
    """True if it is on the stream as a whole when a send returns, or not at all."""
    if isinstance(message, bytes):
        return len(message) <= WHOLE
    assert isinstance(message, Bundle)
    return len(message.data) <= WHOLE


class OutcomePipe:
    """The pipe of a pool's small outcomes, beside the stream of the others."""

    _reader: ConnectionMixin | None = None  # not in workers

    def __init__(self, stream_reader: ConnectionMixin, stream_writer: ConnectionMixin) -> None:
        """Raises: OSError (EMFILE)."""
        connection = type(stream_reader)
        reader, writer = os.pipe()
        self._reader = connection(reader, writable=False)
        self._writer = connection(writer, readable=False)
        os.set_blocking(writer, False)
        if system.SET_PIPE_SIZE is not None:
            with suppress(OSError):  # EPERM: the user's pipes have many pages, pipe(7)
                fcntl.fcntl(writer, system.SET_PIPE_SIZE, _CAPACITY)
        self._stream_reader, self._stream_writer = stream_reader, stream_writer
        sock = stream_reader._carrier()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ONE_SECOND)
        self._data = b""  # of the pipe
        self._start = 0  # what is before was taken
        # Job and index of what was announced, and has not come yet. There is one at a time, for
        # its worker has the lock; that of a worker that was killed stays.
        self._due: tuple[int, int] | None = None
        self._is_late = False
        # What a worker has sent that was killed before the last part stays.
        self._parts: dict[tuple[int, int], list[bytes]] = {}
        connection._family.util.register_after_fork(self, _close_reader)

    def __getstate__(self) -> Any:
        return self._writer, self._stream_writer

    def __setstate__(self, state: Any) -> None:
        self._writer, self._stream_writer = state

    def send(self, form: int, job: int, index: int, content: bytes) -> None:
        """Sends an outcome of at most LONGEST bytes. Raises: as `announce`."""
        parts = 0
        while len(content) > _ROOM:
            self._write(_pack(_ROOM, _PART, job, index, 0) + content[:_ROOM])
            content = content[_ROOM:]
            parts += 1
        self._write(_pack(len(content), form, job, index, parts) + content)

    def announce(self, job: int, index: int) -> None:
        """Sends that an outcome is on the stream, or will be.

        Raises: OSError (EPIPE): the pool is gone, or has ended the stream.
        """
        self._write(_pack(0, _ANNOUNCED, job, index, 0))

    def _write(self, frame: bytes) -> None:
        try:
            _write(self._writer._handle, frame)
        except BlockingIOError:
            self._send_when_there_is_room(frame)

    def _send_when_there_is_room(self, frame: bytes) -> None:
        stream, room = self._stream_writer.fileno(), select.poll()
        room.register(stream, 0)  # its end
        room.register(self._writer.fileno(), select.POLLOUT)
        while True:
            if stream in dict(room.poll()):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            with suppress(BlockingIOError):  # another worker was faster
                _write(self._writer._handle, frame)
                return

    def take(self, wait: Callable[[float], object]) -> Outcome:
        """The next outcome, of the pipe or of the stream. For one thread.

        *wait*, and what is raised beside EOFError, is as of `receive_patiently`.
        """
        while True:
            if self._due is not None and (not self._is_late or self._stream_reader._poll(0)):
                outcome = self._receive(wait)
                if outcome is not None:
                    return outcome
                continue
            data, start = self._data, self._start
            end = start + _SIZE
            if end > len(data):
                self._read()
                continue
            size, form, job, index, parts = _unpack(data, start)
            stop = end + size
            if stop > len(data):
                self._read()
                continue
            self._start = stop
            if form <= RAISED:
                content = data[end:stop]
                if self._parts:
                    content = self._joined((job, index), parts, content)
                return form, job, index, content
            if form == _PART:
                self._parts.setdefault((job, index), []).append(data[end:stop])
            elif form == _ANNOUNCED:
                self._due = job, index
            else:
                raise EOFError

    def _joined(self, key: tuple[int, int], count: int, content: bytes) -> bytes:
        # Before these there may be parts of an attempt that a signal's handler has ended.
        parts = self._parts.pop(key, [])
        return b"".join([*parts[len(parts) - count :], content])

    def _read(self) -> None:
        """Waits for the pipe, and where something is late for the stream, too."""
        assert self._reader is not None
        # In place of poll(2) gevent has a function that lets other green threads run meanwhile. It
        # has none in place of read(2).
        if self._due is not None or type(select.poll) is not BuiltinFunctionType:
            ready = select.poll()
            ready.register(self._reader.fileno(), select.POLLIN)
            if self._due is not None:
                ready.register(self._stream_reader.fileno(), select.POLLIN)
            if self._reader.fileno() not in dict(ready.poll()):
                return
        more = _read(self._reader._handle, _CHUNK)
        if not more:
            raise EOFError
        self._data, self._start = self._data[self._start :] + more, 0

    def _receive(self, wait: Callable[[float], object]) -> Outcome | None:
        """What is next on the stream; None: it is void, or late."""
        self._is_late = True
        with suppress(BlockingIOError):
            form, job, index, content = beheaded(receive_patiently(self._stream_reader, wait=wait))
            self._is_late = False
            # Else a handler has raised after a send, and before or after the announcement.
            if (job, index) == self._due:
                self._due = None
                if form != VOID:
                    return form, job, index, content
        return None

    def finish(self) -> None:
        """Nothing more is sent by any process; what was sent is still received. It waits for room,
        as `send`."""
        if not self._writer.closed:
            with suppress(OSError):
                self._write(_pack(0, _END, 0, 0, 0))

    def abandon(self) -> None:
        """Wakes who waits for the pipe, after the stream was ended. Never waits."""
        if not self._writer.closed:
            with suppress(OSError):  # if it is full nobody waits
                _write(self._writer.fileno(), _pack(0, _END, 0, 0, 0))

    def close(self) -> None:
        """Closes both ends, in this process."""
        self._writer.close()
        _close_reader(self)


def _close_reader(pipe: OutcomePipe) -> None:
    """In a forked child, too: a worker sees that the pool's process is gone."""
    if pipe._reader is not None:
        pipe._reader.close()
