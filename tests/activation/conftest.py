"""A service manager's end of NOTIFY_SOCKET."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdshare.activation.notify_socket import NotifySocket


@pytest.fixture(params=["path", "long", "abstract"])
def manager(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NotifySocket]:
    if request.param == "abstract":
        address = f"@fdshare-test-{os.getpid()}"
    else:
        deep = folder / ("x" * 120 if request.param == "long" else "n")
        deep.mkdir()
        address = str(deep / "notify")
    with NotifySocket(address) as bound:
        monkeypatch.setenv("NOTIFY_SOCKET", bound.address)
        yield bound
