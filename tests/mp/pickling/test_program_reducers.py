"""Classes whose pickling the program defines, in channels of ours and in patched ones."""

from __future__ import annotations

import copyreg
import io
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

from fdshare.mp.backends import get_context
from fdshare.mp.family import Family
from fdshare.mp.workers.tasks import hold_initializer
from mp.common import identity, trackers  # noqa: F401
from mp.pickling.conftest import Through

adopted: list[tuple[int, int]] = []


def adopt(sock: socket.socket) -> socket.socket:
    adopted.append(identity(sock))
    return sock


class Adopted:
    """Arrives as the socket, after a call of the program's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def __reduce__(self) -> Any:
        return adopt, (self.sock,)


def test_an_object_that_reduces_to_a_socket_is_not_taken_for_one(through: Through) -> None:
    adopted.clear()
    with socket.socket() as sock:
        for times in range(1, 4):
            through(sock).close()
            through(Adopted(sock)).close()
            assert adopted == [identity(sock)] * times


def test_nor_by_a_connection_that_builds_sockets_while_it_reads(family: Family) -> None:
    adopted.clear()
    reader, writer = get_context(backend=family.package).Pipe(duplex=False)
    with reader, writer, socket.socket() as sock:
        for times in range(1, 4):
            for obj in (sock, Adopted(sock)):
                writer.send(obj)
                reader.recv().close()
            assert len(adopted) == times


class Reopened(io.FileIO):
    """A file that is opened again by its name."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __reduce_ex__(self, protocol: object) -> Any:
        return Reopened, (self.path,)


class Labelled(socket.socket):
    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def __reduce__(self) -> Any:
        return Labelled, (self.label,)


class Stateful(socket.socket):
    label = ""

    def __getstate__(self) -> str:
        return self.label

    def __setstate__(self, label: str) -> None:
        self.__init__()  # type: ignore[misc]
        self.label = label


class Plain(socket.socket):
    pass


def test_methods_of_a_class_are_obeyed(through: Through) -> None:
    with Labelled("a") as first, Stateful() as second, Reopened(os.devnull) as third:
        second.label = "b"
        arrived = through([first, second, third])
        assert [type(obj) for obj in arrived] == [Labelled, Stateful, Reopened]
        assert [arrived[0].label, arrived[1].label, arrived[2].path] == ["a", "b", os.devnull]
        for obj in arrived:
            obj.close()


def test_a_subclass_without_methods_of_its_own_has_its_kind(through: Through) -> None:
    with Plain() as sock, through(sock) as arrived:
        assert type(arrived) is socket.socket
        assert identity(arrived) == identity(sock)


def by_number(obj: Any) -> Any:
    return int, (obj.fileno(),)


def register_with_package(family: Family, cls: type) -> Callable[[], object]:
    reducers = family.ForkingPickler._extra_reducers
    former = dict(reducers)
    family.ForkingPickler.register(cls, by_number)

    def undo() -> None:
        reducers.clear()
        reducers.update(former)

    return undo


def register_with_copyreg(family: Family, cls: type) -> Callable[[], object]:
    copyreg.pickle(cls, by_number)
    return lambda: copyreg.dispatch_table.pop(cls)


def register_with_dill(family: Family, cls: type) -> Callable[[], object]:
    import dill

    former = dict(dill.Pickler.dispatch)
    dill.pickle(cls, lambda pickler, obj: pickler.save_reduce(*by_number(obj), obj=obj))

    def undo() -> None:
        dill.Pickler.dispatch.clear()
        dill.Pickler.dispatch.update(former)

    return undo


@pytest.mark.parametrize("make", [socket.socket, Plain, tempfile.TemporaryFile])
@pytest.mark.parametrize(
    "register", [register_with_package, register_with_copyreg, register_with_dill]
)
def test_registered_reducers_are_obeyed(
    through: Through, family: Family, register: Any, make: Any
) -> None:
    if register is register_with_dill and family.package != "multiprocess":
        pytest.skip("multiprocessing does not pickle with dill")
    if register is register_with_copyreg and make is socket.socket:
        pytest.skip("what the package registers goes before copyreg")
    with make() as obj, through(obj) as before:
        undo = register(family, type(obj))
        try:
            assert [through(obj), through([obj])] == [obj.fileno(), [obj.fileno()]]
            _, arguments = hold_initializer(family, print, (obj,))
        finally:
            undo()
        assert arguments == (obj,)
        with through(obj) as after:
            assert identity(before) == identity(after) == identity(obj)


def test_what_the_package_registers_goes_before_copyreg(through: Through, family: Family) -> None:
    with socket.socket() as sock:
        undo = register_with_copyreg(family, socket.socket)
        try:
            with through(sock) as arrived:
                assert type(arrived) is socket.socket
        finally:
            undo()
