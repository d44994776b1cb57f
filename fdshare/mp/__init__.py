"""multiprocessing and multiprocess with channels that carry descriptors."""

from fdshare.mp.context import get_context

__all__ = ["get_context"]
