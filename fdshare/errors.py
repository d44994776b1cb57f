"""The exceptions of fdshare: one class for each refusal, all of them a FdshareError.

::

    FdshareError
    ├── InvalidName            (ValueError)        a name the rules do not allow
    ├── NameNotFound           (KeyError)          nothing is held under it
    │   └── AlreadyTaken                           a pickled descriptor was loaded, or expired
    ├── NameTaken              (FileExistsError)   something else is held under it
    ├── GenerationMismatch     (ValueError)        it was replaced since you looked
    ├── InvalidArgument        (ValueError)        a value no request may have
    ├── AccessDenied           (PermissionError)   the policy says no, and which rule said so
    ├── AuthenticationFailed   (PermissionError)   the authkeys differ
    ├── UntrustedServer        (PermissionError)   the socket belongs to another user
    ├── AddressInUse           (OSError)           a live server, or a file that is not a socket
    ├── EndpointError          (OSError)           the path cannot be bound or reached
    │   └── NoServer           (FileNotFoundError) nobody listens there
    ├── ServerGone             (ConnectionError)   it ended in the middle
    ├── ProtocolError          (ConnectionError)   the peer speaks something else
    │   └── VersionMismatch                        ... or another version of it
    ├── BadRequest             (ValueError)        the server could not read a request's body
    ├── FetchTimeout           (TimeoutError)      the name did not appear in time
    ├── WatchTimeout           (TimeoutError)      nothing changed in time
    ├── ServerTimeout          (TimeoutError)      the server did not answer in time
    ├── DescriptorLimit        (OSError)           RLIMIT_NOFILE, somewhere; says whose
    ├── DescriptorRefused      (PermissionError)   a security module keeps it from the receiver
    ├── QuotaExceeded          (OSError)           a limit of the server
    ├── KeeperUnavailable      (OSError)           the change could not be journaled
    ├── LogFull                (OSError)           the audit log could not have had it
    ├── TooManyDescriptors     (ValueError)        more than one message or entry may carry
    ├── ClosedDescriptor       (ValueError)        use after close
    ├── TruncatedControl       (OSError)           the control buffer was too small
    ├── MagicMismatch          (ValueError)        the data is not the one expected
    ├── RemoteError            (OSError)           the peer sent a status instead of a descriptor
    ├── UnsupportedPlatform    (NotImplementedError) this system does not have it
    ├── UnsupportedKind        (TypeError)         the state is not in the descriptor
    ├── UnknownKind            (LookupError)       no rebuild is registered under the tag
    ├── KindMismatch           (ValueError)        the descriptor is not what the kind says
    ├── UnreadData             (ValueError)        read-ahead that cannot be put back
    ├── MemoryBusy             (BufferError)       somebody can still write to the memory
    ├── NoTransit              (TypeError)         this channel carries no descriptors
    ├── ForeignHost            (LookupError)       a reference made on another machine or boot
    ├── PolicyError            (ValueError)        the policy file is wrong, and where
    └── Overflow               (BufferError)       a watcher was too slow; a fresh snapshot follows

Each leaf is also the builtin that people catch. Those that are an OSError have an errno. The
attributes are the arguments of the constructor: a program reads these, a person reads the message.
Between client and server an error travels as (code, fields), never as a pickle; through
`multiprocessing` as a pickle, like any exception.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Final

from fdshare.printable import printable

__all__ = [
    "FdshareError",
    "InvalidName",
    "NameNotFound",
    "AlreadyTaken",
    "NameTaken",
    "GenerationMismatch",
    "InvalidArgument",
    "AccessDenied",
    "AuthenticationFailed",
    "UntrustedServer",
    "AddressInUse",
    "EndpointError",
    "NoServer",
    "ServerGone",
    "ProtocolError",
    "VersionMismatch",
    "BadRequest",
    "FetchTimeout",
    "WatchTimeout",
    "ServerTimeout",
    "DescriptorLimit",
    "DescriptorRefused",
    "QuotaExceeded",
    "KeeperUnavailable",
    "LogFull",
    "TooManyDescriptors",
    "ClosedDescriptor",
    "TruncatedControl",
    "MagicMismatch",
    "RemoteError",
    "UnsupportedPlatform",
    "UnsupportedKind",
    "UnknownKind",
    "KindMismatch",
    "UnreadData",
    "MemoryBusy",
    "NoTransit",
    "ForeignHost",
    "PolicyError",
    "Overflow",
]

_HELP: Final = "docs/howto/troubleshooting.md"  # has a section for each
_LISTED: Final = 4  # names in a message
_by_code: dict[str, type[FdshareError]] = {}


class FdshareError(Exception):
    """The root of all: `except FdshareError` catches whatever fdshare refuses.

    *message* is for a person, and has nothing that is not printable: a part of it may be anybody's.
    *fields* are the arguments of the constructor, in plain data that msgpack can carry; each is an
    attribute too.
    """

    code: ClassVar[str] = "error"
    fields: dict[str, Any]
    message: str

    def __init_subclass__(cls, *, code: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = code
        if cls.__doc__ is not None:  # python -OO
            cls.__doc__ += f"\n    See {_HELP}#{cls.__name__.lower()}.\n    "
        _by_code[code] = cls

    def __init__(self, message: str = "fdshare failed", **fields: Any) -> None:
        message = printable(message)
        super().__init__(message)
        self.message = message
        self.fields = fields
        for key, value in fields.items():
            setattr(self, key, value)

    def __str__(self) -> str:
        # KeyError would print the repr of its argument, OSError the errno before it.
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (error_from_wire, (self.code, self.fields, self.message))


_by_code["error"] = FdshareError


def error_from_wire(code: str, fields: dict[str, Any], message: str) -> FdshareError:
    """The exception that a peer described.

    A code or fields that only a newer release knows make a plain FdshareError with the message.
    """
    cls = _by_code.get(code, FdshareError)
    if cls is not FdshareError:
        try:
            return cls(**fields)
        except Exception:  # whatever a constructor does with what it was not made for
            pass
    error = FdshareError(message)
    error.fields = fields
    for key, value in fields.items():
        if not hasattr(error, key):  # a peer does not overwrite what every exception has
            setattr(error, key, value)
    return error


class InvalidName(FdshareError, ValueError, code="invalid_name"):
    """The name breaks a rule; *reason* says which.

    Choose another name.
    """

    name: str
    reason: str

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} is not a valid name: {reason}", name=name, reason=reason)


class NameNotFound(FdshareError, KeyError, code="name_not_found"):
    """Nothing is registered under *names*.

    Wait for it with a timeout, or register it first. An entry that is leased to a taker is hidden,
    and counts as not there.
    """

    names: list[str]

    def __init__(self, names: list[str] | str) -> None:
        names = [names] if isinstance(names, str) else list(names)
        listed = ", ".join(map(repr, names[:_LISTED]))
        if len(names) > _LISTED:
            listed += f" and {len(names) - _LISTED} others"
        super().__init__(f"nothing is held under {listed}", names=names)


class AlreadyTaken(NameNotFound, code="already_taken"):
    """The descriptors of this pickle are gone.

    It was loaded before, or its time to live passed. Send `fdshare.hold(obj, uses=n)` where one
    pickle is loaded n times.
    """

    def __init__(self, names: list[str] | str) -> None:
        names = [names] if isinstance(names, str) else list(names)
        FdshareError.__init__(
            self,
            "the descriptors of this pickle are gone: it was loaded before, its time to live "
            "passed or the server that held them ended; fdshare.hold(obj, uses=n) lets one "
            "pickle be loaded n times",
            names=names,
        )


class NameTaken(FdshareError, FileExistsError, code="name_taken"):
    """Something else is registered under *name*, at *generation*.

    Pass replace=True to put yours in its place, or choose another name.
    """

    name: str
    generation: int

    def __init__(self, name: str, generation: int) -> None:
        super().__init__(
            f"{name!r} is already held (generation {generation}); "
            "pass replace=True to put yours in its place",
            name=name,
            generation=generation,
        )
        self.errno = errno.EEXIST


class GenerationMismatch(FdshareError, ValueError, code="generation_mismatch"):
    """The entry is not at the generation that was *expected*: it was replaced or is gone.

    *current* is its generation, 0 where the name is free. Look at it again before you decide.
    """

    name: str
    expected: int
    current: int

    def __init__(self, name: str, expected: int, current: int) -> None:
        now = f"it is at generation {current}" if current else "nothing is held under it"
        super().__init__(
            f"{name!r} was expected at generation {expected}, but {now}",
            name=name,
            expected=expected,
            current=current,
        )


class InvalidArgument(FdshareError, ValueError, code="invalid_argument"):
    """The value of *argument* is not allowed; *reason* says why.

    Pass another value.
    """

    argument: str
    reason: str

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(f"{argument}: {reason}", argument=argument, reason=reason)


class AccessDenied(FdshareError, PermissionError, code="access_denied"):
    """The policy of the server does not allow *verb* on *name* for *uid*.

    *rule* is the rule that decides. Have the policy changed, and check it with `explain`.
    """

    verb: str
    name: str
    uid: int
    rule: str

    def __init__(self, verb: str, name: str, uid: int, rule: str) -> None:
        what = f"{verb} {name!r}" if name else verb  # stats, shutdown ...: of the whole server
        super().__init__(
            f"uid {uid} may not {what}: {rule}", verb=verb, name=name, uid=uid, rule=rule
        )
        self.errno = errno.EACCES


class AuthenticationFailed(FdshareError, PermissionError, code="authentication_failed"):
    """The authkeys of client and server differ, or one side has none.

    Use the same key on both sides.
    """

    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"authentication failed: {reason}", reason=reason)
        self.errno = errno.EACCES


class UntrustedServer(FdshareError, PermissionError, code="untrusted_server"):
    """The server at *address* runs as *uid*, which this client does not trust.

    Anybody can put a socket into a shared folder. If you trust that user, pass the uid in *trust*.
    """

    address: str
    uid: int
    reason: str

    def __init__(
        self,
        address: str,
        uid: int,
        reason: str = "neither yours nor root; if you trust that user, pass the uid in trust=...",
    ) -> None:
        super().__init__(
            f"the server at {address} runs as uid {uid}, {reason}",
            address=address,
            uid=uid,
            reason=reason,
        )
        self.errno = errno.EPERM


class AddressInUse(FdshareError, OSError, code="address_in_use"):
    """A live server has *address*, or a file that is not a socket is there.

    *pid* is the server, where it is known. Stop it, move the file away, or choose another address.
    """

    address: str
    pid: int | None
    reason: str

    def __init__(self, address: str, reason: str, pid: int | None = None) -> None:
        super().__init__(f"{address} is in use: {reason}", address=address, reason=reason, pid=pid)
        self.errno = errno.EADDRINUSE


class EndpointError(FdshareError, OSError, code="endpoint_error"):
    """*address* cannot be bound or reached; *reason* says why.

    `errno` is the error of the system call, where there was one.
    """

    address: str
    reason: str

    def __init__(self, address: str, reason: str, errno: int | None = None) -> None:
        super().__init__(f"{address}: {reason}", address=address, reason=reason, errno=errno)


class NoServer(EndpointError, FileNotFoundError, code="no_server"):
    """Nobody listens at *address*.

    Start the server that is to listen there; of fdshare itself: `fdshare serve ADDRESS`.
    """

    def __init__(
        self, address: str, reason: str, errno: int | None = None, advice: str = ""
    ) -> None:
        message = f"no server at {address}: {reason}"
        FdshareError.__init__(
            self,
            f"{message}; {advice}" if advice else message,
            address=address,
            reason=reason,
            errno=errno,
            advice=advice,
        )


class ServerGone(FdshareError, ConnectionError, code="server_gone"):
    """The server ended during the call, and was not found again in time.

    A change may have happened or not: look, then repeat. *reconnect* of the client is the time.
    """

    address: str
    reason: str

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(
            f"the server at {address} is gone: {reason}", address=address, reason=reason
        )
        self.errno = errno.ECONNRESET


class ProtocolError(FdshareError, ConnectionError, code="protocol_error"):
    """The peer sent what the protocol does not allow; the connection is closed.

    The peer is another program, or has a fault.
    """

    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the peer broke the protocol: {reason}", reason=reason)
        self.errno = errno.EPROTO


class VersionMismatch(ProtocolError, code="version_mismatch"):
    """The peer speaks protocol version *theirs*, this side speaks *ours*.

    Run the same release of fdshare on both sides.
    """

    theirs: int
    ours: int

    def __init__(self, theirs: int, ours: int) -> None:
        FdshareError.__init__(
            self,
            f"the peer speaks protocol version {theirs}, this side {ours}; "
            "run the same release of fdshare on both sides",
            theirs=theirs,
            ours=ours,
        )
        self.errno = errno.EPROTO


class BadRequest(FdshareError, ValueError, code="bad_request"):
    """The server could not read the body of a request.

    The client is of another release, or has a fault.
    """

    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the server could not read the request: {reason}", reason=reason)


class FetchTimeout(FdshareError, TimeoutError, code="fetch_timeout"):
    """Nothing was registered under *name* within *timeout* seconds.

    Try again, or wait longer.
    """

    name: str
    timeout: float

    def __init__(self, name: str, timeout: float) -> None:
        super().__init__(
            f"nothing was registered under {name!r} within {timeout:g} s",
            name=name,
            timeout=timeout,
        )
        self.errno = errno.ETIMEDOUT


class WatchTimeout(FdshareError, TimeoutError, code="watch_timeout"):
    """No name that matches *pattern* changed within *timeout* seconds.

    The watch goes on: ask for its next item.
    """

    pattern: str
    timeout: float

    def __init__(self, pattern: str, timeout: float) -> None:
        super().__init__(
            f"nothing changed under {pattern!r} within {timeout:g} s",
            pattern=pattern,
            timeout=timeout,
        )
        self.errno = errno.ETIMEDOUT


class ServerTimeout(FdshareError, TimeoutError, code="server_timeout"):
    """The server did not answer within *timeout* seconds.

    It is stopped or overloaded. A change may have happened or not: look, then repeat.
    """

    address: str
    timeout: float

    def __init__(self, address: str, timeout: float) -> None:
        super().__init__(
            f"the server at {address} did not answer within {timeout:g} s",
            address=address,
            timeout=timeout,
        )
        self.errno = errno.ETIMEDOUT


class DescriptorLimit(FdshareError, OSError, code="descriptor_limit"):
    """A process has no descriptor left (EMFILE), or a user too many in flight (ETOOMANYREFS).

    Raise the limit, or close some. *whose* is "sender", "receiver", "client", "server" or
    "command" (of the command line); *what* is the name of the limit, *limit* its value, *used* how
    many are in use, where it is known.
    """

    errno: int
    what: str
    limit: int
    used: int | None
    whose: str

    def __init__(
        self, errno: int, what: str, limit: int, used: int | None, whose: str, advice: str = ""
    ) -> None:
        use = "all in use" if used is None or used >= limit else f"{used} in use"
        advice = advice or "raise it (ulimit -n) or close some"
        super().__init__(
            f"{what} of the {whose} is {limit}, {use}; {advice}",
            errno=errno,
            what=what,
            limit=limit,
            used=used,
            whose=whose,
            advice=advice,
        )


class DescriptorRefused(FdshareError, PermissionError, code="descriptor_refused"):
    """A security module, SELinux for instance, does not let a process have a descriptor that came.

    What came with it is closed. Allow it in the policy of that module. *whose* is "receiver" or
    "server".
    """

    whose: str

    def __init__(self, whose: str) -> None:
        super().__init__(
            f"a security module does not let the {whose} have a descriptor that was sent to it; "
            "its log says which, and its policy may allow it",
            whose=whose,
        )
        self.errno = errno.EACCES


class QuotaExceeded(FdshareError, OSError, code="quota_exceeded"):
    """A limit of the server is reached: *used* of *limit*.

    Unregister something, or raise the limit. *what* is the option that raises it: "max_names",
    "max_connections_per_uid" ...
    """

    what: str
    limit: int
    used: int

    def __init__(self, what: str, limit: int, used: int) -> None:
        super().__init__(
            f"the server's {what} is {limit}, {used} in use; unregister some or raise {what}",
            what=what,
            limit=limit,
            used=used,
        )
        self.errno = errno.EDQUOT


class KeeperUnavailable(FdshareError, OSError, code="keeper_unavailable"):
    """The keeper could not record the change, so the server did not make it.

    Try again; `fdshare stats` shows how the keeper is.
    """

    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the change was not made, because the keeper could not record it: {reason}",
            reason=reason,
        )
        self.errno = errno.EAGAIN


class LogFull(FdshareError, OSError, code="log_full"):
    """The audit log has no room for what the server would do, and must have all of it.

    Something has to read the server's standard error; `fdshare serve --audit-strict` asked for
    this.
    """

    def __init__(self) -> None:
        super().__init__("the audit log is full, for nobody reads it, and must have every line")
        self.errno = errno.EAGAIN


class TooManyDescriptors(FdshareError, ValueError, code="too_many_descriptors"):
    """*count* descriptors were given, where one message or entry has at most *limit*.

    Use several messages or entries.
    """

    count: int
    limit: int

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(
            f"{count} descriptors where at most {limit} are allowed", count=count, limit=limit
        )


class ClosedDescriptor(FdshareError, ValueError, code="closed_descriptor"):
    """A descriptor, or the object that owns it, is used after it was closed.

    Keep it open for as long as it is used.
    """

    reason: str

    def __init__(self, reason: str = "the descriptor is closed") -> None:
        super().__init__(reason, reason=reason)


class TruncatedControl(FdshareError, OSError, code="truncated_control"):
    """The peer sent more descriptors than there was *room* for.

    The *received* ones that fitted were closed. Receive with more room.
    """

    received: int
    room: int

    def __init__(self, received: int, room: int) -> None:
        super().__init__(
            f"the control buffer had room for {room} descriptors, more came; the {received} that "
            "fitted were closed",
            received=received,
            room=room,
        )
        self.errno = errno.EMSGSIZE


class MagicMismatch(FdshareError, ValueError, code="magic_mismatch"):
    """The data that came with a descriptor are not the *expected* ones.

    The descriptors were closed. The peer is another program.
    """

    expected: bytes
    received: bytes

    def __init__(self, expected: bytes, received: bytes) -> None:
        super().__init__(
            f"expected the data {expected!r}, received {received[:32]!r}; "
            "the descriptors that came with it were closed",
            expected=expected,
            received=received,
        )


class RemoteError(FdshareError, OSError, code="remote_error"):
    """The peer of `recv_fd` sent a status and a text in place of a descriptor.

    *status* is 1 to 255, the byte that its `send_err` sent; often an errno, and set as one.
    """

    status: int

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text or f"the peer refused with status {status}", status=status, text=text)
        self.errno = status


class UnsupportedPlatform(FdshareError, NotImplementedError, code="unsupported_platform"):
    """*feature* is not available on this system; *reason* says why.

    Use another way, or another system.
    """

    feature: str
    reason: str

    def __init__(self, feature: str, reason: str) -> None:
        super().__init__(
            f"{feature} is not available here: {reason}", feature=feature, reason=reason
        )


class UnsupportedKind(FdshareError, TypeError, code="unsupported_kind"):
    """An object of *type_name* cannot be shared; *reason* says why.

    Share what is below it, or write a kind of your own with `fdshare.register_kind`.
    """

    type_name: str
    reason: str

    def __init__(self, type_name: str, reason: str) -> None:
        super().__init__(f"cannot share {type_name}: {reason}", type_name=type_name, reason=reason)


class UnknownKind(FdshareError, LookupError, code="unknown_kind"):
    """The object has a kind whose *tag* this process does not know.

    Call `fdshare.register_kind` for it here, too.
    """

    tag: str

    def __init__(self, tag: str) -> None:
        super().__init__(
            f"no kind is registered under the tag {tag!r} in this process; "
            "call fdshare.register_kind() for it here too",
            tag=tag,
        )


class KindMismatch(FdshareError, ValueError, code="kind_mismatch"):
    """The descriptor is not what its kind, *tag*, says; it was closed.

    *reason* says what differs. Whoever registered or sent it has to correct it.
    """

    tag: str
    reason: str

    def __init__(self, tag: str, reason: str) -> None:
        super().__init__(
            f"the descriptor does not fit the kind {tag!r}: {reason}", tag=tag, reason=reason
        )


class UnreadData(FdshareError, ValueError, code="unread_data"):
    """*count* bytes are in the buffer of the file object and cannot be put back.

    Read them first, or open the file with buffering=0.
    """

    count: int

    def __init__(self, count: int) -> None:
        super().__init__(
            f"{count} bytes were read ahead into the file object's buffer and cannot be put back; "
            "read them first, or open the file with buffering=0",
            count=count,
        )


class MemoryBusy(FdshareError, BufferError, code="memory_busy"):
    """The memory cannot be sealed: somebody can still write to it.

    *reason* says who. Delete what maps it for writing, then seal.
    """

    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the memory cannot be sealed: {reason}", reason=reason)


class NoTransit(FdshareError, TypeError, code="no_transit"):
    """An object of *type_name* is pickled for a channel that carries no descriptors.

    Call `fdshare.install` first, or use a channel of `fdshare.get_context`.
    """

    type_name: str

    def __init__(self, type_name: str) -> None:
        super().__init__(
            f"{type_name} cannot travel in this pickle: call fdshare.install() at the start of the "
            "program, or take the channel from fdshare.get_context()",
            type_name=type_name,
        )


class ForeignHost(FdshareError, LookupError, code="foreign_host"):
    """A reference that was *made_on* another machine, or before a reboot, is used *here*.

    Descriptors do not leave their machine. Register one here, too.
    """

    name: str
    made_on: str
    here: str

    def __init__(self, name: str, made_on: str, here: str) -> None:
        super().__init__(
            f"the reference to {name!r} was made on {made_on}, this is {here}; descriptors do not "
            "leave their machine, register one here too",
            name=name,
            made_on=made_on,
            here=here,
        )


class PolicyError(FdshareError, ValueError, code="policy_error"):
    """The policy *file* is wrong at *where*; *reason* says how.

    Correct it. A server that runs keeps its old policy.
    """

    file: str
    where: str
    reason: str

    def __init__(self, file: str, where: str, reason: str) -> None:
        super().__init__(f"{file}: {where}: {reason}", file=file, where=where, reason=reason)


class Overflow(FdshareError, BufferError, code="overflow"):
    """A watcher read too slowly, and the server dropped events for it.

    A new snapshot follows: start again from that.
    """

    def __init__(self) -> None:
        super().__init__("this watcher was too slow; events were dropped, a new snapshot follows")
