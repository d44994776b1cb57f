"""The service as another user than root, behind a socket of root's."""

from __future__ import annotations

import pytest

from .container import used_folders
from .service import Service, run, systemctl

HARDENED = """
ProtectSystem=strict
ProtectHome=tmpfs
PrivateTmp=yes
PrivateDevices=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
MemoryDenyWriteExecute=yes
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
SystemCallArchitectures=native
RestrictNamespaces=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
UMask=0077
PrivateIPC=yes
KeyringMode=private
"""
BIND = "AmbientCapabilities=CAP_NET_BIND_SERVICE\n"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param("User=daemon", id="User"),
        pytest.param("DynamicUser=yes", id="DynamicUser"),
        pytest.param("PrivateUsers=yes", id="PrivateUsers"),
        pytest.param(f"DynamicUser=yes\n{BIND}{HARDENED}", id="DynamicUser, hardened"),
    ],
)
def test_root_is_served_whatever_dies(service: Service, lines: str) -> None:
    # The interpreter may be where such a service sees nothing.
    folders = " ".join(map(str, used_folders()))
    service.dropin(f"{lines}\nBindReadOnlyPaths={folders}")
    service.memory("kept", ttl=500, metadata={"a": "b"})
    service.memory("of a process", lifetime="process")
    with service.client() as client:
        client.bind("port", "tcp://127.0.0.1:8080").close()
    before = service.table()
    for death in ("keeper", "server", "keeper"):
        service.kill(death)
        service.redundant()
        assert service.table() == before
    service.kill_both()
    service.restart()
    run("fdshare", "upgrade").check_returncode()
    service.redundant()
    systemctl("reload", "fdshare.service")
    assert service.table() == before
