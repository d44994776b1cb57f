"""Whether a client reaches the socket that `bind` found under its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdshare.kernel.descriptor_limit import first_use

if TYPE_CHECKING:
    from fdshare.protocol.bind_address import BindAddress

__all__ = ["is_at", "why_nobody_can_connect", "why_unreachable"]


def why_unreachable(fd: int, address: BindAddress) -> tuple[str, bool]:
    """(why nobody can connect to a socket; whether only its path is gone); empty where nothing is
    known to be wrong with it.

    A path is looked up if it is that of *address*, which the caller has chosen: another may be on a
    file system that never answers. *fd* is borrowed for the call.
    """
    with first_use():
        from fdshare.server.loop.inspect import THROUGH_FOLDER, describe_descriptor

    found = describe_descriptor(fd, look_up_path=False)
    if found.type != "socket" or found.socket_type != "stream" or found.peer:
        return "", False
    if not found.listening:
        # One that was never bound may be what somebody has registered.
        return ("it does not listen, or somebody has shut it down" if found.local else ""), False
    through_folder = found.local.startswith(THROUGH_FOLDER)
    if address.scheme == "unix" and is_at(address, found.local):
        found = describe_descriptor(fd, bound_to=address.path)
    wrong = found.health if "nobody can connect" in found.health else ""
    # Of a long path only the last part is known: it may be well, and in another folder.
    return wrong, wrong.startswith("nothing is at") and not through_folder


def why_nobody_can_connect(fd: int) -> str:
    """What is wrong with a listening socket, wherever it is; empty where nothing is known to be.
    *fd* is borrowed for the call."""
    with first_use():
        from fdshare.server.loop.inspect import describe_descriptor

    found = describe_descriptor(fd)
    return found.health if found.listening and "nobody can connect" in found.health else ""


def is_at(address: BindAddress, local: str) -> bool:
    """Whether a socket that the kernel says is bound to *local* is at *address*; of a long path,
    whether it may be."""
    from fdshare.server.loop.inspect import is_last_part

    if address.scheme == "unix":
        return local == address.path or is_last_part(local, address.path)
    host, _, port = local.rpartition(":")
    wanted = f"[{address.host}]" if ":" in address.host else address.host
    if host.partition("%")[0].rstrip("]") != wanted.partition("%")[0].rstrip("]"):
        return False
    return address.port in (0, int(port))
