"""Where the tests of a module are: in the file of its name, in the folder of its folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fdshare

TESTS = Path(__file__).parent
PACKAGE = Path(fdshare.__file__).parent

# What a single module does not do by itself, and why it is tested in one place.
ACROSS = {
    "chaos": "breaks a whole server and its clients, and keeps a ledger",
    "compat": "runs CPython's own tests over our classes",
    "examples": "runs the programs of examples/",
    "foreign": "speaks the protocol from its description, without our code",
    "pages": "runs what README and docs say, block by block",
    "parity": "runs the same programs in the standard packages and in ours",
    "systemd": "runs the units of contrib/ under a real systemd",
    "typing": "what type checkers say of programs that use fdshare",
    "cli/test_hostile_text.py": "what every command prints of what others chose",
    "client/test_contract.py": "what both clients and Manager promise alike",
    "client/test_lifetimes.py": "what a client's end does to its entries",
    "client/test_processes.py": "clients in threads, over fork, in pickles",
    "client/test_strangers.py": "both clients against servers that break every rule",
    "kernel/test_system.py": "that one module alone asks what the system has",
    "kinds/test_hostile.py": "every kind, described by a peer that lies",
    "mp/test_default_timeout.py": "every channel in a program with a default timeout",
    "mp/test_facts.py": "what the stock classes do, which ours answer",
    "mp/test_failures.py": "every channel at its limits, and with peers that die",
    "mp/test_forks.py": "every channel of which a thread forks while another is in a message",
    "mp/test_interrupts.py": "a handler between any two instructions of every channel",
    "mp/test_matrix.py": "every channel with every start method, of both packages",
    "server/test_audit.py": "the audit log, from the verb to the line",
    "server/test_boundaries.py": "no descriptor left: the server, the client, the kernel",
    "server/test_endings.py": "how entries end, over the death of either half",
    "server/test_following.py": "what followers see, over the death of either half and more",
    "server/test_hostile_users.py": "what one user does to stop the others",
    "server/test_leases.py": "takes, over the death of the taker and of either half",
    "server/test_revoked_rights.py": "another policy, and the clients that wait meanwhile",
    "server/test_unread_log.py": "a server whose log nobody reads, or has no room",
    "server/test_user_namespace.py": "who is trusted where few users have a number",
    "test_benchmarks.py": "the programs of benchmarks/",
    "test_class_names.py": "that one word is one class, in all modules",
    "test_doctests.py": "the examples of the docstrings, of all modules",
    "test_documents.py": "what the documents name",
    "test_interpreter_end.py": "what is dropped when modules have lost their names",
    "test_layout.py": "this",
    "test_odd_places.py": "no /proc, no docstrings, a zip file, and the like",
    "test_threads.py": "what threads may share, in many threads at once",
    "test_sub_interpreters.py": "what of fdshare can be imported in one",
    "test_platforms.py": "the table of docs/platforms.md",
    "test_troubleshooting.py": "what the documents say of each error",
    "test_public.py": "the public surface, of all modules",
}

# Types alone: what they describe is tested where it is.
TYPES = {"parking/interface.py", "server/core/ports.py"}


def modules() -> list[Path]:
    """Those that need tests, relative to the package."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(path for path in paths if does_something(path) and str(path) not in TYPES)


def does_something(path: Path) -> bool:
    """Whether it has a function or a class. An `__init__` that imports what is first used has
    neither, nor does `__main__`, which calls main()."""
    if path.name == "__main__.py":
        return False
    body = ast.parse((PACKAGE / path).read_text()).body
    defined = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return bool(defined - {"__getattr__", "__dir__"} if path.name == "__init__.py" else defined)


def test_of(module: Path) -> Path:
    """Its file of tests, relative to tests/; that of a package has the name of the package."""
    name = module.parent.name if module.name == "__init__.py" else module.stem
    return module.parent / f"test_{name}.py"


test_of.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", modules(), ids=str)
def test_every_module_has_its_tests(module: Path) -> None:
    path = TESTS / test_of(module)
    assert path.is_file(), f"fdshare/{module} has no tests/{test_of(module)}"
    assert "def test_" in path.read_text() or "TestCase" in path.read_text()


def test_every_file_of_tests_has_its_module() -> None:
    known = {test_of(module) for module in modules()}
    for path in TESTS.rglob("test_*.py"):
        relative = path.relative_to(TESTS)
        tool = path.with_name(path.name.removeprefix("test_"))  # one of the tests themselves
        across = str(relative) in ACROSS or relative.parts[0] in ACROSS
        assert relative in known or across or tool.is_file(), f"of what is tests/{relative}?"


def test_one_word_is_one_class() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_what_is_excepted_is_there() -> None:
    assert all((TESTS / path).exists() for path in ACROSS)
    assert all((PACKAGE / path).is_file() for path in TYPES)
