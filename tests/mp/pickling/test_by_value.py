"""Functions that dill pickles by value: once, as long as it would write the same."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import dill
import pytest
from lambdas import needs_lambdas

from fdshare.mp.backends import backend_of
from fdshare.mp.pickling import by_value
from fdshare.mp.pickling.by_value import ByValue
from fdshare.mp.pickling.reducers import encode

pytestmark = needs_lambdas
FAMILY = backend_of("multiprocess").FAMILY

limit = 10


class Dumps:
    """What has pickled the functions, and how often."""

    def __init__(self) -> None:
        self.count = 0
        self.of = ByValue(self, dill.loads, dill.settings)

    def __call__(self, function: FunctionType) -> object:
        self.count += 1
        return dill.dumps(function)

    def arrived(self, function: Any) -> Any:
        """*function* as it arrives; None: it is not one that is kept."""
        reduced = self.of.reduce(function)
        return None if reduced is None else reduced[0](*reduced[1])


@pytest.fixture
def dumps() -> Dumps:
    return Dumps()


def make() -> Any:
    def local(number: int = 1, text: str = "a") -> tuple[int, str]:
        """Returns both, and a global."""
        return number, text, limit  # type: ignore[return-value]

    return local


def test_the_same_function_is_pickled_once(dumps: Dumps) -> None:
    local = make()
    for function in local, local, make():  # the last one has the same code
        arrived = dumps.arrived(function)
        assert arrived is not function
        assert arrived(2) == (2, "a", 10)
        assert arrived.__globals__ is globals()
        for name in "__name__", "__qualname__", "__module__", "__doc__", "__annotations__":
            assert getattr(arrived, name) == getattr(function, name)
    assert dumps.count == 1


CHANGES: list[tuple[str, Any]] = [
    ("__code__", (lambda number=1, text="a": "other").__code__),
    ("__defaults__", (3, "b")),
    ("__defaults__", (1, "a", "longer")),
    ("__doc__", "Another text."),
    ("__doc__", None),
    ("__name__", "renamed"),
    ("__qualname__", "renamed"),
    ("__annotations__", {"number": "float"}),
    ("__annotations__", {"number": int, "return": None}),
    ("__annotations__", {}),
]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_what_has_changed_is_pickled_again(dumps: Dumps, name: str, value: Any) -> None:
    local = make()
    dumps.arrived(local)
    setattr(local, name, value)
    for _ in range(2):
        arrived, expected = dumps.arrived(local), dill.loads(dill.dumps(local))
        assert getattr(arrived, name) == getattr(expected, name)
    assert dumps.count == 2


def test_annotations_that_change_in_place(dumps: Dumps) -> None:
    local = make()
    dumps.arrived(local)
    local.__annotations__["number"] = "float"
    assert dumps.arrived(local).__annotations__["number"] == "float"


def test_a_function_whose_code_is_another_ones(dumps: Dumps) -> None:
    first, second = make(), make()
    second.__defaults__ = (7, "c")
    for _ in range(2):
        assert dumps.arrived(first)() == (1, "a", 10)
        assert dumps.arrived(second)() == (7, "c", 10)


class Mine:
    pass


def closing(number: int) -> Any:
    return lambda: number


def with_keyword() -> Any:
    return lambda *, number=1: number


def changed(name: str, value: Any) -> Callable[[], Any]:
    def changed() -> Any:
        function = make()
        setattr(function, name, value)
        return function

    return changed


def with_constant(value: Any) -> Callable[[], Any]:
    code = make().__code__.replace(co_consts=(None, value))
    return changed("__code__", code)


def of_other_globals() -> Any:
    scope = {"__name__": __name__}
    exec("def found(): return 1", scope)
    return scope["found"]


def of_module(name: Any) -> Callable[[], Any]:
    """Of a module that is not found dill pickles all globals, of which this one has few."""

    def of_module() -> Any:
        function = of_other_globals()
        function.__module__ = name
        return function

    return of_module


OTHERS = [
    lambda: closing(1),
    with_keyword,
    changed("note", "an attribute"),
    changed("__defaults__", ([1], "a")),
    changed("__defaults__", ((1, [2]), "a")),
    changed("__defaults__", (type("Int", (int,), {})(1), "a")),
    changed("__doc__", ["a list"]),
    changed("__annotations__", {"number": Mine}),
    changed("__annotations__", {"number": [int]}),
    of_module("elsewhere"),
    of_module(None),
    of_module(["unhashable"]),
    with_constant([1]),
    with_constant(with_constant([1])().__code__),
    of_other_globals,
]


@pytest.mark.parametrize("make_one", OTHERS)
def test_what_may_change_by_itself_is_not_kept(dumps: Dumps, make_one: Callable[[], Any]) -> None:
    function = make_one()
    for _ in range(2):
        assert dumps.arrived(function) is None
    assert not dumps.count
    try:
        expected = dill.loads(dill.dumps(function))
    except Exception as error:
        with pytest.raises(type(error)):
            encode(FAMILY, (function, 1))
    else:
        arrived, one = FAMILY.loads(encode(FAMILY, (function, 1)))
        assert one == 1
        assert vars(arrived) == vars(expected)
        assert arrived.__defaults__ == expected.__defaults__


def test_globals_by_value(dumps: Dumps, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make()
    dumps.arrived(local)
    monkeypatch.setitem(dill.settings, "recurse", True)
    assert dumps.arrived(local) is None


def test_no_more_are_kept_than_a_number(dumps: Dumps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_value, "_MOST", 3)
    functions = [eval(f"lambda: {number}", globals()) for number in range(1, 20)]
    for _ in range(2):
        for number, function in enumerate(functions, 1):
            assert dumps.arrived(function)() == number
            assert len(dumps.of._kept) <= 3
    assert [dumps.arrived(functions[-1])() for _ in range(3)] == [19] * 3
    assert dumps.count == 38


def test_an_error_of_pickling_is_raised(dumps: Dumps) -> None:
    def fail(_: object) -> object:
        raise ValueError("not to be pickled")

    refusing = ByValue(fail, dill.loads, dill.settings)
    for _ in range(2):
        with pytest.raises(ValueError, match="not to be pickled"):
            refusing.reduce(make())


def test_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    local = make()
    first, (second, *others) = FAMILY.loads(encode(FAMILY, (local, [local, 1, "a"])))
    assert first is second
    assert others == [1, "a"]
    assert first(2) == (2, "a", 10)

    def mark(pickler: Any, _: object) -> None:
        pickler.write(b"Vmarked\n")

    monkeypatch.setitem(dill.Pickler.dispatch, CodeType, mark)
    message = encode(FAMILY, local)  # the kept pickle does not count
    assert type(message) is bytes
    with pytest.raises(TypeError, match="str"):
        FAMILY.loads(message)


SCRIPT = """
import fdshare

def twice(number): return 2 * number

with fdshare.ProcessPoolExecutor(1, fdshare.get_context({method!r}, backend="multiprocess")) as ex:
    print(ex.submit(twice, 4).result(), list(ex.map(twice, range(3))))
    def later(number, factor=3): return factor * number + offset()
    def offset(): return 1
    try:
        ex.submit(later, 1).result()
    except NameError as error:
        print(error)
    def later(number, factor=3): return factor * number
    print(ex.submit(later, 1).result(), ex.submit(later, 2).result())
    later.__defaults__ = (4,)
    print(ex.submit(later, 1).result(), list(ex.map(lambda n: -n, [1, 2])))
    def twice(number): return 200 * number
    print(ex.submit(twice, 4).result())
"""


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_functions_of_main_that_are_defined_later(tmp_path: Any, method: str) -> None:
    body = textwrap.indent(SCRIPT.format(method=method), "    ")
    script = tmp_path / "notebook.py"
    script.write_text(f'if __name__ == "__main__":\n{body}')
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        "8 [0, 2, 4]",
        "name 'offset' is not defined",
        "3 6",
        "4 [-1, -2]",
        "800",
    ]
