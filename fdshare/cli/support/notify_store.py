"""What a service stores with FDSTORE=1: entries of the server, and back at the next start.

An entry under NAME/ with the metadata "fdstore" is one stored descriptor, if this user or root has
registered it: others may register there, too. When the program is started again, LISTEN_FDS has
them after the others, in the order in which they were stored.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from fdshare.activation import STORED, Notification, check_fdname
from fdshare.cli.support.fetch_exact import fetch_exact
from fdshare.errors import AccessDenied, FdshareError
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.open_file import same_open_file
from fdshare.printable import printable
from fdshare.protocol.names import literal

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.protocol.messages import EntryInfo

__all__ = ["Store", "stored"]

_MARK: Final = "fdstore"  # metadata of an entry: for which service it is stored ...
_FDNAME: Final = "fdname"  # ... and its name there


def stored(client: Client, service: str) -> list[tuple[str, Descriptor]]:
    """(fdname, descriptor) of all that is stored for *service*, in the order of storing.

    Nothing, and a line that says so, where the policy lets this user list no names. The caller owns
    the result.
    """
    try:
        return _stored(client, service)
    except AccessDenied as error:
        _warn(f"{service} gets nothing of what it may have stored: {error}")
        return []


def _stored(client: Client, service: str) -> list[tuple[str, Descriptor]]:
    found: list[tuple[str, Descriptor]] = []
    try:
        for entry in _entries(client, service):
            fetched = fetch_exact(client, entry)
            if fetched is not None:
                found += [(_fdname(entry), descriptor) for descriptor in fetched[1]]
    except BaseException:
        close_all(descriptor for _, descriptor in found)
        raise
    return found


def _entries(client: Client, service: str) -> list[EntryInfo]:
    """What is stored for *service*, in the order of storing."""
    entries = [
        entry
        for entry in client.infos(f"{literal(service)}/*")
        if entry.metadata.get(_MARK) == service and entry.registrant.uid in (0, os.geteuid())
    ]
    return sorted(entries, key=lambda entry: entry.generation)


def _fdname(entry: EntryInfo) -> str:
    return entry.metadata.get(_FDNAME, STORED)


class Store:
    """The descriptors that one service stores: FDSTORE=1, FDSTOREREMOVE=1."""

    def __init__(self, client: Client, service: str) -> None:
        self._client = client
        self._service = service

    def handle(self, said: Notification) -> None:
        """Stores or removes what *said* asks for. Raises: FdshareError: the server refuses."""
        name = said.value("FDNAME")
        if name is not None:
            try:
                check_fdname(name)
            except FdshareError as error:
                _warn(f"{error}; the name is ignored")
                name = None
        if said.says("FDSTOREREMOVE=1"):
            if name is None:
                _warn("FDSTOREREMOVE=1 without a name is ignored")
            else:
                self._remove(name)
        elif said.says("FDSTORE=1"):
            self._add(name or STORED, said.descriptors, poll=not said.says("FDPOLL=0"))

    def _add(self, fdname: str, descriptors: Sequence[Descriptor], *, poll: bool) -> None:
        held = _stored(self._client, self._service)
        try:
            for descriptor in descriptors:
                # As systemd, keep one copy of what is sent twice.
                if not any(_same(descriptor, other) for _, other in held):
                    self._register(fdname, descriptor, poll)
        finally:
            close_all(descriptor for _, descriptor in held)

    def _register(self, fdname: str, descriptor: Descriptor, poll: bool) -> None:
        """Registers it under NAME/FDNAME; the next of that name under NAME/FDNAME:2.

        No FDNAME has a colon.
        """
        taken = set(self._client.names(f"{literal(self._service)}/*"))
        name, number = f"{self._service}/{fdname}", 1
        while name in taken:
            number += 1
            name = f"{self._service}/{fdname}:{number}"
        with _with_its_kind(descriptor) as obj:
            self._client.register(
                name,
                obj,
                drop_on_hangup=poll,
                metadata={_MARK: self._service, _FDNAME: fdname},
            )

    def _remove(self, fdname: str) -> None:
        for entry in _entries(self._client, self._service):
            if _fdname(entry) == fdname:
                self._client.unregister(entry.name, if_generation=entry.generation)


@contextmanager
def _with_its_kind(descriptor: Descriptor) -> Iterator[object]:
    """A socket if *descriptor* is one, so that others fetch a socket; else *descriptor* itself."""
    copy = descriptor.dup()
    try:
        sock = copy.socket()
    except OSError:
        copy.close()
        yield descriptor
        return
    with sock:
        yield sock


def _same(one: Descriptor, other: Descriptor) -> bool:
    here = os.getpid()
    same = same_open_file(here, one.fileno(), here, other.fileno())
    if same is not None:
        return same
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _warn(message: str) -> None:
    print(f"fdshare: {printable(message)}", file=sys.stderr, flush=True)
