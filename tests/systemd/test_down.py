"""What ends, and who waits, while the service is down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

from conftest import wait_until

from .container import ROOT
from .service import SOCKET, UNITS, Service, systemctl

OWNER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import fdshare
client = fdshare.connect({SOCKET!r}, timeout=60, reconnect=60)
with open("/dev/null", "rb") as file:
    client.register("of " + sys.argv[1], file, lifetime="process", grace=float(sys.argv[2]))
print("there", flush=True)
sys.stdin.read()
"""


def owner(name: str, grace: int) -> subprocess.Popen[str]:
    """A process with an entry."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, name, str(grace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_what_ends_meanwhile_is_gone(service: Service) -> None:
    service.dropin("RestartSec=2s")
    near, far = socket.socketpair()
    brief, lasting = service.client(), service.client()
    owners = [owner("brief", 0), owner("lasting", 600)]
    with service.client() as client, near, open(os.devnull, "rb") as null:
        client.register("pair", near, drop_on_hangup=True)
        brief.register("brief connection", null, lifetime="connection")
        lasting.register("lasting connection", null, lifetime="connection")
    service.memory("deadline", ttl=1)
    service.memory("later", ttl=600)
    service.memory("kept")
    late: list[object] = []

    def wait_for_late() -> None:
        with service.client(timeout=60, reconnect=60) as client:
            late.append(client.fetch_raw("late", timeout=60))

    waiter = threading.Thread(target=wait_for_late)
    waiter.start()
    service.kill("keeper", "server")
    wait_until(lambda: service.property("SubState") == "auto-restart", "it is down")
    far.close()
    brief.close()
    for process in owners:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()
    # A client that comes while it is down waits, and finds what is left.
    kept = {"lasting connection", "later", "kept", "of lasting"}
    wait_until(lambda: set(service.names()) == kept, "what has ended is gone")
    service.memory("late")
    waiter.join(30)
    (descriptors,) = late
    for descriptor in descriptors:  # type: ignore[attr-defined]
        descriptor.close()
    lasting.close()
    wait_until(lambda: "lasting connection" not in service.names(), "its client is gone now")


def test_without_a_socket_unit_clients_wait_for_the_path(service: Service) -> None:
    """The server makes its socket itself: who comes while it is down looks for it again."""
    systemctl("stop", "fdshare.socket")
    (UNITS / "fdshare.socket").unlink()
    text = (UNITS / "fdshare.service").read_text()
    for line in ("Requires=fdshare.socket\n", "After=fdshare.socket\n"):
        text = text.replace(line, "")
    service.write("fdshare.service", text)
    systemctl("start", "fdshare.service")
    service.memory("kept")
    before = service.table()
    for _ in range(2):
        service.kill_both()
        assert service.table() == before
        service.restart()
        assert service.table() == before
    systemctl("stop", "fdshare.service")
    assert not os.path.exists(SOCKET)
