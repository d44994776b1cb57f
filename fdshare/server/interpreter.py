"""The command line of a new interpreter that runs the same fdshare."""

from __future__ import annotations

import os
import subprocess
import sys

from fdshare import version

__all__ = ["fresh_interpreter"]


def fresh_interpreter(module: str, call: str) -> list[str]:
    """The command line that imports *module* and exits with the status of *call*, a function of it
    with its arguments: fresh_interpreter("fdshare.server.child", "main(3)").

    The same executable with the same flags, and fdshare found where it was found here.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(version.__file__)))
    function = call.partition("(")[0]
    code = (
        f"import sys; sys.path.insert(0, {root!r}); "
        f"from {module} import {function}; sys.exit({call})"
    )
    # What multiprocessing's spawn passes on, too: -O, -W, -X, -I ...
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]
