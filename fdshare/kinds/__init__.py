"""Kinds: a Python object to (Kind, descriptors), and back.

A kind says how to rebuild an object around its descriptors. It is data, a tag and a typed Struct,
never a pickle: the most that a sender can do is to make us build a socket or a file of the wrong
kind, and the receiver checks the kind against the descriptor.

===========================================  ==========================================
shared                                       rebuilt as
===========================================  ==========================================
socket.socket and subclasses                 socket.socket, with its timeout
what gevent and eventlet have in its place   socket.socket, as it is where that arrives
what asyncio, trio and uvloop put around it  socket.socket, non-blocking
FileIO, Buffered*, TextIOWrapper             the same class, at the same position
BufferedRWPair                               refused: Python does not say what it is made of
files of makefile()                          the same class, with a socket of its own
temporary files                              the file; its creator deletes it
Connection: multiprocessing, multiprocess,   the same class, readable and writable alike
fdshare
SharedMemory                                 the same memory, not a copy
a numpy array that lies in one               a numpy array in the same memory
of a class that derives from it              refused: its mask, its unit is not in the memory
Descriptor, a number, anything with fileno() Descriptor
ssl.SSLSocket                                refused: its state is not in the descriptor
yours                                        what you registered: `register_kind`
===========================================  ==========================================
"""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from fdshare.errors import (
    ClosedDescriptor,
    DescriptorLimit,
    InvalidArgument,
    KindMismatch,
    UnknownKind,
)
from fdshare.kernel.ancillary import discard_all
from fdshare.kernel.descriptor import Descriptor, HasFileno, borrow
from fdshare.kernel.descriptor_limit import Whose, as_limit
from fdshare.kinds.connections import CONNECTIONS, describe_connection, rebuild_connection
from fdshare.kinds.described import Described, Describer, Rebuilder, kind_of, only
from fdshare.kinds.files import (
    describe_file,
    describe_spooled,
    describe_temporary,
    rebuild_file,
)
from fdshare.kinds.sockets import (
    describe_socket,
    describe_wrapped,
    rebuild_socket,
    refuse_tls,
    socket_maker,
)
from fdshare.protocol.kind import Kind

__all__ = [
    "Kind",
    "base_with_kind",
    "describe",
    "describers",
    "discard",
    "in_shared_memory",
    "is_shareable",
    "owned",
    "rebuild",
    "rebuilder",
    "register_kind",
    "unregister_kind",
    "user_kinds",
]

UserDescribe: TypeAlias = Callable[[Any], tuple[Any, Sequence[HasFileno | int]]]
UserRebuild: TypeAlias = Callable[[Any, list[Descriptor]], Any]

_decode_any: Final = msgspec.msgpack.Decoder().decode


def describe(obj: object) -> Described:
    """The kind of *obj* and the numbers of its descriptors, borrowed: valid while *obj* stays open.

    Flushes writers, and moves the offset of a seekable reader to its logical position.

    Raises: UnsupportedKind: no descriptor, or the state is not in it; ClosedDescriptor; UnreadData:
    a pipe's file object has read ahead; OSError of a flush. *obj* is borrowed for the call.
    """
    describe_it = describers.get(type(obj))
    if describe_it is None:
        describe_it = _describer_of(type(obj)) or _describe_descriptor
    return describe_it(obj)


def rebuild(kind: Kind, descriptors: list[Descriptor], keep: bool = False) -> Any:
    """The object that *kind* describes, around *descriptors*, which now belong to it.

    Raises: KindMismatch: they are not what the kind says; UnknownKind; DescriptorLimit: none is
    free to import what it takes. Whatever is raised, every one of *descriptors* is closed; but with
    *keep* and DescriptorLimit they are still open, and the caller's, who may try again. The caller
    owns the result.
    """
    if kind.tag == "descriptor" and len(descriptors) == 1:
        return owned(descriptors)[0]
    try:
        rebuild_it = _rebuilders.get(kind.tag)
        if rebuild_it is None:
            raise UnknownKind(kind.tag)
        return rebuild_it(kind.spec, descriptors)
    except BaseException as error:
        if not keep or type(error) is not DescriptorLimit or kind.tag not in _BUILT_IN_TAGS:
            discard_all(descriptors)
        # RecursionError: a description that is nested too deeply.
        if isinstance(error, msgspec.MsgspecError | UnicodeDecodeError | RecursionError):
            raise KindMismatch(kind.tag, f"its description cannot be read: {error}") from None
        raise


def owned(descriptors: list[Descriptor]) -> list[Descriptor]:
    """*descriptors*, where one is a Spare as a Descriptor; the caller owns the result."""
    for descriptor in descriptors:
        if type(descriptor) is not Descriptor:
            return [descriptor.hand_to(Descriptor) for descriptor in descriptors]
    return descriptors


def discard(obj: Any) -> None:
    """Closes what `rebuild` made and nobody gets. A numpy array has no close(): its memory goes
    with the last reference. Never raises."""
    try:
        getattr(obj, "close", _nothing)()
    except Exception:
        pass  # nobody gets the object, so nobody is told what close(2) says


def _nothing() -> None:
    pass


def rebuilder(kind: Kind) -> Callable[[int], Any] | None:
    """As `rebuild` for *kind*, of one descriptor's number, to be called many times; None for a kind
    whose objects take more than that.

    It believes *kind* about the type of a socket, and checks that it is one, and its family. If it
    raises, the number is still open, and its caller's.
    """
    if kind.tag == "socket":
        return socket_maker(kind.spec)
    return Descriptor if kind.tag == "descriptor" else None


def is_shareable(cls: type) -> bool:
    """True if objects of *cls* have a kind of their own: more than "something with fileno()"."""
    return cls in describers or _describer_of(cls) is not None


def base_with_kind(cls: type) -> type | None:
    """*cls*, or the nearest of its base classes whose objects have a kind of their own."""
    return next((base for base in cls.__mro__ if _own_describer(base)), None)


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

    `describe(obj)` returns (a description that msgpack can carry, the descriptors: things with
    fileno(), or numbers), which stay *obj*'s. `rebuild(description, descriptors)` gets Descriptors,
    owns them and returns the object; if it raises, all are closed. The receiver must register the
    same tag.

    Raises: InvalidArgument: the tag is empty, one of fdshare's, or another class's.

    >>> class Log:
    ...     def __init__(self, file, level):
    ...         self.file, self.level = file, level
    >>> def describe(log):
    ...     return log.level, [log.file]
    >>> def rebuild(level, descriptors):
    ...     return Log(descriptors[0].open("a"), level)
    >>> fdshare.register_kind(Log, "example.log", describe, rebuild)
    >>> receiver, sender = fdshare.get_context().Pipe()
    >>> with receiver, sender, open(os.devnull, "a") as file:
    ...     sender.send(Log(file, 3))
    ...     again = receiver.recv()
    >>> with again.file:
    ...     again.level
    3
    >>> fdshare.unregister_kind("example.log")
    """
    if not tag or tag in _BUILT_IN_TAGS:
        raise InvalidArgument("tag", f"{tag!r} belongs to fdshare" if tag else "it is empty")
    owner, _ = _registered.get(tag, (cls, None))
    if owner is not cls:
        raise InvalidArgument("tag", f"{tag!r} is already the tag of {owner.__qualname__}")

    def describe_user(obj: Any) -> Described:
        spec, holders = describe(obj)
        return kind_of(tag, spec), [borrow(holder) for holder in holders]

    def rebuild_user(spec: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
        descriptors[:] = [descriptor.hand_to(Descriptor) for descriptor in descriptors]
        return rebuild(_decode_any(spec), descriptors)

    _registered.pop(tag, None)  # the last of a class's tags is the one that describes it
    _registered[tag] = cls, describe_user
    user_kinds[cls] = describers[cls] = describe_user
    _rebuilders[tag] = rebuild_user


def unregister_kind(tag: str) -> None:
    """The tag is unknown again. Raises: UnknownKind: it was not registered by `register_kind`.

    >>> class Log: ...
    >>> fdshare.register_kind(Log, "example.log", lambda log: (None, []), lambda _, fds: Log())
    >>> fdshare.unregister_kind("example.log")
    """
    if tag not in _registered:
        raise UnknownKind(tag)
    cls, _ = _registered.pop(tag)
    del _rebuilders[tag]
    others = [describe for other, describe in _registered.values() if other is cls]
    if others:
        user_kinds[cls] = describers[cls] = others[-1]
        return
    del user_kinds[cls]
    if cls in _BUILT_IN_DESCRIBERS:
        describers[cls] = _BUILT_IN_DESCRIBERS[cls]
    else:
        del describers[cls]


# Plain descriptors


def _describe_descriptor(obj: Any) -> Described:
    if hasattr(type(obj), "__array_interface__"):
        return _describe_array(obj)  # not by type: an array is shareable by where it lies
    return _DESCRIPTOR, [borrow(obj)]


def _rebuild_descriptor(_: msgspec.Raw, descriptors: list[Descriptor]) -> Descriptor:
    return only("descriptor", descriptors)


_DESCRIPTOR: Final = kind_of("descriptor", None)


# Memory: its module is imported when there is some, since most programs share none.


def _describe_memory(memory: Any) -> Described:
    described: Described = _memory("sender").describe_memory(memory)
    return described


def _describe_array(array: Any) -> Described:
    described: Described = _memory("sender").describe_array(array)
    return described


def _rebuild_memory(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    return _memory("receiver").rebuild_memory(raw, descriptors)


def _rebuild_array(raw: msgspec.Raw, descriptors: list[Descriptor]) -> Any:
    return _memory("receiver").rebuild_array(raw, descriptors)


def _memory(whose: Whose) -> Any:
    try:  # with first_use() is slow for what is called each time
        from fdshare.kinds import memory
    except (ImportError, OSError) as error:
        raise as_limit(error, whose) from None
    return memory


# The tables

_BUILT_IN_DESCRIBERS: Final[dict[type, Describer]] = {
    socket.socket: describe_socket,
    Descriptor: _describe_descriptor,
    io.FileIO: describe_file,
    io.BufferedReader: describe_file,
    io.BufferedWriter: describe_file,
    io.BufferedRandom: describe_file,
    io.BufferedRWPair: describe_file,
    io.TextIOWrapper: describe_file,
    socket.SocketIO: describe_file,
}
# Classes of modules that a program may never import, by module and name.
_BY_NAME: Final[dict[tuple[str, str], Describer]] = {
    ("ssl", "SSLSocket"): refuse_tls,
    ("ssl", "SSLObject"): refuse_tls,
    ("asyncio.trsock", "TransportSocket"): describe_wrapped,
    ("trio._socket", "_SocketType"): describe_wrapped,
    ("uvloop.loop", "PseudoSocket"): describe_wrapped,
    ("gevent._socket3", "socket"): describe_socket,
    ("gevent.ssl", "SSLSocket"): refuse_tls,
    ("eventlet.greenio.base", "GreenSocket"): describe_socket,
    ("tempfile", "_TemporaryFileWrapper"): describe_temporary,
    ("tempfile", "SpooledTemporaryFile"): describe_spooled,
    ("fdshare.kernel.shared_memory", "SharedMemory"): _describe_memory,
    **dict.fromkeys(CONNECTIONS.values(), describe_connection),
}
# Exact types, and those that a program has registered: one look-up tells.
describers: Final[dict[type, Describer]] = dict(_BUILT_IN_DESCRIBERS)
user_kinds: Final[dict[type, Describer]] = {}
_registered: Final[dict[str, tuple[type, Describer]]] = {}

_rebuilders: Final[dict[str, Rebuilder]] = {
    "socket": rebuild_socket,
    "file": rebuild_file,
    "connection": rebuild_connection,
    "descriptor": _rebuild_descriptor,
    "memory": _rebuild_memory,
    "array": _rebuild_array,
}
_BUILT_IN_TAGS: Final = frozenset(_rebuilders)


def _describer_of(cls: type) -> Describer | None:
    """The one of the nearest base class that has one."""
    for base in cls.__mro__:
        found = _own_describer(base)
        if found is not None:
            return found
    return None


def _own_describer(cls: type) -> Describer | None:
    return describers.get(cls) or _BY_NAME.get((cls.__module__, cls.__qualname__))
