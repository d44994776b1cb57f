"""Text of others, made harmless for a log, a message or a terminal.

Any user chooses names, paths, addresses and commands. What is not printable (str.isprintable) can
end a line and forge the next, be obeyed by a terminal, or change the direction of writing.
"""

from __future__ import annotations

__all__ = ["printable", "printable_json"]


def printable(text: str) -> str:
    """*text* with escapes for what is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_json(text: str, *, ascii_only: bool = False) -> str:
    """*text*, which is JSON in one line, with escapes of JSON for what is not printable; with
    *ascii_only* for what is not ASCII, too."""
    if text.isprintable() and (not ascii_only or text.isascii()):
        return text
    return "".join(
        c if c.isprintable() and (not ascii_only or c.isascii()) else _escaped(c) for c in text
    )


def _escaped(char: str) -> str:
    # Not with json: every program that imports fdshare would import that, too.
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
