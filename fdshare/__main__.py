"""The command line: `fdshare`, or `python -m fdshare`."""

from __future__ import annotations

import sys

__all__ = ["main"]

_INTERRUPTED = 130  # as in cli/main.py, which may not be imported yet


def main() -> int:
    """Runs the command of sys.argv; returns its exit status."""
    try:
        from fdshare.cli.main import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:  # Ctrl-C while it imports what it needs
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
