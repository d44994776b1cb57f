"""The verbs as generators: each yields its exchanges, is sent the answers, and returns the result.

The client that drives a generator does the waiting, and raises refusals into it. So a verb is
written once for the blocking and the asynchronous client.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Final, TypeAlias, TypeVar, get_args

from fdshare.client.conversation import Exchange, LeaseEnd, WholeAnswer, check_seconds
from fdshare.client.reachable import why_unreachable
from fdshare.errors import (
    AccessDenied,
    EndpointError,
    InvalidArgument,
    KindMismatch,
    NameNotFound,
    ProtocolError,
    TooManyDescriptors,
)
from fdshare.kernel import system
from fdshare.kernel.ancillary import discard_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import first_use
from fdshare.kinds import describe, discard, owned, rebuild
from fdshare.protocol import messages as m
from fdshare.protocol.names import MAX_ENTRY_DESCRIPTORS, MAX_NAMES, literal

T = TypeVar("T")
R = TypeVar("R", bound=m.Reply)
Steps: TypeAlias = Generator[Exchange | LeaseEnd, WholeAnswer, T]

_BINDS: Final = 5  # of one call: others may replace the entry, or remove its path, meanwhile


# The answers with which descriptors may come.
_CARRIERS: Final = (m.Given, m.GivenMany, m.Followed)


def register(
    name: str,
    obj: object,
    *,
    replace: bool,
    if_generation: int | None,
    lifetime: m.Lifetime,
    ttl: float | None,
    grace: float,
    drop_on_hangup: bool,
    metadata: Mapping[str, str] | None,
    lifeline: int | None,
) -> Steps[m.Registered]:
    if lifetime not in get_args(m.Lifetime):
        known = ", ".join(get_args(m.Lifetime))
        raise InvalidArgument("lifetime", f"{lifetime!r} is none of {known}")
    for argument, seconds in (("ttl", ttl), ("grace", grace)):
        if seconds is not None:
            check_seconds(argument, seconds)
    kind, fds = describe(obj)
    if len(fds) > MAX_ENTRY_DESCRIPTORS:
        raise TooManyDescriptors(len(fds), MAX_ENTRY_DESCRIPTORS)
    request = m.Register(
        name=name,
        kind=kind,
        replace=replace,
        if_generation=if_generation,
        lifetime=lifetime,
        ttl=ttl,
        grace=grace,
        drop_on_hangup=drop_on_hangup,
        metadata=dict(metadata or {}),
    )
    given = [*fds] if lifeline is None else [*fds, lifeline]
    return _answer((yield Exchange(request, given)), m.Registered)


def _answer(parts: WholeAnswer, cls: type[R]) -> R:
    """The only part of an answer, which brings descriptors only where it may.

    Raises: ProtocolError: it is another one; what came with it is closed.
    """
    reply = parts.replies[0]
    if type(reply) is not cls:
        discard_all(parts.descriptors)
        raise ProtocolError(f"the answer is {type(reply).__name__} instead of {cls.__name__}")
    if parts.descriptors and cls not in _CARRIERS:
        discard_all(parts.descriptors)
        raise ProtocolError(f"{len(parts.descriptors)} descriptors came with {cls.__name__}")
    return reply


def fetch(name: str, timeout: float | None) -> Steps[Any]:
    return given((yield asking(name, timeout)))


def fetch_raw(name: str, timeout: float | None) -> Steps[list[Descriptor]]:
    return given_raw((yield asking(name, timeout)))


def look_raw(name: str, timeout: float | None = 0) -> Steps[list[Descriptor]]:
    """As fetch_raw, for a caller that only looks at it: the entry does not count it."""
    return given_raw((yield Exchange(m.Fetch(name, timeout, look=True), wait=timeout)))


def asking(name: str, timeout: float | None) -> Exchange:
    """The only exchange of a fetch; `given` or `given_raw` makes its result of the answer."""
    return Exchange(m.Fetch(name, timeout), wait=timeout)


def given(parts: WholeAnswer) -> Any:
    return rebuild(_answer(parts, m.Given).kind, parts.descriptors)


def given_raw(parts: WholeAnswer) -> list[Descriptor]:
    _answer(parts, m.Given)
    return parts.descriptors


def following(name: str, timeout: float | None, known: int, epoch: str, page: int) -> Exchange:
    """The only exchange of a follow; `followed` makes its result of the answer."""
    return Exchange(m.Follow(name, timeout, known, epoch, page), wait=timeout)


def followed(parts: WholeAnswer, known: int) -> tuple[m.Followed, Any, Descriptor | None]:
    """(the answer, the object, the page): the object is None where *known* is the generation, the
    page where it was not sent. The caller owns both."""
    answer, descriptors = _answer(parts, m.Followed), parts.descriptors
    if answer.mapped and not descriptors:
        raise ProtocolError("the answer to a follow has no page")
    page = descriptors.pop() if answer.mapped else None
    try:
        if answer.kind is not None:
            return answer, rebuild(answer.kind, descriptors), page
        if descriptors or answer.generation != known:
            discard_all(descriptors)
            raise ProtocolError("the answer to a follow has no kind")
    except BaseException:
        if page is not None:
            page.close()
        raise
    return answer, None, page


def fetch_many(names: Iterable[str]) -> Steps[dict[str, Any]]:
    left = list(dict.fromkeys(names))
    found: dict[str, Any] = {}
    missing: list[str] = []
    try:
        while left:
            asked = left[:MAX_NAMES]
            parts = yield Exchange(m.FetchMany(asked))
            answer = _answer(parts, m.GivenMany)
            if answer.missing:
                discard_all(parts.descriptors)
                missing += _missing(answer.missing, asked)
                left = left[len(asked) :]
            else:
                _rebuild_items(answer.items, parts.descriptors, found, asked)
                left = left[len(answer.items) :]
        if missing:
            raise NameNotFound(missing)
    except BaseException:
        for obj in found.values():
            discard(obj)
        raise
    return found


def _missing(indexes: list[int], names: list[str]) -> list[str]:
    if min(indexes) < 0 or max(indexes) >= len(names):
        raise ProtocolError("the answer misses other names than the request has")
    return [names[index] for index in indexes]


def _rebuild_items(
    items: list[m.GivenItem],
    descriptors: list[Descriptor],
    found: dict[str, Any],
    names: list[str],
) -> None:
    """Adds the objects of one answer to *found*: they are those of *names*, from the first."""
    end = 0
    try:
        counts = [item.count for item in items]
        if not items or [item.name for item in items] != names[: len(items)]:
            raise ProtocolError("the answer has other names than the request")
        tags = [item.kind.tag for item in items]
        if counts.count(1) == tags.count("descriptor") == len(items) == len(descriptors):
            found.update(zip(names, owned(descriptors), strict=False))
            return
        if sum(counts) != len(descriptors) or min(counts) < 0:
            raise ProtocolError(
                f"{len(descriptors)} descriptors came, its items have {sum(counts)}"
            )
        for item, count in zip(items, counts, strict=True):
            start, end = end, end + count
            found[item.name] = rebuild(item.kind, descriptors[start:end])
    except BaseException:
        discard_all(descriptors[end:])
        raise


def take(name: str, timeout: float | None) -> Steps[Any]:
    while True:
        parts = yield Exchange(m.Take(name, timeout), wait=timeout)
        given = _answer(parts, m.Given)
        with _lease_of(parts) as lease:
            obj = rebuild(given.kind, parts.descriptors)
            confirmed = confirm(lease, obj, discard)
        if confirmed is not None:
            with confirmed:
                yield LeaseEnd(confirmed)
            return obj


def take_raw(name: str, timeout: float | None) -> Steps[list[Descriptor]]:
    while True:
        descriptors, lease = yield from lease_raw(name, timeout)
        with lease:
            confirmed = confirm(lease, descriptors, discard_all)
        if confirmed is not None:
            with confirmed:
                yield LeaseEnd(confirmed)
            return descriptors


def lease_raw(name: str, timeout: float | None) -> Steps[tuple[list[Descriptor], Descriptor]]:
    """(descriptors, lease): a take that the caller is to `confirm`. Closed unconfirmed, the lease
    gives the entry back."""
    parts = yield Exchange(m.Take(name, timeout), wait=timeout)
    _answer(parts, m.Given)
    try:
        lease = _lease_of(parts)
    except BaseException:
        discard_all(parts.descriptors)
        raise
    return parts.descriptors, lease


def _lease_of(parts: WholeAnswer) -> Descriptor:
    """The lease, which is the last of the descriptors; it is taken off them."""
    if not parts.descriptors:
        raise ProtocolError("the answer to a take has no lease")
    return parts.descriptors.pop()


def confirm(lease: Descriptor, taken: T, let_go: Callable[[T], None]) -> socket.socket | None:
    """Sends one byte on the lease, so that *taken* is ours; the lease, whose end is to be waited
    for. None, after *let_go* of it, where the lease was revoked: the entry was replaced, removed or
    given back before. Never blocks. The caller owns the result.

    Raises, after *let_go*: ProtocolError: this is no lease.
    """
    try:
        sock = lease.socket()
        try:
            sock.setblocking(True)  # whatever socket.setdefaulttimeout() says
            sock.send(b"\1", socket.MSG_DONTWAIT | system.NOSIGNAL)  # its buffer is empty
        except BaseException:
            sock.close()
            raise
        return sock
    except (BrokenPipeError, ConnectionResetError):
        let_go(taken)
        return None
    except OSError as error:
        let_go(taken)
        raise ProtocolError(f"what it gave is no lease: {error.strerror}") from None


def wait(name: str, timeout: float | None) -> Steps[m.Registered]:
    return _answer((yield Exchange(m.Wait(name, timeout), wait=timeout)), m.Registered)


def unregister(name: str, if_generation: int | None) -> Steps[None]:
    _answer((yield Exchange(m.Unregister(name, if_generation))), m.Done)


def rename(old: str, new: str) -> Steps[m.Registered]:
    return _answer((yield Exchange(m.Rename(old, new))), m.Registered)


def bind(name: str, address: str, backlog: int, reuse_port: bool) -> Steps[socket.socket]:
    with first_use():
        from fdshare.protocol.bind_address import parse_address

    replaces, wrong = None, ""
    for _ in range(_BINDS):
        try:
            parts = yield Exchange(m.Bind(name, address, backlog, reuse_port, replaces))
        except AccessDenied:
            if replaces is None:
                raise
            break  # may use what is held, and not bind it anew
        given = _answer(parts, m.Given)
        bound = _bound_socket(name, given.kind, parts.descriptors)
        try:
            wrong, is_gone = why_unreachable(bound.fileno(), parse_address(address))
            # The server has kept it if the path leads to it where the server is: in another mount
            # namespace, perhaps.
            if not wrong or (is_gone and given.generation == replaces):
                return bound
        except BaseException:
            bound.close()
            raise
        bound.close()
        if not is_gone:
            break
        replaces = given.generation
    raise EndpointError(address, f"{name!r} is held, but {wrong}; unregister it, and bind again")


def _bound_socket(name: str, kind: m.Kind, descriptors: list[Descriptor]) -> socket.socket:
    """What `bind` was given. The caller owns the result. Raises: KindMismatch."""
    if kind.tag == "socket":
        bound: socket.socket = rebuild(kind, descriptors)
        return bound
    try:  # *name* was there already; a socket may have been registered by its number
        if kind.tag == "descriptor" and len(descriptors) == 1:
            return descriptors[0].socket()
    except OSError:
        pass
    discard_all(descriptors)
    raise KindMismatch("socket", f"{name!r} is registered as a {kind.tag}")


def names(pattern: str) -> Steps[list[str]]:
    parts = yield Exchange(m.Names(pattern))
    found: list[str] = []
    for reply in _answers(parts, m.NameList):
        found += reply.names
    return found


def _answers(parts: WholeAnswer, cls: type[R]) -> list[R]:
    """All parts of an answer, as `_answer` checks them."""
    return [_answer(WholeAnswer([reply], parts.descriptors), cls) for reply in parts.replies]


def holds(name: str) -> Steps[bool]:
    """Whether *name* is registered."""
    return bool((yield from names(literal(name))))


def info(name: str) -> Steps[m.EntryInfo]:
    parts = yield Exchange(m.Info(name))
    entries = _answer(parts, m.InfoList).entries
    if not entries:
        raise NameNotFound(name)
    return entries[0]


def infos(pattern: str) -> Steps[list[m.EntryInfo]]:
    parts = yield Exchange(m.Infos(pattern))
    return [entry for reply in _answers(parts, m.InfoList) for entry in reply.entries]


def explain(verb: str, name: str, uid: int, gid: int, groups: Iterable[int]) -> Steps[m.Explained]:
    parts = yield Exchange(m.Explain(verb, name, uid, gid, list(groups)))
    return _answer(parts, m.Explained)


def stats() -> Steps[m.ServerStats]:
    parts = yield Exchange(m.Stats())
    return _answer(parts, m.StatsReply).stats


def simple(request: m.Request) -> Steps[None]:
    """A request whose answer says only that it was done."""
    _answer((yield Exchange(request)), m.Done)
