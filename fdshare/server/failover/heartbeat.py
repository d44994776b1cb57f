"""Heartbeat: a keeper's knowledge of whether its server answers."""

from __future__ import annotations

from typing import Final

__all__ = ["Heartbeat"]

_PINGS: Final = 5  # a server that has answered none of so many in a row hangs


class Heartbeat:
    """When to ask the server for a sign of life, and what its silence means. Pure.

    What counts is how many questions in a row were not answered, and not the time that has passed:
    where both processes were stopped, by a debugger, a freezer or a suspended machine, the server
    has not been silent.
    """

    def __init__(self, bound: float) -> None:
        """A server that is silent for about *bound* seconds hangs."""
        self._every = bound / (_PINGS + 1)
        self._unanswered = 0
        self.due: float | None = None  # when `ask` is to be called; None where there is no server

    def begin(self, now: float) -> None:
        """There is another server."""
        self._unanswered, self.due = 0, now + self._every

    def end(self) -> None:
        """There is none any more, or it has been told to end."""
        self._unanswered, self.due = 0, None

    def answered(self) -> None:
        """It has said something."""
        self._unanswered = 0

    def ask(self, now: float) -> bool:
        """True if it is time for a question; False also where the server hangs."""
        if self.due is None or now < self.due:
            return False
        self.due = now + self._every
        self._unanswered += 1
        return not self.hangs

    @property
    def well(self) -> bool:
        """Whether it has answered the last question but one."""
        return self._unanswered < 2

    @property
    def hangs(self) -> bool:
        """Whether it has answered none for so long that it is to be replaced."""
        return self._unanswered > _PINGS
