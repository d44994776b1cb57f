"""serve --detach: the server goes on in a child of init, and this process tells when it serves."""

from __future__ import annotations

import os
from typing import NoReturn

from fdshare.cli.support.orphan import fork_orphan
from fdshare.cli.support.start_server import not_started, open_log
from fdshare.kernel.descriptor_table import close_all_but

__all__ = ["go_on_in_background"]


def go_on_in_background(path: str) -> int:
    """In the server's process: the number to write its ready line to. The caller owns the result.

    The other process, which called this, waits for the line, prints the path and the pid, and does
    not return. The output of the server goes to PATH.log. Raises: EndpointError, OSError; in
    the process that waits: `not_started`.
    """
    from fdshare.server.failover.service_manager import leave_service

    log = open_log(path)
    before = os.fstat(log).st_size
    reads, writes = os.pipe()
    if not fork_orphan():
        os.close(writes)
        _wait(path, reads, log, before)
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in enumerate((nothing, log, log)):
        os.dup2(source, target)
    # It must not keep a caller's pipe open: somebody may wait for the end of that.
    close_all_but({writes})
    leave_service()
    return writes


def _wait(path: str, reads: int, log: int, before: int) -> NoReturn:
    with open(reads, "rb") as ready:
        said = ready.read().decode()
    if not said:
        raise not_started(os.pread(log, 4096, before).decode(errors="replace"))
    print(f"serving at {path}, pid {said.strip()}", flush=True)
    os._exit(0)
