"""The socket of NAME=ADDRESS: the one that is held, if it is that address and clients reach it.

A socket whose path is gone is bound anew. Every other difference is refused, unless the caller
keeps what is held or replaces it. The new socket is bound before the entry is replaced, so that no
connection is refused; who has the old one keeps it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import click

from fdshare.client.conversation import Exchange
from fdshare.client.reachable import is_at, why_unreachable
from fdshare.errors import AccessDenied, GenerationMismatch
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.bound_path import set_file
from fdshare.kernel.descriptor import Descriptor
from fdshare.printable import printable
from fdshare.protocol import messages as m
from fdshare.protocol.bind_address import BindAddress, parse_address
from fdshare.server.loop.binding import bind_address, gid_of
from fdshare.server.loop.inspect import describe_descriptor

if TYPE_CHECKING:
    from fdshare.client.blocking.client import Client
    from fdshare.client.verbs import Steps

__all__ = ["Difference", "Mismatch", "WantedAddress", "held_socket"]

Mismatch: TypeAlias = Literal["refuse", "keep", "rebind"]

_ATTEMPTS: Final = 5  # others may replace it at the same time


class Difference(click.ClickException):
    """What is held under the name is not what was asked for."""


@dataclass(frozen=True, slots=True)
class WantedAddress:
    """NAME=ADDRESS, and what to do where something else is held."""

    name: str
    address: str
    backlog: int
    reuse_port: bool
    mismatch: Mismatch


def held_socket(client: Client, wanted: WantedAddress) -> Descriptor:
    """The socket of *wanted*, bound by the server if nothing is held. The caller owns the result.

    Raises: Difference; and as Client.bind.
    """
    address = parse_address(wanted.address)
    replaces: int | None = None
    for _ in range(_ATTEMPTS):
        try:
            given, descriptors = client._do(_bind(wanted, replaces))
        except AccessDenied:
            if replaces is None:
                raise
            # The server may not bind it for this user.
            given, descriptors = _bound_here(client, wanted, replaces)
        try:
            difference, gone = _difference(address, descriptors, given.kind.tag)
            if gone and given.generation == replaces:  # it is there where the server is
                difference, replaces = "", None
            if not difference or (wanted.mismatch == "keep" and len(descriptors) == 1):
                if replaces is not None:
                    said = printable(f"{wanted.name} is bound anew, at {address}")
                    print(f"fdshare: {said}", file=sys.stderr, flush=True)
                return descriptors.pop(0)
        finally:
            close_all(descriptors)
        if wanted.mismatch == "refuse" and not gone:
            raise Difference(
                f"{wanted.name} is held, but {difference}; --keep goes on with what is held, "
                "--rebind replaces it"
            )
        if difference == _wrong_file(address):
            owner = (-1, gid_of(address)) if address.group else None
            set_file(address.path, address.mode, owner)
        else:
            replaces = given.generation
    raise Difference(f"{wanted.name} is replaced again and again by somebody else")


def _difference(address: BindAddress, descriptors: list[Descriptor], tag: str) -> tuple[str, bool]:
    """(how they differ from *address*, or empty; whether it is only that the path is gone)."""
    if len(descriptors) != 1:
        return f"it is a {tag} of {len(descriptors)} descriptors, not a socket", False
    found = describe_descriptor(descriptors[0].fileno(), bound_to=address.path)
    if found.type != "socket":
        return f"it is a {found.type}, not a socket for {address}", False
    family, kind = _sort_of(address)
    if (found.family, found.socket_type) != (family, kind):
        return f"it is a socket {found.family}/{found.socket_type}, not {address}", False
    if kind == "stream" and not found.listening:
        return "it does not listen: it is a connection, or somebody has shut it down", False
    if not is_at(address, found.local):
        return f"it is at {found.local or 'no address'}, not at {address}", False
    wrong, gone = why_unreachable(descriptors[0].fileno(), address)
    return (wrong, gone) if wrong else (_wrong_file(address), False)


def _sort_of(address: BindAddress) -> tuple[str, str]:
    """(family, type) of a socket, as DescriptorInfo has them."""
    if address.scheme == "unix":
        return "unix", "stream"
    return "inet6" if address.is_ipv6 else "inet", "stream" if address.scheme == "tcp" else "dgram"


def _wrong_file(address: BindAddress) -> str:
    """Whether the socket's file has another mode or group than *address* says."""
    if address.mode is None and not address.group:
        return ""
    try:
        info = os.stat(address.path)
    except OSError:
        return ""
    mode = info.st_mode & 0o777
    if address.mode not in (None, mode):
        return f"the mode of its file is {mode:04o}, not as {address}"
    if address.group and info.st_gid != gid_of(address):
        return f"the group of its file is {info.st_gid}, not as {address}"
    return ""


# To replace it.


def _bound_here(
    client: Client, wanted: WantedAddress, replaces: int
) -> tuple[m.Given, list[Descriptor]]:
    """What is held after this process has bound the address, and replaced the entry if it still had
    that generation. Raises: as bind_address and Client.register."""
    with bind_address(wanted.address, backlog=wanted.backlog, reuse_port=wanted.reuse_port) as sock:
        try:
            client.register(wanted.name, sock, if_generation=replaces)
        except GenerationMismatch:
            pass
    return client._do(_bind(wanted))


def _bind(
    wanted: WantedAddress, replaces: int | None = None
) -> Steps[tuple[m.Given, list[Descriptor]]]:
    """What is held, whatever it is; `Client.bind` refuses what is no socket."""
    parts = yield Exchange(
        m.Bind(wanted.name, wanted.address, wanted.backlog, wanted.reuse_port, replaces)
    )
    given: m.Given = parts.replies[0]
    return given, parts.descriptors
