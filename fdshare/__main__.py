"""The command line: `fdshare`, or `python -m fdshare`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Runs the command of sys.argv; returns its exit status."""
    from fdshare.cli.main import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
