"""Whether dill can pickle the code of a function on this Python."""

from __future__ import annotations

import pickle
import platform
from functools import cache
from types import CodeType, ModuleType

__all__ = ["check_code"]


def check_code(code: CodeType) -> None:
    """Returns where dill can pickle *code*. Raises: pickle.PicklingError, which says what to do.

    dill 0.4.1 and older need code.co_lnotab, which Python 3.15 does not have.
    """
    import dill  # only who pickles with it pays for it

    if _fails(dill):
        raise pickle.PicklingError(
            f"dill {dill.__version__} cannot pickle {code.co_qualname}, a function that cannot be "
            f"imported by its name, on Python {platform.python_version()}: define it at the top of "
            "a module, or install a newer dill"
        )


@cache
def _fails(dill: ModuleType) -> bool:
    try:
        dill.dumps(check_code.__code__)
    except AttributeError:
        return True
    return False
