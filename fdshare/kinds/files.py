"""File objects: each arrives as the same class, at the same position, with the same settings.

Processes share the offset of an open file through the kernel, and nothing else: what Python has
read ahead or not yet written is in the memory of one process. So before a file is shared, its
writers are flushed, and the offset of a reader is moved back to where the file object says it is.
Where that is not possible (a pipe has no offset) it is `UnreadData`, and the file stays as it was.

CPython has no attribute for some of this. Each detour has a function of its own, with the versions
in which it was read and tested (3.11, 3.12, 3.13).
"""

from __future__ import annotations

import codecs
import fcntl
import gc
import io
import os
import socket
from _thread import RLock  # threading imports more, and adds nothing to it
from functools import partial
from typing import IO, Any, Final

import msgspec

from fdshare.errors import ClosedDescriptor, KindMismatch, UnreadData, UnsupportedKind
from fdshare.kernel import system
from fdshare.kernel.ancillary import discard_all
from fdshare.kernel.descriptor import Descriptor, borrow
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kinds.described import Described, kind_of, only

__all__ = [
    "FileSpec",
    "RawSpec",
    "TextSpec",
    "describe_file",
    "describe_spooled",
    "describe_temporary",
    "newline_of",
    "rebuild_file",
]

_BUFFERS: Final[dict[str, Any]] = {
    "reader": io.BufferedReader,
    "writer": io.BufferedWriter,
    "random": io.BufferedRandom,
}


class RawSpec(msgspec.Struct, frozen=True, array_like=True):
    """A FileIO, or the SocketIO of a `makefile()`: then *timeout* is its socket's."""

    mode: str
    name: str | None = None
    is_socket: bool = False
    timeout: float | None = None


class TextSpec(msgspec.Struct, frozen=True, array_like=True):
    encoding: str
    errors: str | None
    newline: str | None
    line_buffering: bool
    write_through: bool
    mode: str | None = None
    # Of a decoder that would not start right at this position: the second of its getstate().
    decoder_state: int | None = None


class FileSpec(msgspec.Struct, frozen=True, array_like=True):
    """*buffer* is a key of _BUFFERS, "" for a raw file."""

    buffer: str
    raw: RawSpec
    text: TextSpec | None = None


_decode_file: Final = msgspec.msgpack.Decoder(FileSpec).decode


def describe_file(file: IO[Any] | io.IOBase) -> Described:
    """The kind of *file* and the number of its descriptor, borrowed from it.

    Flushes it and moves the offset to its logical position.
    Raises: ClosedDescriptor, UnreadData, UnsupportedKind (no descriptor below); OSError of a flush.
    """
    if file.closed:
        raise ClosedDescriptor(f"the {type(file).__qualname__} is closed")
    buffer: Any = file.buffer if isinstance(file, io.TextIOWrapper) else file
    layer = _layer_of(buffer)
    raw = _raw_of(buffer, layer)
    fd = borrow(raw)
    text = _settle_text(file, buffer) if isinstance(file, io.TextIOWrapper) else None
    if layer:
        _settle_buffer(buffer, layer)
    return kind_of("file", FileSpec(layer, _raw_spec(raw), text)), [fd]


def describe_temporary(wrapper: Any) -> Described:
    """As `describe_file`, for the file of a NamedTemporaryFile."""
    return describe_file(wrapper.file)


def describe_spooled(spooled: Any) -> Described:
    """As `describe_file`, for a SpooledTemporaryFile, which moves from memory to the disk."""
    spooled.rollover()
    return describe_file(spooled._file)  # the only way to it; there since 2.6


def rebuild_file(encoded: msgspec.Raw, descriptors: list[Descriptor]) -> IO[Any]:
    """The file object, which owns the descriptor now unless this raises.

    Raises: KindMismatch: not one descriptor, a directory, or not opened for what the mode says;
    DescriptorLimit: none is free to import the encoding with.
    """
    spec = _decode_file(encoded)
    raw = None
    try:
        if spec.text is not None:
            _import_encoding(spec.text.encoding)
        raw = _open_raw(spec.raw, only("file", descriptors))
        file: Any = _BUFFERS[spec.buffer](raw) if spec.buffer else raw
        return file if spec.text is None else _wrap_text(file, spec.text)
    except BaseException as error:
        if raw is not None:
            discard_all((raw,))
        if isinstance(error, IsADirectoryError):
            raise KindMismatch("file", "it is a directory") from error
        if isinstance(error, KindMismatch):  # a ValueError, too
            raise
        if isinstance(error, ValueError | LookupError | TypeError | OverflowError):
            raise KindMismatch("file", str(error)) from error
        raise


def _import_encoding(encoding: str) -> None:
    """What TextIOWrapper would do when the file has the descriptor."""
    try:
        codecs.lookup(encoding)
    except OSError as error:
        raise as_limit(error, "receiver") from None


def _layer_of(buffer: Any) -> str:
    for name, cls in _BUFFERS.items():
        if isinstance(buffer, cls):
            return name
    if isinstance(buffer, io.FileIO | socket.SocketIO):
        return ""
    if isinstance(buffer, io.BufferedRWPair):
        raise UnsupportedKind(
            "BufferedRWPair",
            "Python does not say which two files it is made of; share these, or the socket",
        )
    raise UnsupportedKind(
        type(buffer).__qualname__, "it is not a file of the io module; share the file below it"
    )


def _raw_of(buffer: Any, layer: str) -> Any:
    raw = buffer.raw if layer else buffer
    if not isinstance(raw, io.FileIO | socket.SocketIO):
        raise UnsupportedKind(type(raw).__qualname__, "it is a file without a descriptor")
    return raw


def _raw_spec(raw: io.FileIO | socket.SocketIO) -> RawSpec:
    if isinstance(raw, socket.SocketIO):
        # `_sock` is the only way to the timeout; there under that name since 3.0.
        return RawSpec(raw.mode, None, True, raw._sock.gettimeout())  # type: ignore[attr-defined]
    # An integer name is a number in *this* process; a path means the same in another.
    name: object = getattr(raw, "name", None)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if isinstance(name, str):
        name = name.encode("utf-8", "replace").decode()  # surrogates are no msgpack
    return RawSpec(raw.mode, name if isinstance(name, str) else None)


def _open_raw(spec: RawSpec, descriptor: Descriptor) -> Any:
    if spec.is_socket:
        return _open_socket_file(spec, descriptor)
    fd = descriptor.fileno()
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    access = flags & os.O_ACCMODE
    reads, writes = "r" in spec.mode or "+" in spec.mode, spec.mode.strip("b") != "r"
    unfit = (reads and access == os.O_WRONLY) or (writes and access == os.O_RDONLY)
    if unfit or flags & system.O_PATH:
        raise KindMismatch("file", f"it is not open for {spec.mode!r}")
    # FileIO in an appending mode seeks to the end, which would move the sender's position too.
    position = _position(fd) if "a" in spec.mode else None
    # Without a function in Python in between, where a signal's handler could raise: then the file
    # and the descriptor would close the number both.
    raw = descriptor.hand_to(partial(io.FileIO, mode=spec.mode))
    if position is not None:
        os.lseek(fd, position, os.SEEK_SET)
    if spec.name is not None:
        raw.name = spec.name
    return raw


def _position(fd: int) -> int | None:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:  # ESPIPE
        return None


def _open_socket_file(spec: RawSpec, descriptor: Descriptor) -> Any:
    try:
        sock = descriptor.socket()
    except OSError as error:
        raise KindMismatch("socket file", f"no socket ({error.strerror})") from None
    # The file keeps the socket open until it is closed itself (socket.makefile's documentation).
    with sock:
        if sock.gettimeout() != spec.timeout:
            sock.settimeout(spec.timeout)  # ValueError, OverflowError: not a timeout
        return sock.makefile(spec.mode, buffering=0)  # type: ignore[call-overload]


# Buffers


def _settle_buffer(buffer: Any, layer: str) -> None:
    """Empties *buffer*: writes it out, or moves the offset back."""
    if layer != "reader":
        # For a BufferedRandom this also moves the offset back (bufferedio.c, flush_and_rewind).
        buffer.flush()
    if layer == "reader":
        unread = _read_ahead(buffer)
        if not unread:
            return
        if not buffer.seekable():
            raise UnreadData(unread)
        position = buffer.tell()
        buffer.read(unread)  # or seek() would stay inside the buffer and ask nothing of the kernel
        buffer.seek(position)


def _read_ahead(buffer: Any) -> int:
    """How many bytes *buffer* holds unread. Reads nothing from its raw file.

    peek() would read where the buffer is empty, and block. A raw file whose readinto() returns None
    has "nothing now" (io.RawIOBase), so for the length of one peek() ours says that. If threads
    peek into one file, it says so until the last has done so.
    """
    raw, peek = buffer.raw, object()
    try:
        with _lock:
            _peeks[peek] = raw
            raw.readinto = _nothing_now  # instances of FileIO and SocketIO have a __dict__
        return len(buffer.peek(0))  # without the lock: it waits where another thread reads
    finally:
        with _lock:
            _peeks.pop(peek, None)
            if not any(other is raw for other in _peeks.values()):
                vars(raw).pop("readinto", None)


def _nothing_now(_: object) -> None:
    return None


_peeks: dict[object, Any] = {}  # each that goes on -> its raw file
_lock = RLock()  # a signal's handler may share a file, too


def _after_fork_in_child() -> None:
    global _lock
    _lock = RLock()  # another thread of the parent may have held it
    for raw in _peeks.values():  # into which a thread peeks that is not here
        vars(raw).pop("readinto", None)
    _peeks.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# Text


def _settle_text(text: io.TextIOWrapper, buffer: Any) -> TextSpec:
    """Flushes *text*, and moves *buffer* to where *text* is."""
    state = None
    if buffer.readable() and text.seekable():
        state = _rewind_text(text)  # before flush(), which forgets that a loop forbids to tell
    text.flush()
    if buffer.readable() and not text.seekable():
        _refuse_unread_text(text, buffer)
    return TextSpec(
        text.encoding,
        text.errors,
        newline_of(text),
        text.line_buffering,
        text.write_through,
        vars(text).get("mode"),
        state,
    )


# tell() of a text file is one number (textiowrapper_build_cookie, Modules/_io/textio.c): 64 bits of
# the position of its buffer, 32 of the decoder's state, and above these how many bytes to decode,
# and characters to skip, from there on.
_STATE_AT: Final = 64
_MORE_AT: Final = 96
_SKIPPED_AT: Final = 128
_32_BITS: Final = 2**32 - 1
_MOST_STATE: Final = 2**31 - 1  # it is a C int


def _rewind_text(text: io.TextIOWrapper) -> int | None:
    """Moves the buffer of *text* to where *text* is; the decoder's state, where that matters.

    Raises: UnsupportedKind: the position is not known, or not between two characters.
    """
    try:
        cookie = text.tell()
    except OSError as error:  # "telling position disabled by next() call"
        raise UnsupportedKind(
            "TextIOWrapper", f"its position is not known ({error}): read it with readline()"
        ) from None
    if cookie >> _STATE_AT & 1 and cookie >> _SKIPPED_AT & _32_BITS == 1:
        # Behind a carriage return whose line feed the decoder of newlines had waited for, in vain:
        # what it waits with is that character, which was read. (A line feed would have been fed,
        # and the position would be behind it.)
        cookie = cookie & ((1 << _MORE_AT) - 1) ^ (1 << _STATE_AT)
    if cookie >> _MORE_AT:
        raise UnsupportedKind(
            "TextIOWrapper",
            f"its position is where {text.encoding} is decoded only together with what stands "
            "before it: read on to the end of a line",
        )
    text.seek(cookie)
    state = cookie >> _STATE_AT
    # utf-16 expects a mark at its start, so "no state" is not how its decoder begins.
    fresh = codecs.getincrementaldecoder(text.encoding)(text.errors or "strict").getstate()
    return state if state or (cookie and fresh[1]) else None


def _refuse_unread_text(text: io.TextIOWrapper, buffer: Any) -> None:
    """Raises UnreadData where *text* has decoded more of a pipe than was read from it.

    The characters can only be counted by reading them, so the next read gets them again.
    """
    with _lock:  # or two threads would have a part of them each; nothing in here waits
        stash = vars(buffer).get("read1")  # of an earlier refusal, not read since
        if stash is None:
            if len(_strings(text)) - (newline_of(text) is not None) <= 2:
                return  # it has decoded nothing yet
            unread = _drain(text, buffer)
            if not unread:
                return
            stash = buffer.read1 = buffer.read = _Stash(
                buffer, unread.encode(text.encoding, text.errors or "strict")
            )
    raise UnreadData(len(stash.data))


class _DrainedError(Exception):
    pass


def _drain(text: io.TextIOWrapper, buffer: Any) -> str:
    """The characters that *text* has decoded and not yet returned; they are read now."""

    def stop(_: int = -1) -> bytes:
        raise _DrainedError

    chars: list[str] = []
    buffer.read1 = stop
    try:
        while True:
            chars.append(text.read(1))
    except _DrainedError:
        return "".join(chars)
    finally:
        del buffer.read1


class _Stash:
    """Replaces read1() and read() of *buffer* until the first call, which returns *data*."""

    def __init__(self, buffer: Any, data: bytes) -> None:
        self.buffer = buffer
        self.data = data

    def __call__(self, size: int | None = -1) -> bytes:
        del self.buffer.read1, self.buffer.read
        if size is None or size < 0:
            return self.data + bytes(self.buffer.read())
        return self.data  # TextIOWrapper takes what comes, its size is a hint


def _wrap_text(buffer: Any, spec: TextSpec) -> io.TextIOWrapper:
    if spec.errors is not None:
        codecs.lookup_error(spec.errors)  # CPython 3.11.2 takes what is before a NUL
    text = io.TextIOWrapper(
        buffer,
        encoding=spec.encoding,
        errors=spec.errors,
        newline=spec.newline,
        line_buffering=spec.line_buffering,
        write_through=spec.write_through,
    )
    if spec.mode is not None:
        vars(text)["mode"] = spec.mode  # as open() does
    if spec.decoder_state is not None:
        if not 0 <= spec.decoder_state <= _MOST_STATE:
            raise ValueError(f"a decoder has no state {spec.decoder_state}")
        # To where the file is: nothing is read, and nobody's position moves.
        text.seek(buffer.tell() | spec.decoder_state << _STATE_AT)
    return text


def newline_of(text: io.TextIOWrapper) -> str | None:
    """The *newline* that *text* was made with; None, the default, if CPython does not show it."""
    return _newline(text) if _tells_newline() else None


def _strings(text: io.TextIOWrapper) -> list[str]:
    """The strings that a TextIOWrapper refers to: encoding, newline?, decoded?, errors."""
    return [part for part in gc.get_referents(text) if type(part) is str]


def _newline(text: io.TextIOWrapper) -> str | None:
    between = _strings(text)[1:-1]
    if not between:
        return None
    if len(between) == 1 and text.readable():
        universal = any(
            isinstance(part, io.IncrementalNewlineDecoder) for part in gc.get_referents(text)
        )
        # None and "" are decoded universally; a newline of any other kind is not.
        if universal != (between[0] == ""):
            return None
    return between[0] if between[0] in ("", "\n", "\r", "\r\n") else None


_tells: list[bool] = []


def _tells_newline() -> bool:
    """Whether this Python shows its newline as 3.11, 3.12 and 3.13 do; tried once."""
    if not _tells:
        samples: list[str | None] = [None, "", "\n", "\r", "\r\n"]
        read = [_newline(io.TextIOWrapper(io.BytesIO(), "utf-8", newline=nl)) for nl in samples]
        _tells.append(read == samples)
    return _tells[0]
