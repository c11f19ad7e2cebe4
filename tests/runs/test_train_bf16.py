"""RL in bf16 on saved rollouts: ratios start at exactly 1, main weights are fp32, and results stay close to fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import Forks
from rl_runs import MINI_BATCHES, run_all, save_rollouts, weights, write_config
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics

STEPS = 2
# Without a baseline the loss is near -1/2 (half of the samples are rewarded), and not a difference of rounding errors.
# Adam's step is far smaller than the spacing of bf16 numbers near 1, the size of norm weights.
OPTIONS = "optim.lr=1e-4 optim.eps=1e-8 objective.advantage.baseline=none objective.advantage.std=none"
# Smaller than in other tests. Rounding chooses between two experts with almost equal scores; with large random weights
# their outputs would differ by far.
STD = 0.06


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration; its folder has the fp32 run `fp32` and the bf16 run `bf16`, both on one rank."""
    root = tmp_path_factory.mktemp("bf16")
    model = make_tiny_model(root / "model", std=STD)
    save_rollouts(model, root / "saved", steps=STEPS)
    config = write_config(root / "config.yaml", model, root / "saved", preset="grpo")
    options = f"train.steps={STEPS} {OPTIONS}"
    run_all(forks, config, 1, [f"run_dir={root / dtype} engine.dtype={dtype} {options}" for dtype in ("fp32", "bf16")])
    return config


def check(setting: Path, name: str) -> None:
    _check_metrics(setting.with_name(name), setting.with_name("fp32"))
    _check_weights(setting.with_name(name), setting.with_name("fp32"), setting.with_name("model"))


def _check_metrics(run_dir: Path, reference: Path) -> None:
    lines, expected = (read_metrics(d / "metrics.jsonl") for d in (run_dir, reference))
    assert len(lines) == STEPS * MINI_BATCHES
    for line, fp32 in zip(lines, expected, strict=True):
        if line["mini_batch"] == 0:
            assert line["ratio/min"] == line["ratio/max"] == 1.0
        else:
            assert line["ratio/min"] < 1.0 < line["ratio/max"]
        assert abs(fp32["loss"]) > 0.2
        assert line["loss"] == pytest.approx(fp32["loss"], abs=5e-3)
        assert line["grad_norm"] == pytest.approx(fp32["grad_norm"], rel=0.2)
        assert line["entropy/mean"] == pytest.approx(fp32["entropy/mean"], abs=5e-3)
    # The policy is the one that sampled the rollout, so the gap is bf16 rounding: small but not zero.
    assert 1e-4 < lines[0]["abs_logprob_gap/mean"] < 0.02
    assert expected[0]["abs_logprob_gap/mean"] < 1e-5


def _check_weights(run_dir: Path, reference: Path, model: Path) -> None:
    main, exported = load_file(run_dir / "main.safetensors"), weights(run_dir)
    start, fp32 = load_file(model / "model.safetensors"), weights(reference)
    assert main.keys() == exported.keys() == fp32.keys()
    moved, expected = [], []
    for name, weight in main.items():
        assert (weight.dtype, exported[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(exported[name], weight.bfloat16()), name
        begin = start[name].bfloat16()
        if "norm" not in name:
            assert not torch.equal(exported[name], begin), name
        assert (weight != weight.bfloat16()).float().mean() > 0.9, f"{name} holds no more than bf16"
        moved.append((weight - begin.float()).flatten())
        expected.append((fp32[name] - start[name]).flatten())
    cosine = torch.nn.functional.cosine_similarity(torch.cat(moved), torch.cat(expected), dim=0)
    assert cosine > 0.95


def test_bf16_training_stays_close_to_fp32_on_one_rank(setting: Path) -> None:
    check(setting, "bf16")


@pytest.mark.slow
@pytest.mark.distributed
def test_bf16_training_stays_close_to_fp32_under_tp_and_pp(forks: Forks, setting: Path) -> None:
    layouts = {"tp": "parallel.tp=2 parallel.etp=2", "pp": "parallel.pp=2"}
    options = f"engine.dtype=bf16 train.steps={STEPS} {OPTIONS}"
    run_all(forks, setting, 2, [f"run_dir={setting.with_name(name)} {layouts[name]} {options}" for name in layouts])
    for name in layouts:
        check(setting, name)
