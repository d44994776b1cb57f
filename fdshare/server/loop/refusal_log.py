"""RefusalLog: the audit lines that a client can cause as often as it likes, without any right.

Who may only connect could fill a disk with refusals. So each user gets a burst of lines, and then
some each second; what is left out is counted, and a line says how many it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fdshare.server import logs
from fdshare.server.core.ports import Session

__all__ = ["RefusalLog"]

_BURST: Final = 100  # lines of one uid at once,
_RATE: Final = 10.0  # and lines a second after that
_PERIOD: Final = 5.0  # seconds after which what was left out is counted in a line


class _Share:
    """What one user may still cause: *lines* at the time *at*; *left_out* since the last count."""

    __slots__ = ("at", "left_out", "lines")

    def __init__(self, now: float) -> None:
        self.lines = float(_BURST)
        self.at = now
        self.left_out = 0

    def refill(self, now: float) -> None:
        self.lines = min(self.lines + (now - self.at) * _RATE, _BURST)
        self.at = now


class RefusalLog:
    """Notes refusals and the like, of each user at a limited rate."""

    def __init__(self, later: Callable[[float, Callable[[float], None]], None]) -> None:
        """*later(delay, call)* has *call* made in *delay* seconds, with the time."""
        self._later = later
        self._shares: dict[int, _Share] = {}

    def note(self, verb: str, name: str, session: Session, outcome: str, now: float) -> None:
        uid = session.subject.uid
        share = self._shares.get(uid)
        if share is None:
            if not self._shares:
                self._later(_PERIOD, self._count)
            share = self._shares[uid] = _Share(now)
        share.refill(now)
        if share.lines >= 1.0:
            share.lines -= 1.0
            logs.audit(verb, name, outcome, session.pid, uid)
        else:
            share.left_out += 1

    def tell(self) -> None:
        """Notes how many lines were left out, for each user."""
        for uid, share in self._shares.items():
            if share.left_out:
                logs.audit("request", "", f"refused {share.left_out} times more", None, uid)
                share.left_out = 0

    def _count(self, now: float) -> None:
        self.tell()
        for uid, share in list(self._shares.items()):
            share.refill(now)
            if share.lines == _BURST:
                del self._shares[uid]
        if self._shares:
            self._later(_PERIOD, self._count)
