"""fdshare: share open descriptors between Python processes."""

from fdshare.version import __version__

__all__ = ["__version__"]
