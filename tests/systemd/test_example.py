"""contrib/systemd/example-web, as its comments say to install it; deploys of it refuse nobody."""

from __future__ import annotations

import http.client
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from .container import used_folders
from .service import SHIPPED, Service, properties, run, systemctl

EXAMPLE = SHIPPED / "example-web"
APP = Path("/srv/app.py")
CODE = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"version 1"]


async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"version 1"})
"""


@pytest.fixture
def web(service: Service) -> Iterator[Service]:
    """The example, as its comments say, with a gunicorn and a uvicorn where Debian has them."""
    for name in ("gunicorn", "uvicorn"):
        program = Path("/usr/bin", name)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {name} "$@"\n')
        program.chmod(0o755)
    APP.write_text(CODE)
    for source, target in {
        "sysusers.conf": "/etc/sysusers.d/fdshare-clients.conf",
        "policy.toml": "/etc/fdshare/policy.toml",
    }.items():
        Path(target).parent.mkdir(exist_ok=True)
        shutil.copy(EXAMPLE / source, target)
    run("systemd-sysusers").check_returncode()
    service.write("fdshare.socket.d/example-web.conf", (EXAMPLE / "socket.conf").read_text())
    service.write("fdshare.service.d/example-web.conf", (EXAMPLE / "service.conf").read_text())
    service.write("example-web.service", (EXAMPLE / "example-web.service").read_text())
    folders = " ".join(map(str, used_folders()))
    service.write(
        "example-web.service.d/test.conf",
        f"[Service]\nBindReadOnlyPaths={folders}\nWorkingDirectory=/srv\n",
    )
    systemctl("restart", "fdshare.socket")
    yield service
    run("systemctl", "stop", "example-web.service")


class Visitor:
    """Asks for the page again and again."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                connection = http.client.HTTPConnection("127.0.0.1", 80, timeout=20)
                connection.request("GET", "/", headers={"Connection": "close"})
                self.seen.append(connection.getresponse().read().decode())
                connection.close()
            except (OSError, http.client.HTTPException) as error:
                self.seen.append(repr(error))

    def __enter__(self) -> Visitor:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def version(number: int) -> None:
    APP.write_text(CODE.replace("version 1", f"version {number}"))


@pytest.mark.parametrize("server", ["gunicorn", "uvicorn"])
def test_deploys_refuse_nobody(web: Service, server: str) -> None:
    if server == "uvicorn":
        web.write(
            "example-web.service.d/uvicorn.conf",
            "[Service]\nType=exec\nExecStart=\nExecStart=/usr/bin/fdshare run --path "
            "/run/fdshare.sock web=tcp://0.0.0.0:80 -- /usr/bin/uvicorn --fd 3 app:asgi\n",
        )
    systemctl("start", "example-web.service")
    wait_until(lambda: web.names() == ["web"], "the port is bound")
    with Visitor() as visitor:
        for number in range(1, 4):
            version(number)
            systemctl("restart", "example-web.service")
            wait_until(lambda text=f"version {number}": text in visitor.seen[-1:], "it is there")
        # Nor does it notice the end of what holds its port.
        started = properties("example-web.service", "MainPID")
        web.restart()
        web.kill_both()
        assert properties("example-web.service", "MainPID") == started
        pages = len(visitor.seen)
        wait_until(lambda: len(visitor.seen) > pages + 10, "it is still there")
    seen = set(visitor.seen)
    if server == "uvicorn":  # which closes what it has accepted and not read: docs/howto/deploy.md
        seen = {page for page in seen if not page.startswith(("RemoteDisc", "ConnectionReset"))}
    assert seen == {"version 1", "version 2", "version 3"}


def test_its_user_may_do_no_more(web: Service) -> None:
    systemctl("start", "example-web.service")
    web.memory("secret")
    said = run(
        "setpriv", "--reuid=65534", "--regid=65534", "--groups=fdshare-clients",
        "fdshare", "fetch", "secret", "--cat", "--path", "/run/fdshare.sock",
    )  # fmt: skip
    assert "may not fetch" in said.stderr
