"""Programs that start another one as their child, which LISTEN_PID does not name then."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

__all__ = ["starts_a_child"]

# Those that exec the program instead (env, nice, nohup, setpriv, chroot ...) are none.
_WRAPPERS: Final = frozenset(
    ["timeout", "su", "sudo", "doas", "runuser", "strace", "ltrace", "script", "xargs"]
)
_SHELLS: Final = frozenset(["sh", "bash", "dash", "ash", "ksh", "zsh"])
# A shell that has more to do than one command starts it as a child; `exec` says not to.
_MORE: Final = re.compile(r"[;&|\n]")
_CAREFUL: Final = re.compile(r"\bexec\b|LISTEN_|<&|>&")


def starts_a_child(command: Sequence[str]) -> bool:
    """Whether *command* is known to run the real program as a child, which would not find that the
    descriptors are its own."""
    name = os.path.basename(command[0])
    if name in _WRAPPERS:
        return True
    if name not in _SHELLS or len(command) < 3 or command[1] != "-c":
        return False
    return bool(_MORE.search(command[2])) and not _CAREFUL.search(command[2])
