"""The journal: a SOCK_SEQPACKET pair on which the server's records go to its keeper.

Notes go on it both ways. `Journal` is the server's end; it also replaces a keeper that has died.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Literal, TypeAlias

import msgspec

from fdshare.errors import DescriptorLimit, FdshareError, KeeperUnavailable
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.process_limit import why_not_forked
from fdshare.protocol import messages as m
from fdshare.server.core.ports import JournalBusy
from fdshare.server.core.records import Record
from fdshare.server.failover.fd_store import FdStore
from fdshare.server.failover.processes import BACK_OFF, Deaths, Forked, fence, fork_half
from fdshare.server.failover.service_manager import is_reported, store_state
from fdshare.server.loop.closing import close_quietly
from fdshare.server.loop.connection import NO_MEMORY
from fdshare.server.loop.dying import has_ended, is_ending
from fdshare.server.loop.poller import READ
from fdshare.server.loop.server import Server

__all__ = ["MAX_LETTER", "Journal", "Letter", "Note", "decode_letter", "encode_letter"]

log = logging.getLogger("fdshare.server")

MAX_LETTER: Final = 1 << 17  # bytes: less than a socket's send buffer
_SILENCE = 15.0  # seconds from the exec of new code to its hello
_RETRY = 0.1  # seconds until the next attempt to fork a new keeper
_AGAIN = 5.0  # seconds until the next attempt to ask the store, or to write to it
_LOOK = 1.0  # seconds between looks whether the keeper lives
# A signal so many seconds before the keeper's death was for both. A keeper that lives obeys sooner.
_TOGETHER = 10.0
_NONE = "it died, and there is no other yet"


class Note(msgspec.Struct, tag="note"):
    """What the halves tell each other beside the records.

    From the server: "hello" (it serves), "policy" (*data* is the text of a new one), "shutdown" and
    "upgrade" (a client's request, (*session*, *id*)), "pong". From the keeper: "hello" (it holds
    what the server holds), "drain" (answer what has begun, then stand by until a successor is
    made), "end" (answer what has begun, then end), "reload" (the policy; answered with "reload"),
    "ping" (answered with "pong"), "upgrading" (its next note is a hello, or it dies), "failed" (the
    upgrade, and why), "closed" (what a change removed and whose client waits for it; *id* is the
    table's serial after the change, 0 for none; *closed* says how many descriptors of each uid
    since the last such note).
    """

    verb: Literal[
        "hello",
        "policy",
        "shutdown",
        "upgrade",
        "pong",
        "drain",
        "end",
        "reload",
        "ping",
        "upgrading",
        "failed",
        "closed",
    ]
    session: str = ""
    id: int = 0
    data: bytes | None = None
    closed: dict[int, int] = {}


Letter: TypeAlias = Record | Note

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Letter)

encode_letter = _encoder.encode
decode_letter = _decoder.decode


class Journal:
    """The `JournalWriter` of a server that has a keeper.

    A record is written before its client hears "ok", and is not acknowledged: what is in the buffer
    of a SOCK_SEQPACKET pair outlives its writer.
    """

    def __init__(
        self, sock: socket.socket, keeper: Descriptor, pid: int, fdstore: FdStore | None = None
    ) -> None:
        """Takes *sock* and the pidfd *keeper* over. Records go into *fdstore*, too."""
        self._sock = sock
        self._keeper = keeper
        self._pid: int | None = pid
        self._fdstore = fdstore
        self._mending = False  # it is stale, and the next attempt is planned
        self._log_dropped = 0  # lines that the keeper's log had no room for
        self._acquainted = False  # the keeper has said hello: it holds what the server holds
        self._lost = False
        self._buried = False  # it is dead, and our ends of its descriptors are closed
        self._upgrading = False  # it has begun to exec new code ...
        self._upgrades = 0  # ... so many times
        self._deaths = Deaths()
        self._asked: dict[tuple[str, int], None] = {}  # upgrades whose clients wait for an answer
        self._ending = False  # the server is to end: a client or the keeper said so
        self._signalled = -math.inf  # when this process was sent a signal that ends a keeper
        self._server: Server

    def attach(self, server: Server) -> None:
        """Watches the keeper from the server's loop."""
        self._server = server
        self._sock.setblocking(False)
        server.loop.poller.register(self._sock.fileno(), READ, self._on_letter)
        server.loop.poller.register(self._keeper.fileno(), READ, self._on_death)
        self._look_after_keeper(self._keeper)
        self._mend_store()

    # `JournalWriter`, for the server.

    def write(self, record: Record, fds: Sequence[int]) -> None:
        if self._lost:
            # A client must not hear "ok" of what only this process holds.
            raise JournalBusy(_NONE, BACK_OFF)
        letter = encode_letter(record)
        if len(letter) > MAX_LETTER:  # the keeper would read a part of it
            raise KeeperUnavailable(f"the record has {len(letter)} bytes, at most {MAX_LETTER}")
        try:
            send_message(self._sock, (letter,), fds)
        except (
            BlockingIOError,
            DescriptorLimit,
        ):  # full, or too much in flight: it has to read first
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
        if self._fdstore is not None:  # whatever that has of the record, it is done
            self._fdstore.record(record, fds)
            self._mend_store()

    def state(self) -> tuple[int | None, bool]:
        return self._pid, self._acquainted and not self._lost

    def command(self, verb: Literal["shutdown", "upgrade"], session: str, id: int) -> bool:
        self._tell(Note(verb, session, id))
        if verb == "upgrade":
            self._asked[session, id] = None
            return False
        self._ending = True
        return True

    def log_dropped(self) -> int:
        return self._log_dropped

    def keep_policy(self, text: bytes | None) -> None:
        try:
            self._tell(Note("policy", data=text))
        except KeeperUnavailable:
            if not self._lost:  # it is full; one that is dead is replaced by a fork of this process
                raise

    def stored(self, name: str) -> bool | None:
        return None if self._fdstore is None else self._fdstore.stored(name)

    def store_stats(self) -> m.StoreStats | None:
        return None if self._fdstore is None else self._fdstore.stats()

    def refill_store(self) -> None:
        if self._fdstore is None:
            return
        fdstore, loop = self._fdstore, self._server.loop
        told = fdstore.told

        def ask() -> None:  # in a thread: it may wait
            limit, held = store_state()
            # What was counted while the server told more says nothing.
            loop.post(lambda: answered(limit, held if fdstore.told == told else None))

        def answered(limit: int | None, held: int | None) -> None:
            fdstore.try_again(limit, held)
            self._mend_store()

        try:
            threading.Thread(target=ask, name="fdshare-store", daemon=True).start()
        except RuntimeError:  # EAGAIN, from RLIMIT_NPROC or a cgroup's pids.max
            loop.later(_AGAIN, lambda now: self.refill_store())

    def _mend_store(self, delay: float = 0.0) -> None:
        """Has a store that is stale hold the server's table again in *delay* seconds, and tries it
        until it does. The table has by then what was just written."""
        if self._fdstore is not None and self._fdstore.stale and not self._mending:
            self._mending = True
            self._server.loop.later(delay, self._try_to_mend_store)

    def _try_to_mend_store(self, now: float) -> None:
        assert self._fdstore is not None
        self._mending = False
        self._fdstore.reconcile(self._server.table)
        if not self._fdstore.stale:
            log.warning("the store is up to date again")
        self._mend_store(_AGAIN)

    def hello(self) -> None:
        """Tells the keeper that the server serves; one that is dead is replaced soon."""
        with suppress(KeeperUnavailable):
            self._tell(Note("hello"))

    def _tell(self, note: Note) -> None:
        if self._lost:
            raise KeeperUnavailable(_NONE)
        try:
            send_message(self._sock, (encode_letter(note),))
        except (BrokenPipeError, ConnectionResetError):
            self._lose()
            raise KeeperUnavailable(_NONE) from None
        except OSError as error:
            raise KeeperUnavailable(str(error)) from None

    # What comes from the keeper.

    def _on_letter(self, events: int, now: float) -> None:
        self._read_letter()

    def _read_letter(self) -> bool:
        """Reads the next letter and does what it says; False if there is none."""
        try:
            data = self._sock.recv(MAX_LETTER)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNRESET, *NO_MEMORY):
                return False  # an end of the stream follows
            data = b""
        if not data:
            self._lose()
            return False
        note = decode_letter(data)
        assert isinstance(note, Note)
        self._on_note(note)
        return True

    def _on_note(self, note: Note) -> None:
        if note.verb == "closed":
            self._server.closed_by_keeper(note.id, note.closed)
        elif note.verb == "hello":
            self._acquainted, self._upgrading = True, False
        elif note.verb in ("drain", "end"):
            self._ending = self._ending or note.verb == "end"
            self._server.stop()
        elif note.verb == "reload":
            self._server.try_to_reload()
            with suppress(KeeperUnavailable):  # full: then a successor reloads once more
                self._tell(Note("reload"))
        elif note.verb == "ping":
            self._log_dropped = note.id
            with suppress(KeeperUnavailable):  # full: then it has enough to read
                self._tell(Note("pong"))
        elif note.verb == "upgrading":
            self._acquainted, self._upgrading = False, True
            self._upgrades += 1
            number = self._upgrades
            self._server.loop.later(_SILENCE, lambda now: self._check_silence(number))
        elif note.verb == "failed":
            self._upgrade_failed((note.data or b"").decode())

    def _check_silence(self, number: int) -> None:
        """Ends a keeper whose new code has sent nothing since its exec."""
        if self._upgrading and number == self._upgrades:
            self._upgrade_failed("the new code started and then hung; it was replaced by the old")
            self._lose()

    def _upgrade_failed(self, why: str) -> None:
        """The old code goes on; the clients that asked for the upgrade are told why."""
        self._upgrading = False
        self._server.notes["upgrade"] = why
        body = m.encode(m.refusal(FdshareError(f"the upgrade failed, nothing has changed: {why}")))
        asked, self._asked = self._asked, {}
        for connection in list(self._server.loop.connections):
            for session, id in asked:
                if connection.session.name == session:
                    self._server.loop.answer(connection.session, id, body)

    # The end of the server.

    def note_signal(self, number: int, frame: object) -> None:
        """A handler of the signals that end a keeper: one that dies of something else in the same
        moment needs no successor."""
        self._signalled = time.monotonic()

    def stand_by(self) -> Forked | None:
        """After the server's last turn: waits until the keeper ends this process, and makes another
        one. A keeper that dies first is replaced; in the child: what it is given. None where there
        is to be no other server."""
        while not self._ending:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)  # says to the keeper that nothing follows
            while not self.is_alone():
                has_ended(self._keeper, _LOOK)
            self._lost = True
            if (half := self.replace_keeper()) is not None:
                return half
            if self._lost:
                time.sleep(_RETRY)
        return None

    def is_alone(self) -> bool:
        """Whether there is no keeper that lives."""
        return self._lost or is_ending(self._keeper)

    # The keeper's death.

    def _on_death(self, events: int, now: float) -> None:
        self._lose()

    def _lose(self) -> None:
        """The keeper is gone, or will be. It is replaced between two turns of the loop."""
        if not self._lost:
            self._lost = True
            self._server.loop.interrupt()

    def replace_keeper(self) -> Forked | None:
        """Forks a new keeper, after an interrupt of the loop. In the child: what it is given."""
        waits = not self._buried and not self._bury()
        if self._is_to_end():  # it would only be told the same
            self._ending = True
            self._server.stop()
            return None
        if waits:
            return None
        try:
            half = fork_half(self._server.lanes, orphan=is_reported())
        except OSError as error:
            log.error(
                "no new keeper (%s); the table cannot be changed until there is one",
                why_not_forked(error),
            )
            self._interrupt_in(_RETRY)
            return None
        if half.born:
            return half
        self._sock, self._keeper, self._pid = half.journal, half.other, half.pid
        self._lost = self._buried = self._acquainted = False
        self.attach(self._server)
        with suppress(KeeperUnavailable):  # it is dead, too
            if self._is_to_end():  # a signal that came during the fork
                self._tell(Note("shutdown"))
        return None

    def _is_to_end(self) -> bool:
        return self._ending or time.monotonic() - self._signalled < _TOGETHER

    def _bury(self) -> bool:
        """Makes sure that the keeper is dead. False if the next one has to wait."""
        poller = self._server.loop.poller
        poller.unregister(self._sock.fileno())
        poller.unregister(self._keeper.fileno())
        how = fence(self._keeper, self._sock)
        for _ in range(3):  # ECONNRESET, for a letter that it has not read, is reported before
            while self._read_letter():
                pass
        self._server.keeper_is_dead()
        plan = "the server ends" if self._is_to_end() else "making a new one"
        log.warning("keeper %s is gone (%s), %s", self._pid, how, plan)
        if self._upgrading:
            self._upgrade_failed("the new code died at its start; the old one goes on")
        elif self._asked:  # it may have died of that, and so would the next one
            self._upgrade_failed("the keeper died meanwhile")
        self._server.dying.bury(self._keeper, "keeper")
        close_quietly(self._sock)
        self._buried = True
        often = self._deaths.too_many(time.monotonic())
        if not often:
            return True
        log.error(
            "the keeper died %s; nothing can be changed before the next start, in %d s",
            often,
            BACK_OFF,
        )
        self._interrupt_in(BACK_OFF)
        return False

    def _look_after_keeper(self, keeper: Descriptor) -> None:
        """Notices the death of a keeper that hangs in its end. Until it is replaced."""
        if self._keeper is keeper and not self._lost:
            if is_ending(keeper):
                self._lose()
            else:
                self._server.loop.later(_LOOK, lambda now: self._look_after_keeper(keeper))

    def close(self) -> None:
        """Closes the journal: the server has ended."""
        close_quietly(self._sock)

    def _interrupt_in(self, seconds: float) -> None:
        self._server.loop.later(seconds, lambda now: self._server.loop.interrupt())
