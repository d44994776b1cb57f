"""install() patches the picklers of multiprocessing and multiprocess, so that they carry
descriptors; uninstall() undoes it.

The classes `multiprocessing.reduction.ForkingPickler` and `multiprocess.reduction.ForkingPickler`
get three methods: `reducer_override`, which collects the descriptors of the objects, `dump`, which
parks them when the pickle is complete, and `dumps`, which is faster for a single descriptor. Every
queue, pipe, pool and executor of the packages pickles with these classes, by name, so nothing else
has to change. stock.py has the names that are used.

A forked child inherits the patch. A child that is spawned, or made by a fork server, is patched by
the pickle that starts it, and any other child by the first such pickle that it loads.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from fdshare.errors import InvalidArgument
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.pickling import parked
from fdshare.mp.pickling.bundle import Reduced
from fdshare.mp.pickling.hold import Held
from fdshare.mp.pickling.parked import DEFAULT_TTL, Label, Parked, Place, dumps_single
from fdshare.mp.pickling.program_reducers import Reducers, is_dispatched, reducer_of_program
from fdshare.mp.pickling.reducers import PLAIN, Override, reduce_with
from fdshare.parking.private_address import new_address

if TYPE_CHECKING:
    from fdshare.mp.stock import ReductionModule, StockForkingPickler, StockProcess

    class _PatchedPickler(StockForkingPickler):
        """A ForkingPickler with our methods."""

        registered: ClassVar[Reducers]
        dispatched: ClassVar[Mapping[type, object] | None]
        parked: Parked | None


__all__ = ["install", "load", "uninstall"]

_PACKAGES: Final = ("multiprocessing", "multiprocess")
_ABSENT: Final = object()
# Every pickler pickles them alike; pickle.dumps() does so in less time than one of these.
_WITHOUT_PARTS: Final = frozenset({int, str, bytes, float, bool, type(None)})
# Their objects may be a single descriptor, which `dumps_single` pickles in less time.
_SINGLE: Final = frozenset({socket.socket, Descriptor, Held})
_lock = threading.Lock()
_patched: dict[type, dict[str, object]] = {}  # class -> its attributes before
_uninstalled = False  # by uninstall(): no pickle patches this process then


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)


def install(path: str | os.PathLike[str] | None = None, *, ttl: float = DEFAULT_TTL) -> None:
    """Makes the stock channels of multiprocessing and multiprocess carry descriptors from now on.

    Their queues, pipes, pools and executors then carry sockets, files and everything else with a
    descriptor, in this process and in its children. The server at *path* holds the descriptors
    until they are loaded; or a private server of this process and its children does, which is
    started when it is first needed and ends by itself. What nobody has loaded after *ttl* seconds
    is closed. A second call changes both for what is sent from then on.

    Raises: NoServer and the others of `fdshare.connect`, where *path* is given; InvalidArgument.

    >>> fdshare.install()
    >>> receiver, sender = multiprocessing.Pipe()
    >>> with receiver, sender, open(os.devnull) as file:
    ...     sender.send(["a file", file])
    ...     _, again = receiver.recv()
    >>> with again:
    ...     again.name
    '/dev/null'
    >>> fdshare.uninstall()
    """
    if not 0 < ttl < float("inf"):
        raise InvalidArgument("ttl", f"{ttl!r} is not a positive number of seconds")
    if path is None:
        former = parked.current()
        address = former.address if former.private else new_address()
        _install(Place(address, True, float(ttl), load))
    else:
        place = Place(os.path.abspath(os.fspath(path)), False, float(ttl), load)
        place.server().check()
        _install(place)


def uninstall() -> None:
    """Makes the picklers what they were before `install()`; in running children they stay patched.

    What was sent can still be loaded. Connections to the server are closed: a private one ends when
    it holds nothing any more.

    >>> fdshare.install()
    >>> fdshare.uninstall()
    >>> with socket.socket() as sock:
    ...     pickle.dumps(sock)
    Traceback (most recent call last):
    TypeError: cannot pickle 'socket' object
    """
    global _uninstalled
    with _lock:
        _uninstalled = True
        if _late_finder in sys.meta_path:
            sys.meta_path.remove(_late_finder)
        for pickler, former in _patched.items():
            for name, value in former.items():
                if value is _ABSENT:
                    delattr(pickler, name)
                else:
                    setattr(pickler, name, value)
        _patched.clear()
    parked.use(None)
    parked.forget()


def load(label: Label, tag: str, spec: bytes, first: int, count: int) -> Any:
    """As `parked.load`, for the pickles of a patched process: a child that loads one is patched.
    Pickles name it: do not move or rename."""
    if not _patched and not _uninstalled and _is_child():
        _token, address, private, ttl, *_arrival = label
        _install(Place(address, private, ttl, load))
    return parked.load(label, tag, spec, first, count)


def _is_child() -> bool:
    modules = (sys.modules.get(f"{package}.process") for package in _PACKAGES)
    return any(module is not None and module.parent_process() is not None for module in modules)


def _install(place: Place) -> None:
    global _uninstalled
    _uninstalled = False
    parked.use(place)
    # Not multiprocess: it imports dill, which few programs use.
    importlib.import_module("multiprocessing.reduction")
    with _lock:
        for package in _PACKAGES:
            reduction = sys.modules.get(f"{package}.reduction")
            if reduction is not None:
                _patch(cast("ReductionModule", reduction))
            elif _late_finder not in sys.meta_path:
                sys.meta_path.insert(0, _late_finder)


def _patch(reduction: ReductionModule) -> None:
    """Gives the ForkingPickler of *reduction* its methods."""
    pickler = reduction.ForkingPickler
    if pickler in _patched:
        return
    package = reduction.__name__.rpartition(".")[0]
    new: dict[str, object] = {
        "dumps": _make_dumps(pickler),
        "dump": _make_dump(package, reduction),
        "reducer_override": _make_override(package, reduction),
        "registered": pickler._extra_reducers,
        "dispatched": getattr(pickler, "dispatch", None),
        "parked": None,
    }
    _patched[pickler] = {name: vars(pickler).get(name, _ABSENT) for name in new}
    for name, value in new.items():
        setattr(pickler, name, value)


def _make_dumps(pickler: type[StockForkingPickler]) -> object:
    stock_dumps = vars(pickler)["dumps"].__func__
    patched = cast("type[_PatchedPickler]", pickler)

    def dumps(cls: type, /, obj: Any, *args: object, **kwargs: object) -> memoryview:
        """*obj* pickled. A single descriptor, and what has no parts, is pickled in less time."""
        if cls is pickler and not args and not kwargs:
            of = type(obj)
            if of in _WITHOUT_PARTS and not is_dispatched(patched.dispatched, of):
                return memoryview(pickle.dumps(obj))
            if (
                of in _SINGLE
                and reducer_of_program(patched, of) is None
                and (message := dumps_single(obj)) is not None
            ):
                return memoryview(message)
        pickled: memoryview = stock_dumps(cls, obj, *args, **kwargs)
        return pickled

    return classmethod(dumps)


def _make_dump(package: str, reduction: ReductionModule) -> object:
    stock_dump = reduction.ForkingPickler.dump

    def dump(self: _PatchedPickler, obj: Any) -> None:
        """Pickles *obj*, then parks its descriptors."""
        if reduction.context.get_spawning_popen() is not None:
            obj = _with_patch(package, obj)
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

    def reducer_override(self: _PatchedPickler, obj: Any) -> Override:
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


# Children that are not forked


class _PatchingProcess:
    """A Process that is pickled for a new interpreter, which is patched when it loads this."""

    def __init__(self, process: StockProcess, place: Place) -> None:
        self.process = process
        self.place = place

    def __reduce__(self) -> Reduced:
        address, private, ttl, _ = self.place
        return _patch_child, (address, private, ttl, self.process)


def _patch_child(address: str, private: bool, ttl: float, process: StockProcess) -> StockProcess:
    _install(Place(address, private, ttl, load))
    return process


def _with_patch(package: str, obj: Any) -> Any:
    process = sys.modules.get(f"{package}.process")
    if process is not None and isinstance(obj, process.BaseProcess):
        return _PatchingProcess(obj, parked.current())
    return obj


# multiprocess, imported later than install() was called


class _LateFinder:
    """An import finder that has the others find one module, and patches that when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "multiprocess.reduction":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                return _patching(spec)
        return None


def _patching(spec: ModuleSpec) -> ModuleSpec:
    loader = spec.loader
    assert loader is not None  # of a namespace package alone it is None
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        with _lock:
            if _late_finder in sys.meta_path:
                sys.meta_path.remove(_late_finder)
                _patch(cast("ReductionModule", module))

    loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


_late_finder: Final = _LateFinder()
