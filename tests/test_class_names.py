"""One word, one class: no two modules define a class of the same name."""

from __future__ import annotations

import ast
from pathlib import Path

import fdshare


def test_no_name_has_two_classes() -> None:
    root = Path(fdshare.__file__).parent
    homes: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(root)))
    assert len(homes) > 100
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
