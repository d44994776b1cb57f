"""Which programs start the real one as their child."""

from __future__ import annotations

import pytest

from fdshare.cli.support.wrappers import starts_a_child


@pytest.mark.parametrize(
    "command",
    [
        ["timeout", "60", "gunicorn"],
        ["/usr/bin/sudo", "-u", "www-data", "gunicorn"],
        ["sh", "-c", "cd /srv && gunicorn app:app"],
        ["bash", "-c", "gunicorn app:app; echo over"],
    ],
)
def test_wrappers(command: list[str]) -> None:
    assert starts_a_child(command)


@pytest.mark.parametrize(
    "command",
    [
        ["gunicorn", "-c", "a;b"],
        ["env", "A=b", "gunicorn"],
        ["sh", "-c", "cd /srv && exec gunicorn app:app"],
        ["sh", "-c", "LISTEN_PID=$$ ./program; true"],
        ["sh", "-c", "read line <&3; echo"],
        ["sh", "-c", "./program"],
        ["sh"],
        ["bash", "script.sh"],
    ],
)
def test_programs_that_are_none(command: list[str]) -> None:
    assert not starts_a_child(command)
