"""Server: the service, the table and the event loop together. It is the service's `Effects`.

`Service` plans what a request changes. The system calls that this takes are made from here: leases,
guards, watching for hang-ups, closing, binding, inspecting; and the audit log is written here.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from fdshare.errors import (
    FdshareError,
    InvalidArgument,
    PolicyError,
    UnsupportedPlatform,
)
from fdshare.kernel import system
from fdshare.kernel.borrowed_socket import has_connections
from fdshare.kernel.credentials import peer_pidfd
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import (
    descriptor_limit,
    is_descriptor_limit,
    raise_descriptor_limit,
)
from fdshare.kernel.plain_socket import WITHOUT_TIMEOUT, stream_pair
from fdshare.kinds import describe
from fdshare.protocol import messages as m
from fdshare.protocol.auth import checked_authkey
from fdshare.server import logs
from fdshare.server.core.policy import Policy
from fdshare.server.core.ports import LeaseState, Session
from fdshare.server.core.records import Record
from fdshare.server.core.service import Service
from fdshare.server.core.slots import Page
from fdshare.server.core.table import Entry, Table
from fdshare.server.limits import Limits
from fdshare.server.loop.binding import bind_address, is_reached
from fdshare.server.loop.closing import (
    Closer,
    Handle,
    assign_owners,
    close_in_order,
)
from fdshare.server.loop.dying import Dying
from fdshare.server.loop.hangups import Hangups
from fdshare.server.loop.inspections import Inspections
from fdshare.server.loop.lanes import Lanes
from fdshare.server.loop.loop import Loop
from fdshare.server.loop.metrics_endpoint import MetricsEndpoint
from fdshare.server.loop.page import MemoryPage, new_page
from fdshare.server.loop.refusal_log import RefusalLog
from fdshare.server.settings import Settings, policy_of, read_policy

__all__ = ["JournalWriter", "Server"]

log = logging.getLogger("fdshare.server")
audit_log = logging.getLogger("fdshare.audit")

_OUTPUT_FOR_EVENTS: Final = 1 << 20  # bytes queued above which a watcher is told Overflow instead


class JournalWriter(Protocol):
    """The server's end of the journal: its keeper reads the records and commands."""

    def write(self, record: Record, fds: Sequence[int]) -> None:
        """Returns when *record* outlives this process. *fds* are borrowed for the call.
        Raises: JournalBusy, KeeperUnavailable; nothing was written then."""

    def state(self) -> tuple[int | None, bool]:
        """(the keeper's pid, whether it holds everything that the server holds)."""

    def command(self, verb: Literal["shutdown", "upgrade"], session: str, id: int) -> bool:
        """Passes a client's command on; False if the answer comes later."""

    def log_dropped(self) -> int:
        """How many lines of the keeper's log are lost."""

    def keep_policy(self, text: bytes | None) -> None:
        """Passes the text of the policy on: a successor needs it."""

    def stored(self, name: str) -> bool | None:
        """Whether the entry is in the service manager's store; None where there is none."""

    def store_stats(self) -> m.StoreStats | None:
        """How full that store is."""

    def refill_store(self) -> None:
        """Looks, soon, whether that store has room for what it had none for."""


class Server:
    """Serves *table* on *listener*. Both stay the caller's; `shut_down()` closes the handles in the
    table."""

    def __init__(
        self,
        listener: socket.socket,
        settings: Settings,
        *,
        table: Table | None = None,
        journal: JournalWriter | None = None,
        epoch: str | None = None,
        dying: dict[int, str] | None = None,
        page: Descriptor | None = None,
    ) -> None:
        """*page* is borrowed (loop/page.py); without one, the server makes its own."""
        nofile = raise_descriptor_limit()
        self.table = table or Table()
        self.notes: dict[str, str] = {}
        limits = Limits.for_rlimit(nofile, **settings.limits)
        self.epoch = epoch or os.urandom(8).hex()
        self._own_page = new_page() if page is None else None
        self.page: Page | None = _page_in(page or self._own_page)
        self.service = Service(self.table, self._remembered_policy(settings), limits, self)
        if settings.closed:
            self.service.closed = self.notes["closed"] = settings.closed
        self._journal = journal
        self.auditing = audit_log.isEnabledFor(logging.INFO)
        self.strict = self.auditing and settings.audit_strict
        self.audit_is_full = logs.is_full
        self.settings = settings
        self._started = time.monotonic()
        self.lanes = Lanes()
        # Without a policy nobody but root and our own uid puts anything in, or gets it.
        self._closer = Closer(self.lanes, self._on_closed, alone=settings.policy is None)
        self._closed_by_keeper: dict[int, Callable[[], None]] = {}  # serial of a change -> to call
        authkey = checked_authkey(settings.authkey)
        self.loop = Loop(self.service, self._closer, listener, self.epoch, authkey, nofile)
        self.dying = Dying(self.loop.poller, {} if dying is None else dying)
        self._hangups = Hangups(self.loop)
        self._inspections = Inspections(self.loop, self.lanes, self._is_stored)
        self._refusals = RefusalLog(self.loop.later)
        # Parts of `Effects`.
        self.answer = self.loop.answer
        self.answer_in_parts = self.loop.answer_in_parts
        self.publish = self.loop.publish
        self.inspect = self._inspections.inspect
        self.moved_leases = self._hangups.moved_leases
        for entry in self.table.entries.values():
            self.watch(entry)

    def run(self) -> bool:
        """Serves until `stop()`; False then. True after the journal interrupted it: to be called
        again."""
        metrics = self._metrics()
        try:
            return self.loop.run()
        finally:
            self._refusals.tell()
            if metrics is not None:
                metrics.close()

    def _metrics(self) -> MetricsEndpoint | None:
        """What serves the metrics, if the settings ask for it. The caller owns the result."""
        address = self.settings.metrics
        if not address:
            return None
        try:
            endpoint = MetricsEndpoint(address, self.stats, self.loop)
            self.notes.pop("metrics", None)
            return endpoint
        except (OSError, FdshareError) as error:
            # The server runs on without: what it holds is worth more.
            self.notes["metrics"] = f"not served at {address}: {error}"
            log.error("no metrics at %s: %s", address, error)
            return None

    def stop(self) -> None:
        """Makes `run` return soon. May be called from any thread, and from a signal handler."""
        self.loop.stop()

    def shut_down(self) -> None:
        """Closes every handle of the table, and everything else. The server cannot run again."""
        self.loop.acceptor.close()
        self.service.slots.changed_all()
        self.close(list(self.table.handles()))
        if self.page is not None:
            self.close([self.page.handle])
        if self._own_page is not None:
            self._own_page.close()
        self.loop.close()
        self.dying.close()
        self.lanes.stop(timeout=1.0)

    def abandon(self) -> list[tuple[int, int]]:
        """In a forked child: forgets what is the parent's alone, without a close that the parent
        would notice. (number, owner) of what the child has to close besides, which may block."""
        self.loop.abandon()
        self.dying.close()
        return [*self._closer.unfinished(), *((h.fd, h.uid) for h in self.loop.held())]

    def take_over(self, unfinished: Iterable[tuple[int, int]]) -> None:
        """In a forked child: closes what its parent, the keeper, has still to close."""
        unfinished = list(unfinished)
        self._closer.take_over(unfinished)
        self.loop.keeper_closes.add(uid for _, uid in unfinished)

    # `Effects`, for the service.

    def journal(self, record: Record, handles: Sequence[Handle]) -> None:
        if self._journal is not None:
            self._journal.write(record, [handle.fd for handle in handles])

    def lease_pair(self) -> tuple[Handle, Handle]:
        try:
            ours, theirs = stream_pair()
        except OSError as error:
            raise descriptor_limit(error.errno, "server") from None
        # Theirs is closed at once when it was sent: if the taker never received it, that ends the
        # lease, and the entry must be back before the taker's next request.
        return Handle(ours.detach()), Handle(theirs.detach())

    def lease_state(self, ours: Handle, *, revoke: bool = False) -> LeaseState:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | WITHOUT_TIMEOUT, 0, ours.fd)
        try:
            if revoke:
                # A byte sent before stays readable; one sent later is EPIPE for the taker.
                sock.shutdown(socket.SHUT_RD)
            confirmed = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return "held"
        except OSError:
            return "dropped"
        finally:
            sock.detach()
        return "confirmed" if confirmed else "dropped"

    def check_lifeline(self, handle: Handle) -> None:
        if not has_connections(handle.fd):  # only the end of its peer tells that a client is gone
            reason = "the lifeline, the last descriptor, is not a stream socket of UNIX or TCP"
            raise InvalidArgument("lifetime", reason)

    def owner_guard(self, session: Session) -> Handle:
        guard = peer_pidfd(session.route.sock)
        if guard is not None:
            return Handle(guard.detach())
        if not system.HAS_PIDFD:
            raise UnsupportedPlatform('lifetime="process"', "it needs a pidfd")
        try:
            return Handle(os.pidfd_open(session.pid))
        except OSError as error:
            if is_descriptor_limit(error):
                raise descriptor_limit(error.errno, "server") from None
            raise InvalidArgument("lifetime", f"no process {session.pid}: {error}") from None

    def registrant(self, session: Session) -> m.Registrant:
        command = _command_of(session.pid, whole=session.trusted)
        return m.Registrant(session.pid, session.subject.uid, session.subject.gid, command)

    def watch(self, entry: Entry) -> None:
        assign_owners(entry)
        if entry.guard is not None or entry.lease is not None or entry.put.drop_on_hangup:
            self._hangups.watch(entry)

    def close(self, handles: Sequence[Handle], *, when_sent: bool = False) -> None:
        for handle in handles:
            self._hangups.forget(handle)
        if not when_sent:
            self.loop.drop_unsent(handles)
        self._closer.close(handles)

    def close_removed(
        self,
        handles: Sequence[Handle],
        ends: Sequence[Handle],
        then: Callable[[], None] | None,
    ) -> None:
        for handle in (*handles, *ends):
            self._hangups.forget(handle)
        self.loop.drop_unsent(handles)
        if self._journal is not None and not self._closer.alone:
            self.loop.keeper_closes.add(handle.uid for handle in (*handles, *ends))
        if then is None or self._journal is None:
            close_in_order(self._closer, handles, ends, then)
            return
        closed = close_in_order(self._closer, handles, ends, then, elsewhere=True)
        self._closed_by_keeper[self.table.serial] = closed

    def closed_by_keeper(self, serial: int, counts: Mapping[int, int]) -> None:
        """The keeper has closed its copies of what the change of *serial* removed, or they hang;
        and so many descriptors of each uid since it said so last."""
        self.loop.keeper_closes.closed(counts)
        self._closed_by_keeper.pop(serial, _nothing)()

    def keeper_is_dead(self) -> None:
        """It holds nothing any more."""
        self.loop.keeper_closes.clear()
        closed, self._closed_by_keeper = self._closed_by_keeper, {}
        for call in closed.values():
            call()

    def _on_closed(self) -> None:
        """In a thread of the lanes."""
        self.loop.post(lambda: self._closer.collect(time.monotonic()))

    def bind(self, session: Session, request: m.Bind) -> tuple[m.Kind, Handle]:
        sock = bind_address(
            request.address,
            backlog=request.backlog,
            reuse_port=request.reuse_port,
            # Others would have the loop look through all processes again and again.
            find_owner=session.trusted,
        )
        kind, _ = describe(sock)
        return kind, Handle(sock.detach())

    def is_reached(self, address: str, handle: Handle) -> bool:
        return is_reached(address, handle.fd)

    def stats(self) -> m.ServerStats:
        loop, limits = self.loop, self.service.limits
        keeper_pid, redundant = self._journal.state() if self._journal else (None, False)
        return m.ServerStats(
            server_pid=os.getpid(),
            keeper_pid=keeper_pid,
            redundant=redundant,
            uptime=time.monotonic() - self._started,
            names=len(self.table.entries),
            descriptors=self.table.descriptors,
            leases=len(self.table.leases),
            connections=len(loop.connections),
            in_flight=loop.in_flight.measure(),
            generation=self.table.generation,
            serial=self.table.serial,
            counters={
                **self.service.counters,
                "accepted": loop.acceptor.accepted,
                "evicted": loop.acceptor.evicted,
            },
            limits=msgspec.structs.asdict(limits),
            notes={**self.notes, **_log_notes(), **self.dying.notes(), **self._hanging()},
            store=self._journal.store_stats() if self._journal else None,
            dying=len(self.dying),
            log_dropped=logs.dropped() + (self._journal.log_dropped() if self._journal else 0),
        )

    def reload_policy(self) -> None:
        policy, text = read_policy(self.settings)  # raises PolicyError: the old one stays
        if self._journal is not None:
            self._journal.keep_policy(text)
        self.settings.policy_text = text
        self.notes.pop("policy", None)
        self.service.adopt(self._warned_of(policy))
        if self._journal is not None:
            self._journal.refill_store()

    def try_to_reload(self) -> None:
        """Reloads for a signal: its sender finds in the log how that went."""
        try:
            self.reload_policy()
            log.info("policy reloaded")
        except FdshareError as error:
            log.error("the policy stays as it was: %s", error)

    def command(self, verb: Literal["shutdown", "upgrade"], session: Session, id: int) -> bool:
        if self._journal is not None:
            return self._journal.command(verb, session.name, id)
        if verb == "upgrade":
            raise InvalidArgument("upgrade", "a server without a keeper cannot be upgraded")
        self.loop.stop()
        return True

    def audit(
        self, verb: str, name: str | tuple[str, ...], session: Session | None, outcome: str
    ) -> None:
        if not self.auditing:
            return
        if session is None:
            logs.audit(verb, name, outcome)
        else:
            logs.audit(verb, name, outcome, session.pid, session.subject.uid)

    def audit_refusal(self, verb: str, name: str, session: Session, outcome: str) -> None:
        if self.auditing:
            self._refusals.note(verb, name, session, outcome, time.monotonic())

    def _hanging(self) -> dict[str, str]:
        """The users whose closes hang, for `stats`."""
        here = {uid: self._closer.hanging(uid) for uid in self.lanes.hanging()}
        in_keeper = self.loop.keeper_closes.hanging()
        return {
            f"uid {uid}": f"a close(2) hangs, {count} descriptors wait for it"
            for uid, count in {**in_keeper, **here}.items()
        }

    def _is_stored(self, name: str) -> bool | None:
        return None if self._journal is None else self._journal.stored(name)

    def _warned_of(self, policy: Policy) -> Policy:
        """*policy*; the log and `stats` have its warnings."""
        if policy.warnings:
            self.notes["policy"] = "; ".join(policy.warnings)
            log.warning("the policy: %s", self.notes["policy"])
        return policy

    def _remembered_policy(self, settings: Settings) -> Policy:
        """The policy that *settings* remember. If that cannot be read any more, only root and this
        uid may do anything: that is better than a server that does not start."""
        try:
            return self._warned_of(policy_of(settings))
        except PolicyError as error:
            note = f"only root and uid {os.geteuid()} are served: {error}"
            log.error("the policy has a fault, %s", note)
            self.notes["policy"] = note
            return Policy(os.geteuid(), file=settings.policy or "", faulty=True)


def _page_in(memfd: Descriptor | None) -> MemoryPage | None:
    """The page in *memfd*, which is borrowed; None where there is none that clients can be given:
    they ask each time then."""
    try:
        return None if memfd is None else MemoryPage(memfd)
    except OSError as error:
        log.info("each use of what a client follows is a question: %s", error)
        return None


def _log_notes() -> dict[str, str]:
    """What is wrong with the log, for `stats`."""
    failure = logs.failure()
    return {"log": f"it cannot be written: {failure}"} if failure else {}


def _nothing() -> None:
    pass


def _command_of(pid: int, *, whole: bool) -> str:
    """The command line of *pid*, at most 80 characters, or the name of its program alone; empty if
    /proc does not show it.

    The arguments are in the memory of the process, and to read there waits for its mmap_lock, which
    it can keep for ever. The name is the kernel's own, proc_pid_comm(5).
    """
    try:
        with open(f"/proc/{pid}/{'cmdline' if whole else 'comm'}", "rb") as file:
            raw = file.read(256)
    except OSError:
        return ""
    return raw.rstrip(b"\0\n").replace(b"\0", b" ").decode(errors="replace")[:80]
