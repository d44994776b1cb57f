"""The two packages we work on: multiprocessing, and multiprocess, its fork that pickles with dill.

Both have the same modules with the same names in them, so one description serves both. Everything
of theirs that is not in their documentation is reached through here or named beside its use; it was
read in CPython 3.11.7, 3.12.1 and 3.13.0 and in multiprocess 0.70.19.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from types import ModuleType
from typing import Any

from fdshare.mp.pickling.reducers import make_pickler

__all__ = ["Family", "family_of"]

# Where the classes of each family live: pickles name them, so they need a module each.
_HOMES = {
    "multiprocessing": "fdshare.mp.on_multiprocessing",
    "multiprocess": "fdshare.mp.on_multiprocess",
}


class Family:
    """One of the two packages. *home* is the module that holds our classes over it."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.home = _HOMES[package]
        # ForkingPickler: register/dumps/loads/_extra_reducers are the same from 3.8 to 3.14.
        self.ForkingPickler: Any = self.module("reduction").ForkingPickler
        self.loads: Any = self.ForkingPickler.loads
        self.Pickler: Any = make_pickler(self.ForkingPickler)

    def module(self, name: str) -> Any:
        """One of the package's modules."""
        return importlib.import_module(f"{self.package}.{name}")

    @cached_property
    def classes(self) -> ModuleType:
        """Our classes over this package."""
        return importlib.import_module(self.home)

    @property
    def spawning(self) -> Any:
        """The Popen that is pickling a process just now in this thread, or None."""
        return self._context.get_spawning_popen()

    @cached_property
    def _context(self) -> Any:
        return self.module("context")

    def derive(self, name: str, mixin: type, stock: type, **attributes: Any) -> Any:
        """The class *name*: *mixin* before *stock*, at home in our module of this family."""
        namespace = {"__module__": self.home, "__qualname__": name, "__doc__": mixin.__doc__}
        return type(name, (mixin, stock), namespace | {"_family": self} | attributes)

    def __reduce__(self) -> Any:
        return family_of, (self.package,)

    def __repr__(self) -> str:
        return f"<Family {self.package}>"


def family_of(package: str) -> Family:
    """The family of that name; imports the package. Raises: ValueError."""
    if package not in _HOMES:
        raise ValueError(f"backend is {package!r}; it may be one of {', '.join(_HOMES)}")
    family: Family = importlib.import_module(_HOMES[package]).FAMILY
    return family
