"""The cases of tests/cases: inputs on which the program once failed, run by the commands that a user would type."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.run import names, run_case, unmet


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_each_case_prints_the_expected_output(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    output = run_case(name, tiny_model_dir, tmp_path)
    assert not unmet(name, output), output
