"""The public surface: its names, what help() says of each, and what repr() shows."""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mp.common import trackers  # noqa: F401

import fdshare
from fdshare import activation, aio, errors, kernel
from fdshare.errors import FdshareError

# Whoever adds a name here promises to keep it. Every other name is free to change.
PUBLIC = {
    fdshare: """
        Client Descriptor DescriptorInfo EntryInfo Event Explained Follower Manager
        ProcessPoolExecutor Ref Registered ServerStats SharedMemory Snapshot Watcher __version__
        activation aio connect errors get_context hold install kernel listen_fds notify ref
        register_kind shared_copy uninstall unregister_kind
    """,
    kernel: """
        Credentials Descriptor HasFileno Listener MAX_DESCRIPTORS Received borrow cli_conn
        close_all connect datagram enable_credentials listen own_credentials peer_credentials
        peer_pidfd recv_fd recv_fds s_pipe send_err send_fd send_fds serv_accept serv_listen
    """,
    aio: "AsyncClient AsyncFollower AsyncWatcher connect",
    activation: """
        FIRST Notification NotifySocket STORED barrier check_fdname child_environment listen_fds
        listen_fds_in_order notify own_pidfd_id store unstore watchdog_seconds
    """,
    errors: """
        AccessDenied AddressInUse AlreadyTaken AuthenticationFailed BadRequest ClosedDescriptor
        DescriptorLimit DescriptorRefused EndpointError FdshareError FetchTimeout ForeignHost
        GenerationMismatch InvalidArgument InvalidName KeeperUnavailable LogFull KindMismatch
        MagicMismatch MemoryBusy
        NameNotFound NameTaken NoServer NoTransit Overflow PolicyError ProtocolError QuotaExceeded
        RemoteError ServerGone ServerTimeout TooManyDescriptors TruncatedControl UnknownKind
        UnreadData UnsupportedKind UnsupportedPlatform UntrustedServer VersionMismatch WatchTimeout
    """,
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_each_module_exports_just_these(module: ModuleType) -> None:
    names = set(PUBLIC[module].split())
    if module is fdshare:
        names |= set(errors.__all__)
    assert set(module.__all__) == names
    assert len(module.__all__) == len(names)


def documented() -> Iterator[tuple[str, Any]]:
    """Each public module, class, function and method, under its full name."""
    for module, names in PUBLIC.items():
        yield module.__name__, module
        for name in names.split():
            thing = getattr(module, name)
            if inspect.ismodule(thing) or not callable(thing):
                continue  # a module has its own row, a constant a word in its module's docstring
            yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing) and not issubclass(thing, Exception):
                for member, value in inspect.getmembers(thing):
                    function = value.fget if isinstance(value, property) else value
                    home = getattr(function, "__module__", None) or ""
                    if not member.startswith("_") and home.startswith("fdshare"):
                        yield f"{module.__name__}.{name}.{member}", value


DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_first_line_of_help_is_one_sentence(name: str) -> None:
    thing = DOCUMENTED[name]
    lines = (thing.__doc__ or "").strip().splitlines()
    assert lines, f"{name} has no docstring"
    assert lines[0].endswith((".", ":")), f"{name}: {lines[0]!r} goes on in the next line"
    if inspect.isroutine(thing):
        assert "(" not in lines[0].split(" ")[0], f"{name} repeats its signature"


def test_constants_are_in_the_docstring_of_their_module() -> None:
    for module, names in PUBLIC.items():
        for name in names.split():
            if isinstance(getattr(module, name), int | str):
                assert name in (module.__doc__ or ""), f"{module.__name__}.{name}"


def test_help_opens_with_a_map_of_all() -> None:
    shown = pydoc.plain(pydoc.render_doc(fdshare))
    opening = shown.partition("PACKAGE CONTENTS")[0]
    assert "DESCRIPTION" in opening
    for name in PUBLIC[fdshare].split():
        assert name in opening, f"{name} is not on the map"


def test_nothing_public_has_the_repr_of_object(folder: Path, server: Any) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(fdshare.connect(server.address))
        null = stack.enter_context(fdshare.Descriptor(os.open(os.devnull, os.O_RDONLY)))
        registered = client.register("x", null)
        notify_socket = stack.enter_context(activation.NotifySocket(str(folder / "n")))
        ours, theirs = kernel.s_pipe()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        kernel.send_fds(ours, [null], b"data")
        managed = fdshare.Manager(folder / "managed").get_server()
        stack.callback(managed.close)
        shown = [
            client,
            stack.enter_context(client.watch()),
            stack.enter_context(client.follow("x")),
            registered,
            client.info("x"),
            client.stats(),
            managed,
            aio.connect(server.address),
            aio.connect(server.address).watch(),
            aio.connect(server.address).follow("x"),
            null,
            stack.enter_context(fdshare.SharedMemory(10)),
            fdshare.ref("x", server.address),
            fdshare.ref("x", server.address).as_object(),
            stack.enter_context(fdshare.hold(null)),
            stack.enter_context(fdshare.ProcessPoolExecutor(1)),
            *(fdshare.get_context(method) for method in ("fork", "spawn", "forkserver")),
            stack.enter_context(kernel.listen(folder / "l")),
            kernel.own_credentials(),
            stack.enter_context(kernel.recv_fds(theirs, 10, 1)),
            notify_socket,
            activation.Notification(["READY=1"]),
            FdshareError("text"),
        ]
        for thing in shown:
            assert f"{type(thing).__name__} object at 0x" not in repr(thing)
            assert type(thing).__repr__ is not object.__repr__


def test_an_import_imports_little() -> None:
    """Everything else when it is first used."""
    code = (
        "import sys; before = set(sys.modules); import fdshare\n"
        "new = set(sys.modules) - before\n"
        "print(*sorted(name for name in new if name.startswith('fdshare')))\n"
        "print(*new & {'asyncio', 'json', 'logging', 'multiprocessing', 'pickle', 'socket'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    ours = "fdshare fdshare.errors fdshare.printable fdshare.version"
    assert (done.stdout, done.stderr) == (f"{ours}\n\n", "")


def test_a_client_imports_what_most_use() -> None:
    """What else it may need takes half as long again: for an authkey, `bind`, `watch`, `follow`."""
    code = (
        "import sys; before = set(sys.modules); import fdshare; fdshare.connect\n"
        "new = set(sys.modules) - before\n"
        "print(*new & {'dataclasses', 'hmac', 'ipaddress', 'pathlib', 'tempfile', 'threading'})\n"
        "print(*sorted(name for name in new if name.endswith(('bind_address', 'watch', 'follow'))))"
    )
    code = f"import msgspec\n{code}"  # some of its releases import more
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n\n", "")


def test_what_is_public_is_imported_by_its_first_use() -> None:
    for name in PUBLIC[fdshare].split():
        assert name in dir(fdshare)
        if not name.startswith("_"):
            found = getattr(fdshare, name)
            home = found.__name__ if inspect.ismodule(found) else found.__module__
            assert getattr(import_module(home), name, found) is found
