"""Docstrings open with a verb or a noun, not with a fragment such as `Of the model` or `Those that`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_rl import __file__ as package

ROOT = Path(package).parent
FRAGMENT = re.compile(r"(Of|To|For|Those|Its|Where)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(ROOT.rglob("*.py"))


def fragments(source: str) -> list[str]:
    """Returns line and opening of each docstring that begins with a fragment."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and FRAGMENT.match(text):
            found.append(f"{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    return found


def test_the_check_finds_a_docstring_that_begins_with_a_fragment() -> None:
    source = '"""Opens well."""\nclass A:\n    """Of a run."""\n    def f(self):\n        """Often right."""\n'
    assert fragments(source) == ["2: Of a run."]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_docstring_begins_with_a_fragment(file: Path) -> None:
    assert fragments(file.read_text()) == []
