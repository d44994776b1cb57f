"""The addresses of `bind`: tcp://HOST:PORT, udp://HOST:PORT, unix:///PATH, unix:@NAME. Pure.

Each address has one spelling, because a policy compares spellings. A second spelling is refused
with a message that says the first; only `localhost` is read as 127.0.0.1.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, Literal, NamedTuple, TypeAlias

from fdshare.errors import InvalidArgument

__all__ = ["BindAddress", "parse_address"]

Scheme: TypeAlias = Literal["tcp", "udp", "unix"]

_GROUP: Final = r"group=([\w.-]{1,32})"
_FILE: Final = re.compile(rf"(.*)\?(?:mode=(0?[0-7]{{3}})(?:&{_GROUP})?|{_GROUP})", re.ASCII)
_NETWORK: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):(0|[1-9][0-9]{0,4})")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST: Final = 4200  # characters: a path has at most 4096 bytes, PATH_MAX
_SHOWN: Final = 200  # characters of an address in an error
_FORMS: Final = "tcp://HOST:PORT, udp://HOST:PORT, unix:///PATH or unix:@NAME"


class BindAddress(NamedTuple):
    """An address: *host* and *port* of tcp and udp; *path* of unix, where a first `@` is abstract.

    The host `*` is all interfaces, IPv4 and IPv6 in one socket. str() is its one spelling.
    """

    scheme: Scheme
    host: str = ""
    port: int = 0
    path: str = ""
    mode: int | None = None  # of the socket's file; None is the default
    group: str = ""  # of the socket's file: a name or a number; empty is the server's

    @property
    def is_ipv6(self) -> bool:
        """Whether its socket is one of IPv6."""
        return ":" in self.host or self.is_dual

    @property
    def is_dual(self) -> bool:
        return self.host == "*"

    def __str__(self) -> str:
        if self.scheme == "unix":
            text = f"unix:{self.path}" if self.path.startswith("@") else f"unix://{self.path}"
            of_file = [] if self.mode is None else [f"mode={self.mode:04o}"]
            of_file += [f"group={self.group}"] if self.group else []
            return f"{text}?{'&'.join(of_file)}" if of_file else text
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_address(text: str) -> BindAddress:
    """The address that *text* is.

    HOST is an IPv4 address, an IPv6 address in brackets, `*` or `localhost`; other names are not
    looked up, because that may block for seconds. With PORT 0 the kernel chooses. A path is
    absolute; `?mode=0660&group=www-data` after it are of the socket's file.
    Raises: InvalidArgument, which says how to write it.
    """
    if not isinstance(text, str):  # as socket.bind() has it: ("127.0.0.1", 80)
        raise InvalidArgument("address", f"{text!r} is not an address to bind: write {_FORMS}")
    if len(text) > _LONGEST:
        raise _bad(text, f"it has {len(text)} characters, at most {_LONGEST}")
    if _CONTROL.search(text):
        raise _bad(text, "it has a control character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(text, "it cannot be encoded as UTF-8") from None
    if text.startswith("unix:"):
        return _unix(text, text.removeprefix("unix:"))
    for scheme in ("tcp", "udp"):
        if text.startswith(f"{scheme}://"):
            return _network(text, scheme, text[len(scheme) + 3 :])
    raise _bad(text, f"write {_FORMS}")


def _network(text: str, scheme: Scheme, rest: str) -> BindAddress:
    match = _NETWORK.fullmatch(rest)
    if match is None:
        raise _bad(text, f"write {scheme}://127.0.0.1:PORT or {scheme}://[::1]:PORT")
    v6, host, digits = match.groups()
    if int(digits) > 65535:
        raise _bad(text, "a port is at most 65535")
    if v6 is not None:
        return BindAddress(scheme, _ipv6(text, v6), int(digits))
    if host == "localhost":
        return BindAddress(scheme, "127.0.0.1", int(digits))
    if host == "*":
        return BindAddress(scheme, "*", int(digits))
    try:
        # Four decimal numbers without leading zeros, nothing else that inet_aton(3) would take.
        return BindAddress(scheme, str(ipaddress.IPv4Address(host)), int(digits))
    except ValueError:
        raise _bad(
            text,
            f"{host[:_SHOWN]!r} is not a numeric address; names other than localhost are not "
            "looked up, and all interfaces are 0.0.0.0, [::] or * (both)",
        ) from None


def _ipv6(text: str, host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise _bad(text, f"{host[:_SHOWN]!r} is not an IPv6 address") from None
    if address.ipv4_mapped is not None:
        raise _bad(text, f"write the IPv4 address: {address.ipv4_mapped}")
    if address.scope_id is not None and not address.is_link_local:
        raise _bad(text, "only a link-local address has a scope")
    number, percent, scope = host.partition("%")  # of a scope, upper case is another name
    if str(address) != number.lower() + percent + scope:
        raise _bad(text, f"write [{address}]")
    return str(address)


def _unix(text: str, rest: str) -> BindAddress:
    mode, group = None, ""
    if match := _FILE.fullmatch(rest):
        rest, group = match[1], match[3] or match[4] or ""
        mode = int(match[2], 8) if match[2] else None
    if rest.startswith("@"):
        if match:
            raise _bad(text, "an abstract name has no mode and no group")
        if not rest.strip("@"):
            raise _bad(text, "the abstract name is empty")
        return BindAddress("unix", path=rest)
    path = rest.removeprefix("//")
    if not rest.startswith("///") or len(path) < 2:
        raise _bad(text, "write unix:///PATH with an absolute path, or unix:@NAME")
    if any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise _bad(text, "write a path without '//', '.', '..' and a slash at its end")
    return BindAddress("unix", path=path, mode=mode, group=group)


def _bad(text: str, reason: str) -> InvalidArgument:
    shown = ascii(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!a}..."
    return InvalidArgument("address", f"{shown} is not an address to bind: {reason}")
