"""Kinds: a Python object to (Kind, descriptors), and back.

A kind says how to rebuild an object around its descriptors. It is data, a tag and a typed Struct,
never a pickle: whoever sends one can make us build a socket or a file of the wrong kind, and
nothing else. The receiver checks the kind against the descriptor all the same.

===========================================  ==========================================
shared                                       rebuilt as
===========================================  ==========================================
socket.socket and subclasses                 socket.socket, with its timeout
what asyncio, trio and uvloop put around it  socket.socket, non-blocking
FileIO, Buffered*, TextIOWrapper             the same class, at the same position
files of makefile()                          the same class, with a socket of its own
temporary files                              the file; its creator deletes it
Connection: multiprocessing, multiprocess,   the same class, readable and writable alike
fdshare
SharedMemory                                 the same memory, not a copy
a numpy array that lies in one               a numpy array in the same memory
Descriptor, a number, anything with fileno() Descriptor
ssl.SSLSocket                                refused: its state is not in the descriptor
yours                                        what you registered: `register_kind`
===========================================  ==========================================
"""

from __future__ import annotations

import importlib
import io
import os
import socket
import stat
import sys
from _socket import socket as _Socket
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from fdshare.errors import (
    ClosedDescriptor,
    InvalidArgument,
    KindMismatch,
    UnknownKind,
    UnsupportedKind,
)
from fdshare.kernel.ancillary import close_all
from fdshare.kernel.descriptor import Descriptor, HasFileno, borrow
from fdshare.kinds.files import FileSpec, assemble, take_apart
from fdshare.protocol.kind import Kind

__all__ = [
    "Kind",
    "describe",
    "describers",
    "in_shared_memory",
    "is_shareable",
    "rebuild",
    "rebuilder",
    "register_kind",
    "unregister_kind",
    "user_kinds",
]

Described: TypeAlias = tuple[Kind, list[int]]
UserDescribe: TypeAlias = Callable[[Any], tuple[Any, Sequence[HasFileno | int]]]
UserRebuild: TypeAlias = Callable[[Any, list[Descriptor]], Any]

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_any: Final = msgspec.msgpack.Decoder().decode


def describe(obj: Any) -> Described:
    """The kind of *obj* and the numbers of its descriptors, borrowed: valid while *obj* stays open.

    Flushes writers, and moves the offset of a seekable reader to its logical position.

    Raises: UnsupportedKind: no descriptor, or the state is not in it; ClosedDescriptor; UnreadData:
    a pipe's file object has read ahead; OSError of a flush. *obj* is borrowed for the call.
    """
    describe_it = describers.get(type(obj))
    if describe_it is None:
        describe_it = _describer_of(type(obj)) or _describe_descriptor
    return describe_it(obj)


def rebuild(kind: Kind, descriptors: list[Descriptor]) -> Any:
    """The object that *kind* describes, around *descriptors*, which now belong to it.

    Raises: KindMismatch: they are not what the kind says; UnknownKind. Whatever is raised, every
    one of *descriptors* is closed. The caller owns the result.
    """
    if kind.tag == "descriptor" and len(descriptors) == 1:
        return descriptors[0]  # what came is what was meant
    try:
        rebuild_it = _rebuilders.get(kind.tag)
        if rebuild_it is None:
            raise UnknownKind(kind.tag)
        return rebuild_it(kind.spec, descriptors)
    except BaseException as error:
        close_all(descriptors)
        if isinstance(error, msgspec.MsgspecError | UnicodeDecodeError):
            raise KindMismatch(kind.tag, f"its description is not one: {error}") from None
        raise


def rebuilder(kind: Kind) -> Callable[[int], Any]:
    """`rebuild` for *kind* and one descriptor's number, to be called many times, for those who
    believe what they are told of it: of a socket, its type. That it is one, and of which family, is
    looked at. Whatever is raised, the descriptor is closed."""
    if kind.tag == "socket":
        spec = _decode_socket(kind.spec)
        return _maker(spec, spec.type)
    if kind.tag == "descriptor":
        return Descriptor
    return lambda fd: rebuild(kind, [Descriptor(fd)])


def is_shareable(cls: type) -> bool:
    """True if objects of *cls* have a kind of their own: more than "something with fileno()"."""
    return cls in describers or _describer_of(cls) is not None


def in_shared_memory(array: Any) -> bool:
    """True if a numpy array lies in a SharedMemory that is not closed: it need not be copied."""
    memory = sys.modules.get("fdshare.kernel.shared_memory")
    if memory is None:
        return False
    try:
        return memory.array_place(array) is not None
    except ClosedDescriptor:
        return False


def register_kind(cls: type, tag: str, describe: UserDescribe, rebuild: UserRebuild) -> None:
    """From now on objects of *cls* and its subclasses are shared under *tag*, in this process.

    `describe(obj)` returns (what msgpack can carry, things with fileno() or numbers), which stay
    *obj*'s. `rebuild(that, descriptors)` gets the Descriptors and returns the object; the ones it
    neither keeps, detaches nor closes are its to lose; if it raises, all are closed. The receiver
    must register the same tag.

    Raises: InvalidArgument: the tag is empty, one of fdshare's, or another class's.
    """
    if not tag or tag in _BUILT_IN_TAGS:
        raise InvalidArgument("tag", f"{tag!r} belongs to fdshare" if tag else "it is empty")
    owner = _registered.get(tag)
    if owner is not None and owner is not cls:
        raise InvalidArgument("tag", f"{tag!r} is already the tag of {owner.__qualname__}")

    def describe_user(obj: Any) -> Described:
        spec, holders = describe(obj)
        return Kind(tag, msgspec.Raw(_encode(spec))), [borrow(holder) for holder in holders]

    def rebuild_user(spec: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
        return rebuild(_decode_any(spec), descriptors)

    _registered[tag] = cls
    user_kinds[cls] = describers[cls] = describe_user
    _rebuilders[tag] = rebuild_user


def unregister_kind(tag: str) -> None:
    """The tag is unknown again. Raises: UnknownKind: it was not registered by `register_kind`."""
    cls = _registered.pop(tag, None)
    if cls is None:
        raise UnknownKind(tag)
    del user_kinds[cls], _rebuilders[tag]
    if cls in _BUILT_IN_DESCRIBERS:
        describers[cls] = _BUILT_IN_DESCRIBERS[cls]
    else:
        del describers[cls]


# Sockets


class SocketSpec(msgspec.Struct, frozen=True, array_like=True):
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


def _describe_socket(sock: socket.socket) -> Described:
    fd = sock.fileno()
    if fd < 0:
        raise ClosedDescriptor("the socket is closed")
    key = _family(sock), _type(sock), sock.proto, sock.gettimeout()
    kind = _socket_kinds.get(key)
    if kind is None:
        kind = Kind("socket", msgspec.Raw(_encode(SocketSpec(*key))))
        if len(_socket_kinds) < _REMEMBERED:
            _socket_kinds[key] = kind
    return kind, [fd]


def _describe_wrapped(wrapper: Any) -> Described:
    """An event loop's clothes around a socket, which it keeps non-blocking."""
    fd = borrow(wrapper)
    spec = SocketSpec(int(wrapper.family), int(wrapper.type), wrapper.proto, 0.0)
    return Kind("socket", msgspec.Raw(_encode(spec))), [fd]


def _rebuild_socket(raw: msgspec.Raw, descriptors: list[Descriptor]) -> socket.socket:
    key = bytes(raw)
    make = _socket_makers.get(key)
    if make is None:
        make = _maker(_decode_socket(key), -1)  # without a type the kernel is asked for it
        if len(_socket_makers) < _REMEMBERED:
            _socket_makers[key] = make
    (descriptor,) = _exactly(1, "socket", descriptors)
    return make(descriptor.detach())


def _maker(spec: SocketSpec, type: int) -> Callable[[int], socket.socket]:
    """What makes sockets of *spec* of descriptors; *type* is what it says of that, or -1."""
    family, proto, timeout = spec.family, spec.proto, spec.timeout
    new, family_of = socket.socket, _family

    def make(fd: int) -> socket.socket:
        try:
            # Without a family the kernel is asked for it: that is our check that it is a socket.
            sock = new(-1, type, proto, fd)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise KindMismatch("socket", f"{getattr(error, 'strerror', error)}") from None
        if family_of(sock) != family or (type < 0 and _type(sock) != spec.type):
            found = f"family {_family(sock)}, type {_type(sock)}"
            sock.close()
            raise KindMismatch("socket", f"{found}; the kind says {family} and {spec.type}")
        if sock.gettimeout() != timeout:
            try:
                sock.settimeout(timeout)
            except (ValueError, OverflowError) as error:
                sock.close()
                raise KindMismatch("socket", f"a timeout of {timeout}: {error}") from None
        return sock

    return make


def _refuse_tls(sock: Any) -> Described:
    raise UnsupportedKind(
        type(sock).__qualname__,
        "the state of its TLS session is not in the descriptor; share the socket before wrapping",
    )


# Files


_decode_file: Final = msgspec.msgpack.Decoder(FileSpec).decode


def _describe_file(file: Any) -> Described:
    spec, fds = take_apart(file)
    return Kind("file", msgspec.Raw(_encode(spec))), fds


def _rebuild_file(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    return assemble(_decode_file(raw), descriptors)


def _describe_temporary(wrapper: Any) -> Described:
    return _describe_file(wrapper.file)


def _describe_spooled(spooled: Any) -> Described:
    spooled.rollover()  # from memory into a file that has a descriptor
    return _describe_file(spooled._file)  # the only way to it; there since 2.6


# Connections


class ConnectionSpec(msgspec.Struct, frozen=True, array_like=True):
    family: str  # a key of _CONNECTIONS
    readable: bool
    writable: bool


# What a Connection of each family is called and who defines it. Looked up by name, so that neither
# multiprocess (it brings dill) nor multiprocessing is imported before an object of theirs is seen.
_CONNECTIONS: Final = {
    "multiprocessing": ("multiprocessing.connection", "Connection"),
    "multiprocess": ("multiprocess.connection", "Connection"),
    "fdshare": ("fdshare.mp.on_multiprocessing", "Connection"),
    "fdshare-multiprocess": ("fdshare.mp.on_multiprocess", "Connection"),
}
_FAMILIES: Final = {name: family for family, name in _CONNECTIONS.items()}
_decode_connection: Final = msgspec.msgpack.Decoder(ConnectionSpec).decode


def _describe_connection(connection: Any) -> Described:
    fd = borrow(connection)
    for cls in type(connection).__mro__:
        family = _FAMILIES.get((cls.__module__, cls.__qualname__))
        if family is not None:
            break
    else:
        raise UnsupportedKind(type(connection).__qualname__, "it is no Connection we know")
    spec = ConnectionSpec(family, connection.readable, connection.writable)
    return Kind("connection", msgspec.Raw(_encode(spec))), [fd]


def _rebuild_connection(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    spec = _decode_connection(raw)
    (descriptor,) = _exactly(1, "connection", descriptors)
    if spec.family not in _CONNECTIONS or not (spec.readable or spec.writable):
        raise KindMismatch("connection", "it is of no family we know, or for nothing")
    mode = os.fstat(descriptor.fileno()).st_mode
    if not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
        raise KindMismatch("connection", "neither a socket nor a pipe")
    module, name = _CONNECTIONS[spec.family]
    cls = getattr(sys.modules.get(module) or importlib.import_module(module), name)
    return cls(descriptor.detach(), spec.readable, spec.writable)


# Memory. It is imported when there is some: most programs share none.


def _describe_memory(memory: Any) -> Described:
    from fdshare.kinds.memory import take_memory_apart

    spec, fd = take_memory_apart(memory)
    return Kind("memory", msgspec.Raw(_encode(spec))), [fd]


def _describe_array(array: Any) -> Described:
    from fdshare.kinds.memory import take_array_apart

    spec, fd = take_array_apart(array)
    return Kind("array", msgspec.Raw(_encode(spec))), [fd]


def _rebuild_memory(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    from fdshare.kinds.memory import MemorySpec, assemble_memory

    spec = msgspec.msgpack.decode(raw, type=MemorySpec)
    (descriptor,) = _exactly(1, "memory", descriptors)
    return assemble_memory(spec, descriptor)


def _rebuild_array(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    from fdshare.kinds.memory import ArraySpec, assemble_array

    spec = msgspec.msgpack.decode(raw, type=ArraySpec)
    (descriptor,) = _exactly(1, "array", descriptors)
    return assemble_array(spec, descriptor)


# Descriptors

_DESCRIPTOR: Final = Kind("descriptor", msgspec.Raw(_encode(None)))


def _describe_descriptor(obj: Any) -> Described:
    if hasattr(type(obj), "__array_interface__"):
        return _describe_array(obj)  # not by type: an array is shareable by where it lies
    return _DESCRIPTOR, [borrow(obj)]


def _rebuild_descriptor(_: msgspec.Raw, descriptors: list[Descriptor]) -> Descriptor:
    (descriptor,) = _exactly(1, "descriptor", descriptors)
    return descriptor


def _exactly(count: int, tag: str, descriptors: list[Descriptor]) -> list[Descriptor]:
    if len(descriptors) != count:
        raise KindMismatch(tag, f"{len(descriptors)} descriptors instead of {count}")
    return descriptors


# The tables

Describer: TypeAlias = Callable[[Any], Described]

_BUILT_IN_DESCRIBERS: Final[dict[type, Describer]] = {
    socket.socket: _describe_socket,
    Descriptor: _describe_descriptor,
    io.FileIO: _describe_file,
    io.BufferedReader: _describe_file,
    io.BufferedWriter: _describe_file,
    io.BufferedRandom: _describe_file,
    io.BufferedRWPair: _describe_file,
    io.TextIOWrapper: _describe_file,
    socket.SocketIO: _describe_file,
}
# Classes of modules that a program may never import, by module and name.
_BY_NAME: Final[dict[tuple[str, str], Describer]] = {
    ("ssl", "SSLSocket"): _refuse_tls,
    ("ssl", "SSLObject"): _refuse_tls,
    ("asyncio.trsock", "TransportSocket"): _describe_wrapped,
    ("trio._socket", "_SocketType"): _describe_wrapped,
    ("uvloop.loop", "PseudoSocket"): _describe_wrapped,
    ("tempfile", "_TemporaryFileWrapper"): _describe_temporary,
    ("tempfile", "SpooledTemporaryFile"): _describe_spooled,
    ("fdshare.kernel.shared_memory", "SharedMemory"): _describe_memory,
    **dict.fromkeys(_CONNECTIONS.values(), _describe_connection),
}
# Exact types, and those that a program has registered, for who must know them at a glance.
describers: Final[dict[type, Describer]] = dict(_BUILT_IN_DESCRIBERS)
user_kinds: Final[dict[type, Describer]] = {}
_registered: Final[dict[str, type]] = {}

_rebuilders: Final[dict[str, Callable[[msgspec.Raw, list[Descriptor]], Any]]] = {
    "socket": _rebuild_socket,
    "file": _rebuild_file,
    "connection": _rebuild_connection,
    "descriptor": _rebuild_descriptor,
    "memory": _rebuild_memory,
    "array": _rebuild_array,
}
_BUILT_IN_TAGS: Final = frozenset(_rebuilders)


def _describer_of(cls: type) -> Describer | None:
    """The one of the nearest base class that has one."""
    for base in cls.__mro__:
        found = describers.get(base) or _BY_NAME.get((base.__module__, base.__qualname__))
        if found is not None:
            return found
    return None
