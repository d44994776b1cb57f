"""A shell for each test, and a server for those that want one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Shell


@pytest.fixture
def shell(folder: Path) -> Iterator[Shell]:
    """Commands without a server."""
    shell = Shell(folder)
    yield shell
    shell.close()


@pytest.fixture
def fdshare(shell: Shell) -> Shell:
    """Commands, and a server without a keeper that they find."""
    shell.serve("--no-keeper")
    return shell
