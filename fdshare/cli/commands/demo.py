"""demo: shows what fdshare does."""

from __future__ import annotations

import sys

import click

__all__ = ["demo"]


@click.command(
    short_help="Show what fdshare does, with real processes.",
    help="""Show what fdshare does, in half a minute, with real processes. Changes nothing.

    \b
    Example:
      fdshare demo
    """,
)
def demo() -> int:
    from fdshare.cli.support.demonstration import run

    status: int = run(sys.stdout)
    return status
