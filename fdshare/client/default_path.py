"""The path of the server where the caller gives none."""

from __future__ import annotations

import os
import stat

from fdshare.errors import EndpointError
from fdshare.kernel.descriptor_limit import first_use

__all__ = ["default_path", "make_own_folder", "own_folder"]


def default_path(*, create: bool = False) -> str:
    """`$FDSHARE_PATH`, else `$XDG_RUNTIME_DIR/fdshare.sock`, else `/run/fdshare.sock` for root and
    `/tmp/fdshare-UID/fdshare.sock` for others.

    A server makes the folder under /tmp (*create*). Raises: EndpointError, as `own_folder`.
    """
    if path := os.environ.get("FDSHARE_PATH"):
        return path
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(folder, "fdshare.sock")
    if os.geteuid() == 0:
        return "/run/fdshare.sock"
    return os.path.join(own_folder(create=create), "fdshare.sock")


def own_folder(*, create: bool) -> str:
    """/tmp/fdshare-UID, which *create* makes with mode 0700.

    Anybody can make a folder there first. Raises: EndpointError: it is not this user's alone.
    """
    folder = _own_folder()
    if create:
        make_own_folder(os.path.join(folder, ""))
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return folder
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EndpointError(
            folder, f"it must be a folder of uid {os.geteuid()} with mode 0700; set FDSHARE_PATH"
        )
    return folder


def make_own_folder(path: str) -> None:
    """Makes the folder of *path*, of a server that somebody names, where that is /tmp/fdshare-UID
    and not there yet: with another mode than 0700 it would be refused afterwards."""
    folder = _own_folder()
    if os.path.dirname(path) == folder:
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            pass


def _own_folder() -> str:
    with first_use():
        import tempfile  # takes a tenth of what a client imports; few come here

    return os.path.join(tempfile.gettempdir(), f"fdshare-{os.geteuid()}")
