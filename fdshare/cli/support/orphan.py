"""A child of init, which the program that this process becomes does not have to wait for."""

from __future__ import annotations

import errno
import os

__all__ = ["fork_orphan"]


def fork_orphan() -> bool:
    """True in a new process, which is a child of init (or of the nearest subreaper), in a session
    of its own; False in the caller, when it is there. Raises: OSError: it is not."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            code = code if code > 0 else errno.ECHILD  # it was killed
            raise OSError(code, os.strerror(code))
        return False
    code = errno.ECHILD
    try:
        os.setsid()
        if os.fork() == 0:
            return True
        code = 0
    except OSError as error:
        code = error.errno or code
    os._exit(code)
