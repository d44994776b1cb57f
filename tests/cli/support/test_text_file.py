"""text_file: the text in UTF-8, or an error that names the file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fdshare.cli.support.text_file import write_text


def test_text_is_written_as_utf_8_in_place_of_another(folder: Path) -> None:
    (folder / "file").write_text("something longer")
    write_text(folder / "file", "Grüße, 世界\n")
    assert (folder / "file").read_bytes() == "Grüße, 世界\n".encode()


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_full_disk_is_told_with_the_file(size: int) -> None:
    with pytest.raises(OSError, match="/dev/full") as caught:
        write_text("/dev/full", "x" * size)
    assert caught.value.errno == errno.ENOSPC
