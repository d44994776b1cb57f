"""What the service and the event loop know of each other, as types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from fdshare.protocol import messages as m
from fdshare.server.core.policy import Subject
from fdshare.server.core.records import Record
from fdshare.server.core.slots import Page
from fdshare.server.core.table import Entry, Handle
from fdshare.server.core.users import User

__all__ = ["Awaiting", "JournalBusy", "LeaseState", "Session", "Waiter", "Effects"]

Awaiting: TypeAlias = m.Fetch | m.Take | m.Wait | m.Follow
LeaseState: TypeAlias = Literal["held", "confirmed", "dropped"]


class JournalBusy(Exception):
    """The keeper cannot take a record now; to be tried again. *wait*: so many seconds more than
    usual may pass until it can."""

    def __init__(self, reason: str = "it does not read its journal", wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(slots=True, eq=False)
class Session:
    """One client connection, as the service knows it."""

    subject: Subject
    pid: int
    user: User
    name: str = ""  # the client's connection id, from its Hello
    registrant: m.Registrant | None = None
    waiting: dict[int, Waiter] = field(default_factory=dict)
    watches: dict[int, str] = field(default_factory=dict)  # id -> pattern
    holds: bool = False  # it has registered an entry that ends with it or with its process
    owed: int = 0  # its changes that are done, and answered when what they removed is closed
    route: Any = None  # the client's connection, in the event loop
    trusted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.trusted = self.user.trusted


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for its name."""

    session: Session
    id: int
    request: Awaiting
    deadline: float | None
    done: bool = False


class Effects(Protocol):
    """What the service has done for it. It never looks into a handle, it only passes handles on."""

    def answer(
        self, session: Session, id: int, body: bytes, handles: Sequence[Handle] = ()
    ) -> None:
        """Sends *body* and copies of *handles*. Never fails, never blocks."""

    def answer_in_parts(self, session: Session, id: int, bodies: Sequence[bytes]) -> None:
        """Sends all of *bodies*, however long they are together. Never fails, never blocks."""

    def publish(self, sessions: Sequence[Session], body: bytes) -> None:
        """Sends one event to many. A session whose client does not read is sent `Overflowed` and
        fresh snapshots later instead."""

    def journal(self, record: Record, handles: Sequence[Handle]) -> None:
        """Returns when *record* outlives this process. Raises: JournalBusy, KeeperUnavailable."""

    def lease_pair(self) -> tuple[Handle, Handle]:
        """A new lease: (our end, the taker's end). Raises: DescriptorLimit."""

    def lease_state(self, ours: Handle, *, revoke: bool = False) -> LeaseState:
        """What the taker has done. After *revoke* it can do nothing more; the result is not
        "held"."""

    def moved_leases(self) -> Sequence[int]:
        """The ids of the leases of which `lease_state` is not "held"."""

    def check_lifeline(self, handle: Handle) -> None:
        """Raises: InvalidArgument: it is no stream of UNIX or TCP."""

    def owner_guard(self, session: Session) -> Handle:
        """A pidfd of the client's process. Raises: DescriptorLimit, InvalidArgument,
        UnsupportedPlatform."""

    def registrant(self, session: Session) -> m.Registrant:
        """Who the client is, for an entry that it registers."""

    def watch(self, entry: Entry) -> None:
        """From now on `hung_up` and `lease_moved` are called when guard, descriptors or lease of
        *entry* report it. Never fails: the entry is in the table, even if it cannot be watched."""

    def close(self, handles: Sequence[Handle], *, when_sent: bool = False) -> None:
        """Closes each of *handles*, which are in no entry.

        A client that was answered with one of *handles* and has not read that yet is disconnected;
        with *when_sent* the handle is closed later, when it is sent. Never fails, never blocks."""

    def close_removed(
        self,
        handles: Sequence[Handle],
        ends: Sequence[Handle],
        then: Callable[[], None] | None,
    ) -> None:
        """Closes each of *handles*, which a change has removed from the table, in both halves. Then
        it closes *ends*, our ends of leases, which tells the takers, and then calls *then*. Neither
        waits for a close that hangs. For the rest as `close`."""

    def inspect(self, session: Session, id: int, entries: Sequence[Entry], now: float) -> None:
        """Answers with an InfoList, later, when the kernel has been asked about each descriptor."""

    def bind(self, session: Session, request: m.Bind) -> tuple[m.Kind, Handle]:
        """A new socket bound to the address. Raises: as `binding.bind_address`."""

    def is_reached(self, address: str, handle: Handle) -> bool:
        """Whether *handle* is a socket at the path of *address*, and clients can connect to it."""

    def stats(self) -> m.ServerStats: ...

    def reload_policy(self) -> None:
        """Reads the policy file again. Raises: PolicyError: the old policy stays."""

    def command(self, verb: Literal["shutdown", "upgrade"], session: Session, id: int) -> bool:
        """Carries it out. True: the request is to be answered now. False: it is answered later, by
        this server or its successor."""

    epoch: str  # a different one means that entries are lost
    page: Page | None  # where followers look
    auditing: bool  # whether `audit` does anything
    strict: bool  # whether nothing is done that the audit log has no room for

    def audit_is_full(self) -> bool: ...

    def audit(
        self, verb: str, name: str | tuple[str, ...], session: Session | None, outcome: str
    ) -> None:
        """Logs who was given or refused what, a line for each name; *session* is None if no client
        asked for it."""

    def audit_refusal(self, verb: str, name: str, session: Session, outcome: str) -> None:
        """As `audit`, of what a client can cause without any right: not each of very many."""
