"""descriptor_limit: which limit, whose, and what to do about it."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import pytest
from mp.common import descriptor_limit_reached

from fdshare.errors import DescriptorLimit
from fdshare.kernel.descriptor_limit import as_limit, descriptor_limit, is_descriptor_limit


def test_the_limits_of_open_descriptors() -> None:
    assert is_descriptor_limit(OSError(errno.EMFILE, ""))
    assert is_descriptor_limit(OSError(errno.ENFILE, ""))
    assert not is_descriptor_limit(OSError(errno.ENOMEM, ""))


@pytest.mark.parametrize(
    ("code", "whose", "what", "words"),
    [
        (errno.EMFILE, "client", "RLIMIT_NOFILE", "raise it (ulimit -n) or close some"),
        (errno.ENFILE, "receiver", "fs.file-max", "raise it (ulimit -n) or close some"),
        (errno.EMFILE, "server", "RLIMIT_NOFILE", "unregister some or raise it"),
        (errno.ETOOMANYREFS, "sender", "RLIMIT_NOFILE", "in flight"),
    ],
)
def test_it_says_which_and_whose(code: int, whose: str, what: str, words: str) -> None:
    error = descriptor_limit(code, whose)  # type: ignore[arg-type]
    assert (error.errno, error.what, error.whose) == (code, what, whose)
    assert error.limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert f"{what} of the {whose} is {error.limit}, all in use" in str(error)
    assert words in str(error)


def test_an_import_that_fails_at_the_limit() -> None:
    """Where a shared library cannot be opened, an ImportError says so in words alone."""
    error = ImportError("libopenblas.so.0: cannot open shared object file: Too many open files")
    assert as_limit(error) is error
    with descriptor_limit_reached():
        limit = as_limit(error)
    assert isinstance(limit, DescriptorLimit)
    assert limit.errno == errno.EMFILE


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    program = (
        "import resource\n"
        "from fdshare.kernel.descriptor_limit import raise_descriptor_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))\n"
        "print(raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"60 (60, 60)\n"
