"""Sends the messages of one socket of this process, one after the other, each as a whole.

`send` may be called during a `send` of the same thread, at any instruction: by a finaliser that the
collector runs, or by a handler of the signal module. It leaves its message to the outer one then. A
handler may also raise at any instruction: what has begun is gone on with by the next `send`.
"""

from __future__ import annotations

import socket
from _thread import get_ident
from collections import deque
from contextlib import suppress
from typing import Final

from fdshare.errors import DescriptorLimit
from fdshare.kernel import system
from fdshare.kernel.ancillary import send_all_into
from fdshare.mp.channels.framing import LARGEST, LENGTH, WHOLE, headed
from fdshare.mp.channels.sending import Outgoing, push_short, short
from fdshare.mp.pickling.bundle import Bundle, Encoded

__all__ = ["Sender"]

# Of two sends.
_WITHOUT_DESCRIPTORS: Final = ((), ())
_FLAGS: Final = (system.NOSIGNAL, system.NOSIGNAL)


class Sender:
    """Sends messages on a socket, which stays the connection's."""

    __slots__ = ("__weakref__", "_inside", "_sock", "waiting")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._inside = 0  # the thread that is in the middle of a message
        # What the next `send` sends first: what has begun and was not ended, and what inner calls
        # have left.
        self.waiting: deque[Outgoing] = deque()

    @property
    def begun(self) -> bool:
        """True if a message has begun that nobody is sending: the next `send` goes on with it."""
        return bool(self.waiting) and self.waiting[0].begun

    def send(self, message: Encoded) -> None:
        """Sends *message*, after what waits.

        Raises: DescriptorLimit (ETOOMANYREFS), after 10 seconds; BlockingIOError, if the program
        has made the socket non-blocking; any other OSError of sendmsg(2). Whatever is raised, none
        of *message* was sent, or the next call sends the rest.
        """
        if not self._inside and not self.waiting:
            if type(message) is bytes:
                if len(message) <= WHOLE:
                    self._sock.send(headed(message), system.NOSIGNAL)
                    return
                if 0 < WHOLE < len(message) <= LARGEST:
                    self._send_large(message)
                    return
            parts = short(message, at_once=False)
            if parts is not None:
                sent = [False]
                self._inside = get_ident()
                try:
                    push_short(sent, self._sock, parts)
                except DescriptorLimit:
                    pass  # to be tried again
                except BaseException:
                    self._try_waiting()
                    raise
                finally:
                    self._inside = 0
                if sent[0]:
                    if type(message) is Bundle:
                        message.close()  # a handler may raise in a finaliser, and end it
                    if self.waiting:
                        self.send_waiting()
                    return
        self._send_in_turn(message)

    def _send_large(self, message: bytes) -> None:
        """Sends *message*, longer than WHOLE. Its head goes first: a reader that waits takes as
        long to wake up as the kernel takes to copy the rest. Raises: as `send`."""
        counts: list[int] = []
        parts = (LENGTH.pack(len(message)),), (message,)
        self._inside = get_ident()
        try:
            send_all_into(counts, self._sock, parts, _WITHOUT_DESCRIPTORS, _FLAGS)
        except BaseException:
            self._keep_rest(message, counts)
            self._try_waiting()
            raise
        finally:
            self._inside = 0
        if sum(counts) < LENGTH.size + len(message):  # a signal came
            self._keep_rest(message, counts)
        if self.waiting:
            self.send_waiting()

    def _keep_rest(self, message: bytes, counts: list[int]) -> None:
        """Has the next `send` go on with *message*, of which *counts* were sent."""
        outgoing = Outgoing(message, sum(counts))
        if outgoing.begun:
            self.waiting.appendleft(outgoing)

    def send_waiting(self) -> None:
        """Sends what waits. Raises: as `send`."""
        while self.waiting:
            self._inside = get_ident()
            try:
                self._push_waiting()
            finally:
                self._inside = 0

    def leave(self, message: Encoded) -> None:
        """Leaves *message* to the `send` that is going on, or to the next one. It is safe to close
        what was pickled after this call. Raises: as `Bundle.share`."""
        outgoing = Outgoing(message)
        outgoing.own()
        self.waiting.append(outgoing)

    def close(self) -> None:
        """Sends what waits, if that takes no time, and drops the rest.

        While another thread is in the middle of a message, it does nothing: the rest is that one's.
        """
        # Else no global name is used: the interpreter may have taken them away.
        if self.waiting and self._inside in (0, get_ident()):
            self._try_waiting()
            self.waiting.clear()

    def forget(self) -> None:
        """In a forked child: closes the copies of what the parent sends. It is not used again."""
        for outgoing in self.waiting:
            outgoing.close()

    def _send_in_turn(self, message: Encoded) -> None:
        if self._inside == get_ident():
            self.leave(message)
            return
        outgoing = Outgoing(message)
        self._inside = get_ident()
        try:
            self._push_waiting()
            self.waiting.appendleft(outgoing)  # before what was left in the meantime
            outgoing.push_patiently(self._sock)
            self.waiting.popleft()
        except BaseException:
            if not outgoing.settle(self._sock) and outgoing in self.waiting:
                self.waiting.remove(outgoing)
            self._try_waiting()
            raise
        finally:
            self._inside = 0
        if self.waiting:
            self.send_waiting()

    def _first(self) -> Outgoing | None:
        """The first message that waits and has to be sent."""
        while self.waiting:
            first = self.waiting[0]
            if first.begun or first.independent:
                return first
            self.waiting.popleft()  # a second exception came before it was removed
        return None

    def _try_waiting(self) -> None:
        with suppress(OSError):
            while (first := self._first()) and first.push_now(self._sock):
                self.waiting.popleft()

    def _push_waiting(self) -> None:
        while first := self._first():
            try:
                first.push_patiently(self._sock)
            except DescriptorLimit:
                self.waiting.popleft()
                raise
            self.waiting.popleft()
