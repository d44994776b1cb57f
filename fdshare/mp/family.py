"""The two packages we work on: multiprocessing, and multiprocess, its fork that pickles with dill.

Both have the same modules with the same names in them, so one description serves both: stock.py.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from fdshare.mp import stock
from fdshare.mp.pickling.reducers import make_pickler

__all__ = ["Family"]

T = TypeVar("T")


class Family:
    """One of the two packages. *home* is the module that holds our classes over it.

    The home's name for its family is FAMILY: a pickle holds no more than that.
    """

    # Its modules, each imported when it is first asked for.
    connection: stock.ConnectionModule
    context: stock.ContextModule
    managers: stock.ManagersModule
    pool: stock.PoolModule
    popen_fork: stock.PopenModule
    popen_forkserver: stock.PopenModule
    popen_spawn_posix: stock.PopenModule
    queues: stock.QueuesModule
    reduction: stock.ReductionModule
    resource_tracker: stock.ResourceTrackerModule
    synchronize: stock.SynchronizeModule
    util: stock.UtilModule

    def __init__(self, package: str, home: str) -> None:
        self.package = package
        self.home = self.__module__ = home
        self.ForkingPickler = self.reduction.ForkingPickler
        self.loads = self.ForkingPickler.loads
        self.Pickler = make_pickler(self.ForkingPickler)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in stock.MODULES:
                raise AttributeError(f"a family has no {name!r}")
            module = importlib.import_module(f"{self.package}.{name}")
            setattr(self, name, module)
            return module

    @property
    def is_spawning(self) -> bool:
        """Whether this thread is pickling a process just now, for a child that it starts."""
        return self.context.get_spawning_popen() is not None

    def derive(self, name: str, mixin: type[T], base: type, **attributes: object) -> type[T]:
        """The class *name*: *mixin* before *base*, put into our module of this family, where
        pickles find it. There is one: of those that several threads make, the first to be there."""
        namespace = {"__module__": self.home, "__qualname__": name, "__doc__": mixin.__doc__}
        cls = type(name, (mixin, base), namespace | {"_family": self} | attributes)
        made: type[T] = vars(sys.modules[self.home]).setdefault(name, cls)
        return made

    def __reduce__(self) -> str:
        return "FAMILY"

    def __repr__(self) -> str:
        return f"<Family {self.package}>"
