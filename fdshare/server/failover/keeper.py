"""Keeper: the second process, which makes `kill -9` of the server harmless. It talks to no client.

It is the process that was started. It owns the listening socket and a copy of every descriptor,
follows the server's journal, and forks a new server when the old one is dead. When the keeper dies,
the server forks a new keeper. In both cases the survivor first fences the other (processes.py).

    keeper ── fork ──> server       SOCK_SEQPACKET: records up, notes both ways
       │  listener, lock, table        │  listener, table, connections
       └── pidfd of the server         └── pidfd of the keeper

Why no record is lost. The server writes it to the journal before it answers. If the server dies
then, the record is in the socket's buffer and the keeper reads it before it forks a successor. If
the keeper dies, the server has the table. A client whose answer was lost repeats the request, and
finds the answer beside the table (`Table.answers`).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from fdshare.errors import FdshareError
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import (
    descriptor_limit,
    is_descriptor_limit,
    raise_descriptor_limit,
)
from fdshare.kernel.process_limit import why_not_forked
from fdshare.server import logs
from fdshare.server.core.records import Record
from fdshare.server.failover.heartbeat import Heartbeat
from fdshare.server.failover.holdings import Holdings, bind_anew
from fdshare.server.failover.journal import (
    MAX_LETTER,
    Note,
    decode_letter,
    encode_letter,
)
from fdshare.server.failover.processes import (
    BACK_OFF,
    SIGNALS,
    Deaths,
    Forked,
    Life,
    fence,
    fork_half,
)
from fdshare.server.failover.service_manager import Watchdog, report
from fdshare.server.failover.upgrade import (
    Handover,
    Trial,
    exec_new_code,
    make_handover,
)
from fdshare.server.limits import Limits
from fdshare.server.loop.closing import (
    OURS,
    Closer,
    Handle,
    assign_owners,
    close_in_order,
    close_quietly,
    receive_handles,
)
from fdshare.server.loop.connection import NO_MEMORY
from fdshare.server.loop.dying import Dying, has_ended, is_ending
from fdshare.server.loop.lanes import Lanes
from fdshare.server.loop.poller import READ, Poller

__all__ = ["Keeper"]

log = logging.getLogger("fdshare.keeper")

# Seconds for the last answers of a server that was told to end; less than a Manager waits.
_DRAIN: Final = 3.0
_LOOK: Final = 1.0  # seconds between looks whether the server lives


class Keeper:
    """One keeper; `run` is its life."""

    def __init__(
        self,
        holdings: Holdings,
        become_server: Callable[[Holdings, Forked], Life | None],
        ready: Callable[[], None] | None = None,
        *,
        journal: socket.socket | None = None,
        server: Descriptor | None = None,
        reloading: bool = False,
    ) -> None:
        """*become_server* is the life of a forked child. *ready* is called once a server serves.
        *journal* and *server* are of the server that is there; without them it forks the first.
        *reloading*: it may not have heard of the last SIGHUP."""
        self._holdings = holdings
        self._become_server = become_server
        self._ready = ready
        self._journal = journal
        self._server = server
        self._poller = Poller()
        self._watchdog = Watchdog()
        limits = Limits.for_rlimit(raise_descriptor_limit(), **holdings.settings.limits)
        self._heartbeat = Heartbeat(limits.hang_timeout)
        self._lanes = Lanes()
        self._closer = Closer(self._lanes, self._wake_up, alone=holdings.settings.policy is None)
        # By uid: how many descriptors were removed, of which the server does not know that they are
        # closed here, too.
        self._removed: Counter[int] = Counter()
        self._closer.take_over(holdings.unfinished)
        holdings.unfinished = []
        for entry in holdings.table.entries.values():
            assign_owners(entry)
        self._fencing = False
        self._deaths = Deaths()
        self._start_at: float | None = None if journal is not None else 0.0
        self._stopping = False
        self._reloading = reloading  # the server was told to, and has not said that it has
        self._drain_until: float | None = None  # when a server that was told to end is killed
        self._wake, self._waker = socket.socketpair()
        self._signals: list[int] = []
        self._buffer = bytearray(MAX_LETTER)
        self._trial: Trial | None = None
        self._trial_until = 0.0
        self._ready_to_exec = False  # the new code has passed its trial, and is to be run
        self._upgrade = Note("upgrade")
        self._relieved = False  # the server was told to drain: its code or its socket is old
        self._look_at = 0.0  # when to see whether the server lives
        self._dying = Dying(self._poller, holdings.dying)

    # Running.

    def run(self, *, relieve: bool = False) -> Life | None:
        """Returns None when the server has been told to end, and has; nothing is held any more. In
        a forked child: the life of the server that the child becomes.

        With *relieve* the server that is there runs older code: it answers the requests that it
        has, ends, and is replaced.
        """
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self._poller.register(self._wake.fileno(), READ, self._on_signal)
        if self._holdings.control is not None:
            self._poller.register(self._holdings.control.fileno(), READ, self._on_owner_gone)
        self._hear_signals()
        if self._journal is not None:
            self._follow()
            # Its predecessor may have died after it had bound the path anew.
            if self._bind_anew(reclaim=True) or relieve:
                self._relieve()
        try:
            while not self._ended():
                if (life := self._turn()) is not None:
                    return life
        except BaseException:
            if self._ready is None:  # the server is there, or its successor will be
                self._holdings.listener.leave_path()
            raise
        self._let_go()
        return None

    def _turn(self) -> Life | None:
        if self._start_at is not None and time.monotonic() >= self._start_at:
            if (life := self._start_server()) is not None:
                return life
            if self._journal is None:
                return None
        for key, events in self._poller.wait(self._timeout()):
            key(events)  # type: ignore[operator]
        self._closer.collect(time.monotonic())
        if self._removed and not self._fencing:
            self._tell_closed()
        trial = self._trial
        if trial is not None and (time.monotonic() > self._trial_until or trial.is_over()):
            self._on_trial_over(0)
        if self._ready_to_exec:
            self._exec()
        self._look_after_server()
        if self._drain_until is not None and time.monotonic() > self._drain_until:
            log.warning("the server does not end, killed")
            self._on_server_gone()
        return None

    def _timeout(self) -> float | None:
        if self._drain_until is not None or self._trial is not None or self._ready_to_exec:
            return 0.2
        look_at = None if self._server is None else self._look_at
        times = (
            self._start_at,
            self._watchdog.due,
            self._heartbeat.due,
            self._closer.due,
            look_at,
        )
        due = [at for at in times if at is not None]
        return max(min(due) - time.monotonic(), 0.0) if due else None

    def _ended(self) -> bool:
        return self._stopping and self._server is None

    def _let_go(self) -> None:
        if self._trial is not None:
            self._trial.verdict()  # which ends it
            close_quietly(self._trial.pidfd)
        self._holdings.listener.close()
        if self._holdings.page is not None:
            close_quietly(self._holdings.page)
        self._closer.close(list(self._holdings.table.handles()))
        self._lanes.stop(timeout=1.0)
        signal.set_wakeup_fd(-1)
        self._poller.close()
        self._dying.close()
        close_quietly(self._wake, self._waker)

    # Signals, and the owner.

    def _hear_signals(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note_signal)
        # A handler in Python runs only after epoll_wait(2) returns, which is not interrupted by a
        # signal that came just before it.
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        if self._holdings.control is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the owner's
        # Blocked by whoever forked this process, and by the old code before its exec.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _note_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)
        self._wake_up()

    def _wake_up(self) -> None:
        """Ends the wait for events. May be called from any thread."""
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # full: it wakes in any case

    def _on_signal(self, events: int) -> None:
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            pass
        signals, self._signals = self._signals, []
        for number in signals:
            if number == signal.SIGUSR2:
                self._start_upgrade(Note("upgrade"))
            elif number == signal.SIGHUP:
                self._reload()
            else:
                self._stop()

    def _reload(self) -> None:
        """The policy; and the path, if somebody has removed it."""
        self._reloading = True
        if self._bind_anew() and self._server is not None and not self._stopping:
            # A server accepts at the socket that it was forked with; its successor is told.
            self._relieve()
        else:
            self._tell(Note("reload"))

    def _bind_anew(self, *, reclaim: bool = False) -> bool:
        return bind_anew(self._holdings.listener, self._holdings.settings, reclaim=reclaim)

    def _relieve(self) -> None:
        self._relieved = True
        self._drain()

    def _on_owner_gone(self, events: int) -> None:
        assert self._holdings.control is not None
        self._poller.unregister(self._holdings.control.fileno())
        self._stop()

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._start_at = None
            report("STOPPING=1\nSTATUS=Ending")
            self._drain()

    def _drain(self) -> None:
        self._heartbeat.end()
        if self._server is not None:
            self._drain_until = time.monotonic() + _DRAIN
            self._tell(Note("end" if self._stopping else "drain"))

    # The server.

    def _start_server(self) -> Life | None:
        self._start_at = None
        try:
            half = fork_half(self._lanes)
        except OSError as error:
            if self._ready is not None and not self._holdings.table.entries:
                if is_descriptor_limit(error):
                    raise descriptor_limit(error.errno, "server") from None
                raise FdshareError(f"no server can be started: {why_not_forked(error)}") from None
            log.error("no new server: %s", why_not_forked(error))
            self._start_at = time.monotonic() + 1.0
            return None
        if half.born:
            self._holdings.unfinished = self._closer.unfinished()
            self._abandon()
            return partial(self._become_server, self._holdings, half)
        self._journal, self._server = half.journal, half.other
        self._removed = Counter({uid: self._closer.left(uid) for uid in self._closer.owners()})
        self._follow()
        return None

    def _look_after_server(self) -> None:
        """Asks it for a sign of life, when it is time to, and kills it if it gives none."""
        if self._heartbeat.ask(time.monotonic()):
            self._tell(Note("ping", id=logs.dropped()))
        elif self._heartbeat.hangs:
            log.error("the server does not answer, killed")
            self._on_server_gone()
        self._watchdog.feed(well=self._heartbeat.well)
        if self._server is not None and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK
            if is_ending(self._server):  # which neither its journal nor its pidfd may tell
                self._on_server_gone()

    def _follow(self) -> None:
        """Watches the server and its journal, and tells the server that it does."""
        assert self._journal is not None
        assert self._server is not None
        self._journal.setblocking(False)
        self._poller.register(self._journal.fileno(), READ, self._on_journal)
        self._poller.register(self._server.fileno(), READ, self._on_death)
        self._tell(Note("hello"))
        if self._reloading:  # the server that was told is dead
            self._tell(Note("reload"))
        self._heartbeat.begin(time.monotonic())

    def _abandon(self) -> None:
        """In a forked child: closes its copies of what belongs to the keeper alone."""
        signal.set_wakeup_fd(-1)
        self._dying.close()
        close_quietly(self._poller, self._wake, self._waker)
        if self._trial is not None:
            self._trial.abandon()

    def _on_death(self, events: int) -> None:
        if self._server is not None:  # else the end of its journal came in the same batch
            self._on_server_gone()

    def _on_server_gone(self) -> None:
        """Fences the server, reads the journal to its end, and only then plans a successor."""
        assert self._server is not None
        assert self._journal is not None
        self._poller.unregister(self._server.fileno())
        self._poller.unregister(self._journal.fileno())
        self._fencing = True
        how = fence(self._server, self._journal)
        # ECONNRESET, for a note that it has not read, is reported before the records.
        for _ in range(3):
            while self._read_letter():
                pass
        self._fencing = False
        self._dying.bury(self._server, "server")
        close_quietly(self._journal)
        self._server = self._journal = None
        self._drain_until = None
        self._heartbeat.end()
        if not self._stopping:
            if not self._relieved:
                log.warning("the server is gone (%s), making a new one", how)
            self._plan_successor()
        self._relieved = False

    def _plan_successor(self) -> None:
        now = self._start_at = time.monotonic()
        if self._relieved:  # it was told to end
            return
        if often := self._deaths.too_many(now):
            if self._ready is not None:
                raise FdshareError(f"the server died {often}, before it served anybody")
            log.error(
                "the server died %s; the table is kept, the next start is in %d s", often, BACK_OFF
            )
            self._start_at = now + BACK_OFF

    # The journal.

    def _on_journal(self, events: int) -> None:
        # A few at a time: signals and the owner must not wait long.
        for _ in range(64):
            if self._journal is None or not self._read_letter():
                return

    def _read_letter(self) -> bool:
        """Reads the next letter and does what it says; False if there is none now, or none any
        more."""
        assert self._journal is not None
        try:
            count, handles, lost = receive_handles(self._journal, self._buffer, OURS)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNRESET, *NO_MEMORY):
                raise
            return False
        if not count:
            if not self._fencing:
                self._on_server_gone()  # the end of the stream: it is dead, or will be
            return False
        self._heartbeat.answered()
        if lost is not None:
            # This process holds no more than the server does: its limit was lowered. The
            # server forks a new keeper, which has the whole table.
            log.critical("the journal lost descriptors: %s", lost)
            self._closer.close(handles)
            # Where no server is left, even if its end was not heard of yet, what is here is all.
            if self._fencing or self._server is None or has_ended(self._server, _LOOK):
                return True
            logs.flush()
            os._exit(1)
        try:
            letter = decode_letter(bytes(memoryview(self._buffer)[:count]))
            if isinstance(letter, Record):
                self._apply(letter, handles)
            else:
                self._on_note(letter)
        except Exception:
            # The server forks a new keeper, which has the whole table. If the server is dead, this
            # table is all there is: one record that cannot be applied must not lose the rest.
            if not self._fencing:
                raise
            log.critical("a record of the dead server cannot be applied", exc_info=True)
        return True

    def _apply(self, record: Record, handles: list[Handle]) -> None:
        table = self._holdings.table
        applied = table.apply(record, handles)
        for entry in applied.changed:
            assign_owners(entry)
        told = None
        if record.reply and not self._fencing:
            told = partial(self._tell_closed, table.serial)
        if applied.closed or applied.ended:
            if not self._closer.alone:
                self._removed.update(handle.uid for handle in (*applied.closed, *applied.ended))
            close_in_order(self._closer, applied.closed, applied.ended, told)

    def _tell_closed(self, serial: int = 0) -> None:
        """Tells the server how many descriptors of each user are closed since the last time, and
        that those are which the change of *serial* removed, or hang."""
        left = Counter({uid: self._closer.left(uid) for uid in self._removed})
        closed = self._removed - left
        if (closed or serial) and self._tell(Note("closed", id=serial, closed=closed)):
            self._removed -= closed

    def _on_note(self, note: Note) -> None:
        if note.verb == "hello":
            if self._ready is not None:
                ready, self._ready = self._ready, None
                ready()
        elif note.verb == "shutdown":
            self._stop()
        elif note.verb == "upgrade":
            self._start_upgrade(note)
        elif note.verb == "policy":
            self._holdings.settings.policy_text = note.data
        elif note.verb == "reload":
            self._reloading = False

    def _tell(self, note: Note) -> bool:
        """False: the server does not hear it."""
        if self._journal is None:
            return False
        try:
            self._journal.send(encode_letter(note))
        except OSError as error:
            log.warning("the server does not hear %r: %s", note.verb, error)
            return False
        return True

    # New code.

    def _start_upgrade(self, note: Note) -> None:
        """Starts a trial of the new code; everything else goes on meanwhile."""
        if (
            self._trial is not None
            or self._ready_to_exec
            or self._stopping
            or self._journal is None
        ):
            return
        if self._fencing:  # the client repeats its request to the successor
            return
        try:
            self._lanes.rest()
            self._trial = Trial(self._handover(note), self._cannot_be_closed())
        except Exception as error:  # whatever it is: the next keeper could do no better
            self._upgrade_failed(why_not_forked(error) if isinstance(error, OSError) else error)
            return
        finally:
            self._lanes.resume()
        self._upgrade, self._trial_until = note, time.monotonic() + Trial.limit
        self._poller.register(self._trial.fileno(), READ, self._on_trial_over)

    def _on_trial_over(self, events: int) -> None:
        trial, self._trial = self._trial, None
        assert trial is not None
        self._poller.unregister(trial.fileno())
        why = trial.verdict()
        self._dying.bury(trial.pidfd, "trial of new code")
        if why:
            self._upgrade_failed(why)
        else:
            self._ready_to_exec = True

    def _exec(self) -> None:
        """Replaces the code of this process; returns only if that failed.

        The server goes on meanwhile. Its records wait in the journal for the new code. If that dies
        or hangs, the server forks a keeper of the old code.
        """
        self._ready_to_exec = False
        if self._journal is None or self._stopping:
            return
        if not self._lanes.stop(timeout=0.5):  # the exec would wait for it, and for its thread
            self._lanes.resume()
            self._upgrade_failed("a close(2) hangs: there is a file system that does not answer")
            return
        # Until the new code can hear them. The other threads have them blocked, too.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if self._signals:  # of which the new code would not hear: they are obeyed before
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._lanes.resume()
            self._ready_to_exec = True
            return
        self._tell(Note("upgrading"))
        try:
            exec_new_code(self._handover(self._upgrade))
        except Exception as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._lanes.resume()
            self._upgrade_failed(error)
            self._tell(Note("hello"))

    def _cannot_be_closed(self) -> list[int]:
        """Numbers that a child should not have to close, for it could hang."""
        held = ((handle.fd, handle.uid) for handle in self._holdings.table.handles())
        kept = [fd for fd, uid in held if not self._closer.at_once(fd, uid)]
        return [*kept, *(fd for fd, _ in self._closer.unfinished())]

    def _upgrade_failed(self, why: str | Exception) -> None:
        if isinstance(why, Exception):
            why = str(why) or type(why).__name__  # a MemoryError says nothing
        log.error("upgrade failed: %s; the old code goes on", why)
        # A path in it need not be UTF-8.
        self._tell(Note("failed", data=why[:1000].encode(errors="backslashreplace")))

    def _handover(self, note: Note) -> Handover:
        assert self._journal is not None
        assert self._server is not None
        made = make_handover(self._holdings, self._journal, self._server, note.session, note.id)
        made.reloading = self._reloading
        return made
