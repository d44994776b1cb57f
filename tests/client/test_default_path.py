"""default_path: where the server is, when nobody says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from conftest import line

from fdshare.client.default_path import default_path, make_own_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FDSHARE_PATH", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)


def test_the_first_that_is_said_counts(
    nothing_said: None, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert default_path() == f"{folder}/fdshare.sock"
    monkeypatch.setenv("FDSHARE_PATH", "@mine")
    assert default_path() == "@mine"
    monkeypatch.setenv("FDSHARE_PATH", "")  # as good as unset
    assert default_path() == f"{folder}/fdshare.sock"


@as_root
def test_roots(nothing_said: None) -> None:
    assert default_path() == default_path(create=True) == "/run/fdshare.sock"


def test_the_folder_of_a_path_that_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    own = folder / f"fdshare-{os.geteuid()}"
    make_own_folder(f"{folder}/other/fdshare.sock")
    make_own_folder("@abstract")
    assert list(folder.iterdir()) == []
    make_own_folder(f"{own}/fdshare.sock")
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o750)  # somebody wants it so
    make_own_folder(f"{own}/fdshare.sock")
    assert own.stat().st_mode & 0o777 == 0o750


CODE = """
    import os, sys, tempfile
    from fdshare.client.default_path import default_path
    from fdshare.errors import EndpointError
    os.environ.pop("FDSHARE_PATH", None)
    os.environ.pop("XDG_RUNTIME_DIR", None)
    tempfile.tempdir = sys.argv[1]
    os.setgid(65534)
    os.setuid(65534)
    for create in (False, True, False):
        try:
            print(default_path(create=create))
        except EndpointError as error:
            print("refused", error)
    folder = f"{sys.argv[1]}/fdshare-65534"
    print(oct(os.lstat(folder).st_mode), flush=True)
"""


@as_root
def test_others(folder: Path, child: object) -> None:
    """A server makes the folder, a client does not."""
    folder.chmod(0o777)
    process = child(CODE, folder)  # type: ignore[operator]
    path = f"{folder}/fdshare-65534/fdshare.sock"
    assert [line(process) for _ in range(4)] == [path, path, path, "0o40700"]


@as_root
@pytest.mark.parametrize("what", ["file", "link", "open to others", "somebody else's"])
def test_a_folder_that_is_not_theirs_alone(folder: Path, child: object, what: str) -> None:
    folder.chmod(0o777)
    there = folder / "fdshare-65534"
    if what == "file":
        there.touch(0o700)
    elif what == "link":
        there.symlink_to(folder)
    else:
        there.mkdir(0o700)
    if what != "somebody else's":
        os.chown(there, 65534, 65534, follow_symlinks=False)
    if what == "open to others":
        there.chmod(0o710)
    process = child(CODE, folder)  # type: ignore[operator]
    for _ in range(3):
        assert "must be a folder of uid 65534 with mode 0700; set FDSHARE_PATH" in line(process)
