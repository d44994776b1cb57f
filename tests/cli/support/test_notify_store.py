"""What a service stores, and gets back at its next start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from commandline import Shell
from users import as_user, needs_root

from cli.support.conftest import SERVICE
from fdshare import SharedMemory, connect


def test_what_is_stored_comes_back(fdshare: Shell, service) -> None:
    store = """
kept = [os.memfd_create("one"), os.memfd_create("two")]
print([os.fstat(fd).st_ino for fd in kept])
a.store("state", kept)
a.store("other", [os.memfd_create("three")])
a.barrier(30)
"""
    first = service(store)
    assert list(first) == ["web"]
    names = [entry["name"] for entry in fdshare.json("ls", "web/*")]
    assert names == ["web/other", "web/state", "web/state:2"]
    second = service()
    assert list(second) == ["web", "state", "other"]
    assert second["web"] == first["web"]
    assert len(second["state"]) == 2
    third = service("a.unstore('state'); a.barrier(30)")
    assert third == second
    assert list(service()) == ["web", "other"]


def test_what_is_stored_twice_is_kept_once(fdshare: Shell, service) -> None:
    service("fd = os.memfd_create('x'); a.store('s', [fd]); a.store('s', [fd, fd]); a.barrier(30)")
    assert len(service()["s"]) == 1


def test_a_hang_up_removes_it_unless_told_otherwise(fdshare: Shell, service, until) -> None:
    service(
        """
import socket
one, two = socket.socketpair(), socket.socketpair()
a.store("polled", [one[0]])
a.store("kept", [two[0]], poll=False)
a.barrier(30)
"""
    )
    until(lambda: len(fdshare.json("ls", "web/*")) == 1, "the hang-up is noticed")
    assert list(service()) == ["web", "kept"]


def test_a_name_that_is_none_becomes_stored(fdshare: Shell) -> None:
    code = SERVICE + "a.notify('FDSTORE=1\\nFDNAME=a:b', fds=[os.memfd_create('x')]); a.barrier(30)"
    done = fdshare.run("run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code)
    assert "the name is ignored" in done.stderr
    assert [entry["name"] for entry in fdshare.json("ls", "web/*")] == ["web/stored"]


def test_entries_of_others_in_the_group_are_not_passed(fdshare: Shell, service) -> None:
    fdshare("register", "web/http", "--memory", "/dev/null")
    assert list(service()) == ["web"]


@needs_root
def test_entries_of_other_users_are_not_passed(shell: Shell, folder: Path) -> None:
    """They might have any name, or be a listener in the place of that of the service."""
    policy = folder / "policy.toml"
    policy.write_text(
        '[[rule]]\neffect = "allow"\nusers = [65534]\nverbs = ["register"]\nnames = ["web/*"]\n'
    )
    folder.chmod(0o755)
    shell.serve("--mode", "0666", "--policy", policy)

    def register() -> str:
        with connect(shell.path, trust=[0]) as client, SharedMemory.from_bytes(b"x") as memory:
            for number, more in enumerate([{}, {"fdname": "a:b"}, {"fdname": "web"}]):
                client.register(f"web/{number}", memory, metadata={"fdstore": "web", **more})
        return "registered"

    assert as_user(65534, register) == "registered"
    code = SERVICE + "a.store('own', [os.memfd_create('x')]); a.unstore('stored'); a.barrier(30)"
    words = ["run", "--notify", "web=tcp://127.0.0.1:0", "--", sys.executable, "-c", code]
    assert list(json.loads(shell(*words))) == ["web"]
    assert list(json.loads(shell(*words))) == ["web", "own"]
    names = [entry["name"] for entry in shell.json("ls", "web/*")]
    assert names == ["web/0", "web/1", "web/2", "web/own", "web/own:2"]
