"""The classes of this package over multiprocessing. Pickles name them: keep the names."""

from __future__ import annotations

from typing import Any

from fdshare.mp.classes import build, build_late
from fdshare.mp.family import Family

FAMILY = Family("multiprocessing")
globals().update(build(FAMILY))


def __getattr__(name: str) -> Any:
    value = globals()[name] = build_late(FAMILY, name)
    return value
