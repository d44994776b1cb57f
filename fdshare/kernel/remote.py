"""An exception's text and traceback as data: what a refusal carries from one process to another.

The traceback is tblib's `Traceback.to_dict()` in JSON. It is built again from checked data: names
and line numbers, never code and never a pickle. JSON writes no NUL, so that it fits the textbook's
convention.
"""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Any, Final

from fdshare.errors import RemoteError

__all__ = ["describe", "refusal"]

_RECORD: Final = b"\x1efdshare-traceback "  # after the line for people; RS (ASCII 30) starts it
MAX_FRAMES: Final = 100  # the innermost; JSON nests twice as deep


def describe(error: BaseException, traceback: bool) -> bytes:
    """*error* as one text, `FileNotFoundError: ...`, and its *traceback* where wanted."""
    words = str(error)
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    line = text.encode(errors="replace").replace(b"\x1e", b"?")
    if not traceback or error.__traceback__ is None:
        return line
    try:
        from tblib import Traceback  # only where an exception really travels
    except (ImportError, OSError):  # with no descriptor free, nothing can be imported
        return line

    frames = error.__traceback__
    depth = _depth(frames)
    while depth > MAX_FRAMES and frames.tb_next is not None:
        frames, depth = frames.tb_next, depth - 1
    data = Traceback(frames, get_locals=_no_locals).to_dict()
    return line + _RECORD + json.dumps(data).encode()


def refusal(status: int, said: bytes) -> RemoteError:
    """The RemoteError of *status* and what was *said*, with the traceback if it holds one.

    A record that is not one is kept as text.
    """
    line, mark, record = said.partition(_RECORD)
    traceback = _rebuild(record) if mark else None
    text = (said if mark and traceback is None else line).decode(errors="replace")
    return RemoteError(status, text).with_traceback(traceback)


def _depth(traceback: TracebackType | None) -> int:
    depth = 0
    while traceback is not None:
        depth, traceback = depth + 1, traceback.tb_next
    return depth


def _no_locals(frame: object) -> dict[str, Any]:
    return {}


def _rebuild(record: bytes) -> TracebackType | None:
    """The traceback in *record*, or None where it is not one."""
    from tblib import Traceback

    try:
        checked = _checked(json.loads(record))
        traceback: TracebackType | None = Traceback.from_dict(checked).as_traceback()
        return traceback
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _checked(data: Any) -> dict[str, Any]:
    """A copy of *data* that holds names and numbers only; one of the errors above if it is not."""
    frames = []
    while data is not None:
        frame, code = data["tb_frame"], data["tb_frame"]["f_code"]
        names = _text(code["co_filename"]), _text(code["co_name"])
        frames.append((*names, _line(data["tb_lineno"]), _line(frame["f_lineno"])))
        if len(frames) > MAX_FRAMES:
            raise ValueError("too many frames")
        data = data["tb_next"]
    result: dict[str, Any] | None = None
    for filename, name, tb_lineno, f_lineno in reversed(frames):
        # Whoever prints the traceback reads the file: it had better be one, not a FIFO or a tty.
        filename = filename if os.path.isfile(filename) else f"<{filename}>"
        code = {"co_filename": filename, "co_name": name}
        scope = {"__name__": name, "__file__": filename}
        frame = {"f_globals": scope, "f_locals": {}, "f_code": code, "f_lineno": f_lineno}
        result = {"tb_frame": frame, "tb_lineno": tb_lineno, "tb_next": result}
    if result is None:
        raise ValueError("no frames")
    return result


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        raise TypeError("no name")
    return value


def _line(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError("no line number")
    return value
