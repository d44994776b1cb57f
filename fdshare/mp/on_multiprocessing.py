"""The classes of this package over multiprocessing. Pickles name them: keep the names."""

from __future__ import annotations

from fdshare.mp.classes import Classes
from fdshare.mp.context import make_contexts
from fdshare.mp.family import Family

FAMILY = Family("multiprocessing", __name__)
CLASSES = Classes(FAMILY)
CONTEXTS = make_contexts(CLASSES)


def __getattr__(name: str) -> object:
    # A class that nobody has asked for yet in this process; made, it is in this module.
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(CLASSES, name)
