"""Shows with each verb of AsyncClient the example of the same verb of Client, awaited.

It is one for `python -m asyncio`, which awaits at the prompt. A verb that is used in another way has
an example of its own in its docstring. tests/test_doctests.py runs them.
"""

from __future__ import annotations

import inspect
import re
from doctest import DocTestParser
from typing import Any, Final

from fdshare import Client
from fdshare.aio import AsyncClient

# The call of a verb that is not awaited, and a dot behind it.
CALL: Final = re.compile(r"(?<!await )client\.(\w+)\((?:[^()]|\(\))*\)(\.?)")


def example_of(verb: str) -> str:
    """What is typed, and its output; empty: there is none."""
    for cls in (AsyncClient, Client):
        doc = inspect.getdoc(getattr(cls, verb, None)) or ""
        examples = DocTestParser().get_examples(doc)
        if examples:
            return "".join(_typed(CALL.sub(_awaited, e.source)) + e.want for e in examples)
    return ""


def _awaited(call: re.Match[str]) -> str:
    if not inspect.iscoroutinefunction(getattr(AsyncClient, call[1])):
        return call[0]
    return f"(await {call[0][:-1]})." if call[2] else f"await {call[0]}"


def _typed(source: str) -> str:
    first, *others = source.splitlines()
    return "\n".join([f">>> {first}", *(f"... {line}" for line in others), ""])


def show(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    cls, _, verb = name.rpartition(".")
    if cls == "fdshare.aio.AsyncClient" and not any(">>> " in line for line in lines):
        lines += example_of(verb).splitlines()


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", show)
    return {"parallel_read_safe": True}
