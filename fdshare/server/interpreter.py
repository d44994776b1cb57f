"""The command line of a new interpreter that runs the same fdshare."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from fdshare import version

__all__ = ["fresh_interpreter"]

# fdshare from where it was found here, whatever other is installed. Its folder comes last on the
# path, and the current folder is not on it (-P): what lies there could take the place of a module
# of the standard library, and run as this user.
_CODE: Final = """\
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
spec = PathFinder.find_spec("fdshare", [{root!r}])
sys.modules["fdshare"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["fdshare"])
sys.path.append({root!r})
from {module} import {function}
sys.exit({call})
"""


def fresh_interpreter(module: str, call: str) -> list[str]:
    """The command line that imports *module* and exits with the status of *call*, a function of it
    with its arguments: fresh_interpreter("fdshare.server.child", "main(3, 4)").

    The same executable with the same flags, and fdshare found where it was found here.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(version.__file__)))
    code = _CODE.format(root=root, module=module, function=call.partition("(")[0], call=call)
    # What multiprocessing's spawn passes on, too: -O, -W, -X, -I ...
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if "-I" not in flags and "-P" not in flags:
        flags.append("-P")
    return [sys.executable, *flags, "-c", code]
