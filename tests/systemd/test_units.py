"""The units themselves: each line that keeps the store, and a start that has a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import wait_until

from .service import SOCKET, Service, run, systemctl

POLICY = Path("/etc/fdshare-test.toml")
NOBODY = 65534
ALLOW = '[[rule]]\neffect = "allow"\nusers = ["nobody"]\nverbs = ["list"]\n'


def test_no_number_of_deaths_is_too_many(service: Service) -> None:
    service.memory("kept")
    before = service.table()
    for _ in range(7):
        service.kill_both()
    for _ in range(7):
        service.restart()
    assert service.table() == before
    assert systemctl("is-active", "fdshare.socket") == "active\n"


def test_a_start_that_fails_loses_nothing(service: Service) -> None:
    service.memory("kept")
    before = service.table()
    service.dropin(serve="--limit max_naems=3")
    run("systemctl", "restart", "fdshare.service")
    wait_until(lambda: int(service.property("NRestarts")) > 6, "more starts than systemd's limit")
    service.dropin()
    assert service.table() == before


def test_a_restart_with_a_bad_policy_serves_root_alone(service: Service) -> None:
    POLICY.write_text(ALLOW)
    POLICY.chmod(0o644)
    service.dropin(serve=f"--policy {POLICY}")
    service.write("fdshare.socket.d/test.conf", "[Socket]\nSocketMode=0666\n")
    systemctl("restart", "fdshare.socket")
    service.memory("kept")
    before = service.table()

    POLICY.write_text(ALLOW.replace("allow", "alow"))
    service.restart()
    assert service.table() == before
    assert "alow" in service.stats().notes["policy"]
    wait_until(lambda: "alow" in service.log(), "the reason")
    refused = run(
        "setpriv", f"--reuid={NOBODY}", "--clear-groups", "fdshare", "ls", "--path", SOCKET
    )
    assert refused.returncode
    assert f"{POLICY} has a fault" in refused.stderr
    # The successors of both halves say the same.
    service.kill("server")
    assert "policy" in service.redundant().notes
    service.kill_both()
    assert "policy" in service.stats().notes
    assert run("systemctl", "reload", "fdshare.service").returncode

    POLICY.write_text(ALLOW)
    systemctl("reload", "fdshare.service")
    assert "policy" not in service.stats().notes
    allowed = run(
        "setpriv", f"--reuid={NOBODY}", "--clear-groups", "fdshare", "ls", "--path", SOCKET
    )
    assert allowed.returncode == 0, allowed.stderr
    assert service.table() == before


def test_a_first_start_with_a_bad_policy_fails(service: Service) -> None:
    POLICY.write_text(ALLOW.replace("allow", "alow"))
    service.dropin(serve=f"--policy {POLICY}")
    assert run("systemctl", "start", "fdshare.service").returncode
    wait_until(lambda: "alow" in service.log(), "the reason")


@pytest.fixture(autouse=True)
def no_policy() -> None:
    POLICY.unlink(missing_ok=True)
