"""The plans of large models in docs/scale.md are those that the planner makes."""

from __future__ import annotations

from tools import write_plans


def test_the_page_has_the_plans_of_large_models() -> None:
    page = write_plans.PAGE.read_text()
    assert page == write_plans.write_page(page), "plans have changed; run: python tools/write_plans.py"


def test_the_page_shows_the_configuration_that_was_planned() -> None:
    shown = write_plans.RUN.replace("MODEL", "Qwen3-30B-A3B")
    assert f'```yaml title="run.yaml"\n{shown.strip()}\n```\n' in write_plans.PAGE.read_text()
