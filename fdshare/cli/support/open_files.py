"""The processes that have an open file description now, from /proc and kcmp(2)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from fdshare.kernel.open_file import same_open_file

__all__ = ["Holder", "holders"]

How: TypeAlias = Literal["kcmp", "inode"]


class Holder(NamedTuple):
    """A process that has it open, under the numbers *fds*.

    *how*: "kcmp": the kernel says that it is the same open file description; "inode": it is the
    same file or socket, which may have been opened twice.
    """

    pid: int
    uid: int
    command: str
    fds: list[int]
    how: How


def holders(fds: Sequence[int]) -> list[Holder]:
    """The other processes that have one of *fds* of this process open, in the order of pids.

    Only those whose /proc this user may read. *fds* are borrowed for the call.
    """
    ours = {fd: _link(os.getpid(), fd) for fd in fds}
    found = []
    for pid in _pids():
        kcmp: list[int] = []
        inode: list[int] = []
        for number, link in _open_files(pid):
            for fd, own in ours.items():
                if link != own:
                    continue
                same = same_open_file(os.getpid(), fd, pid, number)
                if same:
                    kcmp.append(number)
                elif same is None and not own.startswith("anon_inode:"):
                    inode.append(number)
        for numbers, how in ((kcmp, "kcmp"), (inode, "inode")):
            if numbers:
                found.append(_holder(pid, sorted(set(numbers)), how))  # type: ignore[arg-type]
    return found


def _pids() -> list[int]:
    own = os.getpid()
    return sorted(int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) != own)


def _open_files(pid: int) -> Iterator[tuple[int, str]]:
    """(number, link in /proc) of a process; none if it has ended, or is another user's."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for number in numbers:
        if link := _link(pid, int(number)):
            yield int(number), link


def _link(pid: int, fd: int) -> str:
    # Never os.stat(): on a dead network mount it would wait.
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return ""


def _holder(pid: int, fds: list[int], how: How) -> Holder:
    command, uid = "", -1
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            raw = file.read(4096)
        command = raw.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        pass
    return Holder(pid, uid, command, fds, how)
