"""Sockets: each arrives as a socket.socket with its timeout; a TLS socket is refused."""

from __future__ import annotations

import socket
from _socket import socket as _Socket
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

import msgspec

from fdshare.errors import ClosedDescriptor, KindMismatch, UnsupportedKind
from fdshare.kernel.descriptor import Descriptor, borrow
from fdshare.kernel.plain_socket import WITHOUT_TIMEOUT
from fdshare.kinds.described import Described, kind_of, only
from fdshare.protocol.kind import Kind

__all__ = [
    "SocketSpec",
    "describe_socket",
    "describe_wrapped",
    "rebuild_socket",
    "refuse_tls",
    "socket_maker",
]


class SocketSpec(msgspec.Struct, frozen=True, array_like=True):
    """What a socket.socket is made with, and its timeout in seconds."""

    family: int
    type: int
    proto: int
    # O_NONBLOCK lives in the shared description: both ends must agree on the timeout.
    timeout: float | None


_decode_socket: Final = msgspec.msgpack.Decoder(SocketSpec).decode
# The properties of socket.socket make enums of them, which cost more than all the rest here.
_family: Final[Callable[[Any], int]] = _Socket.family.__get__
_type: Final[Callable[[Any], int]] = _Socket.type.__get__
# Programs share few kinds of sockets, many times.
_socket_kinds: Final[dict[tuple[int, int, int, float | None], Kind]] = {}
_socket_makers: Final[dict[bytes, Callable[[int], socket.socket]]] = {}
_REMEMBERED: Final = 64


def describe_socket(sock: socket.socket) -> Described:
    """The kind and descriptor of *sock*, borrowed from it. It is a socket.socket, or one of those
    that gevent and eventlet have in its place. Raises: ClosedDescriptor."""
    fd = sock.fileno()
    if fd < 0:
        raise ClosedDescriptor("the socket is closed")
    try:
        key = _family(sock), _type(sock), sock.proto, sock.gettimeout()
    except TypeError:  # no socket of Python's
        key = int(sock.family), int(sock.type), sock.proto, sock.gettimeout()
    kind = _socket_kinds.get(key)
    if kind is None:
        kind = kind_of("socket", SocketSpec(*key))
        if len(_socket_kinds) < _REMEMBERED:
            _socket_kinds[key] = kind
    return kind, [fd]


def describe_wrapped(wrapper: Any) -> Described:
    """As `describe_socket`, for an event loop's wrapper around a socket, which is non-blocking."""
    fd = borrow(wrapper)
    spec = SocketSpec(int(wrapper.family), int(wrapper.type), wrapper.proto, 0.0)
    return kind_of("socket", spec), [fd]


def rebuild_socket(raw: msgspec.Raw, descriptors: list[Descriptor]) -> socket.socket:
    """The socket, which owns the descriptor now. Raises: KindMismatch: it is another socket."""
    key = bytes(raw)
    make = _socket_makers.get(key)
    if make is None:
        make = _maker(_decode_socket(key), -1)  # without a type the kernel is asked for it
        if len(_socket_makers) < _REMEMBERED:
            _socket_makers[key] = make
    return only("socket", descriptors).hand_to(make)


def socket_maker(raw: msgspec.Raw) -> Callable[[int], socket.socket]:
    """A function that makes a socket of a descriptor's number, to be called many times.

    It believes *raw* about the type of the socket, and checks that it is one, and its family. If
    it raises, the number is still open, and its caller's.
    """
    spec = _decode_socket(raw)
    return _maker(spec, spec.type)


def _maker(spec: SocketSpec, type: int) -> Callable[[int], socket.socket]:
    """A function that makes a socket of a descriptor's number. It checks the number against *spec*;
    with a *type* other than -1 it believes that, and does not ask the kernel."""
    family, proto, timeout = spec.family, spec.proto, spec.timeout
    cls, default_timeout = socket.socket, socket.getdefaulttimeout
    new, init = cls.__new__, cls.__init__
    # gevent and eventlet put their own classes there.
    is_foreign = not issubclass(cls, _Socket)
    family_of: Callable[[Any], int] = attrgetter("family") if is_foreign else _family
    type_of: Callable[[Any], int] = attrgetter("type") if is_foreign else _type

    def make(fd: int) -> socket.socket:
        # In two steps: a signal's handler may raise after any call, and we must know who owns *fd*.
        sock = new(cls)
        owns = False
        try:
            # Without a family the kernel is asked for it: that is our check that it is a socket.
            if default_timeout() is None:
                init(sock, -1, type, proto, fd)
                owns, found = True, type_of(sock) if type < 0 else type
            else:
                init(sock, -1, spec.type | WITHOUT_TIMEOUT, proto, fd)
                owns, found = True, sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            if family_of(sock) != family or found != spec.type:
                said = f"the kind says {family} and {spec.type}"
                raise KindMismatch("socket", f"family {family_of(sock)}, type {found}; {said}")
            if sock.gettimeout() != timeout:
                sock.settimeout(timeout)
        except BaseException as error:
            if owns or not is_foreign:
                sock.detach()
            if isinstance(error, OSError | OverflowError | ValueError):
                raise _mismatch(error, proto, timeout) from None
            raise
        return sock

    return make


def _mismatch(error: Exception, proto: int, timeout: float | None) -> KindMismatch:
    if isinstance(error, KindMismatch):
        return error
    if isinstance(error, OSError):
        return KindMismatch("socket", str(error.strerror))
    return KindMismatch("socket", f"protocol {proto} and a timeout of {timeout}: {error}")


def refuse_tls(sock: Any) -> Described:
    """Raises UnsupportedKind."""
    raise UnsupportedKind(
        type(sock).__qualname__,
        "the state of its TLS session is not in the descriptor; share the socket before wrapping",
    )
