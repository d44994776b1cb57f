"""The two packages we work on: multiprocessing, and multiprocess, its fork that pickles with dill.

Both have the same modules with the same names in them, so one description serves both. Everything
of theirs that is not in their documentation is reached through here or named beside its use; it was
read in CPython 3.11.7, 3.12.1 and 3.13.0 and in multiprocess 0.70.19.
"""

from __future__ import annotations

import importlib
import sys
from functools import cached_property
from typing import Any

from fdshare.mp.pickling.reducers import make_pickler

__all__ = ["Family"]


class Family:
    """One of the two packages. *home* is the module that holds our classes over it.

    The home's name for its family is FAMILY: a pickle holds no more than that.
    """

    def __init__(self, package: str, home: str) -> None:
        self.package = package
        self.home = self.__module__ = home
        # ForkingPickler: register/dumps/loads/_extra_reducers are the same from 3.8 to 3.14.
        self.ForkingPickler: Any = self.module("reduction").ForkingPickler
        self.loads: Any = self.ForkingPickler.loads
        self.Pickler: Any = make_pickler(self.ForkingPickler)

    def module(self, name: str) -> Any:
        """One of the package's modules."""
        return importlib.import_module(f"{self.package}.{name}")

    @property
    def spawning(self) -> Any:
        """The Popen that is pickling a process just now in this thread, or None."""
        return self._context.get_spawning_popen()

    @cached_property
    def _context(self) -> Any:
        return self.module("context")

    def derive(self, name: str, mixin: type, stock: type, **attributes: Any) -> Any:
        """The class *name*: *mixin* before *stock*, put into our module of this family, where
        pickles find it."""
        namespace = {"__module__": self.home, "__qualname__": name, "__doc__": mixin.__doc__}
        cls = type(name, (mixin, stock), namespace | {"_family": self} | attributes)
        setattr(sys.modules[self.home], name, cls)
        return cls

    def __reduce__(self) -> str:
        return "FAMILY"

    def __repr__(self) -> str:
        return f"<Family {self.package}>"
