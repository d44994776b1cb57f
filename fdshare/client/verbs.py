"""Every verb as a generator: it yields the exchanges it needs, is sent the answers, returns the
result. What waits, and how, is the business of who drives it; refusals are raised into it.

So a verb is written once for the blocking and the asynchronous client.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from fdshare.client.conversation import Exchange, Parts
from fdshare.errors import NameNotFound, TooManyDescriptors
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import describe, rebuild
from fdshare.protocol import messages as m
from fdshare.protocol.names import MAX_ENTRY_DESCRIPTORS, check_metadata, check_name

T = TypeVar("T")
Steps: TypeAlias = Generator[Exchange, Parts, T]


def register(
    name: str,
    obj: Any,
    *,
    replace: bool,
    if_generation: int | None,
    lifetime: m.Lifetime,
    ttl: float | None,
    grace: float,
    drop_on_hangup: bool,
    metadata: Mapping[str, str] | None,
    lifeline: int | None,
) -> Steps[m.Entry]:
    check_name(name)
    check_metadata(metadata or {})
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
    parts = yield Exchange(request, given)
    reply: m.Registered = parts.replies[0]
    return m.Entry(reply.name, reply.generation)


def fetch(name: str, timeout: float | None) -> Steps[Any]:
    parts = yield Exchange(m.Fetch(name, timeout), wait=timeout)
    return rebuild(parts.replies[0].kind, parts.descriptors)


def fetch_raw(name: str, timeout: float | None) -> Steps[list[Descriptor]]:
    parts = yield Exchange(m.Fetch(name, timeout), wait=timeout)
    return parts.descriptors


def fetch_many(names: Iterable[str]) -> Steps[dict[str, Any]]:
    wanted = list(dict.fromkeys(names))
    found: dict[str, Any] = {}
    try:
        while len(found) < len(wanted):
            parts = yield Exchange(m.FetchMany(wanted[len(found) :]))
            _rebuild_items(parts, found)
    except BaseException:
        for obj in found.values():
            obj.close()
        raise
    return found


def _rebuild_items(parts: Parts, found: dict[str, Any]) -> None:
    """Adds the objects of one answer to *found*."""
    left = parts.descriptors
    try:
        for item in parts.replies[0].items:
            mine, left = left[: item.count], left[item.count :]
            found[item.name] = rebuild(item.kind, mine)
    except BaseException:
        close_all(left)
        raise


def take(name: str, timeout: float | None) -> Steps[Any]:
    while True:
        parts = yield Exchange(m.Take(name, timeout), wait=timeout)
        lease = parts.descriptors.pop()
        with lease:
            obj = rebuild(parts.replies[0].kind, parts.descriptors)
            if _confirm(lease):
                return obj
        # Revoked: the entry was replaced, removed or given back before we said that we have it.
        obj.close()


def take_raw(name: str, timeout: float | None) -> Steps[list[Descriptor]]:
    while True:
        parts = yield Exchange(m.Take(name, timeout), wait=timeout)
        with parts.descriptors.pop() as lease:
            if _confirm(lease):
                return parts.descriptors
        close_all(parts.descriptors)


def _confirm(lease: Descriptor) -> bool:
    """One byte on the lease; False where it was revoked. Never blocks: the buffer is empty."""
    sock = lease.socket()
    with sock:
        try:
            sock.send(b"\1")
        except (BrokenPipeError, ConnectionResetError):
            return False
    return True


def wait(name: str, timeout: float | None) -> Steps[m.Entry]:
    parts = yield Exchange(m.Wait(name, timeout), wait=timeout)
    return m.Entry(parts.replies[0].name, parts.replies[0].generation)


def unregister(name: str, if_generation: int | None) -> Steps[None]:
    yield Exchange(m.Unregister(name, if_generation))


def rename(old: str, new: str) -> Steps[m.Entry]:
    parts = yield Exchange(m.Rename(old, new))
    return m.Entry(parts.replies[0].name, parts.replies[0].generation)


def bind(name: str, address: str, backlog: int, reuse_port: bool) -> Steps[Any]:
    parts = yield Exchange(m.Bind(name, address, backlog, reuse_port))
    return rebuild(parts.replies[0].kind, parts.descriptors)


def names(pattern: str) -> Steps[list[str]]:
    parts = yield Exchange(m.Names(pattern))
    return [name for reply in parts.replies for name in reply.names]


def holds(name: str) -> Steps[bool]:
    """Whether *name* is there; a wildcard in it means itself."""
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    return bool((yield from names(escaped)))


def info(name: str) -> Steps[m.EntryInfo]:
    parts = yield Exchange(m.Info(name))
    entries: list[m.EntryInfo] = parts.replies[0].entries
    if not entries:
        raise NameNotFound(name)
    return entries[0]


def infos(pattern: str) -> Steps[list[m.EntryInfo]]:
    parts = yield Exchange(m.Infos(pattern))
    return [entry for reply in parts.replies for entry in reply.entries]


def explain(verb: str, name: str, uid: int, gid: int, groups: Iterable[int]) -> Steps[m.Explained]:
    parts = yield Exchange(m.Explain(verb, name, uid, gid, list(groups)))
    reply: m.Explained = parts.replies[0]
    return reply


def stats() -> Steps[m.ServerStats]:
    parts = yield Exchange(m.Stats())
    found: m.ServerStats = parts.replies[0].stats
    return found


def simple(request: m.Request) -> Steps[None]:
    """A request whose answer says only that it was done."""
    yield Exchange(request)
