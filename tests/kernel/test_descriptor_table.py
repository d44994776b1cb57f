"""close_all_but: exactly what is kept stays open, asked of the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def open_after(numbers: list[int], kept: list[int]) -> list[int]:
    """What a process that opened *numbers* has open after `close_all_but(kept)`."""
    program = OPEN.format(numbers=numbers, kept=kept)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize(
    "kept", [[], [3], [599], [4, 5, 6], [3, 5, 599], [300, 3, 5]], ids=lambda kept: f"{kept}"
)
def test_what_is_kept_stays_open(kept: list[int]) -> None:
    assert open_after([*range(3, 20), 255, 256, 300, 598, 599], kept) == [0, 1, 2, *sorted(kept)]


def test_a_number_that_is_not_open_may_be_kept() -> None:
    assert open_after([3, 5, 8], [4, 8]) == [0, 1, 2, 8]
