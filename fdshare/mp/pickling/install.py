"""install(): the picklers of multiprocessing and multiprocess carry descriptors; uninstall(): not.

The classes `multiprocessing.reduction.ForkingPickler` and `multiprocess.reduction.ForkingPickler`
get three methods: `reducer_override`, which parks what has descriptors, `dump`, which hands the lot
to the server when the pickle is complete, and `dumps`, which has a short way for single ones.
Every queue, pipe, pool and executor of the packages pickles with these classes, by name, so nothing
else has to change. Read in CPython 3.11.7, 3.12.1, 3.13.0 and in multiprocess 0.70.19
(reduction.py).

A child inherits this when it is forked. One that is spawned, or made by a fork server, is armed by
the very pickle that starts it.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

from fdshare.errors import InvalidArgument
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.pickling import parked
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.pickling.hold import Held
from fdshare.mp.pickling.parked import DEFAULT_TTL, Label, Parked, Place, dumps_single
from fdshare.mp.pickling.reducers import PLAIN, Override, reduce_with
from fdshare.parking.client import new_address

if TYPE_CHECKING:
    from fdshare.mp.stock import ReductionModule, StockForkingPickler, StockProcess

    class _ArmedPickler(StockForkingPickler):
        """A ForkingPickler with our methods."""

        bare_exceptions: bool
        saw_exception: bool
        parked: Parked | None


__all__ = ["install", "load", "uninstall"]

_PACKAGES: Final = ("multiprocessing", "multiprocess")
_ABSENT: Final = object()
# Pickled the same by every pickler, and quicker without making one.
_WITHOUT_PARTS: Final = frozenset({int, str, bytes, float, bool, type(None)})
# What may be a single descriptor, with a short way.
_SINGLE: Final = frozenset({socket.socket, Descriptor, Held})
_lock = threading.Lock()
_armed: dict[type, dict[str, object]] = {}  # class -> what its attributes were
_dismissed = False  # uninstall() was called: what arrives changes nothing


def install(path: str | os.PathLike[str] | None = None, *, ttl: float = DEFAULT_TTL) -> None:
    """Makes the stock channels of multiprocessing and multiprocess carry descriptors from now on.

    Their queues, pipes, pools and executors then carry sockets, files and everything else with a
    descriptor, in this process and in its children. The descriptors wait in the server at *path*,
    or in a private one of this process and its children, which is started when it is first needed
    and ends by itself. What nobody has loaded after *ttl* seconds is let go. Called again, it
    changes both for what is sent from then on.

    Raises: NoServer and the others of `fdshare.connect`, where *path* is given; InvalidArgument.
    """
    if not 0 < ttl < float("inf"):
        raise InvalidArgument("ttl", f"{ttl!r} is no positive number of seconds")
    if path is None:
        former = parked.current()
        address = former.address if former.private else new_address()
        _install(Place(address, True, float(ttl), load))
    else:
        place = Place(os.path.abspath(os.fspath(path)), False, float(ttl), load)
        place.server().check()
        _install(place)


def uninstall() -> None:
    """Makes the picklers what they were before `install()`; children that run stay armed.

    What was sent can still be loaded. Connections to the server are closed: a private one ends when
    it holds nothing any more.
    """
    global _dismissed
    with _lock:
        _dismissed = True
        if _late in sys.meta_path:
            sys.meta_path.remove(_late)
        for pickler, former in _armed.items():
            for name, value in former.items():
                if value is _ABSENT:
                    delattr(pickler, name)
                else:
                    setattr(pickler, name, value)
        _armed.clear()
    parked.use(None)
    parked.forget()


def load(label: Label, tag: str, spec: bytes, first: int, count: int) -> Any:
    """As `parked.load`, for the pickles of a process that is armed: the child that it is called in
    is armed by it. Pickles name it: do not move or rename."""
    if not _armed and not _dismissed and _is_child():
        _token, address, private, ttl, *_arrival = label
        _install(Place(address, private, ttl, load))
    return parked.load(label, tag, spec, first, count)


def _is_child() -> bool:
    modules = (sys.modules.get(f"{package}.process") for package in _PACKAGES)
    return any(module is not None and module.parent_process() is not None for module in modules)


def _install(place: Place) -> None:
    global _dismissed
    _dismissed = False
    parked.use(place)
    # Not multiprocess: it brings dill, which few programs have any use for.
    importlib.import_module("multiprocessing.reduction")
    with _lock:
        for package in _PACKAGES:
            reduction = sys.modules.get(f"{package}.reduction")
            if reduction is not None:
                _arm(cast("ReductionModule", reduction))
            elif _late not in sys.meta_path:
                sys.meta_path.insert(0, _late)


def _arm(reduction: ReductionModule) -> None:
    """Gives the ForkingPickler of *reduction* its methods."""
    pickler = reduction.ForkingPickler
    if pickler in _armed:
        return
    package = reduction.__name__.rpartition(".")[0]
    # reducers.py: exceptions are pickled as the package does it.
    new: dict[str, object] = {
        "dumps": _make_dumps(pickler),
        "dump": _make_dump(package, reduction),
        "reducer_override": _make_override(package, reduction),
        "bare_exceptions": True,
        "parked": None,
    }
    _armed[pickler] = {name: vars(pickler).get(name, _ABSENT) for name in new}
    for name, value in new.items():
        setattr(pickler, name, value)


def _make_dumps(pickler: type[StockForkingPickler]) -> object:
    stock_dumps = vars(pickler)["dumps"].__func__

    def dumps(cls: type, /, obj: Any, *args: object, **kwargs: object) -> bytes | memoryview:
        """*obj* pickled; a single descriptor takes the short way, and so does what has no parts."""
        if cls is pickler and not args and not kwargs:
            of = type(obj)
            if of in _WITHOUT_PARTS:
                return pickle.dumps(obj)
            if of in _SINGLE and (message := dumps_single(obj)) is not None:
                return message
        pickled: memoryview = stock_dumps(cls, obj, *args, **kwargs)
        return pickled

    return classmethod(dumps)


def _make_dump(package: str, reduction: ReductionModule) -> object:
    stock_dump = reduction.ForkingPickler.dump

    def dump(self: _ArmedPickler, obj: Any) -> None:
        """Pickles *obj*, and parks the descriptors in it when all of it is pickled."""
        if reduction.context.get_spawning_popen() is not None:
            obj = _with_arms(package, obj)
        try:
            stock_dump(self, obj)
            if self.parked is not None:
                self.parked.commit()
        finally:
            if self.parked is not None:
                self.parked.rollback()
                self.parked = None

    return dump


def _make_override(package: str, reduction: ReductionModule) -> object:
    former = getattr(reduction.ForkingPickler, "reducer_override", None)
    name = f"{package}.connection"

    def reducer_override(self: _ArmedPickler, obj: Any) -> Override:
        cls = type(obj)
        if cls in PLAIN:
            return NotImplemented
        if reduction.context.get_spawning_popen() is not None:
            # The package's own connections, those in its queues too, are inherited by the child.
            connection = sys.modules.get(name)
            if connection is not None and isinstance(obj, connection.Connection):
                return NotImplemented
        if self.parked is None:
            self.parked = Parked()
        reduced = reduce_with(self.parked, self, obj, cls)
        if reduced is NotImplemented and former is not None:
            return former(self, obj)
        return reduced

    return reducer_override


# Children that do not inherit our memory


class _Recruit:
    """A Process on its way to a new interpreter, which is armed on arrival."""

    def __init__(self, process: StockProcess, place: Place) -> None:
        self.process = process
        self.place = place

    def __reduce__(self) -> Reduced:
        address, private, ttl, _ = self.place
        return _enlist, (address, private, ttl, self.process)


def _enlist(address: str, private: bool, ttl: float, process: StockProcess) -> StockProcess:
    _install(Place(address, private, ttl, load))
    return process


def _with_arms(package: str, obj: Any) -> Any:
    process = sys.modules.get(f"{package}.process")
    if process is not None and isinstance(obj, process.BaseProcess):
        return _Recruit(obj, parked.current())
    return obj


# multiprocess, imported later than install() was called


class _Late:
    """A finder that finds one module as all others do, and arms it once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "multiprocess.reduction":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                return _arming(spec)
        return None


def _arming(spec: ModuleSpec) -> ModuleSpec:
    loader = spec.loader
    assert loader is not None  # of a namespace package alone it is None
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        with _lock:
            if _late in sys.meta_path:
                sys.meta_path.remove(_late)
                _arm(cast("ReductionModule", module))

    loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


_late: Final = _Late()
