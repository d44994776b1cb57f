"""Every way in which fdshare refuses, one class each.

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
    ├── AddressInUse           (OSError)           a live server, or something that is no socket
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
    ├── QuotaExceeded          (OSError)           a limit of the server
    ├── KeeperUnavailable      (OSError)           the change could not be journaled
    ├── TooManyDescriptors     (ValueError)        more than one message or entry may carry
    ├── ClosedDescriptor       (ValueError)        use after close
    ├── TruncatedControl       (OSError)           the control buffer was too small
    ├── MagicMismatch          (ValueError)        the data is not the one expected
    ├── RemoteError            (OSError)           the peer sent a status instead of a descriptor
    ├── UnsupportedPlatform    (NotImplementedError) the kernel offers no means
    ├── UnsupportedKind        (TypeError)         the state is not in the descriptor
    ├── UnknownKind            (LookupError)       no rebuild is registered under the tag
    ├── KindMismatch           (ValueError)        the descriptor is not what the kind says
    ├── UnreadData             (ValueError)        read-ahead that cannot be put back
    ├── MemoryBusy             (BufferError)       shared memory that somebody still writes to
    ├── NoTransit              (TypeError)         this channel carries no descriptors
    ├── ForeignHost            (LookupError)       a reference made on another machine or boot
    ├── PolicyError            (ValueError)        the policy file is wrong, and where
    └── Overflow               (BufferError)       a watcher was too slow; a fresh snapshot follows

Each leaf also is the builtin that people catch. Those that are an OSError carry an errno. The
named attributes are the constructor's arguments: a program reads those, a person reads the
message. Errors travel over the rendezvous as (code, fields), never as pickles, and through
`multiprocessing` as pickles like any exception.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

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
    "QuotaExceeded",
    "KeeperUnavailable",
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
    "error_from_wire",
]

_by_code: dict[str, type[FdshareError]] = {}


class FdshareError(Exception):
    """The root. `fields` are the constructor's arguments, in plain data that msgpack can carry."""

    code: ClassVar[str] = "error"
    fields: dict[str, Any]
    message: str

    def __init_subclass__(cls, *, code: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = code
        _by_code[code] = cls

    def __init__(self, message: str = "fdshare failed", **fields: Any) -> None:
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
    """The exception that a peer described; a code or fields of a newer peer make a plain
    FdshareError with the peer's message."""
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
    name: str
    reason: str

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} is no name: {reason}", name=name, reason=reason)


class NameNotFound(FdshareError, KeyError, code="name_not_found"):
    names: list[str]

    def __init__(self, names: list[str] | str) -> None:
        names = [names] if isinstance(names, str) else list(names)
        listed = ", ".join(map(repr, names))
        super().__init__(f"nothing is held under {listed}", names=names)


class AlreadyTaken(NameNotFound, code="already_taken"):
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
    argument: str
    reason: str

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(f"{argument}: {reason}", argument=argument, reason=reason)


class AccessDenied(FdshareError, PermissionError, code="access_denied"):
    verb: str
    name: str
    uid: int
    rule: str

    def __init__(self, verb: str, name: str, uid: int, rule: str) -> None:
        super().__init__(
            f"uid {uid} may not {verb} {name!r}: {rule}", verb=verb, name=name, uid=uid, rule=rule
        )
        self.errno = errno.EACCES


class AuthenticationFailed(FdshareError, PermissionError, code="authentication_failed"):
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"authentication failed: {reason}", reason=reason)
        self.errno = errno.EACCES


class UntrustedServer(FdshareError, PermissionError, code="untrusted_server"):
    address: str
    uid: int

    def __init__(self, address: str, uid: int) -> None:
        super().__init__(
            f"the server at {address} runs as uid {uid}, neither yours nor root; "
            "name the uids you trust (trust=...) if that is meant",
            address=address,
            uid=uid,
        )
        self.errno = errno.EPERM


class AddressInUse(FdshareError, OSError, code="address_in_use"):
    address: str
    pid: int | None
    reason: str

    def __init__(self, address: str, reason: str, pid: int | None = None) -> None:
        super().__init__(f"{address} is in use: {reason}", address=address, reason=reason, pid=pid)
        self.errno = errno.EADDRINUSE


class EndpointError(FdshareError, OSError, code="endpoint_error"):
    address: str
    reason: str

    def __init__(self, address: str, reason: str, errno: int | None = None) -> None:
        super().__init__(f"{address}: {reason}", address=address, reason=reason, errno=errno)


class NoServer(EndpointError, FileNotFoundError, code="no_server"):
    def __init__(self, address: str, reason: str, errno: int | None = None) -> None:
        FdshareError.__init__(
            self,
            f"no server at {address}: {reason}; start one with: fdshare serve {address}",
            address=address,
            reason=reason,
            errno=errno,
        )


class ServerGone(FdshareError, ConnectionError, code="server_gone"):
    address: str
    reason: str

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(
            f"the server at {address} is gone: {reason}", address=address, reason=reason
        )
        self.errno = errno.ECONNRESET


class ProtocolError(FdshareError, ConnectionError, code="protocol_error"):
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the peer broke the protocol: {reason}", reason=reason)
        self.errno = errno.EPROTO


class VersionMismatch(ProtocolError, code="version_mismatch"):
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
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the server could not read the request: {reason}", reason=reason)


class FetchTimeout(FdshareError, TimeoutError, code="fetch_timeout"):
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
    """`whose` is "sender", "receiver", "client" or "server"; `what` is the name of the limit."""

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


class QuotaExceeded(FdshareError, OSError, code="quota_exceeded"):
    """`what` is the option that raises the limit: "max_names", "max_connections_per_uid" ..."""

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
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the change was not made, because the keeper could not record it: {reason}",
            reason=reason,
        )
        self.errno = errno.EAGAIN


class TooManyDescriptors(FdshareError, ValueError, code="too_many_descriptors"):
    count: int
    limit: int

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(
            f"{count} descriptors where at most {limit} are allowed", count=count, limit=limit
        )


class ClosedDescriptor(FdshareError, ValueError, code="closed_descriptor"):
    reason: str

    def __init__(self, reason: str = "the descriptor is closed") -> None:
        super().__init__(reason, reason=reason)


class TruncatedControl(FdshareError, OSError, code="truncated_control"):
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
    """`status` is 1..255, as the peer's send_err() gave it; often an errno, and set as one."""

    status: int

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text or f"the peer refused with status {status}", status=status, text=text)
        self.errno = status


class UnsupportedPlatform(FdshareError, NotImplementedError, code="unsupported_platform"):
    feature: str
    reason: str

    def __init__(self, feature: str, reason: str) -> None:
        super().__init__(
            f"{feature} is not to be had here: {reason}", feature=feature, reason=reason
        )


class UnsupportedKind(FdshareError, TypeError, code="unsupported_kind"):
    type_name: str
    reason: str

    def __init__(self, type_name: str, reason: str) -> None:
        super().__init__(f"cannot share {type_name}: {reason}", type_name=type_name, reason=reason)


class UnknownKind(FdshareError, LookupError, code="unknown_kind"):
    tag: str

    def __init__(self, tag: str) -> None:
        super().__init__(
            f"no kind is registered under the tag {tag!r} in this process; "
            "call fdshare.register_kind() for it here too",
            tag=tag,
        )


class KindMismatch(FdshareError, ValueError, code="kind_mismatch"):
    tag: str
    reason: str

    def __init__(self, tag: str, reason: str) -> None:
        super().__init__(f"the descriptor is no {tag}: {reason}", tag=tag, reason=reason)


class UnreadData(FdshareError, ValueError, code="unread_data"):
    count: int

    def __init__(self, count: int) -> None:
        super().__init__(
            f"{count} bytes were read ahead into the file object's buffer and cannot be put back; "
            "read them first, or open the file with buffering=0",
            count=count,
        )


class MemoryBusy(FdshareError, BufferError, code="memory_busy"):
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the memory cannot be sealed: {reason}", reason=reason)


class NoTransit(FdshareError, TypeError, code="no_transit"):
    type_name: str

    def __init__(self, type_name: str) -> None:
        super().__init__(
            f"{type_name} cannot travel in this pickle: call fdshare.install() at the start of the "
            "program, or take the channel from fdshare.get_context()",
            type_name=type_name,
        )


class ForeignHost(FdshareError, LookupError, code="foreign_host"):
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
    file: str
    where: str
    reason: str

    def __init__(self, file: str, where: str, reason: str) -> None:
        super().__init__(f"{file}: {where}: {reason}", file=file, where=where, reason=reason)


class Overflow(FdshareError, BufferError, code="overflow"):
    def __init__(self) -> None:
        super().__init__("this watcher was too slow; events were dropped, a new snapshot follows")
