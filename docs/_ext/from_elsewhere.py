"""Fails where a page would load something from another place: the site works without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from sphinx.errors import ExtensionError

# What a browser loads by itself. A link that a reader follows is another matter.
LOADS: Final = re.compile(
    r"""(?:\ssrc=|\bdata=|url\(|@import\s+|<link[^>]*\bhref=|<image[^>]*\bhref=)\s*["']?"""
    r"""((?:https?:)?//[^"')\s>]+)"""
)


def check(app: Any, failure: Exception | None) -> None:
    if failure is not None or app.builder.name != "html":
        return
    for path in Path(app.outdir).rglob("*"):
        if path.suffix in (".html", ".css", ".svg"):
            if found := LOADS.search(path.read_text()):
                raise ExtensionError(f"{path.relative_to(app.outdir)} loads {found[1]}")


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
