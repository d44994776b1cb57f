"""granian on a socket that is passed. It has no option for that: this takes the place of the method
in which it binds its own."""

from __future__ import annotations

from granian import Granian
from granian._granian import SocketHolder
from granian.constants import Interfaces

import fdshare


class PassedSocket(Granian):
    def _init_shared_socket(self) -> None:
        [passed] = fdshare.listen_fds()["web"]
        self._sso = passed.socket()
        self._shd = SocketHolder(self._sso.fileno(), False, 1024)


if __name__ == "__main__":
    PassedSocket("app:asgi", interface=Interfaces.ASGI, log_enabled=False).serve()
