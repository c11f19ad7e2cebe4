"""The code and the files that the pages name exist."""

from __future__ import annotations

import ast
import re

import pytest
from paths import ROOT

MAX_STEPS = 25
STEP = re.compile(r"^(\d+)\. `([\w/]+\.py)` `([\w.]+)` ", re.MULTILINE)


def way() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "design.md").read_text()
    section = text.split("## A prompt's way\n")[1].split("\n## ")[0]
    steps = STEP.findall(section)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert len(steps) == len(re.findall(r"^\d+\.", section, re.MULTILINE))
    return [(file, name) for _, file, name in steps]


def test_the_list_of_a_prompts_steps_is_short() -> None:
    assert 20 <= len(way()) <= MAX_STEPS


@pytest.mark.parametrize(("file", "name"), way())
def test_each_step_of_a_prompts_way_exists_in_the_code(file: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse((ROOT / "megatron_rl" / file).read_text()).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        assert found, f"{file} has no {name}"
        body = found[0].body


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md")]
NAMED = re.compile(r"\b(?:tests|docs|tools|examples|benchmarks|requirements)/[\w/-]+\.\w+")


def test_the_checked_pages_name_files() -> None:
    """Otherwise the next test would check nothing."""
    assert sum(len(NAMED.findall(page.read_text())) for page in PAGES) > 20


def test_files_named_in_pages_and_docstrings_exist() -> None:
    files = [*PAGES, *(ROOT / "megatron_rl").rglob("*.py")]
    named = [(file, name) for file in files for name in NAMED.findall(file.read_text())]
    assert [(str(file), name) for file, name in named if not (ROOT / name).exists()] == []
