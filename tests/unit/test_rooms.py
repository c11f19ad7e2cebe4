"""Rules of the source: unique names, the length of a file, how a docstring opens. Import rules are contracts in
pyproject.toml.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

from paths import ROOT

FILES = sorted((ROOT / "megatron_rl").rglob("*.py"))
FRAGMENT = re.compile(r"(Of|To|For|Those|Its|Where)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def nodes_of_the_package() -> dict[Path, list[ast.AST]]:
    return {file: list(ast.walk(ast.parse(file.read_text()))) for file in FILES}


def fragments(nodes: list[ast.AST]) -> list[str]:
    """Returns line and opening of each docstring that begins with a fragment, such as `Of the model`."""
    found = []
    for node in nodes:
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and FRAGMENT.match(text):
            found.append(f"{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    return found


def twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_no_two_modules_have_the_same_name() -> None:
    assert len(FILES) > 100
    assert twice([file.stem for file in FILES if file.stem != "__init__"]) == []


def test_no_two_classes_have_the_same_name() -> None:
    nodes = [node for each in nodes_of_the_package().values() for node in each]
    assert twice([node.name for node in nodes if isinstance(node, ast.ClassDef)]) == []


def test_no_docstring_begins_with_a_fragment() -> None:
    found = {str(file.relative_to(ROOT)): fragments(nodes) for file, nodes in nodes_of_the_package().items()}
    assert {file: openings for file, openings in found.items() if openings} == {}


def test_the_check_finds_a_docstring_that_begins_with_a_fragment() -> None:
    source = '"""Opens well."""\nclass A:\n    """Of a run."""\n    def f(self):\n        """Often right."""\n'
    assert fragments(list(ast.walk(ast.parse(source)))) == ["2: Of a run."]


def test_no_python_file_is_longer_than_400_lines() -> None:
    """Split a longer file by what its parts do (CONTRIBUTING.md)."""
    folders = [ROOT / name for name in ("megatron_rl", "tests", "examples", "tools", "benchmarks")]
    files = [file for folder in folders for file in folder.rglob("*.py") if "__pycache__" not in file.parts]
    lines = {str(f.relative_to(ROOT)): f.read_bytes().count(b"\n") for f in [ROOT / "setup.py", *files]}
    assert len(lines) > 300
    assert {file: count for file, count in lines.items() if count > 400} == {}
