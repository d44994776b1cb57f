"""multiprocessing and multiprocess with channels that carry descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdshare.mp.backends import get_context

__all__ = ["get_context"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Not at the top: a child that was sent a socket needs what takes it, and no context.
        if name != "get_context":
            raise AttributeError(f"module 'fdshare.mp' has no attribute {name!r}")
        from fdshare.mp.backends import get_context

        return get_context
