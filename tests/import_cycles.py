"""Prints the modules of fdshare that import each other in a circle; exits 1 if there are any.

Every import counts: at the top, inside a function, and under `if TYPE_CHECKING`, because a module
that needs the type of another cannot be read without it. `lint-imports` compares folders and the
modules beside each other in them; this also compares a package with the modules inside it, and
knows the modules that are imported by their name.

    python tests/import_cycles.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

import grimp

Graph: TypeAlias = Mapping[str, set[str]]


def imports_by_name() -> dict[str, set[str]]:
    """Module -> what it imports with importlib, where these are modules that it depends on."""
    import fdshare
    from fdshare.cli import main

    return {
        "fdshare": set(fdshare._LAZY.values()),
        "fdshare.cli.main": {f"fdshare.cli.commands.{file}" for file in main._FAMILIES.values()},
    }


# These import no module of fdshare that they depend on by its name: they import other packages, or
# look up a class whose name is in a pickle or a kind, or read a file that comes with them.
OTHERS = {
    "fdshare.cli.commands.systemd_units",
    "fdshare.kinds.connections",
    "fdshare.mp.family",
    "fdshare.mp.pickling.install",
    "fdshare.mp.stock",
}


def import_graph(package: str) -> dict[str, set[str]]:
    """Module -> the modules of *package* that it imports, in a function or out of it."""
    graph = grimp.build_graph(package, cache_dir=None)
    return {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}


def users_of_importlib(package: str) -> set[str]:
    """The modules of *package* that import something by its name."""
    graph = grimp.build_graph(package, include_external_packages=True, cache_dir=None)
    return graph.find_modules_that_directly_import("importlib")


def find_cycle(graph: Graph) -> list[str]:
    """The modules of one circle, each imported by the one before it; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def main() -> int:
    """Says what is wrong with fdshare; the exit status."""
    graph, by_name = import_graph("fdshare"), imports_by_name()
    different = users_of_importlib("fdshare") ^ (set(by_name) | OTHERS)
    if different:
        print(f"importlib is used in other modules than this file says: {sorted(different)}")
        return 1
    cycle = find_cycle(graph | {name: graph[name] | found for name, found in by_name.items()})
    print(" -> ".join(cycle) or f"{len(graph)} modules, no circle")
    return 1 if cycle else 0


if __name__ == "__main__":
    sys.exit(main())
