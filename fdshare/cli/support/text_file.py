"""Text that a command writes to a file which its user names."""

from __future__ import annotations

import os

__all__ = ["write_text"]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes *text* to the file at *path*, in UTF-8, in place of what it has.

    Raises: OSError, which names the file: whatever goes wrong, and of a full disk, too.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        error.filename = os.fspath(path)  # write(2) and close(2) name none
        raise
