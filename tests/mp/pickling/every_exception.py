"""One of every exception class of the standard library and of numpy."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

# What an import of these does, or needs: a window, another platform, a browser.
NOT_IMPORTED = {
    "antigravity",
    "idlelib",
    "lib2to3",
    "test",
    "this",
    "tkinter",
    "turtle",
    "turtledemo",
    "ensurepip",
    "pip",
}
# What a constructor of some other class may want.
SAMPLES: tuple[tuple[Any, ...], ...] = (
    ("text",),
    (),
    *(tuple(pair) for pair in itertools.product(("text", 3, b"data"), repeat=2)),
    ("a", "b", "c"),
    ("a", "b", 3),
    ("a", 2, "c"),
    ("a", 2, "c", {}),
)
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
NOT_BUILT = {
    "xml.dom.DOMException": "it is abstract",
    "concurrent.interpreters.ExecutionFailed": "it has what a sub-interpreter has said",
}
# Those that no pickle can name: the module has no class of that name.
NOT_NAMED = {
    "dbm.error": "it is _dbm.error",
    "signal.itimer_error": "it is signal.ItimerError",
    "concurrent.interpreters.QueueError": "it is not in that module",
    "concurrent.interpreters.QueueNotFoundError": "it is not in that module",
}


def constructors() -> dict[str, Callable[[], BaseException]]:
    """How those are made whose constructors want more than text and numbers, or whose attributes
    the samples would leave unset."""
    import argparse
    import configparser
    import subprocess
    import tarfile
    from email.message import Message
    from importlib.metadata import PackageNotFoundError
    from py_compile import PyCompileError
    from pydoc import ErrorDuringImport
    from urllib.error import HTTPError
    from xml.sax import SAXParseException
    from xml.sax.xmlreader import Locator

    import numpy

    try:
        from numpy._core import _exceptions as ufuncs
    except ImportError:  # numpy 1
        from numpy.core import _exceptions as ufuncs

    # From 3.12 on the exception by itself.
    wrong: Any = ValueError("wrong")
    wrong = wrong if sys.version_info >= (3, 12) else (ValueError, wrong, None)
    double, whole = numpy.dtype("f8"), numpy.dtype("i8")
    made: list[Callable[[], BaseException]] = [
        lambda: UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"),
        lambda: UnicodeEncodeError("ascii", "a\xe9", 1, 2, "ordinal not in range"),
        lambda: UnicodeTranslateError("a\xe9", 1, 2, "no translation"),
        lambda: SyntaxError("invalid", ("file.py", 3, 4, "text", 3, 7)),
        lambda: BaseExceptionGroup("group", [KeyboardInterrupt(1), ValueError(2)]),
        lambda: ExceptionGroup("group", [TypeError(1), OSError(2, "gone", "path")]),
        lambda: SystemExit(7),
        lambda: StopIteration(["value"]),
        lambda: OSError(95, "gone", "here", None, "there"),
        lambda: BlockingIOError(11, "would block", 5),
        lambda: ImportError("none", name="n", path="p"),
        lambda: ModuleNotFoundError("none", name="n", path="p"),
        lambda: NameError("none", name="n"),
        lambda: AttributeError("none", name="n", obj=[1, 2]),
        lambda: argparse.ArgumentError(None, "wrong"),
        lambda: configparser.MissingSectionHeaderError("file", 3, "line"),
        lambda: subprocess.CalledProcessError(1, ["false"], b"out", b"err"),
        lambda: PackageNotFoundError("package"),
        lambda: PyCompileError(ValueError, ValueError("wrong"), "file"),
        lambda: ErrorDuringImport("file", wrong),
        lambda: HTTPError("http://localhost", 404, "none", Message(), io.BytesIO(b"body")),
        lambda: SAXParseException("wrong", None, Locator()),
        lambda: numpy.exceptions.AxisError(3, 2, "an axis"),
        lambda: ufuncs._ArrayMemoryError((3, 4), double),
        lambda: ufuncs._UFuncBinaryResolutionError(numpy.add, (double, whole)),
        lambda: ufuncs._UFuncNoLoopError(numpy.add, (double, whole)),
        lambda: ufuncs._UFuncInputCastingError(numpy.add, "safe", double, whole, 0),
        lambda: ufuncs._UFuncOutputCastingError(numpy.add, "safe", double, whole, 0),
    ]
    if hasattr(tarfile, "FilterError"):  # 3.11.4
        made += [
            lambda: tarfile.LinkOutsideDestinationError(tarfile.TarInfo("name"), "path"),
            lambda: tarfile.OutsideDestinationError(tarfile.TarInfo("name"), "path"),
            lambda: tarfile.AbsoluteLinkError(tarfile.TarInfo("name")),
            lambda: tarfile.AbsolutePathError(tarfile.TarInfo("name")),
            lambda: tarfile.SpecialFileError(tarfile.TarInfo("name")),
        ]
    if hasattr(tarfile, "LinkFallbackError"):
        made.append(lambda: tarfile.LinkFallbackError(tarfile.TarInfo("name"), "path"))
    return {name(type(make())): make for make in made}


def name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def classes() -> list[type[BaseException]]:
    """Of the modules that this interpreter can import, in a fixed order."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for module in sorted(sys.stdlib_module_names - NOT_IMPORTED):
            if not module.startswith("_py"):  # the classes of C once more
                _import(module)
        _import("numpy")
        importlib.import_module("numpy.ma")
    return sorted(set(_below(BaseException)), key=name)


def _import(package: str) -> None:
    try:
        module = importlib.import_module(package)
    except ImportError:  # of another platform
        return
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if found.name != "__main__" and "test" not in found.name:
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{package}.{found.name}")


def _below(cls: type[BaseException]) -> Iterator[type[BaseException]]:
    package = cls.__module__.partition(".")[0]
    # pytest says of some of its own that they are of builtins. A class that its module has replaced
    # by one in C, as pickle has, is there for ever on Python 3.13 without the GIL.
    namesake = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
    posing = namesake is not cls and (package == "builtins" or isinstance(namesake, type))
    if (package in sys.stdlib_module_names or package == "numpy") and not posing:
        yield cls
    for derived in cls.__subclasses__():
        yield from _below(derived)


def build(known: dict[str, Callable[[], BaseException]], cls: type) -> BaseException | None:
    """One of *cls*, with a note; None: no sample fits its constructor."""
    makers = [known.get(name(cls)), *(partial(cls, *sample) for sample in SAMPLES)]
    for make in filter(None, makers):
        try:
            error: BaseException = make()
        except Exception:
            continue
        error.add_note("a note")
        if not any(
            "__reduce__" in vars(base) and base.__flags__ & HEAP_TYPE for base in cls.__mro__
        ):
            vars(error)["own"] = ["attribute"]  # which a method of Python's may leave out
        return error
    return None


def attributes(error: BaseException) -> dict[str, Any]:
    """Every attribute that is no method, in a form that can be compared."""
    found = {}
    for each in dir(error):
        if each == "__notes__" or not each.startswith("__"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is deprecated
                value = getattr(error, each, None)
            if not callable(value):
                found[each] = plain(value)
    return found | {"str": str(error), "repr": repr(error), "class": type(error)}


def plain(value: Any) -> Any:
    if isinstance(value, BaseException):
        return attributes(value)
    if isinstance(value, list | tuple):
        return type(value), [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value).__eq__ is object.__eq__ and hasattr(value, "__dict__"):
        return type(value), plain(vars(value))
    return type(value) if type(value).__eq__ is object.__eq__ else value
