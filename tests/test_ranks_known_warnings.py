"""Known start-up warnings of other libraries are hidden, and no other warning is."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from config_files import write
from rl_runs import environment, torchrun
from tiny_models import make_tiny_model

from megatron_rl.ranks.known_warnings import EVERYWHERE, ON_CPU, hide_known_warnings

FULL_SCOPE = "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer."
CONFIG_MODULE = "megatron.core.transformer.transformer_config"
SFT = """\
run_dir: run
model: {path: model}
parallel: {tp: 2}
engine: {device: cpu, dtype: fp32, recompute: full}
data: {train: examples.jsonl, max_tokens: 200}
steps: 1
batch_size: 4
"""


def shown(text: str, module: str, category: type[Warning] = UserWarning) -> bool:
    """Whether a warning that `module` gives is shown while the known ones are hidden."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        hide_known_warnings(EVERYWHERE + ON_CPU)
        warnings.warn_explicit(text, category, "file.py", 1, module=module)
    return bool(caught)


def test_a_known_warning_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert not shown(FULL_SCOPE, CONFIG_MODULE)


@pytest.mark.parametrize(
    ("text", "module", "category"),
    [
        ("half scope is deprecated", CONFIG_MODULE, UserWarning),
        (FULL_SCOPE, "megatron_rl.engine.model", UserWarning),
        (FULL_SCOPE, CONFIG_MODULE, FutureWarning),
        ("Note: " + FULL_SCOPE, CONFIG_MODULE, UserWarning),
    ],
    ids=["other text", "our module", "other category", "text within"],
)
def test_any_other_warning_shows(
    monkeypatch: pytest.MonkeyPatch, text: str, module: str, category: type[Warning]
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert shown(text, module, category)


def test_a_user_who_asks_for_warnings_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert shown(FULL_SCOPE, CONFIG_MODULE)


def test_none_is_aimed_at_this_package() -> None:
    assert not [known for known in EVERYWHERE + ON_CPU if re.match(known.module, "megatron_rl.engine.model")]


@pytest.mark.distributed
def test_a_run_prints_no_warning(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", num_layers=1)
    write(tmp_path / "sft.yaml", SFT)
    write(tmp_path / "examples.jsonl", '{"prompt": "1+1=", "response": "2"}\n' * 4)
    command = torchrun(2, "-m", "megatron_rl", "sft", "sft.yaml")
    ours = {name: value for name, value in environment().items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 1/1" in done.stdout
    assert "Warning" not in done.stderr
