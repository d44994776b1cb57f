"""The version: read by setup.cfg and by the program, so it stands where neither imports more."""

__version__ = "0.1.0"
