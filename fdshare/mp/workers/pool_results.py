"""What a pool gives for its jobs: results that are waited for, one or one after the other.

A signal that comes just before a wait does not end it, nor does one that another thread receives:
its handler would run when the job is done. A worker that dies of the same Ctrl-C does no job. So a
wait without end is one of many here.
"""

from __future__ import annotations

from typing import Any, Final

from fdshare.mp.stock import StockApplyResult, StockIMapIterator

__all__ = ["ApplyResultMixin", "IMapIteratorMixin"]

_LOOK: Final = 1.0  # seconds until the handler of a signal runs that a wait has not noticed


class ApplyResultMixin(StockApplyResult):
    """An AsyncResult that keeps nothing alive by the exception that it raises."""

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the job is done, or after *timeout* seconds."""
        if timeout is not None:
            super().wait(timeout)
            return
        while not self._event.wait(_LOOK):
            pass

    def get(self, timeout: float | None = None) -> Any:
        """What the job returned, within *timeout* seconds. Raises: what it raised; the family's
        TimeoutError."""
        self.wait(timeout)
        if not self.ready() or self._success:
            return super().get(0)
        try:
            raise self._value
        finally:
            # As concurrent.futures does: the exception has, by its traceback, this frame, which
            # would have the result, which has the exception; and the frames of all that call us.
            del self


class IMapIteratorMixin(StockIMapIterator):
    """The results of `imap`, which are waited for with a look at signals."""

    def next(self, timeout: float | None = None) -> Any:
        """The next result, within *timeout* seconds. Raises: what its call raised; StopIteration;
        the family's TimeoutError."""
        if timeout is None:
            with self._cond:
                while not self._items and self._index != self._length:
                    self._cond.wait(_LOOK)
        return super().next(timeout)

    __next__ = next
