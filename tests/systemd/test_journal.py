"""What the journal has of the service."""

from __future__ import annotations

import json
import os
import signal

import pytest
from conftest import wait_until

from .service import Service, properties, run


def lines(identifier: str) -> list[dict[str, str]]:
    asked = run("journalctl", "-b", "-u", "fdshare.service", f"-t{identifier}", "-ojson")
    return [json.loads(line) for line in asked.stdout.splitlines()]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_lines_have_priorities(service: Service, log_format: str) -> None:
    service.dropin(serve=f"--log-format {log_format}")
    service.memory("kept")
    wait_until(lambda: "register 'kept'" in service.log())
    service.kill("server")
    service.redundant()
    found = {}
    for line in lines("fdshare"):
        if log_format == "json" and line["MESSAGE"].startswith("{"):
            line["MESSAGE"] = json.loads(line["MESSAGE"])["message"]
        found[line["MESSAGE"]] = line["PRIORITY"]
    assert found["the server is gone (it was killed by signal 9), making a new one"] == "4"
    registered = {found[message] for message in found if "register 'kept'" in message}
    assert registered == {"6"}


def test_the_status_says_when_it_ends(service: Service) -> None:
    service.memory("kept")
    run("systemctl", "stop", "fdshare.service")
    assert service.property("StatusText") == "Ending"


def test_stop_says_that_it_comes_back(service: Service) -> None:
    service.memory("kept")
    before = service.table()
    assert "systemctl stop" in run("fdshare", "stop").stderr
    assert service.table() == before


def test_a_journal_that_hangs(service: Service) -> None:
    """Nobody waits for it: no client, no successor, no restart."""
    names = [f"{number}/" + "x" * 200 for number in range(200)]
    with service.client() as client, open(os.memfd_create("held"), "rb") as held:
        for name in names:
            client.register(name, held)
        journald = int(properties("systemd-journald.service", "MainPID")["MainPID"])
        os.kill(journald, signal.SIGSTOP)
        try:
            while not client.stats().log_dropped:
                for descriptor in client.fetch_many(names).values():
                    descriptor.close()
            service.kill("server")
            service.redundant()
            client.register("later", held)
            service.kill("keeper")
            service.redundant()
            service.restart()
            assert len(client.names()) == len(names) + 1
        finally:
            os.kill(journald, signal.SIGCONT)
