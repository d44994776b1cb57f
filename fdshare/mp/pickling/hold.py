"""hold(): an object to be sent, with descriptors of its own.

The queues, pools and executors of the standard library pickle later, in a thread: an object that is
closed straight after `put` cannot be sent any more. One that is held can.
"""

from __future__ import annotations

from typing import Final, TypeVar, cast

from msgspec import Raw, msgpack, structs

from fdshare.errors import ClosedDescriptor, InvalidArgument
from fdshare.kernel.ancillary import close_all, discard_all
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kernel.finaliser import finaliser
from fdshare.kinds import Kind, describe, describers
from fdshare.kinds.files import FileSpec
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.pickling.parked import Parked, Repeatable
from fdshare.parking.protocol import MOST_USES

__all__ = ["Held", "hold"]

_NEWLINES = (None, "", "\n", "\r", "\r\n")
_UNSET: Final[str] = object()  # type: ignore[assignment]


T = TypeVar("T")


class Held(Repeatable):
    """What `hold` returns. Its descriptors are closed when it is dropped."""

    __slots__ = ("__weakref__", "_descriptors", "_kind", "uses")

    def __init__(self, kind: Kind, descriptors: list[Descriptor], uses: int) -> None:
        self._kind = kind
        self._descriptors: list[Descriptor] | None = descriptors
        self.uses = uses

    def close(self) -> None:
        """Closes the descriptors: it cannot be pickled any more. Pickles of it stay loadable."""
        descriptors, self._descriptors = self._descriptors, None
        close_all(descriptors or ())

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @finaliser
    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._descriptors is None else f"uses={self.uses}"
        return f"<Held {self._kind.tag} {state}>"

    def __reduce__(self) -> Reduced:
        # A pickler that is neither ours nor patched, such as pickle.Pickler. It does not tell
        # whether it succeeds: where it fails, the descriptors stay parked for their time to live.
        transit = Parked()
        reduced = transit.carry(self, *_describe(self))
        transit.commit()
        return reduced


def hold(obj: T, uses: int = 1, *, newline: str | None = _UNSET) -> T:
    """A Held: sent in place of *obj* through any channel that pickles, it arrives as the object.

    Its descriptors are duplicated now. Each pickle of it can be loaded *uses* times, at most
    2**32 - 1, in as many processes. *newline*: as in `open()`, for a text file whose own is not
    known to CPython.

    It is safe to close *obj* after this call. Raises: UnsupportedKind, UnreadData,
    ClosedDescriptor, InvalidArgument, DescriptorLimit (EMFILE).

    >>> with open(os.devnull) as file:
    ...     held = fdshare.hold(file)
    >>> with pickle.loads(pickle.dumps(held)) as again:
    ...     again.name
    '/dev/null'
    """
    if isinstance(uses, bool) or not isinstance(uses, int) or not 1 <= uses <= MOST_USES:
        raise InvalidArgument("uses", f"{uses!r} is not a number of uses")
    kind, fds = describe(obj)
    if newline is not _UNSET:
        kind = _with_newline(kind, newline)
    copies: list[Descriptor] = []
    try:
        copies.extend(map(Descriptor.dup_of, fds))  # in place, for the except
    except BaseException as error:
        discard_all(copies)
        raise as_limit(error) from None
    # What arrives is the object: for a checker it may stand wherever that may.
    return cast("T", Held(kind, copies, uses))


def _with_newline(kind: Kind, newline: str | None) -> Kind:
    if newline not in _NEWLINES:
        raise InvalidArgument("newline", f"{newline!r} is not one that open() takes")
    spec = msgpack.decode(kind.spec, type=FileSpec) if kind.tag == "file" else None
    if spec is None or spec.text is None:
        raise InvalidArgument("newline", "only a text file has one")
    spec = structs.replace(spec, text=structs.replace(spec.text, newline=newline))
    return Kind(kind.tag, Raw(msgpack.encode(spec)))


def _describe(held: Held) -> tuple[Kind, list[int]]:
    if held._descriptors is None:
        raise ClosedDescriptor("the object that hold() returned was closed")
    return held._kind, [descriptor.fileno() for descriptor in held._descriptors]


describers[Held] = _describe
