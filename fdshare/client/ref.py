"""ref: a name that can be pickled where a descriptor cannot, and is fetched where it is used.

A cluster engine may move a task to any of its machines. A reference knows which boot of which
machine it was made on. On another one it raises an error that says so, instead of fetching what
somebody else keeps under the same name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from fdshare.client.blocking.client import Client
from fdshare.client.blocking.follow import Follower
from fdshare.client.default_path import default_path
from fdshare.errors import ForeignHost
from fdshare.kernel.descriptor_limit import descriptor_limit, is_descriptor_limit
from fdshare.protocol.names import check_name

__all__ = ["Ref", "ref"]

# random(4): the same for all processes and containers of one kernel, new with each boot.
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class Ref:
    """*name* at the server on *path* of one machine; it has no descriptor, and can be pickled."""

    name: str
    path: str
    host: str
    boot_id: str

    def check(self) -> None:
        """Raises ForeignHost unless this is the machine, and the boot, that it was made on.

        Containers of one machine share its kernel and may share a server, so their host names do
        not matter; where there is no boot id (outside Linux) nothing else does. Raises also:
        DescriptorLimit: none is free to look which machine this is.
        """
        host, boot_id = _here()
        if self.boot_id != boot_id or (not boot_id and self.host != host):
            raise ForeignHost(self.name, _spoken(self.host, self.boot_id), _spoken(host, boot_id))

    def fetch(self, *, timeout: float | None = 0) -> Any:
        """A new object of the kind that is registered under the name, here; see `Client.fetch`.

        The caller owns the result. Raises: ForeignHost, and what `Client.fetch` raises.
        """
        self.check()
        with Client(self.path) as client:
            return client.fetch(self.name, timeout=timeout)

    def follow(
        self, *, timeout: float | None = 0, on_change: Callable[[Any], object] | None = None
    ) -> Follower:
        """A handle on what is registered under the name, here; see `Client.follow`.

        It has a client of its own, which is closed with it. The caller owns the result. Raises:
        ForeignHost, and what `Client.follow` raises.
        """
        self.check()
        client = Client(self.path)
        try:
            return Follower(client, self.name, timeout, on_change, client.close)
        except BaseException:
            client.close()
            raise

    def as_object(self) -> Any:
        """An argument for a task on this machine: unpickling it fetches the object.

        The task owns the object; each unpickling makes another one.
        """
        return _Lazy(self)

    def __str__(self) -> str:
        return f"{self.name} at {self.path} on {self.host}"


class _Lazy:
    """Stands for the object that a reference leads to, until it is unpickled."""

    __slots__ = ("_ref",)

    def __init__(self, ref: Ref) -> None:
        self._ref = ref

    def __reduce__(self) -> tuple[Any, ...]:
        return (_fetch, (self._ref,))

    def __repr__(self) -> str:
        return f"<the object of {self._ref}, once it is unpickled>"


def ref(name: str, path: str | os.PathLike[str] | None = None) -> Ref:
    """A reference to what is, or will be, registered under *name* at the server on *path*.

    *path* as for `connect`; the default is looked up now, and is part of the reference. The server
    is not asked. Raises: InvalidName; DescriptorLimit: none is free to look which machine this is.

    >>> with fdshare.Manager() as manager, open(os.devnull) as file:
    ...     _ = manager.register("null", file)
    ...     there = pickle.loads(pickle.dumps(fdshare.ref("null", manager.address)))
    ...     with there.fetch() as again:
    ...         again.name
    '/dev/null'
    """
    check_name(name)
    address = default_path() if path is None else os.fspath(path)
    if not address.startswith("@"):
        address = os.path.abspath(address)
    return Ref(name, address, *_here())


def _fetch(ref: Ref) -> Any:
    return ref.fetch()


def _here() -> tuple[str, str]:
    """(host name, boot id) of this machine; the second is empty where the kernel has none.

    Raises: DescriptorLimit.
    """
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            boot_id = file.read().strip()
    except OSError as error:
        if is_descriptor_limit(error):
            raise descriptor_limit(error.errno, "client") from None
        boot_id = ""
    return socket.gethostname(), boot_id


def _spoken(host: str, boot_id: str) -> str:
    return f"{host} (boot {boot_id[:8]})" if boot_id else host
