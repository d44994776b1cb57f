"""imports: before a process works, imports what would be imported while it does.

A process without a free descriptor cannot open the file of a module.
"""

from __future__ import annotations

import gc
import sys
import types
from typing import Final

__all__ = ["import_all", "import_lazy"]

_LAZY: Final[type | None] = getattr(types, "LazyImportType", None)


def import_all() -> None:
    """As `import_lazy`, for a server, and ctypes, with which it asks the sockets of others. All
    that is there by now stays, and garbage collections look at it no more. Each took 10 ms, in
    which nobody was served."""
    from fdshare.kernel.borrowed_socket import import_ctypes

    import_ctypes()
    import_lazy()
    gc.freeze()


def import_lazy() -> None:
    """Imports what the modules of fdshare, of msgspec and of the standard library have put off.

    From Python 3.15 a module may be imported when its name is first used (PEP 810): by the keyword
    `lazy`, and all of them with -X lazy_imports=all or PYTHON_LAZY_IMPORTS=all. The modules of the
    program around are its own.
    """
    if _LAZY is not None:
        _import_lazy(_LAZY)


def _import_lazy(lazy: type) -> None:
    known = {"fdshare", "msgspec", *sys.stdlib_module_names}
    done: set[str] = set()
    while new := [name for name in sys.modules if name not in done]:  # each may import others
        done.update(new)
        for name in new:
            module = sys.modules[name]
            if name.partition(".")[0] in known and isinstance(module, types.ModuleType):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, lazy):
                        getattr(module, attribute)
