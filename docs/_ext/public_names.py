"""Warns of every public name that the site does not describe, and describes each once."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from sphinx.util import logging

from fdshare.errors import FdshareError

MODULES: Final = (
    "fdshare",
    "fdshare.kernel",
    "fdshare.aio",
    "fdshare.errors",
    "fdshare.activation",
)
logger = logging.getLogger(__name__)


def skip(app: Any, what: str, name: str, obj: object, skipped: bool, options: Any) -> bool | None:
    """The exceptions are on the page of fdshare.errors, and not of fdshare, too."""
    if app.env.current_document.autodoc_module == "fdshare.errors":
        return None
    return True if isinstance(obj, type) and issubclass(obj, FdshareError) else None


def check(app: Any, env: Any) -> None:
    described = {name.rpartition(".")[2] for name in env.domaindata["py"]["objects"]}
    for module in MODULES:
        for name in import_module(module).__all__:
            if not name.startswith("__") and name not in described:
                logger.warning("%s.%s is public and on no page", module, name)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-skip-member", skip)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
