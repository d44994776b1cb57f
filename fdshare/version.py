"""The version of the package, where both setup.cfg and the program can read it without importing more."""

__version__ = "0.1.0"
