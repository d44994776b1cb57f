"""Exactly what is kept stays open, and standard streams are: asked of the kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
from users import needs_root

OPEN = """
import os, resource
from fdshare.kernel.descriptor_table import close_all_but
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
for number in {numbers}:
    os.dup2(0, number)
close_all_but({kept})
for number in range(600):
    try:
        os.fstat(number)
    except OSError:
        continue
    print(number, end=" ")
"""


def open_after(numbers: list[int], kept: list[int], around: Sequence[str] = ()) -> list[int]:
    """What a process that opened *numbers* has open after `close_all_but(kept)`. *around*: what
    runs the program."""
    command = [*around, sys.executable, "-c", OPEN.format(numbers=numbers, kept=kept)]
    done = subprocess.run(command, capture_output=True, check=True)
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize(
    "kept", [[], [3], [599], [4, 5, 6], [3, 5, 599], [300, 3, 5]], ids=lambda kept: f"{kept}"
)
def test_what_is_kept_stays_open(kept: list[int]) -> None:
    assert open_after([*range(3, 20), 255, 256, 300, 598, 599], kept) == [0, 1, 2, *sorted(kept)]


def test_a_number_that_is_not_open_may_be_kept() -> None:
    assert open_after([3, 5, 8], [4, 8]) == [0, 1, 2, 8]


@pytest.mark.parametrize("closed", [[], [0], [1, 2], [0, 1, 2]], ids=str)
def test_a_standard_stream_that_is_closed_is_opened(closed: list[int]) -> None:
    code = f"""
import os
from fdshare.kernel.descriptor_table import open_standard_streams
out = os.dup(1)
for number in {closed}:
    os.close(number)
open_standard_streams()
null = os.stat(os.devnull).st_rdev
for number in range(3):
    if os.fstat(number).st_rdev == null and os.get_inheritable(number):
        os.write(out, b"%d " % number)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, check=True)
    assert list(map(int, done.stdout.split())) == closed


@needs_root
def test_without_proc() -> None:
    hidden = 'mount -t tmpfs none /proc || exit 77; exec "$@"'
    around = ["unshare", "--mount", "sh", "-c", hidden, "sh"]
    try:
        assert open_after([3, 4, 255, 599], [4], around) == [0, 1, 2, 4]
    except subprocess.CalledProcessError as error:
        if error.returncode != 77 and b"unshare:" not in error.stderr:
            raise
        pytest.skip("no mount namespace can be made here")
