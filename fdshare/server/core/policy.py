"""Who may do what to which name, and the rule that says so. Pure.

The verbs a policy speaks of are those of `VERBS`. A rename is a removal of the old name and a
registration of the new one; a replacement and a removal also need the registrant rule: only the uid
that registered an entry, the server's own uid and root may replace or remove it.

Three sorts of verbs: most are about a name, `bind` is about an address, and `SERVER_VERBS` about
neither. A rule that restricts names says nothing of addresses, and the other way round; a rule that
restricts either says nothing of the server's verbs. So a pattern never grants more than it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from fdshare.errors import InvalidArgument
from fdshare.protocol.bind_address import parse_address

__all__ = ["SERVER_VERBS", "VERBS", "Decision", "Matcher", "Policy", "Rule", "Subject"]

VERBS: Final = (
    "register",
    "fetch",
    "take",
    "unregister",
    "bind",
    "list",
    "info",
    "watch",
    "stats",
    "ping",
    "explain",
    "reload",
    "upgrade",
    "shutdown",
)
# They show or change the whole server, whatever the names in it.
SERVER_VERBS: Final = frozenset(("list", "watch", "stats", "reload", "upgrade", "shutdown"))

Matcher: TypeAlias = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks, as the kernel said. *all_groups*: there are no more than *groups*. *is_overflow*:
    the uid is the one that every user without a number here has, so it is nobody's own."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    all_groups: bool = True
    is_overflow: bool = False


class Decision(NamedTuple):
    allowed: bool
    rule: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, ready to be asked. None is "any": anybody, any name, any address."""

    decision: Decision
    verbs: frozenset[str]
    uids: frozenset[int]
    gids: frozenset[int]
    anybody: bool
    names: tuple[Matcher, ...] | None
    addresses: tuple[Matcher, ...] | None

    def matches(self, verb: str, name: str, subject: Subject) -> bool:
        """True if the rule is about this."""
        return verb in self.verbs and self._who(subject) and self._what(verb, name)

    def _who(self, subject: Subject) -> bool:
        return (
            self.anybody
            or subject.uid in self.uids
            or subject.gid in self.gids
            or not self.gids.isdisjoint(subject.groups)
            # Who may be in the group is not let past a rule that keeps the group out.
            or (bool(self.gids) and not subject.all_groups and not self.decision.allowed)
        )

    def _what(self, verb: str, name: str) -> bool:
        if self.names is None and self.addresses is None:
            return True
        if verb in SERVER_VERBS:
            return False
        patterns = self.addresses if verb == "bind" else self.names
        return patterns is not None and any(matches(name) for matches in patterns)


class Policy:
    """Root and the server's own uid may do everything; others what *rules* allow, by default
    nothing. The first rule that matches decides.

    With *faulty* the *file* could not be read, which those who are refused are told. *warnings* are
    for the administrator.
    """

    def __init__(
        self,
        own_uid: int,
        rules: tuple[Rule, ...] = (),
        *,
        file: str = "",
        faulty: bool = False,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.warnings = warnings
        self.own_uid = own_uid
        self.rules = rules
        self._owner = Decision(True, "uid 0 and the server's own uid may do everything")
        # SO_PEERCRED of a connection is whoever called listen(2) on the socket: this server.
        self._identity = Decision(
            False,
            f"whoever accepts on a UNIX socket of this server's passes for uid {own_uid}; "
            "bind it yourself, and register it",
        )
        own = f"uid {own_uid} and " if own_uid else ""
        default = f"the default: only {own}root"
        if faulty:
            default = f"{default}; {file} has a fault, which the log of the server tells"
        elif file:
            default = f"{default}; no rule of {file} matches"
        self._others = Decision(False, default)

    def trusts(self, subject: Subject) -> bool:
        """True for the users that no rule restrains: they could stop the server anyway."""
        return subject.uid in (0, self.own_uid) and not subject.is_overflow

    def decide(self, verb: str, name: str, subject: Subject) -> Decision:
        """Whether *subject* may, and the rule that made it so.

        *name* is the address for "bind", and empty where the verb has none.
        """
        if verb not in VERBS:
            return Decision(False, f"there is no verb {verb!r}, only {', '.join(VERBS)}")
        if self.trusts(subject):
            return self._owner
        if verb == "ping":
            return _PING
        if verb == "bind":
            try:
                address = parse_address(name)
            except InvalidArgument as error:
                return Decision(False, error.reason)
            if address.scheme == "unix":
                return self._identity
            name = str(address)
        for rule in self.rules:
            if rule.matches(verb, name, subject):
                return rule.decision
        return self._others

    def decide_removal(self, registrant_uid: int, subject: Subject) -> Decision:
        """The registrant rule."""
        if self.trusts(subject):
            return self._owner
        if subject.uid == registrant_uid and not subject.is_overflow:
            return Decision(True, "the registrant's own entry")
        return Decision(False, f"it belongs to uid {registrant_uid}, who registered it")


_PING: Final = Decision(True, "every client may ping")
