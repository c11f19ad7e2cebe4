"""A name means one thing in the whole package. Which room may import which is a contract in pyproject.toml."""

from __future__ import annotations

import ast
from collections import Counter

from paths import ROOT

FILES = [file for file in sorted((ROOT / "megatron_rl").rglob("*.py")) if file.name != "__init__.py"]


def twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_no_two_modules_have_the_same_name() -> None:
    assert twice([file.stem for file in FILES]) == []


def test_no_two_classes_have_the_same_name() -> None:
    trees = [ast.parse(file.read_text()) for file in FILES]
    assert twice([node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]) == []
