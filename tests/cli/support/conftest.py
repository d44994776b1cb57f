"""What the tests of both halves of `run --notify` share: a service that it starts."""

from __future__ import annotations

import json
import sys

import pytest
from commandline import Shell

SERVICE = """
import json, os, sys
import fdshare.activation as a
passed = a.listen_fds()
print(json.dumps({k: [os.fstat(d.fileno()).st_ino for d in v] for k, v in passed.items()}),
      flush=True)
[d.detach() for v in passed.values() for d in v]
"""


@pytest.fixture
def service(fdshare: Shell):
    """Runs a service: SERVICE, then *code*; what it was passed."""

    def run(code: str = "", *options: str) -> dict[str, list[int]]:
        command = [sys.executable, "-c", SERVICE + code]
        said = fdshare("run", "--notify", "web=tcp://127.0.0.1:0", *options, "--", *command)
        return json.loads(said.splitlines()[0])

    return run
