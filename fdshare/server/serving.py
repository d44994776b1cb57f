"""One server process from its settings: listen, say that it is ready, serve, leave nothing behind.

Everybody starts a server through here: the command line, `Manager.start()`, the private server of a
process tree, and the keeper.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Literal

import msgspec

from fdshare.kernel.endpoint import Listener, listen
from fdshare.server.policy import Policy
from fdshare.server.world import Options, Server

__all__ = ["Settings", "serve"]

log = logging.getLogger("fdshare.server")


class Settings(msgspec.Struct, kw_only=True):
    """How to serve. Plain data alone: a new process is handed it, and so is new code when the
    server upgrades itself by exec; a callable would be lost there."""

    path: str
    mode: int = 0o600
    backlog: int = 4096
    keeper: bool = True
    limits: dict[str, float | int] = {}
    authkey: bytes | None = None
    policy: str | None = None  # path of a TOML file
    log_format: Literal["text", "json"] = "text"
    log_level: str = "INFO"
    metrics: str | None = None  # HOST:PORT for Prometheus text over HTTP


def options(settings: Settings) -> Options:
    """What of *settings* concerns the server itself. Raises: PolicyError, InvalidArgument."""
    return Options(settings.limits, settings.authkey, lambda: _policy(settings.policy))


def serve(settings: Settings, ready: Callable[[], None], listener: Listener | None = None) -> None:
    """Serves until SIGTERM, SIGINT or a shutdown request; must run in the main thread.

    *ready* is called once clients can connect. *listener*, taken over, replaces `settings.path`.
    Raises: AddressInUse, EndpointError, PolicyError.
    """
    with listener or listen(settings.path, mode=settings.mode, backlog=settings.backlog) as bound:
        server = Server(bound.socket, options(settings))
        try:
            with _signals(server):
                ready()
                server.run()
        finally:
            server.shut_down()


class _signals:
    """SIGTERM and SIGINT stop, SIGHUP reloads; the former handlers come back at the end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._former: dict[int, object] = {}

    def __enter__(self) -> None:
        stop = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGHUP: self._reload}
        for number, handler in stop.items():
            self._former[number] = signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: object) -> None:
        self._server.stop()

    def _reload(self, number: int, frame: object) -> None:
        self._server.loop.post(self._try_reload)

    def _try_reload(self) -> None:
        try:
            self._server.reload_policy()
            log.info("policy reloaded")
        except ValueError as error:
            log.error("the policy stays as it was: %s", error)


def _policy(file: str | None) -> Policy:
    """The default policy, or the one in *file*."""
    if file is None:
        return Policy(os.geteuid())
    import grp
    import pwd

    with open(file, "rb") as stream:
        text = stream.read()
    return Policy.from_toml(
        text,
        file=file,
        own_uid=os.geteuid(),
        uid_of=lambda name: pwd.getpwnam(name).pw_uid,
        gid_of=lambda name: grp.getgrnam(name).gr_gid,
    )
