"""The classes of this package over multiprocess, which pickles with dill. Keep the names: pickles
hold them."""

from __future__ import annotations

from typing import Any

from fdshare.mp.classes import build, build_late
from fdshare.mp.family import Family

FAMILY = Family("multiprocess")
globals().update(build(FAMILY))


def __getattr__(name: str) -> Any:
    value = globals()[name] = build_late(FAMILY, name)
    return value
