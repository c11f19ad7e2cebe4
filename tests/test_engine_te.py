"""Layers of Transformer Engine against those of plain PyTorch, without a GPU: its real Python over tests/te_stub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import environment
from te_worker import LAYOUTS
from tiny_models import make_tiny_model

DIRECTORY = Path(sys.prefix) / "te"
"""Where `make install` puts it: outside of the environment's packages, where `layers: auto` would find it."""

Answers = dict[str, Any]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """By layout and provider."""
    if not DIRECTORY.is_dir():
        pytest.skip(f"no Transformer Engine in {DIRECTORY}; make install puts it there")
    out = tmp_path_factory.mktemp("te")
    model = make_tiny_model(out / "model", num_layers=4, mlp_only_layers=(1,))
    worker = str(Path(__file__).parent / "te_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(model), str(DIRECTORY), str(out)],
        env={**environment(), "TORCHDYNAMO_DISABLE": "1"},  # it would need a C++ compiler
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {layout: torch.load(out / f"{layout}.pt") for layouts in LAYOUTS.values() for layout in layouts}


layouts = pytest.mark.parametrize("layout", [layout for layouts in LAYOUTS.values() for layout in layouts])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.distributed
@layouts
def test_log_probs_and_gradients_are_the_same(answers: dict[str, Answers], layout: str) -> None:
    te, plain = (answers[layout][provider] for provider in ("te", "torch"))
    assert 0 <= answers[layout]["logprobs_apart"] <= 1e-5
    assert te["gradients"].keys() == plain["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert apart(te["gradients"][name], gradient) <= 2e-5 * float(gradient.abs().max()), name


@pytest.mark.distributed
@layouts
def test_gradient_norms_are_the_same_by_kind_of_weight(answers: dict[str, Answers], layout: str) -> None:
    te, plain = (answers[layout][provider]["norms"] for provider in ("te", "torch"))
    assert plain[0]["expert"] > 1
    for mine, theirs in zip(te, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.distributed
@layouts
def test_two_updates_leave_the_same_weights(answers: dict[str, Answers], layout: str) -> None:
    te, plain = (answers[layout][provider] for provider in ("te", "torch"))
    assert te["copies_apart"] == plain["copies_apart"] == 0.0
    assert te["weights"].keys() == plain["weights"].keys()
    for name, weight in plain["weights"].items():
        assert apart(te["weights"][name], weight) <= 3e-6, name


@pytest.mark.distributed
def test_only_our_own_attention_gets_a_plan(answers: dict[str, Answers]) -> None:
    """Under context parallelism its masks take 512 MiB for a sequence of 32k tokens."""
    found = answers["tp=1"]
    assert (any(found["te"]["attention_plans"]), all(found["torch"]["attention_plans"])) == (False, True)
