"""What docs/howto/systemd.md promises of the units."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from .service import SOCKET, Knocker, Service, run, systemctl


def test_the_first_client_starts_it(service: Service) -> None:
    assert service.property("ActiveState") == "inactive"
    assert service.names() == []
    assert service.property("ActiveState") == "active"
    assert service.property("MainPID") == str(service.stats().keeper_pid)
    assert service.property("StatusText") == f"Serving at {SOCKET}"


@pytest.fixture(scope="module")
def listener(lasting_service: Service) -> Iterator[socket.socket]:
    """Held as "web", among entries of other sorts; the entry that was taken is gone."""
    service = lasting_service
    with service.client() as client, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.listen(4096)
        client.register("web", listener, metadata={"role": "rw", "ü": "ß"})
        client.bind("port", "tcp://127.0.0.1:80").close()
        client.bind("path", "unix:///run/fdshare-test.sock?mode=0660&group=1").close()
        near, far = socket.socketpair()
        with near, far:
            client.register("pair", near, drop_on_hangup=True)
            service.memory("deadline", ttl=600)
            service.memory("process", lifetime="process", grace=60)
            for name in ("old", "taken", "gone"):
                service.memory(name)
            client.rename("old", "new")
            client.take("taken").close()
            client.unregister("gone")
            service.memory("new", replace=True)
            yield listener


DEATHS: dict[str, Callable[[Service], object]] = {
    "the server": lambda s: s.kill("server"),
    "the keeper": lambda s: s.kill("keeper"),
    "the server of a second keeper": lambda s: (s.kill("keeper"), s.redundant(), s.kill("server")),
    "both": lambda s: s.kill("keeper", "server"),
    "all, by systemctl kill": lambda s: systemctl("kill", "-s", "KILL", "fdshare.service"),
    "systemctl restart": lambda s: s.restart(),
    "systemctl reload": lambda s: systemctl("reload", "fdshare.service"),
    "systemctl daemon-reload": lambda s: s.reload(),
    "systemctl daemon-reexec": lambda s: systemctl("daemon-reexec"),
    "both after daemon-reexec": lambda s: (systemctl("daemon-reexec"), s.kill("keeper", "server")),
    "fdshare upgrade": lambda s: run("fdshare", "upgrade").check_returncode(),
    "the keeper after an upgrade": lambda s: (run("fdshare", "upgrade"), s.kill("keeper")),
}


@pytest.mark.parametrize("death", DEATHS)
def test_nothing_is_lost_and_nobody_refused(
    lasting_service: Service, listener: socket.socket, death: str
) -> None:
    service = lasting_service
    before, stored = service.table(), service.stored()
    assert len(before) == 7
    with Knocker(listener) as knocker:
        DEATHS[death](service)
        service.redundant()
        assert service.table() == before
    assert knocker.failures == []
    assert service.stored() == stored


def test_what_the_kernel_says_is_told_all_the_same(
    lasting_service: Service, listener: socket.socket
) -> None:
    """The unit takes much from the server, but not the queue and the command that `info` tells."""
    with lasting_service.client() as client:
        web = client.info("web")
        assert web.descriptors[0].listening
        assert web.descriptors[0].queue == 0
        assert "pytest" in web.registrant.command
        assert client.info("path").descriptors[0].local == "/run/fdshare-test.sock"


def test_a_store_that_is_kept_outlives_a_stop(service: Service) -> None:
    release = run("systemctl", "--version").stdout.split()[1]
    if int(release.partition(".")[0]) < 254:
        pytest.skip(f"systemd {release} has no FileDescriptorStorePreserve=")
    service.dropin("FileDescriptorStorePreserve=yes")
    service.memory("kept")
    before = service.table()
    systemctl("stop", "fdshare.socket", "fdshare.service")
    systemctl("start", "fdshare.socket")
    assert service.table() == before


def test_a_stop_lets_go_of_all(service: Service) -> None:
    service.memory("gone")
    systemctl("stop", "fdshare.service")
    assert service.names() == []
