"""OutputFile: where it is, and whose it may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdshare.cli.support.output_file import OutputFile
from fdshare.errors import EndpointError


def test_it_is_beside_the_socket(folder: Path) -> None:
    with OutputFile.beside(str(folder / "s.sock"), "web/http") as made:
        assert made.path == str(folder / "s.sock.web%2Fhttp.log")
        assert os.stat(made.path).st_mode & 0o777 == 0o600


def test_it_is_in_the_users_own_folder_where_there_is_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with OutputFile.beside("@abstract", "web") as made:
        assert made.path == str(folder / f"fdshare-{os.geteuid()}" / "web.log")


def test_the_last_lines_are_those_since_it_was_opened(folder: Path) -> None:
    path = folder / "out"
    path.write_text("of another start\n")
    with OutputFile(str(path)) as made:
        assert made.last_lines() == []
        os.write(made.descriptor.fileno(), b"".join(b"line %d\n" % n for n in range(12)))
        assert made.last_lines() == [f"line {n}" for n in range(2, 12)]
        os.write(made.descriptor.fileno(), b"x" * 10_000)
        assert made.last_lines() == ["x" * 4096]
    assert path.read_text().startswith("of another start\nline 0\n")


def test_what_is_no_file_has_no_last_lines() -> None:
    with OutputFile(os.devnull) as made:
        assert made.last_lines() == []


def test_a_link_or_a_pipe_of_somebody_else_is_not_written_to(folder: Path) -> None:
    target = folder / "target"
    target.touch()
    (folder / "s.web.log").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        OutputFile.beside(str(folder / "s"), "web")
    os.mkfifo(folder / "s.pipe.log")
    with pytest.raises(EndpointError, match="--output"):
        OutputFile.beside(str(folder / "s"), "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another's file")
def test_anothers_file_is_not_written_to(folder: Path) -> None:
    path = folder / "s.web.log"
    path.touch()
    os.chown(path, 65534, 65534)
    with pytest.raises(EndpointError, match="--output"):
        OutputFile.beside(str(folder / "s"), "web")
