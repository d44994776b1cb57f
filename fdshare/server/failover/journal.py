"""Link: the server's end of the journal, and what it does when its keeper dies."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fdshare.errors import DescriptorLimit, FdshareError, KeeperUnavailable
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m
from fdshare.server.core.ports import JournalBusy
from fdshare.server.core.records import Record
from fdshare.server.failover.processes import (
    BACK_OFF,
    DEATHS,
    WITHIN,
    Forked,
    Note,
    decode_letter,
    encode_letter,
    fence,
    fork_half,
)
from fdshare.server.loop.closing import close_quietly
from fdshare.server.loop.connection import NO_MEMORY
from fdshare.server.loop.poller import READ

if TYPE_CHECKING:
    from fdshare.server.loop.server import Server

__all__ = ["Link"]

log = logging.getLogger("fdshare.server")

_LETTER = 1 << 17  # bytes; no letter is longer than a socket's send buffer
_SILENCE = 15.0  # seconds that new code gets from the exec to its first word
_RETRY = 0.1  # seconds until the next attempt to make a new keeper
_NONE = "it died, and there is no other yet"


class Link:
    """The `Journal` of a server that has a keeper.

    A record is written before its client hears "ok", and needs no answer: what is in the buffer of
    a SOCK_SEQPACKET pair survives the death of its writer.
    """

    def __init__(self, sock: socket.socket, keeper: Descriptor, pid: int) -> None:
        """Takes *sock* and the pidfd *keeper* over."""
        self._sock = sock
        self._keeper = keeper
        self._pid: int | None = pid
        self._acquainted = False  # the keeper has said hello: it holds what we hold
        self._lost = False
        self._buried = False  # it is dead, and what we had of it is closed
        self._upgrading = False  # it has begun to exec new code ...
        self._upgrades = 0  # ... for so many times
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        self._asked: dict[tuple[str, int], None] = {}  # upgrades that wait for word
        self._ending = False  # a client was told that the service ends
        self._server: Server

    def attach(self, server: Server) -> None:
        """Watches the keeper from the server's loop."""
        self._server = server
        self._sock.setblocking(False)
        server.loop.poller.register(self._sock.fileno(), READ, self._on_letter)
        server.loop.poller.register(self._keeper.fileno(), READ, self._on_death)

    # Journal.

    def write(self, record: Record, fds: Sequence[int]) -> None:
        if self._lost:
            # Nothing may be acknowledged that only we hold. A new keeper comes, soon or in a while.
            raise JournalBusy(_NONE, BACK_OFF)
        letter = encode_letter(record)
        if len(letter) > _LETTER:  # the keeper would read a part of it
            raise KeeperUnavailable(f"the record has {len(letter)} bytes, at most {_LETTER}")
        try:
            send_message(self._sock, (letter,), fds)
        except (BlockingIOError, DescriptorLimit):  # full, or too much in flight: let it read
            if self._upgrading:
                raise JournalBusy("its new code has not started yet", _SILENCE) from None
            raise JournalBusy from None
        except (BrokenPipeError, ConnectionResetError):
            self._lose()
            raise JournalBusy("it has just died", BACK_OFF) from None
        except OSError as error:
            if error.errno in NO_MEMORY:
                raise JournalBusy from None
            raise KeeperUnavailable(str(error)) from None

    def state(self) -> tuple[int | None, bool]:
        return self._pid, self._acquainted and not self._lost

    def command(self, verb: Literal["shutdown", "upgrade"], session: str, id: int) -> bool:
        self._tell(Note(verb, session, id))
        if verb == "upgrade":
            self._asked[session, id] = None
            return False
        self._ending = True
        return True

    def keep_policy(self, text: bytes | None) -> None:
        self._tell(Note("policy", data=text))

    def hello(self) -> None:
        """Tells the keeper that the server serves."""
        self._tell(Note("hello"))

    def _tell(self, note: Note) -> None:
        if self._lost:
            raise KeeperUnavailable(_NONE)
        try:
            send_message(self._sock, (encode_letter(note),))
        except OSError as error:
            raise KeeperUnavailable(str(error)) from None

    # What comes from the keeper.

    def _on_letter(self, events: int, now: float) -> None:
        try:
            data = self._sock.recv(_LETTER)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNRESET, *NO_MEMORY):
                return  # EOF comes after it
            data = b""
        if not data:
            self._lose()
            return
        note = decode_letter(data)
        assert isinstance(note, Note)
        if note.verb == "hello":
            self._acquainted, self._upgrading = True, False
        elif note.verb == "drain":
            self._server.stop()
        elif note.verb == "reload":
            self._server.try_to_reload()
        elif note.verb == "upgrading":
            self._acquainted, self._upgrading = False, True
            self._upgrades += 1
            number = self._upgrades
            self._server.loop.later(_SILENCE, lambda now: self._check_silence(number))
        elif note.verb == "failed":
            self._upgrade_failed((note.data or b"").decode())

    def _check_silence(self, number: int) -> None:
        """The keeper had put new code in its place: has that said a word since?"""
        if self._upgrading and number == self._upgrades:
            self._upgrade_failed("the new code started and then hung; it was replaced by the old")
            self._lose()

    def _upgrade_failed(self, why: str) -> None:
        """The old code goes on; those who asked are told why."""
        self._upgrading = False
        self._server.notes["upgrade"] = why
        body = m.encode(m.refusal(FdshareError(f"the upgrade failed, nothing has changed: {why}")))
        asked, self._asked = self._asked, {}
        for connection in list(self._server.loop.connections):
            for session, id in asked:
                if connection.session.name == session:
                    self._server.loop.send(connection, id, body, ())

    # The keeper's death.

    def _on_death(self, events: int, now: float) -> None:
        self._lose()

    def _lose(self) -> None:
        """The keeper is gone, or as good as: replaced between two turns of the loop."""
        if not self._lost:
            self._lost = True
            self._server.loop.interrupt()

    def replace_keeper(self) -> Forked | None:
        """Makes a new one, after an interrupt. In the forked child: what it has of us."""
        if not self._buried and not self._bury():
            return None
        try:
            half = fork_half()
        except OSError as error:
            log.error("no new keeper (%s); the table cannot be changed until there is one", error)
            self._interrupt_in(_RETRY)
            return None
        if half.born:
            return half
        self._sock, self._keeper, self._pid = half.journal, half.other, half.pid
        self._lost = self._buried = self._acquainted = False
        self.attach(self._server)
        for session, id in self._asked:  # of the one that died
            self._tell(Note("upgrade", session, id))
        if self._ending:
            self._tell(Note("shutdown"))
        return None

    def _bury(self) -> bool:
        """Makes sure that the keeper is dead. False where the next has to wait."""
        poller = self._server.loop.poller
        poller.unregister(self._sock.fileno())
        poller.unregister(self._keeper.fileno())
        how = fence(self._keeper)
        log.warning("keeper %s is gone (%s), making a new one", self._pid, how)
        if self._upgrading:
            self._upgrade_failed("the new code died at its start; the old one goes on")
        close_quietly(self._sock, self._keeper)
        self._buried = True
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) < DEATHS or now - self._deaths[0] >= WITHIN:
            return True
        log.error(
            "the keeper died %d times in %d s; nothing can be changed before the next start, "
            "in %d s",
            DEATHS,
            WITHIN,
            BACK_OFF,
        )
        self._deaths.clear()
        self._interrupt_in(BACK_OFF)
        return False

    def _interrupt_in(self, seconds: float) -> None:
        self._server.loop.later(seconds, lambda now: self._server.loop.interrupt())
