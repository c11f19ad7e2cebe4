"""Names of modules and classes are unique in the package. Import rules are contracts in pyproject.toml."""

from __future__ import annotations

import ast
from collections import Counter

from paths import ROOT

FILES = [file for file in sorted((ROOT / "megatron_rl").rglob("*.py")) if file.name != "__init__.py"]


def twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_no_two_modules_have_the_same_name() -> None:
    assert len(FILES) > 100
    assert twice([file.stem for file in FILES]) == []


def test_no_two_classes_have_the_same_name() -> None:
    trees = [ast.parse(file.read_text()) for file in FILES]
    assert twice([node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]) == []


def test_no_python_file_is_longer_than_400_lines() -> None:
    """Split a longer file by what its parts do (CONTRIBUTING.md)."""
    folders = [ROOT / name for name in ("megatron_rl", "tests", "examples", "tools", "benchmarks")]
    files = [file for folder in folders for file in folder.rglob("*.py") if "__pycache__" not in file.parts]
    lines = {str(f.relative_to(ROOT)): f.read_bytes().count(b"\n") for f in [ROOT / "setup.py", *files]}
    assert len(lines) > 300
    assert {file: count for file, count in lines.items() if count > 400} == {}
