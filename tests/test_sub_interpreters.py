"""In an interpreter beside the main one fdshare.kernel works; the rest says why it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Runs the rest of the program in a sub-interpreter; its last line says what went wrong there.
RUN = """\
import sys
try:
    import _interpreters as interpreters
except ImportError:  # before 3.13
    import _xxsubinterpreters as interpreters
code = f"import sys; sys.path[:] = {sys.path!r}\\n" + sys.argv[1]
made = interpreters.create()
failure = interpreters.run_string(made, code)
interpreters.destroy(made)
if failure:
    print(failure.formatted)
"""

KERNEL = """\
import os, socket
from fdshare import kernel
near, far = kernel.s_pipe()
reader, writer = os.pipe()
kernel.send_fd(near, writer)
with kernel.recv_fd(far) as received:
    os.write(received.fileno(), b"through")
print(os.read(reader, 9), kernel.peer_credentials(near).pid == os.getpid())
"""


def run(code: str) -> str:
    """What it prints, or what it raises, in a sub-interpreter of a new process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_the_kernel_layer_works() -> None:
    assert run(KERNEL) == "b'through' True\n"


def test_errors_and_version_are_there() -> None:
    assert run("import fdshare; print(fdshare.FdshareError.__name__)") == "FdshareError\n"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asks no extension whether it may be loaded")
@pytest.mark.parametrize("name", ["Manager", "connect", "aio", "get_context", "install"])
def test_what_is_not_available_says_so(name: str) -> None:
    said = run(f"import fdshare; fdshare.{name}")
    assert f"fdshare.{name} is not available in a sub-interpreter: it needs msgspec" in said
    assert "fdshare.kernel is" in said
