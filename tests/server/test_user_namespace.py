"""In a user namespace that knows few users, all others are shown as one uid. Nobody is that uid."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import line

OWNER, STRANGER, OVERFLOW = 2000, 1501, 65534
# Imports come first: the next user may not be able to read the library.
SERVER = f"""
    import ctypes, os, sys
    from fdshare.manager import ManagedServer
    from fdshare.server.settings import Settings
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setresgid({OWNER}, {OWNER}, {OWNER})
    os.setresuid({OWNER}, {OWNER}, {OWNER})
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, for who writes the tables
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        print("no", os.strerror(ctypes.get_errno()), flush=True)
        sys.exit()
    print("unshared", flush=True)
    sys.stdin.readline()
    assert os.geteuid() == {OVERFLOW}
    settings = Settings(path=sys.argv[1], mode=0o666, keeper=False, log_level="ERROR")
    server = ManagedServer(settings)
    print("ready", flush=True)
    server.serve_forever()
"""
CLIENT = """
    import os, sys
    from fdshare.client.blocking.client import Client
    from fdshare.errors import FdshareError
    uid, trust = map(int, sys.argv[2:])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    with Client(sys.argv[1], trust=[trust]) as client:
        for verb, call in {
            "register": lambda: client.register("name", 0),
            "names": client.names,
            "shutdown": client.shutdown,
        }.items():
            try:
                call()
                print(verb, "done", flush=True)
            except FdshareError as error:
                print(verb, type(error).__name__, flush=True)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a namespace")


@pytest.fixture
def path(folder: Path, child: Callable[..., Any]) -> str:
    """A server of uid 2000 in a namespace where only that uid has a number: 65534."""
    folder.chmod(0o777)
    process = child(SERVER, folder / "s")
    if (said := line(process)) != "unshared":
        pytest.skip(f"no user namespace for uid {OWNER}: {said}")
    tables = Path(f"/proc/{process.pid}")
    (tables / "uid_map").write_text(f"{OVERFLOW} {OWNER} 1\n")
    (tables / "gid_map").write_text(f"{OVERFLOW} {OWNER} 1\n")
    process.stdin.write("\n")
    process.stdin.flush()
    assert line(process) == "ready"
    return str(folder / "s")


@pytest.mark.parametrize("uid", [OWNER, STRANGER])
def test_the_server_trusts_nobody_that_is_shown_as_the_overflow_uid(
    path: str, child: Callable[..., Any], uid: int
) -> None:
    """Before, it took every user without a number for its own."""
    client = child(CLIENT, path, uid, OWNER)
    assert [line(client) for _ in range(3)] == [
        "register AccessDenied",
        "names AccessDenied",
        "shutdown AccessDenied",
    ]


def test_root_of_the_outer_namespace_has_no_number_either(
    path: str, child: Callable[..., Any]
) -> None:
    assert line(child(CLIENT, path, 0, OWNER)) == "register AccessDenied"
