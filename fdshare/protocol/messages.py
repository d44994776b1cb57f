"""Every message of the rendezvous, as a typed Struct.

A message is the body of one frame (framing.py), a msgpack map with its name under "type". The id of
the request is in the header of the frame and not in here: so the body of a reply is the same for
every client, and is encoded once. Every request gets one answer under its id; an answer in parts
ends with the one that has `more=False`. Events have the id 0.

Unknown fields are ignored and missing ones have the default, because both sides may be of different
releases. Times are in seconds; ages and time left are relative, because clocks differ.
"""

from functools import cache
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from fdshare.errors import (
    BadRequest,
    FdshareError,
    InvalidArgument,
    ProtocolError,
    error_from_wire,
)
from fdshare.protocol.kind import Kind
from fdshare.protocol.names import (
    MAX_KIND,
    MAX_NAMES,
    check_metadata,
    check_name,
    check_pattern,
)

__all__ = [
    "Bind",
    "Cancel",
    "DescriptorInfo",
    "Done",
    "EntryInfo",
    "Event",
    "EventKind",
    "Explain",
    "Explained",
    "Fetch",
    "FetchMany",
    "Follow",
    "Followed",
    "Given",
    "GivenItem",
    "GivenMany",
    "Hello",
    "Info",
    "InfoList",
    "Infos",
    "Kind",
    "Lifetime",
    "NameList",
    "Names",
    "Overflowed",
    "Ping",
    "Prove",
    "Proved",
    "Refused",
    "Register",
    "Registered",
    "Registrant",
    "Reload",
    "Rename",
    "Reply",
    "Request",
    "ServerStats",
    "Shutdown",
    "SnapshotPart",
    "Stats",
    "StatsReply",
    "Take",
    "Unregister",
    "Upgrade",
    "Wait",
    "Watch",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
    "refusal",
    "refusal_error",
]

MAGIC: Final = "fdshare"
VERSION: Final = 1

# What a client says. `check` knows more of most; this bounds what it looks at.
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=5000)]
Secret: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=64)]
_CLIPPED: Final = 1000  # characters of each text in a refusal

Lifetime: TypeAlias = Literal["server", "connection", "process"]
EventKind: TypeAlias = Literal[
    "registered", "replaced", "taken", "returned", "unregistered", "expired", "hung_up"
]


class Message(msgspec.Struct, tag_field="type", omit_defaults=True):
    """The root of all. A Struct's tag is its name in lower case, unless it says another."""


def _tag(name: str) -> str:
    return name.lower()


class Request(Message, tag=_tag):
    """Client to server."""

    def check(self) -> None:
        """Returns if the message may be served: it has the shape of one, whatever it asks for.
        Raises: InvalidName, InvalidArgument."""


class _NameRequest(Request):
    """About one name."""

    name: Text

    def check(self) -> None:
        check_name(self.name)


class _PatternRequest(Request):
    """About all names that match."""

    pattern: Text = "*"

    def check(self) -> None:
        check_pattern(self.pattern)


class Reply(Message, tag=_tag):
    """Server to client."""


# The greeting: the first frame each way. The client sends its first request right after it.


class Hello(Request):
    """*session* is an id of the client, which it keeps when it reconnects: a request repeated with
    the same (session, id) gets the stored answer. *nonce* only with an authkey."""

    magic: Text
    version: int
    session: Text
    nonce: Secret = b""


class Welcome(Reply):
    """*epoch* changes when the server loses its table; *nonce* is empty unless the server has an
    authkey."""

    magic: str
    version: int
    pid: int
    epoch: str
    max_frame: int
    max_descriptors: int
    in_flight: int
    nonce: bytes = b""


class Prove(Request):
    """HMAC-SHA256(authkey, b"client" + client nonce + server nonce)."""

    mac: Secret


class Proved(Reply):
    """HMAC-SHA256(authkey, b"server" + client nonce + server nonce)."""

    mac: bytes


# The verbs.


class Register(_NameRequest):
    """The descriptors of the frame are the entry's. With lifetime "connection" one more comes last:
    one end of a socket pair, of which the client keeps the other."""

    kind: Kind
    replace: bool = False
    if_generation: int | None = None
    lifetime: Lifetime = "server"
    ttl: float | None = None
    grace: float = 0.0
    drop_on_hangup: bool = False
    metadata: dict[str, str] = {}

    def check(self) -> None:
        check_name(self.name)
        if self.metadata:
            check_metadata(self.metadata)
        size = len(self.kind.tag.encode()) + memoryview(self.kind.spec).nbytes
        if size > MAX_KIND:
            raise InvalidArgument("kind", f"{size} bytes, at most {MAX_KIND} of tag and spec")
        if self.ttl is not None and not 0 < self.ttl < float("inf"):
            raise InvalidArgument("ttl", f"{self.ttl!r} is not a positive number of seconds")
        if not 0 <= self.grace < float("inf"):
            raise InvalidArgument("grace", f"{self.grace!r} is not a number of seconds")


class Fetch(_NameRequest):
    """Waits *wait* seconds for the name to appear, None for ever. With *look* it is not counted."""

    wait: float | None = 0.0
    look: bool = False


class Take(_NameRequest):
    """As Fetch, and leases the entry. The last descriptor of the reply is the lease: one byte on it
    confirms the take; closing it without that returns the entry."""

    wait: float | None = 0.0


class Wait(_NameRequest):
    """Answered by a Registered when the name is there: a Fetch without descriptors."""

    wait: float | None = None


class Follow(_NameRequest):
    """As Fetch, and says where in the server's page a change of the name is to be seen.

    *known* is the generation that the client has, if it is of *epoch*, as the Welcome has it: then
    the entry is not sent again. *page* is the number of the page that the client has mapped."""

    wait: float | None = 0.0
    known: int = 0
    epoch: Text = ""
    page: int = 0


class FetchMany(Request):
    """Answered for as many of *names*, from the first, as one frame can carry."""

    names: Annotated[list[Text], msgspec.Meta(max_length=MAX_NAMES)]

    def check(self) -> None:
        for name in self.names:
            check_name(name)


class Unregister(_NameRequest):
    if_generation: int | None = None


class Rename(Request):
    old: Text
    new: Text

    def check(self) -> None:
        check_name(self.old)
        check_name(self.new)


class Bind(_NameRequest):
    """Answered as a Fetch. *address*: tcp://HOST:PORT, udp://HOST:PORT or unix:///PATH.

    With *replaces*, a new socket takes the place of an entry that still has that generation.
    """

    address: Text
    backlog: int = 4096
    reuse_port: bool = False
    replaces: int | None = None

    def check(self) -> None:
        check_name(self.name)
        from fdshare.protocol.bind_address import parse_address  # with ipaddress: for who binds

        parse_address(self.address)


class Names(_PatternRequest):
    pass


class Info(_NameRequest):
    pass


class Infos(_PatternRequest):
    pass


class Watch(_PatternRequest):
    """Answered by a SnapshotPart under its id, then by events until a Cancel names it."""


class Cancel(Request):
    """The request *target* is answered at once, with a refusal if it still waits. It has no answer
    of its own."""

    target: int


class Explain(Request):
    """*name* is an address for "bind"."""

    verb: Text
    name: Text
    uid: int
    gid: int
    groups: Annotated[list[int], msgspec.Meta(max_length=65536)] = []  # NGROUPS_MAX

    def check(self) -> None:
        if self.name and self.verb != "bind":
            check_name(self.name)


class Stats(Request):
    pass


class Ping(Request):
    pass


class Shutdown(Request):
    pass


class Reload(Request):
    """Read the policy file again."""


class Upgrade(Request):
    """Run the code that is installed now, with the table that is held now."""


# The answers.


class Done(Reply):
    pass


class Registered(Reply, frozen=True):  # type: ignore[misc]  # msgspec allows it, dataclasses do not
    """The entry that is registered under *name*; *generation* changes when it is replaced."""

    name: str
    generation: int


class Given(Reply):
    name: str
    generation: int
    kind: Kind
    metadata: dict[str, str] = {}
    lease: bool = False


class Followed(Reply):
    """*kind* is None where the client has the entry already; else its descriptors come along. The
    entry is that of the name as long as *slot* of the page has *stamp*; slot 0: ask each time.
    With *mapped*, the last descriptor is the page's."""

    generation: int
    slot: int = 0
    stamp: int = 0
    page: int = 0
    mapped: bool = False
    kind: Kind | None = None


class GivenItem(msgspec.Struct, frozen=True):
    """One entry of a GivenMany: the next *count* descriptors of the frame are its own."""

    name: str
    generation: int
    kind: Kind
    count: int


class GivenMany(Reply):
    """*missing*: which of the names, counted from 0, are not held; then there are no *items*."""

    items: list[GivenItem]
    missing: list[int] = []


class NameList(Reply):
    names: list[str]
    more: bool = False


class Registrant(msgspec.Struct, frozen=True):
    """Who registered the entry, as the kernel said when it connected.

    *command* is from /proc: the command line of a client of root or of the server's own uid, the
    name of the program of others.
    """

    pid: int
    uid: int
    gid: int
    command: str = ""


class DescriptorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the kernel says of one descriptor.

    *type* is "socket", "file", "directory", "pipe", "memfd", "tty", "device" or the word of
    /proc/PID/fd ("pidfd", "eventfd", "eventpoll" ...).
    """

    type: str
    access: str = ""  # "r", "w", "rw", or "path" (O_PATH)
    family: str = ""
    socket_type: str = ""
    local: str = ""
    peer: str = ""
    listening: bool = False
    queue: int | None = None  # connections waiting to be accepted
    backlog: int | None = None
    path: str = ""
    offset: int | None = None
    size: int | None = None
    seals: list[str] = []
    health: str = ""  # what is wrong with it, empty if nothing is known


class EntryInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the server knows of an entry, and the kernel of its descriptors.

    Times are in seconds; *count* is the number of descriptors.
    """

    name: str
    generation: int
    kind: str
    registrant: Registrant
    age: float
    count: int
    lifetime: Lifetime = "server"
    ttl: float | None = None  # seconds left
    grace: float = 0.0
    drop_on_hangup: bool = False
    fetches: int = 0
    leased: bool = False
    metadata: dict[str, str] = {}
    descriptors: list[DescriptorInfo] = []
    stored: bool | None = None  # in the service manager's store; None where there is none


class InfoList(Reply):
    entries: list[EntryInfo]
    more: bool = False


class SnapshotPart(Reply, tag="snapshot"):
    """What is held at *serial*: name -> generation, in parts where `more`."""

    serial: int
    entries: dict[str, int]
    more: bool = False


class Event(Reply):
    """One change of what is registered.

    *serial* grows by one with each change of the server. *old* is the former name of an entry that
    was renamed; then *event* is "registered" or "replaced".
    """

    serial: int
    event: EventKind
    name: str
    generation: int
    old: str = ""


class Overflowed(Reply):
    """Events were dropped for this connection; fresh SnapshotParts under the watch's id follow."""


class Explained(Reply):
    """Whether the policy allows what was asked about, and the rule that decides."""

    allowed: bool
    rule: str


class StoreStats(msgspec.Struct, frozen=True):
    """What a service manager holds for the server: *descriptors* of at most *limit*, None where
    that is not known. *missing* entries would be lost with both halves."""

    descriptors: int
    limit: int | None
    missing: int


class ServerStats(msgspec.Struct, frozen=True):
    """The state of the server. *redundant*: both halves hold everything, either may die now.
    *dying*: processes of it that were killed, and hang in their end."""

    server_pid: int
    keeper_pid: int | None
    redundant: bool
    uptime: float
    names: int
    descriptors: int
    leases: int
    connections: int
    in_flight: int
    generation: int
    serial: int
    counters: dict[str, int]
    limits: dict[str, float]
    notes: dict[str, str] = {}  # for the operator: why the last upgrade failed ...
    store: StoreStats | None = None
    log_dropped: int = 0  # lines of the log that are lost: it was not read in time
    dying: int = 0


class StatsReply(Reply):
    stats: ServerStats


class Refused(Reply):
    """An exception of `fdshare.errors` as data."""

    code: str
    fields: dict[str, Any]
    message: str


AnyRequest: TypeAlias = (
    Hello
    | Prove
    | Register
    | Fetch
    | Take
    | Wait
    | Follow
    | FetchMany
    | Unregister
    | Rename
    | Bind
    | Names
    | Info
    | Infos
    | Watch
    | Cancel
    | Explain
    | Stats
    | Ping
    | Shutdown
    | Reload
    | Upgrade
)
AnyReply: TypeAlias = (
    Welcome
    | Proved
    | Done
    | Registered
    | Given
    | Followed
    | GivenMany
    | NameList
    | InfoList
    | SnapshotPart
    | Event
    | Overflowed
    | Explained
    | StatsReply
    | Refused
)

_encoder: Final = msgspec.msgpack.Encoder()
_replies: Final = msgspec.msgpack.Decoder(AnyReply)

encode = _encoder.encode


@cache
def _requests() -> msgspec.msgpack.Decoder[AnyRequest]:
    """Made by who reads requests: a client does not, and it takes as long as all that is above."""
    return msgspec.msgpack.Decoder(AnyRequest)


def decode_request(body: bytes) -> AnyRequest:
    """The request in *body*. Raises: BadRequest."""
    try:
        return _requests().decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(str(error)[:_CLIPPED]) from None


def decode_reply(body: bytes) -> AnyReply:
    """The reply or event in *body*. Raises: ProtocolError."""
    try:
        reply: AnyReply = _replies.decode(body)
        return reply
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the answer cannot be read: {error}") from None


def refusal(error: FdshareError) -> Refused:
    """The message that carries *error*: a few KiB, however long what was refused is."""
    fields = error.fields.items()
    clipped = {key: v[:_CLIPPED] if type(v) is str else v for key, v in fields}
    return Refused(error.code, clipped, error.message[:_CLIPPED])


def refusal_error(refused: Refused) -> FdshareError:
    """The exception that *refused* carries."""
    return error_from_wire(refused.code, refused.fields, refused.message)
