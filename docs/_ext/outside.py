"""Links of a page to what is in the repository and not in docs/.

A file is a download, and what the site includes is a link to that page. A folder has no page: its
path is shown.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from sphinx.util import logging

logger = logging.getLogger(__name__)
ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
LINK: Final = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")
# In the repository -> the page that includes it.
INCLUDED: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/results.md": "results.md",
}


def rewrite(app: Any, docname: str, source: list[str]) -> None:
    folder = (DOCS / docname).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if path.is_relative_to(DOCS):
            return match[0]
        inside = os.path.relpath(path, ROOT)
        if inside in INCLUDED:
            return f"[{text}]({os.path.relpath(DOCS / INCLUDED[inside], folder)}{anchor})"
        if path.is_file():
            return match[0]
        if not path.is_dir():
            logger.warning("there is no %s", inside, location=docname)
        return text if inside in text else f"{text} (`{inside}` in the repository)"

    source[0] = LINK.sub(link, source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True}
