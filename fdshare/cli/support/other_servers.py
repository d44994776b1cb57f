"""Servers at the other well-known paths: of root, under sudo, of a service."""

from __future__ import annotations

import os
import tempfile

from fdshare.errors import FdshareError
from fdshare.kernel.endpoint import connect

__all__ = ["other_servers"]


def other_servers(path: str) -> list[str]:
    """Those where a server answers, without *path*."""
    users = {str(os.geteuid()), os.environ.get("SUDO_UID", "0"), "0"}
    places = ["/run/fdshare.sock", "/run/fdshare/fdshare.sock"]
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(os.path.join(folder, "fdshare.sock"))
    for uid in sorted(users):
        places.append(f"/run/user/{uid}/fdshare.sock")
        places.append(os.path.join(tempfile.gettempdir(), f"fdshare-{uid}", "fdshare.sock"))
    return [place for place in dict.fromkeys(places) if place != path and _answers(place)]


def _answers(path: str) -> bool:
    try:
        connect(path, timeout=0.2).close()
    except (FdshareError, OSError):
        return False
    return True
